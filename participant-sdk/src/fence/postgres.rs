//! The fence on PostgreSQL (14 or newer).

use sqlx::{Error, PgConnection, Postgres, pool::PoolConnection};

use super::db::{
    Claim, FenceDb, FoundRow, Key, Old, Overdue, OverdueColumns, Record, RecordRow, Settle,
    Statements, in_order,
};

// `clock_timestamp()` and not `now()`: `now()` is the time when the local transaction began, possibly before it waited for a
// lock.

const CLAIM: &str = "
INSERT INTO handfast_fence AS f
    (xid, branch_id, state, action, payload, digest, expires_at, asks, created_at, changed_at, seen)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint, 1)
ON CONFLICT (xid, branch_id) DO UPDATE SET seen = f.seen + 1
RETURNING f.state, f.action, CASE WHEN f.state = 1 AND f.seen > 1 THEN f.payload END, f.reply, f.digest, f.seen,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint";

const FIND: &str = "
UPDATE handfast_fence SET seen = seen + 1 WHERE xid = $1 AND branch_id = $2
RETURNING state, action, CASE WHEN state = 1 THEN payload END, reply, digest, seen,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint";

const SETTLE: &str = "
UPDATE handfast_fence
SET state = $3, reply = coalesce($4, reply), changed_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint
WHERE xid = $1 AND branch_id = $2 AND seen = $5";

// Rows that are locked by others are skipped. So this statement never waits, and batches never wait for each other.
const FIND_MANY: &str = "
WITH held AS (
    SELECT xid, branch_id FROM handfast_fence
    WHERE (xid, branch_id) IN (SELECT * FROM unnest($1::bytea[], $2::bytea[]))
    FOR UPDATE SKIP LOCKED
)
UPDATE handfast_fence AS f SET seen = f.seen + 1 FROM held WHERE f.xid = held.xid AND f.branch_id = held.branch_id
RETURNING f.xid, f.branch_id, f.state, f.action, CASE WHEN f.state = 1 THEN f.payload END, f.seen,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint";

const SETTLE_MANY: &str = "
UPDATE handfast_fence AS f
SET state = $4, changed_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint
FROM unnest($1::bytea[], $2::bytea[], $3::bigint[]) AS seen (xid, branch_id, seen)
WHERE f.xid = seen.xid AND f.branch_id = seen.branch_id AND f.seen = seen.seen";

const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint";

// `now()` and not `clock_timestamp()`: it is constant within the statement, so the index can be used.
const DELETE_OLD: &str = "
DELETE FROM handfast_fence WHERE (xid, branch_id) IN (
    SELECT xid, branch_id FROM handfast_fence
    WHERE state <> 1
    AND changed_at <= (extract(epoch FROM now()) * 1000)::bigint - $1
    AND (expires_at IS NULL OR expires_at <= (extract(epoch FROM now()) * 1000)::bigint - $2)
    ORDER BY changed_at LIMIT $3 FOR UPDATE SKIP LOCKED
)";

pub(super) const OVERDUE: &str = "
SELECT expires_at, xid, branch_id, action, asks FROM handfast_fence
WHERE state = 1 AND expires_at <= (extract(epoch FROM now()) * 1000)::bigint - $1
AND (expires_at, xid, branch_id) > ($2, $3, $4)
ORDER BY expires_at, xid, branch_id LIMIT $5";

// An index that was given up half-way is there, but not valid.
const HAS_TRIED_INDEX: &str = "SELECT count(*) FROM pg_index WHERE indexrelid = to_regclass('handfast_fence_tried') AND indisvalid";

// One process adds the index. The others do not wait for it, because an index that is made CONCURRENTLY waits for them.
const ADD_ONE_AT_A_TIME: &str = "SELECT pg_try_advisory_lock(hashtext('handfast_fence_tried'))";
const DROP_HALF_AN_INDEX: &str = "DROP INDEX CONCURRENTLY IF EXISTS handfast_fence_tried";

const ASKING: &str =
    "SELECT branch_id, action FROM handfast_fence WHERE xid = $1 AND state = 1 AND asks = 1";

const COLUMNS: &str = "
SELECT a.attname::text, format_type(a.atttypid, NULL), coalesce(a.attnum = ANY (i.indkey), false)
FROM pg_attribute a LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
WHERE a.attrelid = to_regclass('handfast_fence') AND a.attnum > 0 AND NOT a.attisdropped";

// Without this lock, two processes could both find no table and both create it, and one would fail. IF NOT EXISTS does not
// prevent that.
const CREATE_ONE_AT_A_TIME: &str = "SELECT pg_advisory_xact_lock(hashtext('handfast_fence'))";

/// The server's error for a change in a read-only transaction: the server is a standby, or the session is read-only.
const READ_ONLY: &str = "25006";

impl FenceDb for Postgres {}

impl Statements for Postgres {
    // SET LOCAL ends with the local transaction, so there is nothing to restore.
    const BEGIN: &'static str = "BEGIN; SET LOCAL lock_timeout = '3s'";
    const SCHEMA: &'static str = super::SCHEMA_POSTGRES;
    const SCHEMA_FILE: &'static str = "schema/postgres.sql";
    const ADD_ASKS: &'static str = "
ALTER TABLE handfast_fence ADD COLUMN IF NOT EXISTS asks smallint;
COMMENT ON COLUMN handfast_fence.asks IS '1: the transaction may be lost without a Cancel, so this service asks about the branch from expires_at on. NULL: it does not'";
    const COLUMNS: [(&'static str, &'static str); 12] = [
        ("xid", "bytea"),
        ("branch_id", "bytea"),
        ("state", "smallint"),
        ("action", "text"),
        ("payload", "bytea"),
        ("reply", "bytea"),
        ("digest", "bytea"),
        ("expires_at", "bigint"),
        ("created_at", "bigint"),
        ("changed_at", "bigint"),
        ("seen", "bigint"),
        ("asks", "smallint"),
    ];

    const ADD_TRIED_INDEX: &'static str = "CREATE INDEX CONCURRENTLY IF NOT EXISTS handfast_fence_tried ON handfast_fence (expires_at, xid, branch_id) WHERE state = 1";

    const BATCHES_AT_A_TIME: usize = 1;

    async fn claim(connection: &mut PgConnection, claim: &Claim<'_>) -> Result<Record, Error> {
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

    async fn find(connection: &mut PgConnection, key: &Key) -> Result<Option<Record>, Error> {
        sqlx::query_as::<_, RecordRow>(FIND)
            .bind(&key.xid[..])
            .bind(&key.branch_id[..])
            .fetch_optional(connection)
            .await?
            .map(Record::try_from)
            .transpose()
    }

    async fn find_many(
        connection: &mut PgConnection,
        keys: &[Key],
    ) -> Result<Vec<Option<Record>>, Error> {
        let (xids, branch_ids) = columns(keys.iter());
        let found = sqlx::query_as::<_, FoundRow>(FIND_MANY).bind(xids).bind(branch_ids);
        in_order(keys, found.fetch_all(connection).await?)
    }

    async fn settle_many(
        connection: &mut PgConnection,
        settles: &[Settle<'_>],
    ) -> Result<u64, Error> {
        let Some(Settle { state, .. }) = settles.first() else { return Ok(0) };
        let (xids, branch_ids) = columns(settles.iter().map(|settle| settle.key));
        let seen: Vec<_> = settles.iter().map(|settle| settle.seen).collect();
        let query = sqlx::query(SETTLE_MANY).bind(xids).bind(branch_ids).bind(seen);
        Ok(query.bind(state.code()).execute(connection).await?.rows_affected())
    }

    async fn settle(connection: &mut PgConnection, settle: &Settle<'_>) -> Result<u64, Error> {
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

    async fn now(connection: &mut PgConnection) -> Result<i64, Error> {
        sqlx::query_scalar(NOW).fetch_one(connection).await
    }

    async fn execute(connection: &mut PgConnection, sql: &'static str) -> Result<(), Error> {
        sqlx::raw_sql(sql).execute(connection).await?;
        Ok(())
    }

    fn cannot_write(error: &Error) -> bool {
        error.as_database_error().and_then(|error| error.code()).as_deref() == Some(READ_ONLY)
    }

    async fn delete_old(connection: &mut PgConnection, old: &Old) -> Result<u64, Error> {
        let done = sqlx::query(DELETE_OLD)
            .bind(old.retention_millis)
            .bind(old.margin_millis)
            .bind(old.limit)
            .execute(connection)
            .await?;
        Ok(done.rows_affected())
    }

    async fn overdue(
        connection: &mut PgConnection,
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
        connection: &mut PgConnection,
        xid: &[u8; 16],
    ) -> Result<Vec<(Vec<u8>, String)>, Error> {
        sqlx::query_as(ASKING).bind(&xid[..]).fetch_all(connection).await
    }

    async fn columns(connection: &mut PgConnection) -> Result<Vec<(String, String, bool)>, Error> {
        sqlx::query_as(COLUMNS).fetch_all(connection).await
    }

    async fn has_tried_index(connection: &mut PgConnection) -> Result<bool, Error> {
        let count: i64 = sqlx::query_scalar(HAS_TRIED_INDEX).fetch_one(connection).await?;
        Ok(count > 0)
    }

    async fn define(connection: &mut PgConnection, sql: &'static str) -> Result<(), Error> {
        Self::execute(connection, CREATE_ONE_AT_A_TIME).await?;
        Self::execute(connection, sql).await
    }

    /// The connection is closed afterwards, and its advisory lock ends with it.
    async fn add_tried_index(connection: &mut PgConnection) -> Result<(), Error> {
        let is_alone: bool =
            sqlx::query_scalar(ADD_ONE_AT_A_TIME).fetch_one(&mut *connection).await?;
        if !is_alone || Self::has_tried_index(connection).await? {
            return Ok(());
        }
        Self::execute(connection, DROP_HALF_AN_INDEX).await?;
        Self::execute(connection, Self::ADD_TRIED_INDEX).await
    }

    /// Closes the connection. It may be in the middle of a statement, and sqlx advises against reusing such a connection. The
    /// server rolls back when it notices the closed connection.
    fn abandon(mut connection: PoolConnection<Self>) {
        connection.close_on_drop();
    }
}

/// The keys as two arrays: xids and branch ids.
fn columns<'a>(keys: impl Iterator<Item = &'a Key>) -> (Vec<&'a [u8]>, Vec<&'a [u8]>) {
    keys.map(|key| (&key.xid[..], &key.branch_id[..])).unzip()
}
