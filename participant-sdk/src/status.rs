//! The one place where answers and refusals turn into gRPC status codes, and back.
//!
//! The codes are those of `participant.proto`. Texts are for people; programs read `google.rpc.ErrorInfo`.

use bytes::Bytes;
use handfast_proto::reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, ErrorInfo, StatusExt as _};

use crate::{
    answer::Answer,
    branch::InvalidBranch,
    error::{MESSAGE_BYTES_MAX, Refusal, cut},
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
            Self::Unknown(message) => Err(Status::unknown(cut(message, MESSAGE_BYTES_MAX))),
            Self::Retry(message) => Err(Status::unavailable(cut(message, MESSAGE_BYTES_MAX))),
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
    let message = cut(format!("{field}: {message}"), MESSAGE_BYTES_MAX);
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
        if status.code() != Code::FailedPrecondition {
            return None;
        }
        let refusal = match status.get_details_error_info() {
            Some(info) => Self {
                reason: info.reason,
                domain: info.domain,
                message: status.message().to_owned(),
                metadata: info.metadata.into_iter().collect(),
            },
            None => Self::new("FAILED_PRECONDITION").message(status.message()),
        };
        Some(refusal.cut())
    }

    fn into_status(self, code: Code) -> Status {
        let Self { reason, domain, message, metadata } = self.cut();
        let info = ErrorInfo { reason, domain, metadata: metadata.into_iter().collect() };
        Status::with_error_details_vec(code, message, [info.into()])
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
    fn a_refusal_survives_the_wire() {
        let mut refusal = Refusal::new("OUT_OF_STOCK").message("2 on hand").with("sku", 1042);
        refusal.domain = "inventory".to_owned();
        assert_eq!(Refusal::from_status(&refusal.clone().into()), Some(refusal));
    }

    #[test]
    fn a_failed_precondition_without_details_is_a_refusal_too() {
        let refusal = Refusal::from_status(&Status::failed_precondition("no")).unwrap();
        assert_eq!(refusal, Refusal::new("FAILED_PRECONDITION").message("no"));
    }

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
