//! Output for people: a table of transactions, and the details of one. Pure functions of an answer and the time.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{Table, presets};
use handfast_coordinator::transaction::Timestamp;
use handfast_proto::{
    text::{first_chars, one_line},
    time,
    v1::{self as pb, BranchState, TransactionState as State},
};
use jiff::tz::TimeZone;

use super::json::word;

/// Characters of an error or a reason in the list. `show` prints all of it.
const NOTE_CHARS_MAX: usize = 72;

/// A table with one line for each transaction.
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
            first_chars(&note(transaction), NOTE_CHARS_MAX),
        ]);
    }
    print(&table)
}

/// The details of one transaction.
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
            let participant = match (branch.address.as_str(), branch.target.as_str()) {
                ("", "") => branch.participant.clone(),
                ("", target) => format!("{} ({target}: is not called)", branch.participant),
                (address, _) => format!("{} ({address})", branch.participant),
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

/// The result of `retry`.
pub(super) fn retried(transaction: &pb::Transaction, server: &str) -> String {
    let done = match transaction.state() {
        State::Confirming | State::Cancelling => {
            let open: Vec<_> =
                transaction.branches.iter().filter(|branch| is_open(branch)).map(name).collect();
            format!(
                "Retrying now: {}.\nSee the result:  handfast show{server} {}",
                open.join(", "),
                transaction.xid
            )
        }
        State::Trying => "There is nothing to retry: it is not decided.".to_owned(),
        State::Confirmed | State::Cancelled | State::Unspecified => {
            "There is nothing to retry.".to_owned()
        }
    };
    format!("{}\n{done}\n", headline(transaction))
}

/// The result of `resolve`. If the branch was resolved before, that first resolution stands, and is printed.
pub(super) fn resolved(transaction: &pb::Transaction, branch_id: &str) -> String {
    let branch = transaction.branches.iter().find(|branch| branch.branch_id == branch_id);
    let resolution = branch.and_then(|branch| branch.resolution.as_ref());
    let (operator, reason) =
        resolution.map_or(("", ""), |resolution| (&*resolution.operator, &*resolution.reason));
    format!("Branch {branch_id} is resolved, by {operator}: {reason}\n{}\n", headline(transaction))
}

/// The result of `resolve --decision`.
pub(super) fn decided(transaction: &pb::Transaction, server: &str) -> String {
    let xid = &transaction.xid;
    format!("{}\nIts participants are called: handfast show{server} {xid}\n", headline(transaction))
}

/// Puts every text that others wrote on one line: with a line break in it, it could look like a line of ours.
pub(super) fn on_one_line(transaction: &mut pb::Transaction) {
    let line = |text: &mut String| *text = one_line(text);
    let pairs = |pairs: &mut BTreeMap<String, String>| {
        *pairs = std::mem::take(pairs)
            .into_iter()
            .map(|(key, value)| [key, value].map(|text| one_line(&text)))
            .map(|[key, value]| (key, value))
            .collect();
    };
    line(&mut transaction.name);
    line(&mut transaction.cancel_reason);
    pairs(&mut transaction.labels);
    if let Some(refusal) = &mut transaction.refusal {
        line(&mut refusal.reason);
        line(&mut refusal.domain);
        line(&mut refusal.message);
        pairs(&mut refusal.metadata);
    }
    for branch in &mut transaction.branches {
        line(&mut branch.action);
        line(&mut branch.participant);
        line(&mut branch.target);
        if let Some(error) = &mut branch.last_error {
            line(&mut error.message);
        }
        if let Some(resolution) = &mut branch.resolution {
            line(&mut resolution.operator);
            line(&mut resolution.reason);
        }
    }
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
            "is in a state that this program does not know; upgrade this program to the coordinator's version."
        }
    };
    format!("{name} {xid} {stands}")
}

/// The participants that the transaction waits for and, if a call failed, the commands that help. `server` is the flag that makes
/// those commands reach this coordinator.
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
    let mut text = format!("\n{stuck} waits for {}, and retries.\n", who.join(", "));
    if let Some(branch) = open.iter().find(|branch| branch.last_error.is_some()) {
        let (xid, id) = (&transaction.xid, &branch.branch_id);
        let _always_fits =
            writeln!(text, "  to retry now:            handfast retry{server} {xid}");
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

/// The last error of the branch that fails most, or why the transaction was cancelled.
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

/// The state of a branch. For an open branch in phase two: what it has to do.
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
