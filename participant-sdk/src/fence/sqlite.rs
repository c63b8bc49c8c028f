//! The fence on SQLite (3.42 or newer; the feature `sqlite` bundles one).
//!
//! A local transaction begins with `BEGIN IMMEDIATE`. It has the write lock from the start, so no later statement waits or fails
//! for a lock. The pool's `busy_timeout` limits the wait for that lock (sqlx: 5 s unless set); SQLite has no other lock timeout.

use sqlx::{Connection as _, Error, Pool, Sqlite, SqliteConnection, pool::PoolConnection};
use sqlx_core::transaction::TransactionManager as _;

use super::{
    db::{
        Claim, FenceDb, Key, Old, Overdue, OverdueColumns, Record, RecordRow, Settle, Statements,
    },
    tx::GIVE_BACK_WITHIN,
};

const CLAIM: &str = "
INSERT INTO handfast_fence (xid, branch_id, state, action, payload, digest, expires_at, asks, created_at, changed_at, seen)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, CAST(round(unixepoch('subsec') * 1000) AS INTEGER),
    CAST(round(unixepoch('subsec') * 1000) AS INTEGER), 1)
ON CONFLICT (xid, branch_id) DO UPDATE SET seen = seen + 1
RETURNING state, action, CASE WHEN state = 1 AND seen > 1 THEN payload END, reply, digest, seen,
    CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

const FIND: &str = "
UPDATE handfast_fence SET seen = seen + 1 WHERE xid = ?1 AND branch_id = ?2
RETURNING state, action, CASE WHEN state = 1 THEN payload END, reply, digest, seen,
    CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

const SETTLE: &str = "
UPDATE handfast_fence
SET state = ?3, reply = coalesce(?4, reply), changed_at = CAST(round(unixepoch('subsec') * 1000) AS INTEGER)
WHERE xid = ?1 AND branch_id = ?2 AND seen = ?5";

const NOW: &str = "SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

const DELETE_OLD: &str = "
DELETE FROM handfast_fence WHERE rowid IN (
    SELECT rowid FROM handfast_fence
    WHERE state <> 1
    AND changed_at <= CAST(round(unixepoch('subsec') * 1000) AS INTEGER) - ?1
    AND (expires_at IS NULL OR expires_at <= CAST(round(unixepoch('subsec') * 1000) AS INTEGER) - ?2)
    ORDER BY changed_at LIMIT ?3
)";

pub(super) const OVERDUE: &str = "
SELECT expires_at, xid, branch_id, action, asks FROM handfast_fence
WHERE state = 1 AND expires_at <= CAST(round(unixepoch('subsec') * 1000) AS INTEGER) - ?1
AND (expires_at, xid, branch_id) > (?2, ?3, ?4)
ORDER BY expires_at, xid, branch_id LIMIT ?5";

const HAS_TRIED_INDEX: &str =
    "SELECT count(*) FROM sqlite_schema WHERE type = 'index' AND name = 'handfast_fence_tried'";

const ASKING: &str =
    "SELECT branch_id, action FROM handfast_fence WHERE xid = ?1 AND state = 1 AND asks = 1";

const COLUMNS: &str = "SELECT name, type, pk > 0 FROM pragma_table_info('handfast_fence')";

impl FenceDb for Sqlite {}

impl Statements for Sqlite {
    const BEGIN: &'static str = "BEGIN IMMEDIATE";
    const BEGIN_READING: &'static str = "BEGIN";
    const SCHEMA: &'static str = super::SCHEMA_SQLITE;
    const SCHEMA_FILE: &'static str = "schema/sqlite.sql";
    const ADD_ASKS: &'static str = "ALTER TABLE handfast_fence ADD COLUMN asks INTEGER";
    const COLUMNS: [(&'static str, &'static str); 12] = [
        ("xid", "blob"),
        ("branch_id", "blob"),
        ("state", "integer"),
        ("action", "text"),
        ("payload", "blob"),
        ("reply", "blob"),
        ("digest", "blob"),
        ("expires_at", "integer"),
        ("created_at", "integer"),
        ("changed_at", "integer"),
        ("seen", "integer"),
        ("asks", "integer"),
    ];

    const ADD_TRIED_INDEX: &'static str = "CREATE INDEX IF NOT EXISTS handfast_fence_tried ON handfast_fence (expires_at, xid, branch_id) WHERE state = 1";

    // SQLite allows one writer at a time.
    const BATCHES_AT_A_TIME: usize = 1;

    /// Acquires in a separate task that continues when the caller gives up. sqlx pings a connection before use, and closes it if
    /// its user is dropped meanwhile. With `sqlite::memory:`, closing the connection would delete the database.
    async fn acquire(pool: &Pool<Self>) -> Result<PoolConnection<Self>, Error> {
        let pool = pool.clone();
        let acquired = tokio::spawn(async move { pool.acquire().await });
        acquired.await.unwrap_or_else(|_| Err(Error::PoolClosed)) // the runtime is stopping
    }

    async fn claim(connection: &mut SqliteConnection, claim: &Claim<'_>) -> Result<Record, Error> {
        sqlx::query_as::<_, RecordRow>(CLAIM)
            .bind(&claim.key.xid[..])
            .bind(&claim.key.branch_id[..])
            .bind(claim.state.code())
            .bind(claim.action)
            .bind(claim.payload)
            .bind(claim.digest)
            .bind(claim.expires_at)
            .bind(claim.asks)
            .fetch_one(connection)
            .await?
            .try_into()
    }

    async fn find(connection: &mut SqliteConnection, key: &Key) -> Result<Option<Record>, Error> {
        sqlx::query_as::<_, RecordRow>(FIND)
            .bind(&key.xid[..])
            .bind(&key.branch_id[..])
            .fetch_optional(connection)
            .await?
            .map(Record::try_from)
            .transpose()
    }

    // There is no server and no round trip, so one query per row costs little.
    async fn find_many(
        connection: &mut SqliteConnection,
        keys: &[Key],
    ) -> Result<Vec<Option<Record>>, Error> {
        let mut records = Vec::with_capacity(keys.len());
        for key in keys {
            records.push(Self::find(connection, key).await?);
        }
        Ok(records)
    }

    async fn settle_many(
        connection: &mut SqliteConnection,
        settles: &[Settle<'_>],
    ) -> Result<u64, Error> {
        let mut done = 0;
        for settle in settles {
            done += Self::settle(connection, settle).await?;
        }
        Ok(done)
    }

    async fn settle(connection: &mut SqliteConnection, settle: &Settle<'_>) -> Result<u64, Error> {
        let done = sqlx::query(SETTLE)
            .bind(&settle.key.xid[..])
            .bind(&settle.key.branch_id[..])
            .bind(settle.state.code())
            .bind(settle.reply)
            .bind(settle.seen)
            .execute(connection)
            .await?;
        Ok(done.rows_affected())
    }

    async fn now(connection: &mut SqliteConnection) -> Result<i64, Error> {
        sqlx::query_scalar(NOW).fetch_one(connection).await
    }

    async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> Result<(), Error> {
        sqlx::raw_sql(sql).execute(connection).await?;
        Ok(())
    }

    /// A file has no other server.
    fn cannot_write(_: &Error) -> bool {
        false
    }

    async fn delete_old(connection: &mut SqliteConnection, old: &Old) -> Result<u64, Error> {
        let done = sqlx::query(DELETE_OLD)
            .bind(old.retention_millis)
            .bind(old.margin_millis)
            .bind(old.limit)
            .execute(connection)
            .await?;
        Ok(done.rows_affected())
    }

    async fn overdue(
        connection: &mut SqliteConnection,
        overdue: &Overdue<'_>,
    ) -> Result<Vec<OverdueColumns>, Error> {
        sqlx::query_as(OVERDUE)
            .bind(overdue.margin_millis)
            .bind(overdue.after.expires_at)
            .bind(&overdue.after.xid)
            .bind(&overdue.after.branch_id)
            .bind(overdue.limit)
            .fetch_all(connection)
            .await
    }

    async fn asking(
        connection: &mut SqliteConnection,
        xid: &[u8; 16],
    ) -> Result<Vec<(Vec<u8>, String)>, Error> {
        sqlx::query_as(ASKING).bind(&xid[..]).fetch_all(connection).await
    }

    async fn columns(
        connection: &mut SqliteConnection,
    ) -> Result<Vec<(String, String, bool)>, Error> {
        sqlx::query_as(COLUMNS).fetch_all(connection).await
    }

    async fn has_tried_index(connection: &mut SqliteConnection) -> Result<bool, Error> {
        let count: i64 = sqlx::query_scalar(HAS_TRIED_INDEX).fetch_one(connection).await?;
        Ok(count > 0)
    }

    async fn define(connection: &mut SqliteConnection, sql: &'static str) -> Result<(), Error> {
        Self::execute(connection, sql).await
    }

    /// Rolls back and keeps the connection: closing it could delete an in-memory database.
    ///
    /// Reuse is safe, because sqlx runs the connection's commands on a separate thread, in order and to completion. The thread
    /// first finishes what was in progress when the future was dropped. Then it rolls back, and then it answers the ping. The
    /// rollback must be `start_rollback`: if a COMMIT was abandoned, the thread skips exactly one such ROLLBACK.
    fn abandon(mut connection: PoolConnection<Self>) {
        <Self as sqlx::Database>::TransactionManager::start_rollback(&mut connection);
        tokio::spawn(async move {
            let answered = tokio::time::timeout(GIVE_BACK_WITHIN, connection.ping()).await;
            if !matches!(answered, Ok(Ok(()))) || connection.is_in_transaction() {
                connection.close_on_drop();
            }
        });
    }
}
