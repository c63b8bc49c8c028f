//! Formats a failed call for people: the name of its gRPC code, and its message.

use tonic::{Code, Status};

/// `UNAVAILABLE: connection refused`
#[must_use]
pub fn with_code(status: &Status) -> String {
    let (code, text) = (code_name(status.code()), status.message());
    if text.is_empty() { code.to_owned() } else { format!("{code}: {text}") }
}

/// The name of a gRPC code, as its specification writes it.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_told_by_its_name() {
        assert_eq!(with_code(&Status::data_loss("a hole")), "DATA_LOSS: a hole");
        assert_eq!(with_code(&Status::internal("")), "INTERNAL");
    }
}
