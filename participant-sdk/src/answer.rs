//! What a participant answers to one call.

use std::fmt;

use bytes::Bytes;
use handfast_proto::reason;

use crate::{
    branch::Phase,
    error::{Failed, Refusal, TryError, chain},
};

/// What a participant answers to one call. Each kind is one gRPC code, named here; `participant.proto` says what callers do
/// with it.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// OK: done, now or before. Of a Try it holds the reply, the same in every repeat.
    Done(Bytes),
    /// FAILED_PRECONDITION: no, and nothing was done. To a Try it ends the global transaction; a Confirm or Cancel is repeated,
    /// and shown to operators at once.
    Refused(Refusal),
    /// ABORTED: the Try came after its Cancel, or after the end of phase one. Nothing was done.
    TooLate(Refusal),
    /// UNKNOWN: it failed. Of a Try nobody can tell whether something was done, so it will be cancelled.
    Unknown(String),
    /// UNAVAILABLE: it failed and is to be repeated: a Confirm or Cancel, or a call whose database takes no changes.
    Retry(String),
    /// INVALID_ARGUMENT: the call itself is wrong. Nothing was done.
    Invalid {
        /// The path of the field in the request.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// UNIMPLEMENTED: the action is not served here. Nothing was done.
    NotServed(Refusal),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(_) => f.write_str("done"),
            Self::Refused(refusal) => write!(f, "refused: {refusal}"),
            Self::TooLate(refusal) => write!(f, "too late: {refusal}"),
            Self::Unknown(message) => write!(f, "unknown: {message}"),
            Self::Retry(message) => write!(f, "to be repeated: {message}"),
            Self::Invalid { field, message } => write!(f, "invalid: {field} {message}"),
            Self::NotServed(refusal) => write!(f, "not served: {refusal}"),
        }
    }
}

impl Answer {
    /// The answer when the call failed, for a reason that is not the author's decision.
    pub(crate) fn failed(phase: Phase, message: String) -> Self {
        match phase {
            Phase::Try => Self::Unknown(message),
            Phase::Confirm | Phase::Cancel => Self::Retry(message),
        }
    }
}

impl From<TryError> for Answer {
    fn from(error: TryError) -> Self {
        match error {
            TryError::Refused(refusal) => Self::Refused(refusal),
            TryError::Unknown(error) => Self::Unknown(chain(&*error)),
        }
    }
}

impl From<Failed> for Answer {
    fn from(error: Failed) -> Self {
        match error {
            Failed::Retry(error) => Self::Retry(chain(&*error)),
            Failed::NeedsAttention(text) => {
                Self::Refused(Refusal::of_handfast(reason::NEEDS_ATTENTION, text))
            }
        }
    }
}

/// Never prints a reply.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(reply) => write!(f, "Done({} bytes)", reply.len()),
            Self::Refused(refusal) => write!(f, "Refused({refusal})"),
            Self::TooLate(refusal) => write!(f, "TooLate({refusal})"),
            Self::Unknown(message) => write!(f, "Unknown({message})"),
            Self::Retry(message) => write!(f, "Retry({message})"),
            Self::Invalid { field, message } => write!(f, "Invalid({field}: {message})"),
            Self::NotServed(refusal) => write!(f, "NotServed({refusal})"),
        }
    }
}
