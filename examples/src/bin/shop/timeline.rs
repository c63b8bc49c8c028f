//! Draws the timeline of one transaction from its events, one line per event.

use super::{
    events::{Call, Event, What},
    screen::Paint,
};

/// Width of the column that names the callee.
const WHO: usize = 16;
/// Width of the column that shows the result.
const RESULT: usize = 30;
/// Width of the bars on the right. The whole line is 100 columns wide.
const BAR: usize = 24;

/// One line of the timeline.
struct Row {
    /// Microseconds since 1970.
    from: i64,
    to: i64,
    verb: String,
    who: String,
    result: String,
    mood: Mood,
    took: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Calm,
    Good,
    Mixed,
    Bad,
    Outside,
}

/// Draws the events of one transaction, which must be sorted by time. Returns no lines if there are no events.
pub(crate) fn draw(events: &[Event], paint: Paint) -> Vec<String> {
    let mut rows: Vec<_> =
        events.iter().filter(|event| !told_twice(event, events)).map(row).collect();
    rows.sort_by_key(|row| row.from);
    let Some(begin) = rows.iter().map(|row| row.from).min() else { return Vec::new() };
    let end = rows.iter().map(|row| row.to).max().unwrap_or(begin);
    let scale = Scale { begin, length: (end - begin).max(1) };
    rows.iter().map(|row| line(row, &scale, paint)).collect()
}

/// Whether the same failed call is also reported by its callee. Then the coordinator's event is dropped, because the callee's
/// says more.
fn told_twice(event: &Event, events: &[Event]) -> bool {
    let What::Called(call) = &event.what else { return false };
    let same = |other: &Call| {
        other.result != COORDINATOR_SAYS
            && (&other.branch_id, &other.phase, other.attempt)
                == (&call.branch_id, &call.phase, call.attempt)
    };
    call.result == COORDINATOR_SAYS
        && events.iter().any(|event| matches!(&event.what, What::Called(other) if same(other)))
}

const COORDINATOR_SAYS: &str = "call failed; will retry";

fn row(event: &Event) -> Row {
    let to = event.at;
    let at_once = |verb: &str, result: String, mood| Row {
        from: to,
        to,
        verb: verb.to_owned(),
        who: String::new(),
        result,
        mood,
        took: String::new(),
    };
    match &event.what {
        What::Begun { branches: 1, .. } => at_once("begin", "1 branch".to_owned(), Mood::Calm),
        What::Begun { branches, .. } => {
            at_once("begin", format!("{branches} branches"), Mood::Calm)
        }
        What::Decided { confirm: true, .. } => at_once("decide", "CONFIRM".to_owned(), Mood::Good),
        What::Decided { confirm: false, cause, .. } => {
            at_once("decide", format!("CANCEL: {cause}"), Mood::Mixed)
        }
        What::Finished { state, .. } => {
            let mood = if state == "CONFIRMED" { Mood::Good } else { Mood::Mixed };
            at_once("finish", state.clone(), mood)
        }
        What::Done(what) => at_once("!", what.clone(), Mood::Outside),
        What::Called(call) => {
            let (result, mood) = said(call);
            let took = match call.took_ms {
                None => String::new(),
                Some(0) => "<1 ms".to_owned(),
                Some(ms) => format!("{ms} ms"),
            };
            Row {
                from: to - call.took_ms.unwrap_or(0) * 1000,
                to,
                verb: call.phase.clone(),
                who: call.action.clone(),
                result,
                mood,
                took,
            }
        }
    }
}

/// The result of a call, in words.
fn said(call: &Call) -> (String, Mood) {
    let Call { result, reason, .. } = call;
    let (words, mood) = match result.as_str() {
        "branch tried" => ("reserved", Mood::Good),
        "branch confirmed" => ("done", Mood::Good),
        "branch cancelled" => ("given back", Mood::Mixed),
        "repeat" => ("done before", Mood::Good),
        "empty rollback" => ("empty rollback: nothing to do", Mood::Mixed),
        "suspension" => ("suspension: too late", Mood::Mixed),
        "refused" => return (format!("refused: {reason}"), Mood::Bad),
        COORDINATOR_SAYS => return (format!("{reason}; will retry"), Mood::Bad),
        // Other results, from the SDK or from the proxies, are shown as they are.
        other if reason.is_empty() => (other, Mood::Bad),
        other => return (format!("{other}: {reason}"), Mood::Bad),
    };
    (words.to_owned(), mood)
}

struct Scale {
    begin: i64,
    length: i64,
}

impl Scale {
    /// The column of a moment in the bar, from 0 to `BAR - 1`.
    fn column(&self, at: i64) -> usize {
        let last = i64::try_from(BAR - 1).unwrap_or(0);
        usize::try_from((at - self.begin) * last / self.length).unwrap_or(0)
    }
}

fn line(row: &Row, scale: &Scale, paint: Paint) -> String {
    let colour = |text: &str| match row.mood {
        Mood::Calm => text.to_owned(),
        Mood::Good => paint.good(text),
        Mood::Mixed => paint.mixed(text),
        Mood::Bad => paint.bad(text),
        Mood::Outside => paint.outside(text),
    };
    let at = format!("{} ms", (row.from - scale.begin) / 1000);
    let (from, to) = (scale.column(row.from), scale.column(row.to));
    let mark = match (row.verb.as_str(), row.mood) {
        ("decide", _) => "◆".to_owned(),
        ("begin" | "finish", _) => "●".to_owned(),
        (_, Mood::Outside) => "✗".to_owned(),
        _ => "━".repeat(to - from + 1),
    };
    let bar = format!("{}{}", paint.dim(&"·".repeat(from)), colour(&mark));
    // A line without a branch may also use the branch's column.
    let text = match row.who.as_str() {
        "" => colour(&fit(&row.result, WHO + 1 + RESULT)),
        who => format!("{} {}", fit(who, WHO), colour(&fit(&row.result, RESULT))),
    };
    let (at, took) = (format!("{at:>7}"), format!("{:>6}", row.took));
    let line = format!("{:<8} {text} {} {}  {bar}", row.verb, paint.dim(&at), paint.dim(&took));
    line.trim_end().to_owned()
}

/// Pads or cuts the text to exactly this many columns.
fn fit(text: &str, columns: usize) -> String {
    if text.chars().count() > columns {
        let cut: String = text.chars().take(columns - 1).collect();
        format!("{cut}…")
    } else {
        format!("{text:<columns$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { colour: false };

    fn call(action: &str, phase: &str, result: &str, took_ms: Option<i64>) -> What {
        What::Called(Call {
            xid: "x".to_owned(),
            branch_id: if action == "order.create" { "1" } else { "2" }.to_owned(),
            action: action.to_owned(),
            phase: phase.to_owned(),
            attempt: 1,
            result: result.to_owned(),
            reason: String::new(),
            took_ms,
        })
    }

    /// `events` are pairs: milliseconds since the start, and what happened.
    fn check<const N: usize>(events: [(i64, What); N], expected: &str) {
        let events = events.map(|(ms, what)| Event { at: 1_000_000 + ms * 1000, what });
        assert_eq!(format!("\n{}", draw(&events, PLAIN).join("\n")), expected);
    }

    fn begun() -> What {
        What::Begun { xid: "x".to_owned(), branches: 2 }
    }

    fn finished(state: &str) -> What {
        What::Finished { xid: "x".to_owned(), state: state.to_owned() }
    }

    #[test]
    fn a_transaction_that_is_confirmed() {
        let decided = What::Decided { xid: "x".to_owned(), confirm: true, cause: String::new() };
        check(
            [
                (0, begun()),
                (7, call("order.create", "try", "branch tried", Some(4))),
                (8, call("inventory.deduct", "try", "branch tried", Some(3))),
                (12, decided),
                (17, call("order.create", "confirm", "branch confirmed", Some(3))),
                (18, call("inventory.deduct", "confirm", "repeat", Some(0))),
                (23, finished("CONFIRMED")),
            ],
            "
begin    2 branches                                         0 ms         ●
try      order.create     reserved                          3 ms   4 ms  ···━━━━━
try      inventory.deduct reserved                          5 ms   3 ms  ·····━━━━
decide   CONFIRM                                           12 ms         ············◆
confirm  order.create     done                             14 ms   3 ms  ··············━━━━
confirm  inventory.deduct done before                      18 ms  <1 ms  ··················━
finish   CONFIRMED                                         23 ms         ·······················●",
        );
    }

    #[test]
    fn a_transaction_in_which_much_goes_wrong() {
        let cause = "requested: the customer has closed the page and gone to bed".to_owned();
        check(
            [
                (0, begun()),
                (0, call("inventory.deduct", "try", "held up on its way", None)),
                (1, What::Done("coordinator is killed (SIGKILL)".to_owned())),
                (2, What::Decided { xid: "x".to_owned(), confirm: false, cause }),
                (3, call("order.create", "cancel", "failed", Some(1))),
                (4, call("inventory.deduct", "cancel", "empty rollback", Some(1))),
                (20, finished("CANCELLED")),
                (23, call("inventory.deduct", "try", "suspension", Some(1))),
            ],
            "
begin    2 branches                                         0 ms         ●
try      inventory.deduct held up on its way                0 ms         ━
!        coordinator is killed (SIGKILL)                    1 ms         ·✗
decide   CANCEL: requested: the customer has closed the…    2 ms         ··◆
cancel   order.create     failed                            2 ms   1 ms  ··━━
cancel   inventory.deduct empty rollback: nothing to do     3 ms   1 ms  ···━━
finish   CANCELLED                                         20 ms         ····················●
try      inventory.deduct suspension: too late             22 ms   1 ms  ······················━━",
        );
    }

    #[test]
    fn a_failure_is_told_once() {
        let failed = call("order.create", "confirm", "made to fail", None);
        let again = call("order.create", "confirm", COORDINATOR_SAYS, None);
        let other = call("inventory.deduct", "confirm", COORDINATOR_SAYS, None);
        let events = [failed, again, other].map(|what| Event { at: 1, what });
        let lines = draw(&events, PLAIN);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("made to fail") && lines[1].contains("inventory.deduct"));
    }

    #[test]
    fn nothing_gives_nothing() {
        assert!(draw(&[], PLAIN).is_empty());
    }
}
