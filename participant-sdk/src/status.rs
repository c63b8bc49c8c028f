//! How answers become gRPC statuses, and what a status from the other side means.
//!
//! The codes of answers are those of `participant.proto`. Texts are for people; programs read `google.rpc.ErrorInfo`.

use bytes::Bytes;
use handfast_proto::{
    connection, failure::with_code, limits::STATUS_MESSAGE_BYTES_MAX, reason, refusal, text::cut,
    v1 as pb,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    answer::Answer,
    branch::InvalidBranch,
    error::{BoxError, Refusal},
};

impl Answer {
    /// The answer as gRPC has it: the reply, or a status.
    ///
    /// # Errors
    ///
    /// Every answer but [`Answer::Done`] is one.
    pub fn into_result(self) -> Result<Bytes, Status> {
        match self {
            Self::Done(reply) => Ok(reply),
            Self::Refused(refusal) => Err(refusal.into_status(Code::FailedPrecondition)),
            Self::TooLate(refusal) => Err(refusal.into_status(Code::Aborted)),
            Self::Unknown(message) => Err(Status::unknown(cut(message, STATUS_MESSAGE_BYTES_MAX))),
            Self::Retry(message) => {
                Err(Status::unavailable(cut(message, STATUS_MESSAGE_BYTES_MAX)))
            }
            Self::Invalid { field, message } => Err(invalid(field, &message)),
            Self::NotServed(refusal) => Err(refusal.into_status(Code::Unimplemented)),
        }
    }
}

impl From<InvalidBranch> for Status {
    fn from(error: InvalidBranch) -> Self {
        invalid(error.field, &error.message)
    }
}

fn invalid(field: &str, message: &str) -> Status {
    let message = cut(format!("{field}: {message}"), STATUS_MESSAGE_BYTES_MAX);
    let mut details = ErrorDetails::with_bad_request_violation(field, message.clone());
    details.set_error_info(reason::INVALID_FIELD, reason::DOMAIN, []);
    Status::with_error_details(Code::InvalidArgument, message, details)
}

impl Refusal {
    /// The refusal that a status carries, if it carries one.
    ///
    /// FAILED_PRECONDITION is one in any case, also from a participant that knows nothing of `google.rpc.ErrorInfo`: its reason
    /// is then `FAILED_PRECONDITION`. No other code is.
    #[must_use]
    pub fn from_status(status: &Status) -> Option<Self> {
        refusal::read(status).map(Self::from)
    }

    fn into_status(self, code: Code) -> Status {
        refusal::status(code, self.into())
    }
}

impl From<pb::Refusal> for Refusal {
    fn from(message: pb::Refusal) -> Self {
        let pb::Refusal { reason, domain, message, metadata } = message;
        Self { reason, domain, message, metadata }
    }
}

impl From<Refusal> for pb::Refusal {
    fn from(refusal: Refusal) -> Self {
        let Refusal { reason, domain, message, metadata } = refusal;
        Self { reason, domain, message, metadata }
    }
}

/// FAILED_PRECONDITION with `google.rpc.ErrorInfo`.
impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        refusal.into_status(Code::FailedPrecondition)
    }
}

/// Whether a retry can succeed.
pub(crate) fn may_be_repeated(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled => {
            true
        }
        Code::Unknown | Code::Internal => connection::is_ours(status),
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

/// Whether the call may have been carried out although it failed.
pub(crate) fn leaves_open(status: &Status) -> bool {
    may_be_repeated(status) && status.code() != Code::ResourceExhausted
}

/// The coordinator's errors that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    NeverRecorded,
    Forgotten,
    KeyUnknown,
    KeyTaken,
    AlreadyDecided,
    BranchesDiffer,
    Other,
}

impl Reason {
    pub(crate) fn of(status: &Status) -> Self {
        match status.get_details_error_info() {
            Some(info) if info.domain == reason::DOMAIN => match info.reason.as_str() {
                reason::NEVER_RECORDED => Self::NeverRecorded,
                reason::FORGOTTEN | reason::LOST => Self::Forgotten,
                reason::KEY_UNKNOWN => Self::KeyUnknown,
                reason::KEY_TAKEN => Self::KeyTaken,
                reason::ALREADY_DECIDED => Self::AlreadyDecided,
                reason::BRANCHES_DIFFER => Self::BranchesDiffer,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// Whether the coordinator responded with an error about this transaction only.
pub(crate) fn concerns_one_transaction(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| {
        let of_one = [reason::OWNED_ELSEWHERE, reason::CORRUPT_RECORD];
        info.domain == reason::DOMAIN && of_one.contains(&info.reason.as_str())
    })
}

/// A status as an error for people.
pub(crate) fn status_error(status: &Status) -> BoxError {
    with_code(status).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_code_is_a_refusal() {
        let refusal = Refusal::new("OUT_OF_STOCK");
        for answer in [
            Answer::TooLate(refusal.clone()),
            Answer::NotServed(refusal),
            Answer::Unknown(String::new()),
            Answer::Retry(String::new()),
            Answer::Invalid { field: "context.xid", message: String::new() },
        ] {
            let status = answer.into_result().unwrap_err();
            assert_eq!(Refusal::from_status(&status), None, "{status:?}");
        }
    }

    #[test]
    fn an_invalid_field_is_named_for_programs() {
        let answer = Answer::Invalid { field: "context.xid", message: "is no xid".to_owned() };
        let status = answer.into_result().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "context.xid: is no xid");
        assert_eq!(status.get_details_error_info().unwrap().reason, reason::INVALID_FIELD);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "context.xid");
    }
}
