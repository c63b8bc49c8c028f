//! The fence on MySQL (8.0 or newer) and MariaDB (10.6 or newer). Both run the same SQL, so it uses neither `INSERT … AS new`
//! nor `RETURNING`.
//!
//! The isolation level may be REPEATABLE READ or READ COMMITTED. The fence reads no row before it holds the row's lock. A
//! locking read opens no snapshot, so the author's first SELECT sees the changes that the lock waited for.
//!
//! The statements run in every `sql_mode` (MariaDB's ORACLE too) and with `sql_safe_updates`.
//!
//! Many statements commit implicitly, such as CREATE TABLE. If the author's code runs one, the fence's row is committed in the
//! middle of the work. A savepoint is set together with BEGIN and released together with COMMIT. If it is gone by then, the
//! local transaction has ended before.

use std::{sync::LazyLock, time::Instant};

use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Either, Error, FromRow as _, MySql, MySqlConnection, mysql::MySqlDatabaseError,
    pool::PoolConnection,
};
use sqlx_core::transaction::TransactionManager as _;

use super::{
    db::{
        Claim, FenceDb, FoundRow, Key, Old, Overdue, OverdueColumns, Record, RecordRow, Settle,
        Statements, in_order,
    },
    millis, tx,
};

// UTC_TIMESTAMP is the time at which its statement began. So the time is read by a statement after the one that may wait for a
// lock, or the wait is added to it. UNIX_TIMESTAMP(SYSDATE(3)) would be an hour off in the night when the session's time zone
// ends daylight saving time.

// The reply to the INSERT contains the value of LAST_INSERT_ID: here, the time.
const CLAIM: &str = "
INSERT INTO handfast_fence (xid, branch_id, state, action, payload, digest, expires_at, asks, created_at, changed_at, seen)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, LAST_INSERT_ID(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000, 1)
ON DUPLICATE KEY UPDATE seen = seen + 1";

const COUNT: &str = "UPDATE handfast_fence SET seen = seen + 1 WHERE xid = ? AND branch_id = ?";

const READ: &str = "
SELECT state, action, CASE WHEN state = 1 AND seen > 1 THEN payload END, reply, digest, seen,
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000
FROM handfast_fence WHERE xid = ? AND branch_id = ? FOR UPDATE";

const SETTLE: &str = "
UPDATE handfast_fence
SET state = ?, reply = COALESCE(?, reply),
    changed_at = TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000
WHERE xid = ? AND branch_id = ? AND seen = ?";

// Locks several rows. The index is forced, because a full scan would lock the whole table. Rows that are locked by others are
// skipped. So this statement never waits, and batches never wait for each other.
const HOLD_MANY: &str = "
SELECT xid, branch_id, state, action, CASE WHEN state = 1 THEN payload END, seen + 1,
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000
FROM handfast_fence FORCE INDEX (PRIMARY) WHERE {rows} FOR UPDATE SKIP LOCKED";

const COUNT_MANY: &str =
    "UPDATE handfast_fence FORCE INDEX (PRIMARY) SET seen = seen + 1 WHERE {rows}";

const SETTLE_MANY: &str = "
UPDATE handfast_fence FORCE INDEX (PRIMARY)
SET state = ?, changed_at = TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000
WHERE {rows}";

const ROW: &str = "(xid = ? AND branch_id = ?)";
const ROW_AS_SEEN: &str = "(xid = ? AND branch_id = ? AND seen = ?)";

/// How many rows a statement can name. There are few sizes, so that few statements are prepared. A shorter list is padded by
/// repeating its last row, which changes nothing. A longer list is split over several statements.
const SIZES: [usize; 4] = [1, 4, 16, ROWS_MAX];
const ROWS_MAX: usize = 64;

/// The statements HOLD_MANY, COUNT_MANY and SETTLE_MANY for each size.
static MANY: LazyLock<[[String; 3]; 4]> = LazyLock::new(|| {
    SIZES.map(|size| {
        [(HOLD_MANY, ROW), (COUNT_MANY, ROW), (SETTLE_MANY, ROW_AS_SEEN)]
            .map(|(sql, row)| sql.replace("{rows}", &vec![row; size].join(" OR ")))
    })
});

const NOW: &str = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000";

// Two statements, so that only the deleted rows are locked. With a single DELETE, the server may scan and lock the whole table
// if it believes the table is small. It would then wait for rows of calls in flight.
const FIND_OLD: &str = "
SELECT HEX(xid), HEX(branch_id), changed_at FROM handfast_fence
WHERE state <> 1
AND changed_at <= TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000 - ?
AND (expires_at IS NULL
    OR expires_at <= TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000 - ?)
ORDER BY changed_at LIMIT ?";

// One statement for each row, for the same reason, and several statements in one packet. If `changed_at` differs, the row has been
// replaced since it was found.
const DELETE: &str = "DELETE FROM handfast_fence WHERE xid = x'{xid}' AND branch_id = x'{branch_id}' AND changed_at = ";

// The condition on `expires_at` alone lets the server start at the right place in the index. InnoDB adds the primary key to each index, so
// the index has this order.
pub(super) const OVERDUE: &str = "
SELECT expires_at, xid, branch_id, action, asks FROM handfast_fence
WHERE state = 1
AND expires_at <= TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000 - ?
AND expires_at >= ? AND (expires_at > ? OR xid > ? OR xid = ? AND branch_id > ?)
ORDER BY expires_at, xid, branch_id LIMIT ?";

const HAS_TRIED_INDEX: &str = "
SELECT COUNT(*) FROM information_schema.statistics
WHERE table_schema = DATABASE() AND table_name = 'handfast_fence' AND index_name = 'handfast_fence_tried'";

// Building the index takes no lock. Only its begin and its end wait until no local transaction uses the table, and calls wait behind it.
const WAIT_BRIEFLY: &str = "SET SESSION lock_wait_timeout = 3";

const ASKING: &str =
    "SELECT branch_id, action FROM handfast_fence WHERE xid = ? AND state = 1 AND asks = 1";

const COLUMNS: &str = "
SELECT CAST(column_name AS CHAR), CAST(data_type AS CHAR), CAST(column_key = 'PRI' AS SIGNED)
FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = 'handfast_fence'";

// One packet each, like BEGIN. If a statement fails, the server does not execute those after it. So if the savepoint is gone,
// there is no COMMIT.
//
// MySQL cannot set this lock timeout for a single local transaction, so it is set back for the session. After COMMIT, this is the
// only statement. Once it runs, the work is durable, and a lost reply is a lost reply to COMMIT.
const COMMIT: &str = "
RELEASE SAVEPOINT handfast_begun;
COMMIT;
SET SESSION innodb_lock_wait_timeout = @handfast_lock_wait";
const ROLLBACK: &str = "
ROLLBACK TO SAVEPOINT handfast_begun;
ROLLBACK;
SET SESSION innodb_lock_wait_timeout = @handfast_lock_wait";
const RESTORE: &str = "SET SESSION innodb_lock_wait_timeout = @handfast_lock_wait";
/// The server's error for a savepoint that does not exist.
const NO_SAVEPOINT: u16 = 1305;

// Follows SETTLE in the packet of COMMIT. Fails unless SETTLE has written its row: otherwise, the sum does not fit into a BIGINT.
// (MySQL has no statement that fails on a condition, except in a stored procedure. Every `sql_mode` has this error. It cannot come
// before SETTLE, as the error of a constant could. DO would ignore it.)
const ONE_ROW: &str = "SET @handfast_settled = 9223372036854775807 + (1 - ROW_COUNT())";
/// The server's error for a number that is out of range.
const NOT_ONE_ROW: u16 = 1690;

/// The server's errors on a connection that takes no changes: `read_only` or `super_read_only` (a replica, or a primary that was
/// replaced), a server in read-only mode, a read-only session, and a Galera member outside its cluster.
const CANNOT_WRITE: [u16; 4] = [1290, 1836, 1792, 1047];

type Manager = <MySql as sqlx::Database>::TransactionManager;

impl FenceDb for MySql {}

impl Statements for MySql {
    // One packet, one round trip. (In MySQL, LEAST of two integers does not have an integer type, so it is cast. In ORACLE mode,
    // BEGIN would begin a block of statements.)
    const BEGIN: &'static str = "
SET @handfast_lock_wait = @@SESSION.innodb_lock_wait_timeout;
SET SESSION innodb_lock_wait_timeout = CAST(LEAST(3, @@SESSION.innodb_lock_wait_timeout) AS SIGNED);
START TRANSACTION;
SAVEPOINT handfast_begun";
    const SCHEMA: &'static str = super::SCHEMA_MYSQL;
    const SCHEMA_FILE: &'static str = "schema/mysql.sql";
    const ADD_ASKS: &'static str = "ALTER TABLE handfast_fence ADD COLUMN asks SMALLINT NULL \
        COMMENT '1: the transaction may be lost without a Cancel, so this service asks about the branch from expires_at on. NULL: it does not'";
    const COLUMNS: [(&'static str, &'static str); 12] = [
        ("xid", "binary"),
        ("branch_id", "binary"),
        ("state", "smallint"),
        ("action", "varchar"),
        ("payload", "mediumblob"),
        ("reply", "mediumblob"),
        ("digest", "binary"),
        ("expires_at", "bigint"),
        ("created_at", "bigint"),
        ("changed_at", "bigint"),
        ("seen", "bigint"),
        ("asks", "smallint"),
    ];

    const ADD_TRIED_INDEX: &'static str = "ALTER TABLE handfast_fence ADD INDEX handfast_fence_tried (state, expires_at), ALGORITHM = INPLACE, LOCK = NONE";

    const BATCHES_AT_A_TIME: usize = 1;

    async fn claim(connection: &mut MySqlConnection, claim: &Claim<'_>) -> Result<Record, Error> {
        if let Claim { payload: None, digest: None, .. } = claim {
            let [xid, branch_id] = literals(claim.key);
            let state = claim.state.code().to_string();
            let action = format!("_utf8mb4 {}", literal(claim.action.as_bytes()));
            let null = || "NULL".to_owned();
            let expires_at = claim.expires_at.map_or_else(null, |at| at.to_string());
            let values = [xid, branch_id, state, action, null(), null(), expires_at, null()];
            let insert = with_values(CLAIM, &values);
            let (_, record) = write_and_read(connection, &insert, claim.key).await?;
            return record.ok_or(Error::RowNotFound);
        }
        let began = Instant::now();
        let claimed = sqlx::query(CLAIM)
            .bind(&claim.key.xid[..])
            .bind(&claim.key.branch_id[..])
            .bind(claim.state.code())
            .bind(claim.action)
            .bind(claim.payload)
            .bind(claim.digest)
            .bind(claim.expires_at)
            .bind(claim.asks)
            .execute(&mut *connection)
            .await?;
        // The count is 1 for an INSERT, and 2 for an UPDATE that changes the row, as this one always does.
        let inserted_at = i64::try_from(claimed.last_insert_id()).unwrap_or_default();
        if claimed.rows_affected() == 1 && inserted_at > 0 {
            return Ok(Record {
                state: claim.state,
                action: claim.action.to_owned(),
                payload: None,
                reply: None,
                digest: claim.digest.map(<[u8]>::to_vec),
                seen: 1,
                // The INSERT may have waited for a lock, but no longer than this call has waited for its reply. So this is not
                // before the row was locked. (Both are rounded down, hence 1.)
                now: inserted_at.saturating_add(millis(began.elapsed())).saturating_add(1),
            });
        }
        read(connection, claim.key).await
    }

    async fn find(connection: &mut MySqlConnection, key: &Key) -> Result<Option<Record>, Error> {
        let count = with_values(COUNT, &literals(key));
        let (counted, record) = write_and_read(connection, &count, key).await?;
        // Without an UPDATE, a row that READ has found is too new: this call is not in its count.
        Ok(record.filter(|_| counted == 1))
    }

    async fn find_many(
        connection: &mut MySqlConnection,
        keys: &[Key],
    ) -> Result<Vec<Option<Record>>, Error> {
        let mut found = Vec::with_capacity(keys.len());
        for keys in keys.chunks(ROWS_MAX) {
            let (rows, [hold, ..]) = filled(keys);
            let mut query = sqlx::query_as::<_, FoundRow>(hold);
            for key in rows {
                query = query.bind(&key.xid[..]).bind(&key.branch_id[..]);
            }
            found.extend(in_order(keys, query.fetch_all(&mut *connection).await?)?);
        }
        let held = keys.iter().zip(&found).filter(|(_, record)| record.is_some());
        let held: Vec<_> = held.map(|(key, _)| key).collect();
        for keys in held.chunks(ROWS_MAX) {
            let (rows, [_, count, _]) = filled(keys);
            let mut query = sqlx::query(count);
            for key in rows {
                query = query.bind(&key.xid[..]).bind(&key.branch_id[..]);
            }
            query.execute(&mut *connection).await?;
        }
        Ok(found)
    }

    async fn settle_many(
        connection: &mut MySqlConnection,
        settles: &[Settle<'_>],
    ) -> Result<u64, Error> {
        let mut done = 0;
        for settles in settles.chunks(ROWS_MAX) {
            let (rows, [.., settle]) = filled(settles);
            let mut query = sqlx::query(settle).bind(settles[0].state.code());
            for Settle { key, seen, .. } in rows {
                query = query.bind(&key.xid[..]).bind(&key.branch_id[..]).bind(seen);
            }
            done += query.execute(&mut *connection).await?.rows_affected();
        }
        Ok(done)
    }

    async fn settle(connection: &mut MySqlConnection, settle: &Settle<'_>) -> Result<u64, Error> {
        // sqlx sets CLIENT_FOUND_ROWS, so a row that matches counts even if nothing in it changed.
        let done = sqlx::query(SETTLE)
            .bind(settle.state.code())
            .bind(settle.reply)
            .bind(&settle.key.xid[..])
            .bind(&settle.key.branch_id[..])
            .bind(settle.seen)
            .execute(connection)
            .await?;
        Ok(done.rows_affected())
    }

    async fn now(connection: &mut MySqlConnection) -> Result<i64, Error> {
        sqlx::query_scalar(NOW).fetch_one(connection).await
    }

    async fn execute(connection: &mut MySqlConnection, sql: &'static str) -> Result<(), Error> {
        sqlx::raw_sql(sql).execute(connection).await?;
        Ok(())
    }

    /// A reply is not sent as text: sqlx logs the text of a slow statement, and a reply is never logged.
    ///
    /// If a connection breaks in the middle of the message, the server executes none of it, and rolls back. If the reply is lost,
    /// the server has executed a part of the message that either ends before COMMIT (and rolls back), or contains it. So the
    /// outcome is unknown, as after any lost reply to COMMIT. A call that is dropped at this place has sent its COMMIT.
    fn settle_at_commit(settle: &Settle<'_>) -> Option<String> {
        if settle.reply.is_some_and(|reply| !reply.is_empty()) {
            return None;
        }
        let [xid, branch_id] = literals(settle.key);
        let (state, seen) = (settle.state.code().to_string(), settle.seen.to_string());
        let reply = settle.reply.map_or_else(|| "NULL".to_owned(), literal);
        let update = with_values(SETTLE, &[state, reply, xid, branch_id, seen]);
        Some(format!("{update}; {ONE_ROW}"))
    }

    async fn commit(connection: &mut MySqlConnection, last: Option<String>) -> Result<(), Error> {
        if Manager::get_transaction_depth(connection) > 1 {
            return Manager::commit(connection).await; // the caller notices the open savepoint, and abandons the connection
        }
        let committed = match last {
            // Hexadecimal digits and numbers only.
            Some(last) => {
                let sql = AssertSqlSafe(format!("{last}; {COMMIT}"));
                sqlx::raw_sql(sql).execute(&mut *connection).await.map(drop)
            }
            None => Self::execute(connection, COMMIT).await,
        };
        match committed {
            Err(error) if matches!(number(&error), Some(NO_SAVEPOINT | NOT_ONE_ROW)) => {
                return Err(tx::ended());
            }
            committed => committed?,
        }
        // sqlx counts only its own COMMIT. This makes it count. The pool sends it when it tests the returned connection, so no call
        // waits for it.
        Manager::start_rollback(connection);
        Ok(())
    }

    async fn rollback(connection: &mut MySqlConnection) -> Result<bool, Error> {
        if Manager::get_transaction_depth(connection) > 1 {
            return Manager::rollback(connection).await.map(|()| true);
        }
        let undone = match Self::execute(connection, ROLLBACK).await {
            Err(error) if number(&error) == Some(NO_SAVEPOINT) => false,
            rolled_back => rolled_back.map(|()| true)?,
        };
        Manager::start_rollback(connection);
        Ok(undone)
    }

    fn cannot_write(error: &Error) -> bool {
        number(error).is_some_and(|number| CANNOT_WRITE.contains(&number))
    }

    async fn delete_old(connection: &mut MySqlConnection, old: &Old) -> Result<u64, Error> {
        let found: Vec<(String, String, i64)> = sqlx::query_as(FIND_OLD)
            .bind(old.retention_millis)
            .bind(old.margin_millis)
            .bind(old.limit)
            .fetch_all(&mut *connection)
            .await?;
        let mut deleted = 0;
        for rows in found.chunks(ROWS_MAX) {
            let deletes = rows.iter().map(|(xid, branch_id, changed_at)| {
                let delete = DELETE.replace("{xid}", xid).replace("{branch_id}", branch_id);
                format!("{delete}{changed_at}")
            });
            let deletes = deletes.collect::<Vec<_>>().join("; ");
            // Hexadecimal digits and numbers only.
            let done = sqlx::raw_sql(AssertSqlSafe(deletes)).execute(&mut *connection).await?;
            deleted += done.rows_affected();
        }
        Ok(deleted)
    }

    async fn overdue(
        connection: &mut MySqlConnection,
        overdue: &Overdue<'_>,
    ) -> Result<Vec<OverdueColumns>, Error> {
        sqlx::query_as(OVERDUE)
            .bind(overdue.margin_millis)
            .bind(overdue.after.expires_at)
            .bind(overdue.after.expires_at)
            .bind(&overdue.after.xid)
            .bind(&overdue.after.xid)
            .bind(&overdue.after.branch_id)
            .bind(overdue.limit)
            .fetch_all(connection)
            .await
    }

    async fn asking(
        connection: &mut MySqlConnection,
        xid: &[u8; 16],
    ) -> Result<Vec<(Vec<u8>, String)>, Error> {
        sqlx::query_as(ASKING).bind(&xid[..]).fetch_all(connection).await
    }

    async fn columns(
        connection: &mut MySqlConnection,
    ) -> Result<Vec<(String, String, bool)>, Error> {
        let columns: Vec<(String, String, i64)> =
            sqlx::query_as(COLUMNS).fetch_all(connection).await?;
        Ok(columns.into_iter().map(|(name, kind, key)| (name, kind, key != 0)).collect())
    }

    async fn has_tried_index(connection: &mut MySqlConnection) -> Result<bool, Error> {
        let count: i64 = sqlx::query_scalar(HAS_TRIED_INDEX).fetch_one(connection).await?;
        Ok(count > 0)
    }

    async fn define(connection: &mut MySqlConnection, sql: &'static str) -> Result<(), Error> {
        Self::execute(connection, sql).await?;
        // The statements above have committed, and the caller commits again.
        Self::execute(connection, "START TRANSACTION; SAVEPOINT handfast_begun").await
    }

    /// The connection is closed afterwards, so its settings do not matter.
    async fn add_tried_index(connection: &mut MySqlConnection) -> Result<(), Error> {
        Self::execute(connection, WAIT_BRIEFLY).await?;
        Self::execute(connection, Self::ADD_TRIED_INDEX).await
    }

    async fn restore(connection: &mut MySqlConnection) -> Result<(), Error> {
        Self::execute(connection, RESTORE).await
    }

    /// Closes the connection. It may be in the middle of a statement, and sqlx advises against reusing such a connection: the
    /// reply to the dropped statement would be taken for the reply to ROLLBACK. The server rolls back when it notices the closed
    /// connection.
    fn abandon(mut connection: PoolConnection<Self>) {
        connection.close_on_drop();
    }
}

/// Picks the smallest size that holds these rows. Returns the padded rows and the statements of that size. `rows` has 1 to
/// [`ROWS_MAX`] entries.
fn filled<T>(rows: &[T]) -> (impl Iterator<Item = &T>, [&'static str; 3]) {
    let size = SIZES.iter().position(|size| rows.len() <= *size).unwrap_or(SIZES.len() - 1);
    let last = rows.len() - 1;
    let rows = (0..SIZES[size]).map(move |n| &rows[n.min(last)]);
    (rows, MANY[size].each_ref().map(String::as_str))
}

/// Executes a statement of hexadecimal digits and numbers that writes to this row, and reads the row, in one packet. Returns the
/// number of rows that the statement has written, and the row.
///
/// As in two packets, the row is read once it is locked, and a failure of the first statement prevents the second. Neither is
/// visible to others before COMMIT, so a lost reply has no effect.
async fn write_and_read(
    connection: &mut MySqlConnection,
    write: &str,
    key: &Key,
) -> Result<(u64, Option<Record>), Error> {
    let read = with_values(READ, &literals(key));
    let sql = AssertSqlSafe(format!("{write}; {read}"));
    let results: Vec<_> = sqlx::raw_sql(sql).fetch_many(connection).try_collect().await?;
    let written = results.first().and_then(|result| result.as_ref().left());
    let written = written.map_or(0, |written| written.rows_affected());
    let row = results.into_iter().find_map(Either::right);
    let record = row.map(|row| RecordRow::from_row(&row)?.try_into()).transpose()?;
    Ok((written, record))
}

/// A statement as text, with these values in place of its question marks. Each is a number, NULL or a [`literal`].
fn with_values(sql: &str, values: &[String]) -> String {
    values.iter().fold(sql.to_owned(), |sql, value| sql.replacen('?', value, 1))
}

/// The key's two parts as SQL text.
fn literals(key: &Key) -> [String; 2] {
    [literal(&key.xid), literal(&key.branch_id)]
}

/// Bytes as SQL text, in hexadecimal. It means the same in every `sql_mode`.
fn literal(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    let digits = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
    ['x', '\''].into_iter().chain(digits).chain(['\'']).collect()
}

async fn read(connection: &mut MySqlConnection, key: &Key) -> Result<Record, Error> {
    sqlx::query_as::<_, RecordRow>(READ)
        .bind(&key.xid[..])
        .bind(&key.branch_id[..])
        .fetch_one(connection)
        .await?
        .try_into()
}

/// The server's number for the error, if the server has reported one.
fn number(error: &Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}
