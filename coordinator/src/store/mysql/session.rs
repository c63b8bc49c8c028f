//! What a connection needs, whatever the server's defaults and the URL say. It is set in one message, before anything else is sent.
//!
//! Each of these defaults has broken a store: `sql_mode` with ORACLE or ANSI, `sql_safe_updates` (an UPDATE without a key), another
//! character set, `autocommit` off, `completion_type` CHAIN (a COMMIT begins another local transaction), `sql_select_limit` (a
//! read that ends early), limits of the time or the size of a query, READ ONLY as the default for transactions.

use crate::store::sql::{CALL_TIMEOUT, Role};

/// A writing connection without a statement for this many seconds is closed by the server. Otherwise an owner that died with an
/// open batch would keep its rows locked.
pub(super) const SILENCE_MAX_SECONDS: u32 = 5;
/// The same for the connection of the purge. It is longer than the pause between two rounds of the purge.
const CLEANER_SILENCE_MAX_SECONDS: u32 = 15;
/// The same for a reading connection. It is checked before it is used again.
const READER_SILENCE_MAX_SECONDS: u32 = 600;
/// How long `migrate` waits for other connections to let go of a table.
const MIGRATION_LOCK_SECONDS: u32 = 60;

/// For every connection. MySQL reads the first kind of comment, MariaDB the second one.
const EVERY: &str = "NAMES utf8mb4, autocommit = 1, sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00', \
                     sql_safe_updates = 0, sql_big_selects = 1, sql_select_limit = 18446744073709551615, sql_auto_is_null = 0, \
                     completion_type = 0, foreign_key_checks = 1, unique_checks = 1 \
                     /*!80000 , max_execution_time = 0, range_optimizer_max_mem_size = 0 */ \
                     /*M!100000 , max_statement_time = 0 */";

/// The statements that set up a connection for `role`. `None`: for a check at the start, or `migrate`.
pub(super) fn set_up(role: Option<Role>) -> String {
    let (isolation, more) = match role {
        // MySQL's wait_timeout also closes a silent connection in the middle of a transaction. MariaDB needs its own variable too.
        Some(Role::Write) => (
            "READ COMMITTED",
            format!(
                "wait_timeout = {SILENCE_MAX_SECONDS}, net_read_timeout = {SILENCE_MAX_SECONDS}, \
                 innodb_lock_wait_timeout = {SILENCE_MAX_SECONDS}, lock_wait_timeout = {SILENCE_MAX_SECONDS} \
                 /*M!100000 , idle_write_transaction_timeout = {SILENCE_MAX_SECONDS} */"
            ),
        ),
        // Its local transactions see one snapshot.
        Some(Role::Read) => (
            "REPEATABLE READ",
            format!(
                "wait_timeout = {READER_SILENCE_MAX_SECONDS}, lock_wait_timeout = {SILENCE_MAX_SECONDS} \
                 /*M!100000 , idle_transaction_timeout = 0, idle_readonly_transaction_timeout = 0 */"
            ),
        ),
        // The purge locks only the rows that it deletes. In REPEATABLE READ it would also lock the gaps beside the branches, and
        // writers of newer branches would wait. Its lock timeout is shorter than our deadline, so that an abandoned delete does
        // not go on at the server. The server closes the connection when it is silent, even during a delete, because the next
        // owner would have to wait.
        Some(Role::CleanUp) => (
            "READ COMMITTED",
            format!(
                "wait_timeout = {CLEANER_SILENCE_MAX_SECONDS}, innodb_lock_wait_timeout = {wait}, lock_wait_timeout = {wait}",
                wait = CALL_TIMEOUT.as_secs() / 2
            ),
        ),
        None => ("REPEATABLE READ", format!("lock_wait_timeout = {MIGRATION_LOCK_SECONDS}")),
    };
    format!(
        "SET SESSION TRANSACTION ISOLATION LEVEL {isolation}, READ WRITE; SET SESSION {more}; SET {EVERY}"
    )
}
