//! Whether the server keeps what it acknowledges, and why a store cannot be opened.

use sqlx::Row as _;
use tracing::warn;

use super::Connection;
use crate::store::sql::CALL_TIMEOUT;

/// The least value of `max_allowed_packet`. A batch stays below a quarter of it.
const PACKET_BYTES_MIN: i64 = 16 * 1024 * 1024;
/// Values of `innodb_doublewrite` with which a half-written page cannot be repaired.
const NO_DOUBLEWRITE: [&str; 4] = ["0", "OFF", "DETECT_ONLY", "off"];

/// Why a store cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL is not valid.
    #[error(
        "the store's URL is not a database URL: {0}; one looks like mysql://user:password@host:3306/database"
    )]
    Url(String),
    /// The server cannot be reached, or refuses the login.
    #[error("cannot connect to the store: {0}")]
    Connect(String),
    /// The server does not answer.
    #[error("the store does not answer within {} seconds", CALL_TIMEOUT.as_secs())]
    TimedOut(#[from] tokio::time::error::Elapsed),
    /// The tables are missing, or have another version.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The server could lose what it acknowledges, or accepts no writes.
    #[error("the store's server is not configured for durable commits:{}", .0.iter().map(|flaw| format!("\n  - {flaw}")).collect::<String>())]
    Unsafe(Vec<String>),
    /// The server does not tell its settings.
    #[error("cannot ask the store's server how it is set up: {0}")]
    Ask(#[from] sqlx::Error),
}

/// The tables do not have the version that this program needs.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// There are no tables, or older ones.
    #[error(
        "the store has {}, and this program needs version {needed}: run `handfast migrate --store URL` first \
         (with --dry-run it only prints what it would do)",
        match found { 0 => "no tables yet".to_owned(), version => format!("schema version {version}") }
    )]
    Older {
        /// The version found. 0: there are no tables.
        found: usize,
        /// The version that this program needs.
        needed: usize,
    },
    /// Another process is migrating the tables.
    #[error(
        "another `handfast migrate` has been at work on this store for {waited_seconds} seconds; run this again when it is done"
    )]
    Busy {
        /// How long this process has waited.
        waited_seconds: u32,
    },
    /// A newer program has migrated the tables.
    #[error(
        "the store has schema version {found}, and this program knows versions up to {known}; it was written by a newer version: run that version"
    )]
    Newer {
        /// The version found.
        found: usize,
        /// The newest version that this program knows.
        known: usize,
    },
}

/// Checks for every setting that could lose acknowledged commits.
pub(super) async fn check(
    connection: &mut Connection,
    allow_unsafe: bool,
) -> Result<(), OpenError> {
    let flaws = tokio::time::timeout(CALL_TIMEOUT, flaws(connection)).await??;
    if flaws.is_empty() {
        return Ok(());
    }
    if !allow_unsafe {
        return Err(OpenError::Unsafe(flaws));
    }
    for flaw in flaws {
        warn!(
            flaw,
            "the store's server is not configured for durable commits, and store_unsafe allows it: decisions may be lost"
        );
    }
    Ok(())
}

/// The unsafe settings, each with its remedy.
async fn flaws(connection: &mut Connection) -> Result<Vec<String>, sqlx::Error> {
    let settings = sqlx::query(
        "SELECT CAST(@@innodb_flush_log_at_trx_commit AS SIGNED), CAST(@@log_bin AS SIGNED), CAST(@@sync_binlog AS SIGNED), \
         CAST(@@innodb_doublewrite AS CHAR), CAST(@@read_only AS SIGNED), CAST(@@max_allowed_packet AS SIGNED)",
    )
    .fetch_one(&mut *connection)
    .await?;
    let [flush, log_bin, sync_binlog] = [0, 1, 2].map(|n| settings.try_get::<i64, _>(n));
    let doublewrite: String = settings.try_get(3)?;
    let [read_only, packet] = [4, 5].map(|n| settings.try_get::<i64, _>(n));
    let mut flaws = Vec::new();
    let flush = flush?;
    if flush != 1 {
        flaws.push(format!(
            "innodb_flush_log_at_trx_commit is {flush}: a crash loses commits. SET GLOBAL innodb_flush_log_at_trx_commit = 1 (and in its configuration)"
        ));
    }
    let sync_binlog = sync_binlog?;
    let log_bin = log_bin?;
    if log_bin == 1 && sync_binlog != 1 {
        flaws.push(format!(
            "sync_binlog is {sync_binlog}: a crash loses commits from the binary log. SET GLOBAL sync_binlog = 1 (and in its configuration)"
        ));
    }
    if NO_DOUBLEWRITE.contains(&doublewrite.as_str()) {
        flaws.push(format!(
            "innodb_doublewrite is {doublewrite}: a crash may tear a page for ever. Set innodb_doublewrite = ON in its configuration, and restart it"
        ));
    }
    if read_only? == 1 {
        flaws.push(
            "it is read-only (read_only = 1), and a coordinator has to write. Connect to the primary; never make a secondary of a group writable by hand"
                .to_owned(),
        );
    }
    let packet = packet?;
    if packet < PACKET_BYTES_MIN {
        flaws.push(format!(
            "max_allowed_packet is {packet}, and must be {PACKET_BYTES_MIN} or more. SET GLOBAL max_allowed_packet = {PACKET_BYTES_MIN} (and in its configuration)"
        ));
    }
    let format: Option<(String,)> = sqlx::query_as("SELECT CAST(@@binlog_format AS CHAR)")
        .fetch_optional(&mut *connection)
        .await
        .unwrap_or_default(); // a server that does not have it any more writes rows
    if log_bin == 1 && format.is_some_and(|(format,)| format == "STATEMENT") {
        flaws.push(
            "binlog_format is STATEMENT: it refuses what a coordinator writes. SET GLOBAL binlog_format = ROW (and in its configuration)"
                .to_owned(),
        );
    }
    if super::member::is_replica(connection).await {
        flaws.push("it is a replica: what is written here is not on its source, and may be overwritten. Connect to the source".to_owned());
    }
    Ok(flaws)
}
