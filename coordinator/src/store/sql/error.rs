//! Errors of databases, sorted by what the caller can do.

use crate::store::Error;

impl From<sqlx::Error> for Error {
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "whatever else goes wrong may go well the next time"
    )]
    fn from(error: sqlx::Error) -> Self {
        match &error {
            // What cannot be decoded will not be the next time either.
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Decode(_)
            | sqlx::Error::ColumnNotFound(_) => Self::Corrupt(error.to_string()),
            // Nor will what breaks a constraint, or does not fit its column (SQLSTATE classes 22 and 23), be taken the next time.
            sqlx::Error::Database(refused)
                if refused.kind() != sqlx::error::ErrorKind::Other
                    || refused.code().is_some_and(|code| code.starts_with("22")) =>
            {
                Self::Corrupt(error.to_string())
            }
            _ => Self::unavailable(error),
        }
    }
}
