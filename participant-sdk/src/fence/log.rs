//! Writes one log line per call, from which a program can reconstruct the course of events. Payloads and replies are never
//! logged.

use std::time::Duration;

use handfast_proto::text;
use tracing::Level;

use super::verdict::Verdict;
use crate::{
    answer::Answer,
    branch::{Branch, Phase},
};

/// `verdict`: `None` if the call failed before there was a verdict.
///
/// `labels`: the keys of the labels that the line shows.
pub(crate) fn log(
    branch: &Branch,
    verdict: Option<Verdict>,
    answer: &Answer,
    took: Duration,
    labels: &[String],
) {
    let Branch { xid, branch_id, action, phase, attempt, .. } = branch;
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let labels = text::labels(&branch.labels, labels);
    let (level, message) = headline(*phase, verdict, answer);
    let verdict = verdict.map_or("none", Verdict::as_str);
    // A refusal's message is not logged: it may contain a customer's name.
    let (reason, error) = match answer {
        Answer::Done(_) => (None, None),
        Answer::Refused(refusal) | Answer::TooLate(refusal) | Answer::NotServed(refusal) => {
            (Some(refusal.reason.as_str()), None)
        }
        Answer::Unknown(error) | Answer::Retry(error) => (None, Some(error.as_str())),
        Answer::Invalid { field, .. } => (None, Some(*field)),
    };
    // A macro, because tracing needs the level at compile time.
    macro_rules! line {
        ($level:expr) => {
            tracing::event!(
                $level,
                %xid,
                %branch_id,
                action,
                %phase,
                attempt,
                labels,
                verdict,
                took_ms,
                reason,
                error,
                "{message}"
            )
        };
    }
    if level == Level::INFO {
        line!(Level::INFO);
    } else if level == Level::WARN {
        line!(Level::WARN);
    } else {
        line!(Level::ERROR);
    }
}

/// The level and the text of the line. ERROR only if a person must look at it.
fn headline(phase: Phase, verdict: Option<Verdict>, answer: &Answer) -> (Level, &'static str) {
    match answer {
        Answer::Unknown(_) | Answer::Retry(_) => return (Level::WARN, "failed"),
        Answer::Invalid { .. } => return (Level::WARN, "invalid call"),
        Answer::NotServed(_) => return (Level::WARN, "action not served"),
        Answer::Done(_) | Answer::Refused(_) | Answer::TooLate(_) => {}
    }
    let refused = matches!(answer, Answer::Refused(_));
    match (verdict, phase) {
        (None | Some(Verdict::Run), Phase::Try) if refused => (Level::INFO, "refused"),
        (None | Some(Verdict::Run), Phase::Confirm | Phase::Cancel) if refused => {
            (Level::ERROR, "needs attention")
        }
        (None | Some(Verdict::Run), Phase::Try) => (Level::INFO, "branch tried"),
        (None | Some(Verdict::Run), Phase::Confirm) => (Level::INFO, "branch confirmed"),
        (None | Some(Verdict::Run), Phase::Cancel) => (Level::INFO, "branch cancelled"),
        (Some(Verdict::Repeat), _) => (Level::INFO, "repeat"),
        (Some(Verdict::EmptyRollback), _) => (Level::INFO, "empty rollback"),
        (Some(Verdict::Forgotten), _) => (Level::WARN, "confirm of a branch that is forgotten"),
        (Some(Verdict::CancelledBefore), _) => (Level::INFO, "too late"),
        (Some(Verdict::Suspension), _) => (Level::INFO, "suspension"),
        (Some(Verdict::Expired), _) => (Level::INFO, "expired"),
        (Some(Verdict::Differs), Phase::Try) => (Level::WARN, "payload differs"),
        (Some(Verdict::Differs), Phase::Confirm | Phase::Cancel) => {
            (Level::ERROR, "action differs")
        }
        (Some(Verdict::NeverTried), _) => (Level::ERROR, "never tried"),
        (Some(Verdict::OppositeDone), _) => (Level::ERROR, "opposite done"),
    }
}
