//! The one place where answers and refusals turn into gRPC status codes, and back.
//!
//! The codes are those of `participant.proto`. Texts are for people; programs read `google.rpc.ErrorInfo`.

use bytes::Bytes;
use handfast_proto::{
    limits::{STATUS_MESSAGE_BYTES_MAX, cut},
    reason, refusal, v1 as pb,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{answer::Answer, branch::InvalidBranch, error::Refusal};

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
