//! What people read: a table of many transactions, and what there is to know of one. Pure functions of an answer and the time.

use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{Table, presets};
use handfast_coordinator::transaction::Timestamp;
use handfast_proto::{
    time,
    v1::{self as pb, BranchState, TransactionState as State},
};
use jiff::tz::TimeZone;

use super::json::word;

/// Characters of an error or a reason in the list; `show` has all of it.
const NOTE_CHARS_MAX: usize = 72;

/// One line for each transaction.
pub(super) fn list(transactions: &[pb::Transaction], now: Timestamp) -> String {
    let mut table = table(["XID", "NAME", "STATE", "BEGUN", "DONE", "NOTE"]);
    for transaction in transactions {
        let stuck = if transaction.stuck { " (stuck)" } else { "" };
        let open = transaction.branches.iter().filter(|branch| is_open(branch)).count();
        table.add_row([
            transaction.xid.clone(),
            transaction.name.clone(),
            format!("{}{stuck}", state_word(transaction)),
            transaction.begun_at.as_ref().map(|at| ago(now, at)).unwrap_or_default(),
            format!("{}/{}", transaction.branches.len() - open, transaction.branches.len()),
            cut(&note(transaction)),
        ]);
    }
    print(&table)
}

/// Everything that a person wants to know of one transaction.
pub(super) fn show(
    transaction: &pb::Transaction,
    now: Timestamp,
    zone: &TimeZone,
    server: &str,
) -> String {
    let moment = |at: &Option<prost_types::Timestamp>| {
        at.as_ref().map(|at| format!("{} ({})", local(at, zone), ago(now, at))).unwrap_or_default()
    };
    let pb::Transaction { begun_at, expires_at, decided_at, finished_at, .. } = transaction;
    let mut facts = vec![(
        "begun",
        match transaction.drive() {
            pb::Drive::Coordinator => format!("{}, driven by the coordinator", moment(begun_at)),
            pb::Drive::Initiator | pb::Drive::Unspecified => moment(begun_at),
        },
    )];
    match transaction.decision() {
        pb::Decision::Unspecified => facts.push(("expires", moment(expires_at))),
        decision @ (pb::Decision::Confirm | pb::Decision::Cancel) => {
            let decision = decision.as_str_name().trim_start_matches("DECISION_");
            facts.push(("decided", format!("{decision}, {}", moment(decided_at))));
        }
    }
    if !transaction.cancel_reason.is_empty() {
        facts.push(("because", because(transaction)));
    }
    if finished_at.is_some() {
        facts.push(("finished", moment(finished_at)));
    }
    if !transaction.labels.is_empty() {
        facts.push(("labels", pairs(&transaction.labels)));
    }
    let facts = facts
        .iter()
        .fold(String::new(), |facts, (what, text)| format!("{facts}{what:<10}{text}\n"));

    let branches = if transaction.branches.is_empty() {
        "It has no branches.\n".to_owned()
    } else {
        let mut table =
            table(["BRANCH", "ACTION", "PARTICIPANT", "STATE", "ATTEMPTS", "NEXT", "LAST ERROR"]);
        for branch in &transaction.branches {
            let participant = match branch.target.as_str() {
                "" => branch.participant.clone(),
                target => format!("{} ({target})", branch.participant),
            };
            table.add_row([
                branch.branch_id.clone(),
                branch.action.clone(),
                participant,
                branch_word(branch, transaction),
                branch.attempts.to_string(),
                branch.next_attempt_at.as_ref().map(|at| ago(now, at)).unwrap_or_default(),
                branch.last_error.as_ref().map(|error| error_text(error, now)).unwrap_or_default(),
            ]);
        }
        print(&table)
    };
    let resolved = transaction.branches.iter().filter_map(|branch| {
        let pb::Resolution { operator, reason, at } = branch.resolution.as_ref()?;
        Some(format!(
            "Branch {} was resolved by {operator}, {}: {reason}\n",
            branch.branch_id,
            moment(at)
        ))
    });
    let resolved: String = resolved.collect();
    let gap = if resolved.is_empty() { "" } else { "\n" };
    format!(
        "{}\n\n{facts}\n{branches}{gap}{resolved}{}",
        headline(transaction),
        waits_for(transaction, server)
    )
}

/// What `retry` has done.
pub(super) fn retried(transaction: &pb::Transaction, server: &str) -> String {
    let done = match transaction.state() {
        State::Confirming | State::Cancelling => {
            let open: Vec<_> =
                transaction.branches.iter().filter(|branch| is_open(branch)).map(name).collect();
            format!(
                "Trying again now: {}.\nHow it went:  handfast show{server} {}",
                open.join(", "),
                transaction.xid
            )
        }
        State::Trying => "There was nothing to try again: it is not decided.".to_owned(),
        State::Confirmed | State::Cancelled | State::Unspecified => {
            "There was nothing to try again.".to_owned()
        }
    };
    format!("{}\n{done}\n", headline(transaction))
}

/// What `resolve` has done. The first answer for a branch stands, which may be another one.
pub(super) fn resolved(transaction: &pb::Transaction, branch_id: &str) -> String {
    let branch = transaction.branches.iter().find(|branch| branch.branch_id == branch_id);
    let resolution = branch.and_then(|branch| branch.resolution.as_ref());
    let (operator, reason) =
        resolution.map_or(("", ""), |resolution| (&*resolution.operator, &*resolution.reason));
    format!("Branch {branch_id} is resolved, by {operator}: {reason}\n{}\n", headline(transaction))
}

fn headline(transaction: &pb::Transaction) -> String {
    let pb::Transaction { name, xid, .. } = transaction;
    let stands = match transaction.state() {
        State::Trying => "is TRYING: there is no decision yet.",
        State::Confirming => "is CONFIRMING. It will be confirmed; nothing can change that.",
        State::Cancelling => "is CANCELLING. It will be cancelled; nothing can change that.",
        State::Confirmed => "is CONFIRMED.",
        State::Cancelled => "is CANCELLED.",
        State::Unspecified => {
            "is in a state that this program does not know; use one as new as the coordinator."
        }
    };
    format!("{name} {xid} {stands}")
}

/// Who is waited for, and how to hurry it, if somebody fails. `server` is what the commands need to reach this coordinator.
fn waits_for(transaction: &pb::Transaction, server: &str) -> String {
    let word = match transaction.state() {
        State::Confirming => "confirm",
        State::Cancelling => "cancel",
        State::Trying | State::Confirmed | State::Cancelled | State::Unspecified => {
            return String::new();
        }
    };
    let open: Vec<_> = transaction.branches.iter().filter(|branch| is_open(branch)).collect();
    let who: Vec<_> = open
        .iter()
        .map(|branch| format!("{} to {word} {}", branch.participant, name(branch)))
        .collect();
    let stuck = if transaction.stuck { "It is stuck: it" } else { "It" };
    let mut text = format!("\n{stuck} waits for {}, and keeps asking.\n", who.join(", "));
    if let Some(branch) = open.iter().find(|branch| branch.last_error.is_some()) {
        let (xid, id) = (&transaction.xid, &branch.branch_id);
        let _always_fits =
            writeln!(text, "  to ask again now:        handfast retry{server} {xid}");
        if transaction.stuck {
            let _always_fits = writeln!(
                text,
                "  if it can never answer:  handfast resolve{server} {xid} {id} --operator NAME --reason \"what was done instead\""
            );
        }
    }
    text
}

fn because(transaction: &pb::Transaction) -> String {
    match &transaction.refusal {
        Some(refusal) if !refusal.metadata.is_empty() => {
            format!("{} ({})", transaction.cancel_reason, pairs(&refusal.metadata))
        }
        Some(_) | None => transaction.cancel_reason.clone(),
    }
}

/// The most interesting thing about a transaction, in a few words.
fn note(transaction: &pb::Transaction) -> String {
    let failing = transaction.branches.iter().filter(|branch| is_open(branch));
    let failing = failing.filter_map(|branch| Some((branch, branch.last_error.as_ref()?)));
    match failing.max_by_key(|(branch, _)| branch.attempts) {
        Some((branch, error)) => {
            format!(
                "{}: {} {} (attempt {})",
                branch.action, error.code, error.message, branch.attempts
            )
        }
        None => transaction.cancel_reason.clone(),
    }
}

/// `branch 2 (points.spend)`
fn name(branch: &pb::Branch) -> String {
    format!("branch {} ({})", branch.branch_id, branch.action)
}

fn is_open(branch: &pb::Branch) -> bool {
    match branch.state() {
        BranchState::Registered | BranchState::Tried | BranchState::Unspecified => true,
        BranchState::Confirmed | BranchState::Cancelled | BranchState::Resolved => false,
    }
}

fn state_word(transaction: &pb::Transaction) -> String {
    word(transaction.state().as_str_name(), "TRANSACTION_STATE_")
}

/// Its state; of an open one in phase two, what it has to do.
fn branch_word(branch: &pb::Branch, transaction: &pb::Transaction) -> String {
    match (is_open(branch), transaction.state()) {
        (true, State::Confirming) => "to confirm".to_owned(),
        (true, State::Cancelling) => "to cancel".to_owned(),
        (true, State::Trying | State::Confirmed | State::Cancelled | State::Unspecified)
        | (false, _) => word(branch.state().as_str_name(), "BRANCH_STATE_"),
    }
}

fn error_text(error: &pb::AttemptError, now: Timestamp) -> String {
    let when = error.at.as_ref().map(|at| format!(" ({})", ago(now, at))).unwrap_or_default();
    format!("{} {}{when}", error.code, error.message)
}

fn pairs(pairs: &BTreeMap<String, String>) -> String {
    pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(NOTE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// `3m ago`, `in 12s`, `now`.
fn ago(now: Timestamp, at: &prost_types::Timestamp) -> String {
    let at = time::millis(at);
    let seconds = now.0.saturating_sub(at).unsigned_abs() / 1000;
    let length = match seconds {
        0 => return "now".to_owned(),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        172_800.. => format!("{}d", seconds / 86_400),
    };
    if at <= now.0 { format!("{length} ago") } else { format!("in {length}") }
}

/// `2026-11-21 10:14:03.123 +01:00`
fn local(at: &prost_types::Timestamp, zone: &TimeZone) -> String {
    match jiff::Timestamp::from_millisecond(time::millis(at)) {
        Ok(at) => at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S%.3f %:z").to_string(),
        Err(_) => "at a time that does not exist".to_owned(),
    }
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn print(table: &Table) -> String {
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

#[cfg(test)]
pub(super) mod tests {
    use handfast_proto::time::{timestamp, wire_duration};

    use super::*;

    /// 2026-11-21T09:14:03.123Z
    const BEGUN: i64 = 1_795_252_443_123;
    const NOW: Timestamp = Timestamp(BEGUN + 180_000);

    fn at(after: i64) -> Option<prost_types::Timestamp> {
        Some(timestamp(BEGUN + after))
    }

    fn branch(branch_id: &str, action: &str, participant: &str, state: BranchState) -> pb::Branch {
        pb::Branch {
            branch_id: branch_id.to_owned(),
            action: action.to_owned(),
            participant: participant.to_owned(),
            state: state.into(),
            attempts: 1,
            ..pb::Branch::default()
        }
    }

    /// One that is stuck, one that was refused, one that is trying, one that is done.
    pub(in super::super) fn samples() -> [pb::Transaction; 4] {
        let stuck = pb::Transaction {
            xid: "3-7-1042-9f3c01d2".to_owned(),
            name: "checkout".to_owned(),
            state: State::Confirming.into(),
            decision: pb::Decision::Confirm.into(),
            drive: pb::Drive::Initiator.into(),
            labels: BTreeMap::from([("order".to_owned(), "A-1042".to_owned())]),
            begun_at: at(0),
            expires_at: at(30_000),
            decided_at: at(100),
            branches: vec![
                branch("1", "order.create", "orders", BranchState::Confirmed),
                pb::Branch {
                    target: "http://127.0.0.1:7703".to_owned(),
                    attempts: 9,
                    next_attempt_at: at(192_000),
                    last_error: Some(pb::AttemptError {
                        code: "UNAVAILABLE".to_owned(),
                        message: "connection refused".to_owned(),
                        at: at(178_000),
                    }),
                    ..branch("2", "points.spend", "points", BranchState::Registered)
                },
                pb::Branch {
                    attempts: 4,
                    resolution: Some(pb::Resolution {
                        operator: "ann".to_owned(),
                        reason: "mail is gone".to_owned(),
                        at: at(120_000),
                    }),
                    ..branch("3", "mail.send", "mail", BranchState::Resolved)
                },
            ],
            stuck: true,
            timeout: Some(wire_duration(std::time::Duration::from_secs(30))),
            ..pb::Transaction::default()
        };
        let cancelled = pb::Transaction {
            xid: "3-7-1041-9f3c01d2".to_owned(),
            state: State::Cancelled.into(),
            decision: pb::Decision::Cancel.into(),
            drive: pb::Drive::Coordinator.into(),
            finished_at: at(120),
            cancel_cause: pb::CancelCause::Refused.into(),
            cancel_reason: "branch 2 refused: OUT_OF_STOCK only 2 left".to_owned(),
            refused_branch_id: "2".to_owned(),
            refusal: Some(pb::Refusal {
                reason: "OUT_OF_STOCK".to_owned(),
                domain: "inventory".to_owned(),
                message: "only 2 left".to_owned(),
                metadata: BTreeMap::from([("sku".to_owned(), "1042".to_owned())]),
            }),
            branches: vec![
                branch("1", "order.create", "orders", BranchState::Cancelled),
                branch("2", "inventory.deduct", "inventory", BranchState::Cancelled),
            ],
            labels: BTreeMap::new(),
            stuck: false,
            ..stuck.clone()
        };
        let trying = pb::Transaction {
            xid: "3-7-1043-9f3c01d2".to_owned(),
            name: "transfer".to_owned(),
            state: State::Trying.into(),
            begun_at: at(179_500),
            expires_at: at(209_500),
            ..pb::Transaction::default()
        };
        let confirmed = pb::Transaction {
            xid: "3-7-1-9f3c01d2".to_owned(),
            state: State::Confirmed.into(),
            begun_at: at(-7_200_000),
            branches: stuck.branches[..1].to_vec(),
            stuck: false,
            ..stuck.clone()
        };
        [stuck, cancelled, trying, confirmed]
    }

    #[test]
    fn a_list_has_a_line_for_each() {
        assert_eq!(
            list(&samples(), NOW),
            "\
XID                NAME      STATE               BEGUN   DONE  NOTE
3-7-1042-9f3c01d2  checkout  confirming (stuck)  3m ago  2/3   points.spend: UNAVAILABLE connection refused (attempt 9)
3-7-1041-9f3c01d2  checkout  cancelled           3m ago  2/2   branch 2 refused: OUT_OF_STOCK only 2 left
3-7-1043-9f3c01d2  transfer  trying              now     0/0
3-7-1-9f3c01d2     checkout  confirmed           2h ago  1/1
"
        );
    }

    #[test]
    fn a_stuck_one_says_what_it_waits_for_and_how_to_hurry_it() {
        let [stuck, ..] = samples();
        assert_eq!(
            show(&stuck, NOW, &TimeZone::fixed(jiff::tz::offset(1)), " --server http://b:1"),
            "\
checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.

begun     2026-11-21 10:14:03.123 +01:00 (3m ago)
decided   CONFIRM, 2026-11-21 10:14:03.223 +01:00 (2m ago)
labels    order=A-1042

BRANCH  ACTION        PARTICIPANT                     STATE       ATTEMPTS  NEXT    LAST ERROR
1       order.create  orders                          confirmed   1
2       points.spend  points (http://127.0.0.1:7703)  to confirm  9         in 12s  UNAVAILABLE connection refused (2s ago)
3       mail.send     mail                            resolved    4

Branch 3 was resolved by ann, 2026-11-21 10:16:03.123 +01:00 (1m ago): mail is gone

It is stuck: it waits for points to confirm branch 2 (points.spend), and keeps asking.
  to ask again now:        handfast retry --server http://b:1 3-7-1042-9f3c01d2
  if it can never answer:  handfast resolve --server http://b:1 3-7-1042-9f3c01d2 2 --operator NAME --reason \"what was done instead\"
"
        );
    }

    #[test]
    fn a_refused_one_says_why() {
        let [_, cancelled, ..] = samples();
        assert_eq!(
            show(&cancelled, NOW, &TimeZone::UTC, ""),
            "\
checkout 3-7-1041-9f3c01d2 is CANCELLED.

begun     2026-11-21 09:14:03.123 +00:00 (3m ago), driven by the coordinator
decided   CANCEL, 2026-11-21 09:14:03.223 +00:00 (2m ago)
because   branch 2 refused: OUT_OF_STOCK only 2 left (sku=1042)
finished  2026-11-21 09:14:03.243 +00:00 (2m ago)

BRANCH  ACTION            PARTICIPANT  STATE      ATTEMPTS  NEXT  LAST ERROR
1       order.create      orders       cancelled  1
2       inventory.deduct  inventory    cancelled  1
"
        );
    }

    #[test]
    fn one_that_is_trying_says_until_when() {
        let [_, _, trying, _] = samples();
        assert_eq!(
            show(&trying, NOW, &TimeZone::UTC, ""),
            "\
transfer 3-7-1043-9f3c01d2 is TRYING: there is no decision yet.

begun     2026-11-21 09:17:02.623 +00:00 (now)
expires   2026-11-21 09:17:32.623 +00:00 (in 29s)

It has no branches.
"
        );
    }

    #[test]
    fn one_that_goes_well_is_not_to_be_hurried() {
        let [mut stuck, ..] = samples();
        stuck.stuck = false;
        let failing = show(&stuck, NOW, &TimeZone::UTC, "");
        assert!(
            failing.contains("handfast retry") && !failing.contains("handfast resolve"),
            "{failing}"
        );
        stuck.branches[1].last_error = None;
        let well = show(&stuck, NOW, &TimeZone::UTC, "");
        assert!(
            well.contains("\nIt waits for points to confirm") && !well.contains("handfast"),
            "{well}"
        );
    }

    #[test]
    fn what_was_done_is_said() {
        let [stuck, _, trying, confirmed] = samples();
        assert_eq!(
            retried(&stuck, ""),
            "checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.\n\
             Trying again now: branch 2 (points.spend).\n\
             How it went:  handfast show 3-7-1042-9f3c01d2\n"
        );
        assert!(
            retried(&trying, "").ends_with("There was nothing to try again: it is not decided.\n")
        );
        assert!(retried(&confirmed, "").ends_with("There was nothing to try again.\n"));
        assert_eq!(
            resolved(&stuck, "3"),
            "Branch 3 is resolved, by ann: mail is gone\n\
             checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.\n"
        );
    }

    #[test]
    fn what_nobody_should_send_does_no_harm() {
        let far = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: -1 });
        let odd = pb::Transaction { state: 99, begun_at: far, ..pb::Transaction::default() };
        assert!(show(&odd, NOW, &TimeZone::UTC, "").contains("does not exist"));
        assert!(list(&[odd], Timestamp(i64::MIN)).contains("unspecified"));
        assert!(resolved(&pb::Transaction::default(), "9").starts_with("Branch 9"));
    }

    #[test]
    fn ages_are_short() {
        let ages = [-999, 999, 1000, 59_999, 60_000, 3_600_000, 172_799_000, 172_800_000]
            .map(|age| ago(Timestamp(BEGUN + age), &timestamp(BEGUN)));
        assert_eq!(
            ages,
            ["now", "now", "1s ago", "59s ago", "1m ago", "1h ago", "47h ago", "2d ago"]
        );
        assert_eq!(ago(Timestamp(0), &timestamp(61_000)), "in 1m");
    }

    #[test]
    fn long_notes_are_cut_between_characters() {
        assert_eq!(cut(&"é".repeat(100)).chars().count(), NOTE_CHARS_MAX + 1);
        assert_eq!(cut("short"), "short");
    }
}
