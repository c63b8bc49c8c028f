//! What a participant's answer means, following the table in `participant.proto`.

use handfast_proto::{failure::code_name, limits, refusal, text, v1 as pb};
use tonic::{Code, Status};

use crate::transaction::{AttemptError, Outcome, Payload, Phase, Refusal, Timestamp};

/// The outcome of a call of `phase`, according to the answer.
pub(super) fn outcome(
    phase: Phase,
    answer: Result<Option<Payload>, Status>,
    now: Timestamp,
) -> Outcome {
    let status = match answer {
        Ok(reply) => return Outcome::Done { reply },
        Err(status) => status,
    };
    let is_try = phase == Phase::Try;
    if is_try && let Some(refusal) = refusal::read(&status) {
        return Outcome::Refused(kept_refusal(refusal));
    }
    let (timed_out, hopeless) = match status.code() {
        // For a Try, these codes are final: it came too late, or the participant will never accept it. Confirm and Cancel are
        // retried for ever. For them, `hopeless` only means that waiting alone will not help.
        Code::Aborted | Code::InvalidArgument => (false, is_try),
        Code::FailedPrecondition | Code::Unimplemented => (false, true),
        // Some servers answer CANCELLED if they notice first that the deadline has passed.
        Code::DeadlineExceeded | Code::Cancelled => (true, false),
        Code::Ok
        | Code::Unknown
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::OutOfRange
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => (false, false),
    };
    // A refused Confirm or Cancel: the record has a single text field, so the reason and its details are put into it.
    let message = match refusal::read(&status) {
        Some(refusal) => kept(&in_words(&refusal)),
        None => kept(status.message()),
    };
    let error = AttemptError { code: code_name(status.code()).to_owned(), message, at: now };
    Outcome::Unknown { error, timed_out, hopeless }
}

/// `NEEDS_ATTENTION from inventory: the shelf has fallen over (sku=1042)`
fn in_words(refusal: &pb::Refusal) -> String {
    let pb::Refusal { reason, domain, message, metadata } = refusal;
    if reason == code_name(Code::FailedPrecondition) && domain.is_empty() {
        return message.clone(); // a participant that gives no reason
    }
    let mut text = reason.clone();
    if !domain.is_empty() {
        text += &format!(" from {domain}");
    }
    if !message.is_empty() {
        text += &format!(": {message}");
    }
    if !metadata.is_empty() {
        let details: Vec<_> =
            metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
        text += &format!(" ({})", details.join(", "));
    }
    text
}

/// What a record keeps of a text from outside.
fn kept(text: &str) -> String {
    text::kept(text, limits::KEPT_BYTES_MAX)
}

/// A refusal with its texts as a record keeps them.
pub(crate) fn kept_refusal(refusal: pb::Refusal) -> Refusal {
    let pb::Refusal { reason, domain, message, metadata } = refusal;
    let [reason, domain, message] = [reason, domain, message].map(|text| kept(&text));
    let metadata = metadata.iter().map(|(key, value)| (kept(key), kept(value))).collect();
    Refusal { reason, domain, message, metadata }
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    const NOW: Timestamp = Timestamp(1);

    fn unknown(phase: Phase, code: Code) -> (bool, bool) {
        match outcome(phase, Err(Status::new(code, "why")), NOW) {
            Outcome::Unknown { error, timed_out, hopeless } => {
                assert_eq!((error.code.as_str(), error.message.as_str()), (code_name(code), "why"));
                (timed_out, hopeless)
            }
            other @ (Outcome::Done { .. } | Outcome::Refused(_)) => {
                panic!("{code:?} to {phase:?} is {other:?}")
            }
        }
    }

    #[test]
    fn the_table_of_answers() {
        for code in (0..=16).map(Code::from_i32).filter(|code| *code != Code::Ok) {
            let named = matches!(
                code,
                Code::FailedPrecondition
                    | Code::Aborted
                    | Code::InvalidArgument
                    | Code::Unimplemented
                    | Code::DeadlineExceeded
                    | Code::Cancelled
            );
            for phase in [Phase::Try, Phase::Confirm, Phase::Cancel].into_iter().filter(|_| !named)
            {
                assert_eq!(unknown(phase, code), (false, false), "{code:?} to {phase:?}");
            }
        }
        assert_eq!(unknown(Phase::Try, Code::Unimplemented), (false, true));
        assert_eq!(unknown(Phase::Try, Code::Aborted), (false, true));
        assert_eq!(unknown(Phase::Try, Code::InvalidArgument), (false, true));
        assert_eq!(unknown(Phase::Try, Code::DeadlineExceeded), (true, false));
        for phase in [Phase::Confirm, Phase::Cancel] {
            assert_eq!(unknown(phase, Code::FailedPrecondition), (false, true), "stuck at once");
            assert_eq!(unknown(phase, Code::Unimplemented), (false, true), "stuck at once");
            assert_eq!(unknown(phase, Code::Aborted), (false, false));
            assert_eq!(unknown(phase, Code::InvalidArgument), (false, false));
            assert_eq!(unknown(phase, Code::DeadlineExceeded), (true, false));
            assert_eq!(unknown(phase, Code::Cancelled), (true, false));
        }
    }

    #[test]
    fn a_refusal_arrives_as_it_was_written() {
        let details = ErrorDetails::with_error_info(
            "OUT_OF_STOCK",
            "inventory",
            [("sku".to_owned(), "7".to_owned())],
        );
        let status = Status::with_error_details(Code::FailedPrecondition, "only 2 left", details);
        let Outcome::Refused(refusal) = outcome(Phase::Try, Err(status), NOW) else {
            panic!("no refusal")
        };
        assert_eq!(
            (refusal.reason.as_str(), refusal.domain.as_str()),
            ("OUT_OF_STOCK", "inventory")
        );
        assert_eq!(
            (refusal.message.as_str(), refusal.metadata["sku"].as_str()),
            ("only 2 left", "7")
        );
        // A refusal without details is still a refusal.
        let plain = Status::failed_precondition("no");
        let Outcome::Refused(refusal) = outcome(Phase::Try, Err(plain), NOW) else {
            panic!("no refusal")
        };
        assert_eq!(
            (refusal.reason.as_str(), refusal.message.as_str()),
            ("FAILED_PRECONDITION", "no")
        );
    }

    #[test]
    fn a_refused_confirm_keeps_its_reason_and_details() {
        let details = ErrorDetails::with_error_info(
            "NEEDS_ATTENTION",
            "inventory",
            [("sku".to_owned(), "7".to_owned())],
        );
        let status = Status::with_error_details(Code::FailedPrecondition, "it fell", details);
        let Outcome::Unknown { error, hopeless: true, .. } =
            outcome(Phase::Confirm, Err(status), NOW)
        else {
            panic!("stuck at once")
        };
        assert_eq!(error.code, "FAILED_PRECONDITION");
        assert_eq!(error.message, "NEEDS_ATTENTION from inventory: it fell (sku=7)");
    }

    #[test]
    fn long_errors_are_cut_and_put_on_one_line() {
        let status = Status::internal("é\n".repeat(10_000));
        let Outcome::Unknown { error, .. } = outcome(Phase::Cancel, Err(status), NOW) else {
            panic!("known")
        };
        // Two bytes and a space, as often as they fit with the ellipsis.
        assert_eq!(error.message, "é ".repeat(340) + "…");
        assert_eq!(limits::KEPT_BYTES_MAX, 340 * 3 + 4);
    }
}
