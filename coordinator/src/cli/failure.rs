//! Failures: three lines for people, and an exit code for scripts.

use std::{error::Error, fmt, io, process::ExitCode, time::Duration};

use handfast_coordinator::{config::Invalid, server, store};
use handfast_proto::{connection, reason, text::one_line};
use tonic::{Code as GrpcCode, Status};
use tonic_types::StatusExt as _;

/// See `handfast --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Unreachable = 5,
    TimedOut = 6,
    Fenced = 8,
    Corrupt = 9,
    Broken = 10,
    StoreGone = 11,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// What failed, why, and what to do.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) what: String,
    /// Empty if `what` says it all.
    pub(super) cause: String,
    /// Empty if there is nothing to suggest.
    pub(super) hint: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if !self.cause.is_empty() {
            write!(f, "\ncause: {}", self.cause)?;
        }
        if !self.hint.is_empty() {
            write!(f, "\nhint:  {}", self.hint)?;
        }
        Ok(())
    }
}

impl Failure {
    pub(super) fn new(
        code: Code,
        what: impl Into<String>,
        cause: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { code, what: what.into(), cause: cause.into(), hint: hint.into() }
    }

    pub(super) fn cannot_write(error: &io::Error) -> Self {
        Self::new(Code::Failed, "cannot write to stdout", error.to_string(), "")
    }

    pub(super) fn cannot_log(error: io::Error) -> Self {
        let hint = "logs go to stdout as JSON, or to stderr as text (--log-format); it must be open, and may be /dev/null";
        Self::new(Code::Failed, "cannot write logs", error.to_string(), hint)
    }

    pub(super) fn unreachable(server: &str, error: &(dyn Error + 'static)) -> Self {
        Self::new(
            Code::Unreachable,
            format!("cannot reach the coordinator at {server}"),
            connection::in_words(error),
            "is it running? start one with `handfast dev`, or choose another with --server or HANDFAST_SERVER",
        )
    }

    pub(super) fn timed_out(what: &str, server: &str, timeout: Duration) -> Self {
        Self::new(
            Code::TimedOut,
            what,
            format!("no answer from {server} within {}", humantime::format_duration(timeout)),
            "it may have taken effect; a retry does no harm. --timeout waits longer",
        )
    }

    /// The coordinator at `server` answered `what` with this status.
    pub(super) fn refused(what: &str, server: &str, status: &Status) -> Self {
        // A status with a source was made on this side: the connection broke, or what answers is no coordinator.
        if let Some(error) = status.source() {
            return Self::unreachable(server, error);
        }
        let details = status.get_error_details();
        let reason = details.error_info().filter(|info| info.domain == reason::DOMAIN);
        let hint = match reason.map_or("", |info| info.reason.as_str()) {
            reason::NEVER_RECORDED => "look for it with `handfast list`",
            reason::FORGOTTEN => {
                "how long finished transactions are kept is `retention` in the coordinator's configuration"
            }
            reason::LOST => {
                "its participants may know: look for this xid in their fences, and then `handfast resolve XID --decision confirm` or `cancel`. \
                 The coordinator's log says when and why records were lost"
            }
            reason::BRANCH_UNKNOWN => "`handfast show XID` tells its branches",
            reason::NOT_DECIDED => {
                "branches are resolved after the decision; it is decided at the latest when its timeout ends"
            }
            reason::ALREADY_ACKNOWLEDGED => {
                "there is nothing left to resolve; see `handfast show XID`"
            }
            reason::CORRUPT_RECORD => "the coordinator's log says what is wrong with it",
            reason::STOPPING
            | reason::STORE_SILENT
            | reason::OWNED_ELSEWHERE
            | reason::TOO_MANY_CALLS => "ask again in a moment; that does no harm",
            _ if status.code() == GrpcCode::Unimplemented => {
                "is it a Handfast coordinator, and not an older one?"
            }
            _ => "",
        };
        let code = match status.code() {
            GrpcCode::NotFound => Code::NotFound,
            GrpcCode::FailedPrecondition | GrpcCode::AlreadyExists => Code::Conflict,
            GrpcCode::Unavailable => Code::Unreachable,
            GrpcCode::DeadlineExceeded => Code::TimedOut,
            GrpcCode::InvalidArgument => Code::Usage,
            GrpcCode::Ok
            | GrpcCode::Cancelled
            | GrpcCode::Unknown
            | GrpcCode::PermissionDenied
            | GrpcCode::ResourceExhausted
            | GrpcCode::Aborted
            | GrpcCode::OutOfRange
            | GrpcCode::Unimplemented
            | GrpcCode::Internal
            | GrpcCode::DataLoss
            | GrpcCode::Unauthenticated => Code::Failed,
        };
        let fields = details.bad_request().into_iter().flat_map(|bad| &bad.field_violations);
        let fields: Vec<_> =
            fields.map(|field| format!("{}: {}", field.field, field.description)).collect();
        let cause = match (fields.is_empty(), status.message()) {
            (false, _) => fields.join("; "),
            (true, "") => status.code().to_string(),
            (true, message) => message.to_owned(),
        };
        // Foreign text: keep it on one line.
        let cause = one_line(&cause);
        Self::new(code, what, cause, hint)
    }
}

impl From<Invalid> for Failure {
    fn from(Invalid { what, hint }: Invalid) -> Self {
        Self::new(Code::Usage, what, "", hint)
    }
}

impl From<server::Error> for Failure {
    fn from(error: server::Error) -> Self {
        let (code, hint) = match &error {
            server::Error::Listen { address, source } => {
                let hint = if source.kind() == io::ErrorKind::AddrInUse {
                    "is there another one running? --listen chooses another port, and 0 any that is free"
                } else {
                    "--listen chooses another address of this machine, and a port above 1023"
                };
                let what = format!("cannot listen on {address}");
                return Self::new(Code::Failed, what, source.to_string(), hint);
            }
            server::Error::Acquire(store::Error::Corrupt(_)) => {
                (Code::Corrupt, "keep a copy of the store as it is before anything else is tried")
            }
            server::Error::Acquire(
                store::Error::Unavailable(_) | store::Error::Old(_) | store::Error::Replaced(_),
            )
            | server::Error::OpenFile(_)
            | server::Error::OpenServer(_)
            | server::Error::Serve(_)
            | server::Error::Signals(_) => (Code::Failed, ""),
        };
        Self::new(code, "the coordinator cannot run", error.to_string(), hint)
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(code: GrpcCode, message: &str, details: ErrorDetails) -> Failure {
        let status = Status::with_error_details(code, message, details);
        Failure::refused("cannot do it", "http://127.0.0.1:7420", &status)
    }

    fn of_reason(reason: &str) -> ErrorDetails {
        ErrorDetails::with_error_info(reason, reason::DOMAIN, [])
    }

    #[test]
    fn a_failure_is_what_why_and_what_to_do() {
        let failure = refused(
            GrpcCode::NotFound,
            "0-1-2-00000003 was never recorded",
            of_reason(reason::NEVER_RECORDED),
        );
        assert_eq!(
            failure.to_string(),
            "error: cannot do it\n\
             cause: 0-1-2-00000003 was never recorded\n\
             hint:  look for it with `handfast list`"
        );
        assert_eq!(failure.code, Code::NotFound);
    }

    #[test]
    fn scripts_can_tell_failures_apart() {
        for (code, reason, expected) in [
            (GrpcCode::NotFound, reason::FORGOTTEN, Code::NotFound),
            (GrpcCode::FailedPrecondition, reason::NOT_DECIDED, Code::Conflict),
            (GrpcCode::AlreadyExists, reason::KEY_TAKEN, Code::Conflict),
            (GrpcCode::Unavailable, reason::STORE_SILENT, Code::Unreachable),
            (GrpcCode::DeadlineExceeded, "", Code::TimedOut),
            (GrpcCode::Internal, reason::CORRUPT_RECORD, Code::Failed),
            (GrpcCode::Unimplemented, "", Code::Failed),
        ] {
            assert_eq!(refused(code, "why", of_reason(reason)).code, expected, "{code:?}");
        }
    }

    #[test]
    fn a_wrong_field_is_named() {
        let mut details = ErrorDetails::with_bad_request_violation("reason", "must not be empty");
        details.set_error_info(reason::INVALID_FIELD, reason::DOMAIN, []);
        let failure = refused(GrpcCode::InvalidArgument, "something longer", details);
        assert_eq!(
            (failure.code, failure.cause.as_str()),
            (Code::Usage, "reason: must not be empty")
        );
    }

    #[test]
    fn what_says_nothing_still_says_something() {
        let failure = refused(GrpcCode::Unknown, "", ErrorDetails::new());
        assert_eq!(failure.to_string(), "error: cannot do it\ncause: Unknown error");
    }

    #[test]
    fn an_address_that_is_taken_is_told_with_a_way_out() {
        let source = io::Error::from(io::ErrorKind::AddrInUse);
        let address = "127.0.0.1:7420".parse().unwrap();
        let failure = Failure::from(server::Error::Listen { address, source });
        assert!(failure.hint.contains("--listen"), "{failure}");
        let corrupt = store::Error::Corrupt("two owners".to_owned());
        assert_eq!(Failure::from(server::Error::Acquire(corrupt)).code, Code::Corrupt);
    }
}
