//! Events, read from the processes' log lines. Timelines are drawn only from these events, and from the faults that the walk
//! itself causes.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::watch;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// When the event ended: UTC microseconds since 1970. All processes run on one machine and share its clock.
    pub(crate) at: i64,
    pub(crate) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// The coordinator began a transaction.
    Begun { xid: String, branches: usize },
    /// A participant was called with Try, Confirm or Cancel.
    Called(Call),
    /// The decision is durable.
    Decided { xid: String, confirm: bool, cause: String },
    /// Every participant has acknowledged the decision.
    Finished { xid: String, state: String },
    /// The walk caused this, for example by killing a process.
    Done(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) xid: String,
    pub(crate) branch_id: String,
    pub(crate) action: String,
    /// `try`, `confirm` or `cancel`.
    pub(crate) phase: String,
    /// Counts from 1.
    pub(crate) attempt: u32,
    /// The result in the callee's words: `branch tried`, `refused`, `empty rollback`.
    pub(crate) result: String,
    /// The reason for the result; empty if there is none.
    pub(crate) reason: String,
    /// `None`: the log line was written before the call ended.
    pub(crate) took_ms: Option<i64>,
}

impl Event {
    /// An event that happens now.
    pub(crate) fn now(what: What) -> Self {
        Self { at: Timestamp::now().as_microsecond(), what }
    }

    /// The transaction that the event belongs to. Events that the walk caused belong to none.
    pub(crate) fn xid(&self) -> Option<&str> {
        match &self.what {
            What::Begun { xid, .. } | What::Decided { xid, .. } | What::Finished { xid, .. } => {
                Some(xid)
            }
            What::Called(call) => Some(&call.xid),
            What::Done(_) => None,
        }
    }

    /// Reads a log line. `None`: the line is not an event.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let line: Line = serde_json::from_str(line).ok()?;
        let at = line.timestamp.parse::<Timestamp>().ok()?.as_microsecond();
        let xid = line.xid?;
        let what = match line.message.as_str() {
            "begun" => What::Begun { xid, branches: line.branches? },
            "decided" => {
                let confirm = line.decision? == "CONFIRM";
                What::Decided { xid, confirm, cause: line.cause.unwrap_or_default() }
            }
            "finished" => What::Finished { xid, state: line.state?.to_uppercase() },
            _ => What::Called(Call {
                xid,
                branch_id: line.branch_id?,
                action: line.action?,
                phase: line.phase?.to_lowercase(),
                attempt: line.attempt?,
                result: line.message,
                reason: line.reason.or(line.code).unwrap_or_default(),
                took_ms: line.took_ms,
            }),
        };
        Some(Self { at, what })
    }
}

/// A log line of the coordinator, or of the SDK in a service. Every line has time and message; the other fields are optional.
#[derive(Deserialize)]
struct Line {
    timestamp: String,
    message: String,
    xid: Option<String>,
    branches: Option<usize>,
    decision: Option<String>,
    cause: Option<String>,
    state: Option<String>,
    branch_id: Option<String>,
    action: Option<String>,
    phase: Option<String>,
    attempt: Option<u32>,
    reason: Option<String>,
    code: Option<String>,
    took_ms: Option<i64>,
}

/// All events so far. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Events(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    list: Mutex<Vec<Event>>,
    /// The number of events; waiters watch it grow.
    grown: watch::Sender<usize>,
    /// Set while no timeline will be drawn, so that events need not be kept.
    ignored: AtomicBool,
}

impl Events {
    pub(crate) fn add(&self, event: Event) {
        let mut list = self.list();
        list.push(event);
        self.0.grown.send_replace(list.len());
    }

    /// Records the event of a log line, unless events are ignored now.
    pub(crate) fn read(&self, line: &str) {
        if !self.0.ignored.load(Ordering::Relaxed)
            && let Some(event) = Event::read(line)
        {
            self.add(event);
        }
    }

    /// Sets whether log lines are ignored from now on.
    pub(crate) fn ignore(&self, ignored: bool) {
        self.0.ignored.store(ignored, Ordering::Relaxed);
    }

    /// The number of events so far. Use it as the start for a later search.
    pub(crate) fn len(&self) -> usize {
        self.list().len()
    }

    /// The events of one transaction, and those that the walk caused since it began, sorted by time.
    pub(crate) fn of(&self, xid: &str) -> Vec<Event> {
        let list = self.list();
        let mine = |event: &&Event| event.xid() == Some(xid);
        let began = list.iter().filter(mine).map(|event| event.at).min().unwrap_or(i64::MAX);
        let ended = list.iter().filter(mine).map(|event| event.at).max().unwrap_or(i64::MIN);
        let outside = |event: &&Event| event.xid().is_none() && (began..ended).contains(&event.at);
        let mut events: Vec<_> =
            list.iter().filter(|event| mine(event) || outside(event)).cloned().collect();
        events.sort_by_key(|event| event.at);
        events
    }

    /// Waits for an event that `fits`. Events since index `from` count too.
    pub(crate) async fn wait(
        &self,
        from: usize,
        name: &str,
        fits: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        /// Longer than any step of the walk takes.
        const PATIENCE: Duration = Duration::from_secs(30);
        let mut grown = self.0.grown.subscribe();
        let found = async {
            loop {
                grown.borrow_and_update();
                if let Some(event) = self.list().iter().skip(from).find(|event| fits(event)) {
                    return event.clone();
                }
                if grown.changed().await.is_err() {
                    std::future::pending::<()>().await; // we hold the sender, so it never ends
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.with_context(|| {
            format!("within {PATIENCE:?} no process has told of this in its log: {name}")
        })
    }

    fn list(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.list.lock().expect("nothing panics while it is locked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_coordinator_is_read() {
        let line = r#"{"timestamp":"1970-01-01T00:00:01.000002Z","level":"INFO","message":"decided","xid":"3-1-7-0000000a",
            "name":"checkout","decision":"CANCEL","cause":"timed out","target":"handfast_coordinator::partition"}"#;
        let (xid, cause) = ("3-1-7-0000000a".to_owned(), "timed out".to_owned());
        let what = What::Decided { xid, confirm: false, cause };
        assert_eq!(Event::read(line), Some(Event { at: 1_000_002, what }));
    }

    #[test]
    fn a_line_of_a_participant_is_read() {
        let line = r#"{"timestamp":"1970-01-01T00:00:01Z","level":"INFO","message":"refused","xid":"3-1-7-0000000a","branch_id":"2",
            "action":"inventory.deduct","phase":"try","attempt":1,"verdict":"run","took_ms":4,"reason":"OUT_OF_STOCK"}"#;
        let Some(Event { at: 1_000_000, what: What::Called(call) }) = Event::read(line) else {
            panic!("{:?}", Event::read(line))
        };
        assert_eq!((call.action.as_str(), call.phase.as_str()), ("inventory.deduct", "try"));
        assert_eq!((call.result.as_str(), call.reason.as_str()), ("refused", "OUT_OF_STOCK"));
        assert_eq!((call.branch_id.as_str(), call.attempt, call.took_ms), ("2", 1, Some(4)));
    }

    #[test]
    fn other_lines_are_none() {
        for line in [
            "",
            "thread panicked",
            r#"{"timestamp":"1970-01-01T00:00:01Z","message":"serving"}"#,
            r#"{"timestamp":"1970-01-01T00:00:01Z","message":"an overdue reservation","xid":"3-1-7-0000000a"}"#,
        ] {
            assert_eq!(Event::read(line), None, "{line}");
        }
    }

    #[tokio::test]
    async fn what_was_done_from_outside_belongs_to_those_who_were_there() {
        let events = Events::default();
        let begun = |xid: &str| What::Begun { xid: xid.to_owned(), branches: 1 };
        let finished =
            |xid: &str| What::Finished { xid: xid.to_owned(), state: "CONFIRMED".to_owned() };
        let killed = What::Done("killed".to_owned());
        for (at, what) in [
            (1, begun("a")),
            (2, finished("a")),
            (3, begun("b")),
            (5, finished("b")),
            (4, killed.clone()),
        ] {
            events.add(Event { at, what });
        }
        assert_eq!(events.of("a").len(), 2);
        let of_b: Vec<_> = events.of("b").into_iter().map(|event| event.what).collect();
        assert_eq!(of_b, [begun("b"), killed, finished("b")]);
        events.wait(2, "b", |event| event.xid() == Some("b")).await.unwrap();
    }
}
