//! Database errors, sorted by what the caller can do.

use sqlx::{error::DatabaseError, mysql::MySqlDatabaseError, sqlite::SqliteError};

use crate::store::Error;

/// MySQL's error numbers for a login that is refused: the password, the host, or a user that does not exist.
const NO_LOGIN: [u16; 3] = [1045, 1130, 1698];
/// MySQL's error numbers for missing privileges (to use a database, a table, a column, a view or a routine).
const NO_PRIVILEGE: [u16; 5] = [1044, 1142, 1143, 1227, 1370];
/// SQLite's primary codes for a file that is damaged (SQLITE_CORRUPT), or no database at all (SQLITE_NOTADB).
const DAMAGED_FILE: [i32; 2] = [11, 26];

impl From<sqlx::Error> for Error {
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "whatever else goes wrong may go well the next time"
    )]
    fn from(error: sqlx::Error) -> Self {
        match &error {
            // A value that cannot be decoded cannot be decoded on a retry either.
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Decode(_)
            | sqlx::Error::ColumnNotFound(_) => Self::Corrupt(error.to_string()),
            // sqlx returns this error when a password would be sent unencrypted.
            sqlx::Error::Configuration(_) => Self::Corrupt(format!(
                "the store cannot be logged in to: {error}. A user with caching_sha2_password or sha256_password needs TLS: add \
                 ?ssl-mode=REQUIRED to its URL"
            )),
            sqlx::Error::Database(refused) => match refusal(&**refused) {
                Some(what) => Self::Corrupt(what),
                None => Self::unavailable(error),
            },
            _ => Self::unavailable(error),
        }
    }
}

/// The text of an error that a retry cannot fix. `None`: a retry may succeed.
fn refusal(refused: &dyn DatabaseError) -> Option<String> {
    if let Some(mysql) = refused.try_downcast_ref::<MySqlDatabaseError>()
        && NO_LOGIN.contains(&mysql.number())
    {
        return Some(format!(
            "the store's server refuses the login: {mysql}. Check the user and the password in the store's URL, and from where the \
             user may log in"
        ));
    }
    if let Some(mysql) = refused.try_downcast_ref::<MySqlDatabaseError>()
        && NO_PRIVILEGE.contains(&mysql.number())
    {
        return Some(format!(
            "the store's server refuses it: {mysql}. The store's user needs SELECT, INSERT, UPDATE and DELETE on all of its tables"
        ));
    }
    if is_damaged_file(refused) {
        return Some(format!(
            "the store's file is damaged: {refused}. Stop this coordinator, keep the file and its -wal, and restore a backup \
             (`handfast restore`)"
        ));
    }
    is_about_rows(refused).then(|| refused.to_string())
}

/// Whether a row breaks a constraint or does not fit its column (SQLSTATE classes 22 and 23).
pub(super) fn is_about_rows(refused: &dyn DatabaseError) -> bool {
    let breaks = refused.kind() != sqlx::error::ErrorKind::Other;
    let does_not_fit = refused.code().is_some_and(|code| code.starts_with("22"));
    breaks || does_not_fit
}

/// Whether SQLite cannot make sense of the file.
pub(in crate::store) fn is_damaged_file(refused: &dyn DatabaseError) -> bool {
    let Some(sqlite) = refused.try_downcast_ref::<SqliteError>() else { return false };
    // The lowest byte of an extended code is the primary code.
    let code = sqlite.code().and_then(|code| code.parse::<i32>().ok()).map(|code| code & 0xff);
    code.is_some_and(|code| DAMAGED_FILE.contains(&code))
}
