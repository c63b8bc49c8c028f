//! Converts errors to gRPC statuses. The only table of codes; it keeps the promises of `coordinator.proto`.

use std::collections::BTreeMap;

use handfast_proto::reason;
use tonic::{Code, Status};
use tonic_types::{BadRequest, ErrorInfo, StatusExt as _};

use super::request::Invalid;
use crate::{
    partition::Error,
    transaction::{CancelCause, GlobalTransaction, Rejection},
};

type Metadata = BTreeMap<String, String>;

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        let no_details = Metadata::new();
        match error {
            Error::NeverRecorded(_) => {
                status(Code::NotFound, reason::NEVER_RECORDED, text, no_details)
            }
            Error::Forgotten(_) | Error::ForgottenAfterResolving(..) => {
                status(Code::NotFound, reason::FORGOTTEN, text, no_details)
            }
            Error::Lost(_) => status(Code::NotFound, reason::LOST, text, no_details),
            Error::KeyUnknown => status(Code::NotFound, reason::KEY_UNKNOWN, text, no_details),
            Error::KeyTaken(xid) => {
                let details = Metadata::from([(reason::XID.to_owned(), xid.to_string())]);
                status(Code::AlreadyExists, reason::KEY_TAKEN, text, details)
            }
            Error::Rejected { rejection, global } => rejected(rejection, &global),
            Error::NotAtDecision(_) => {
                let reason = reason::RECORD_AT_DECISION_REFUSED;
                status(Code::FailedPrecondition, reason, text, no_details)
            }
            Error::TooManyOpen { .. } | Error::TooManyBytes { .. } => {
                status(Code::ResourceExhausted, reason::TOO_MANY_OPEN, text, no_details)
            }
            Error::TooManyCalls => {
                status(Code::ResourceExhausted, reason::TOO_MANY_CALLS, text, no_details)
            }
            Error::StoreSilent => status(Code::Unavailable, reason::STORE_SILENT, text, no_details),
            Error::NotHere(_) | Error::Fenced => {
                status(Code::Unavailable, reason::OWNED_ELSEWHERE, text, no_details)
            }
            Error::Stopping => status(Code::Unavailable, reason::STOPPING, text, no_details),
            Error::Corrupt => status(Code::Internal, reason::CORRUPT_RECORD, text, no_details),
        }
    }
}

fn rejected(rejection: Rejection, global: &GlobalTransaction) -> Status {
    let text = match &global.cancel {
        Some(cause) if matches!(rejection, Rejection::AlreadyDecided(_)) => {
            format!("{rejection}: {cause}")
        }
        _ => rejection.to_string(),
    };
    let join = |ids: &[handfast_proto::BranchId]| {
        ids.iter().map(|id| id.as_str()).collect::<Vec<_>>().join(",")
    };
    match rejection {
        Rejection::AlreadyDecided(decision) => {
            let mut details = Metadata::from([
                (reason::XID.to_owned(), global.xid.to_string()),
                (reason::DECISION.to_owned(), decision.as_str().to_owned()),
            ]);
            details.extend(
                global
                    .cancel
                    .as_ref()
                    .map(|cause| (reason::CANCEL_CAUSE.to_owned(), cause_word(cause))),
            );
            status(Code::FailedPrecondition, reason::ALREADY_DECIDED, text, details)
        }
        Rejection::BranchesDiffer { not_named, not_registered } => {
            let mut text = text;
            let mut details = Metadata::new();
            for (key, words, ids) in [
                (reason::NOT_NAMED, "registered and not named", not_named),
                (reason::NOT_REGISTERED, "named and not registered", not_registered),
            ] {
                if !ids.is_empty() {
                    text = format!("{text}; {words}: {}", join(&ids));
                    details.insert(key.to_owned(), join(&ids));
                }
            }
            status(Code::FailedPrecondition, reason::BRANCHES_DIFFER, text, details)
        }
        Rejection::BranchTaken(_) => {
            status(Code::AlreadyExists, reason::BRANCH_TAKEN, text, Metadata::new())
        }
        Rejection::TooManyBranches | Rejection::PayloadsTooLarge => {
            Invalid { field: "branches".to_owned(), problem: text }.into()
        }
        Rejection::CoordinatorDriven => {
            status(Code::FailedPrecondition, reason::COORDINATOR_DRIVEN, text, Metadata::new())
        }
        Rejection::NotDecided | Rejection::NotLost => {
            status(Code::FailedPrecondition, reason::NOT_DECIDED, text, Metadata::new())
        }
        Rejection::BranchUnknown(_) => {
            status(Code::NotFound, reason::BRANCH_UNKNOWN, text, Metadata::new())
        }
        Rejection::AlreadyAcknowledged(_) => {
            status(Code::FailedPrecondition, reason::ALREADY_ACKNOWLEDGED, text, Metadata::new())
        }
    }
}

/// The name of a `CancelCause`, without its prefix.
fn cause_word(cause: &CancelCause) -> String {
    let word = super::response::cancel_cause(cause).as_str_name();
    word.strip_prefix("CANCEL_CAUSE_").unwrap_or(word).to_owned()
}

impl From<Invalid> for Status {
    fn from(Invalid { field, problem }: Invalid) -> Self {
        let text = format!("{field}: {problem}");
        let violation = BadRequest::with_violation(field, problem);
        let details = [info(reason::INVALID_FIELD, Metadata::new()).into(), violation.into()];
        Self::with_error_details_vec(Code::InvalidArgument, text, details)
    }
}

fn status(code: Code, reason: &str, text: String, metadata: Metadata) -> Status {
    Status::with_error_details_vec(code, text, [info(reason, metadata).into()])
}

fn info(reason: &str, metadata: Metadata) -> ErrorInfo {
    ErrorInfo {
        reason: reason.to_owned(),
        domain: reason::DOMAIN.to_owned(),
        metadata: metadata.into_iter().collect(),
    }
}

/// Too many calls of this connection are waiting. More would leave no streams for short calls.
pub(super) fn too_many_waits(limit: usize) -> Status {
    let text = format!(
        "{limit} calls wait on this connection already; open another one, or wait for less"
    );
    status(Code::ResourceExhausted, reason::TOO_MANY_CALLS, text, Metadata::new())
}
