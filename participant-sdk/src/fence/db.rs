//! What the fence asks of a database. Its answers are in `sqlite.rs`, `mysql.rs` and `postgres.rs`, one file each: all SQL of
//! this crate is there and in `schema/`.

#![expect(
    missing_debug_implementations,
    reason = "what is here holds payloads, and those are never printed"
)]

#[cfg(any(feature = "mysql", feature = "postgres"))]
use std::collections::BTreeMap;
use std::{future::Future, time::Duration};

use handfast_proto::{BranchId, Xid};
use sqlx::{Database, Error, Pool, pool::PoolConnection};

use super::verdict::State;
use crate::branch::Branch;

/// How long a statement in a local transaction waits for a lock. Shorter than the deadline of a call. Otherwise ten Cancels whose
/// callers have given up would block the whole pool on one row.
pub const LOCK_WAIT: Duration = Duration::from_secs(3);

/// A database that can hold a fence: [`Sqlite`](sqlx::Sqlite), [`MySql`](sqlx::MySql) (MariaDB too) or
/// [`Postgres`](sqlx::Postgres), each behind the feature of its name.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot hold a fence",
    note = "enable one of the features `sqlite`, `mysql`, `postgres` of crate `handfast`"
)]
pub trait FenceDb: Statements {}

/// The statements. Each of them is harmless if it is carried out late, after its caller has given up.
///
/// All times are UTC milliseconds since 1970 by the clock of this database.
pub trait Statements: Database {
    /// Begins a local transaction that waits for locks no longer than [`LOCK_WAIT`].
    const BEGIN: &'static str;
    /// Creates the table, the index and the view, unless they exist.
    const SCHEMA: &'static str;
    /// The file that [`Statements::SCHEMA`] comes from.
    const SCHEMA_FILE: &'static str;
    /// The table's columns: name, and type as [`Statements::columns`] tells it. The first two are the primary key.
    const COLUMNS: [(&'static str, &'static str); 11];

    /// Batches of one action and phase that run side by side.
    const BATCHES_AT_A_TIME: usize;

    /// A connection from the pool.
    fn acquire(
        pool: &Pool<Self>,
    ) -> impl Future<Output = Result<PoolConnection<Self>, Error>> + Send {
        pool.acquire()
    }

    /// Try and Cancel: inserts the row, or counts one more call if it exists; locks it; reads it.
    ///
    /// It inserts first and does not read first. If two repeats both read nothing and then insert, MySQL kills one of them.
    fn claim(
        connection: &mut Self::Connection,
        claim: &Claim<'_>,
    ) -> impl Future<Output = Result<Record, Error>> + Send;

    /// Confirm: counts one more call if the row exists; locks it; reads it.
    fn find(
        connection: &mut Self::Connection,
        key: &Key,
    ) -> impl Future<Output = Result<Option<Record>, Error>> + Send;

    /// Confirm and Cancel of several branches: as [`Statements::find`] for each, in the order of the keys, which are all different. A
    /// row that another local transaction holds may be left out, and is never waited for where others could wait for this one.
    fn find_many(
        connection: &mut Self::Connection,
        keys: &[Key],
    ) -> impl Future<Output = Result<Vec<Option<Record>>, Error>> + Send;

    /// Writes what was done, and the reply if there is one. Returns how many rows it wrote: one, or none if the row does not have the
    /// `seen` that this local transaction gave it.
    fn settle(
        connection: &mut Self::Connection,
        settle: &Settle<'_>,
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// As [`Statements::settle`] for each, all with the same state and no reply. Returns how many rows it wrote.
    fn settle_many(
        connection: &mut Self::Connection,
        settles: &[Settle<'_>],
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// The time by the database's clock.
    fn now(connection: &mut Self::Connection) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Runs statements that have no values and no answer.
    fn execute(
        connection: &mut Self::Connection,
        sql: &'static str,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Deletes some of the rows that no call can need any more. Returns how many.
    fn delete_old(
        connection: &mut Self::Connection,
        old: &Old,
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// Some of the rows of an action that are still tried, though phase one ended `margin` ago or longer: xid and branch id.
    fn overdue(
        connection: &mut Self::Connection,
        overdue: &Overdue<'_>,
    ) -> impl Future<Output = Result<Vec<KeyRow>, Error>> + Send;

    /// The existing table: each column's name, its type, and whether it is in the primary key. Empty: there is no table.
    fn columns(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<Vec<(String, String, bool)>, Error>> + Send;

    /// Runs [`Statements::SCHEMA`], one process at a time.
    fn create(connection: &mut Self::Connection) -> impl Future<Output = Result<(), Error>> + Send;

    /// Restores after a local transaction what [`Statements::BEGIN`] has set for the whole connection, because other work of the
    /// author runs on it next.
    fn restore(connection: &mut Self::Connection)
    -> impl Future<Output = Result<(), Error>> + Send;

    /// Ends a local transaction that was dropped, perhaps in the middle of a statement: rolls it back, and frees its place in the pool
    /// in bounded time. The connection is reused only if its state is beyond doubt.
    fn abandon(connection: PoolConnection<Self>);
}

/// The primary key of a row.
#[derive(Debug)]
pub struct Key {
    pub(crate) xid: [u8; 16],
    pub(crate) branch_id: [u8; 32],
}

impl Key {
    pub(crate) fn of(branch: &Branch) -> Self {
        Self { xid: branch.xid.to_bytes(), branch_id: branch.branch_id.to_fixed() }
    }

    /// The branch that a row belongs to. `None`: the SDK did not write this row.
    pub(crate) fn read(xid: &[u8], branch_id: &[u8]) -> Option<(Xid, BranchId)> {
        let text = branch_id.split(|byte| *byte == 0).next().unwrap_or_default();
        let branch_id = std::str::from_utf8(text).ok()?.parse().ok()?;
        Some((Xid::from_bytes(xid.try_into().ok()?), branch_id))
    }
}

/// A [`Key`] as it is selected: xid and branch id.
pub(crate) type KeyRow = (Vec<u8>, Vec<u8>);

/// The row that a Try or a Cancel inserts, unless it exists.
pub struct Claim<'a> {
    pub(crate) key: &'a Key,
    pub(crate) state: State,
    pub(crate) action: &'a str,
    pub(crate) payload: Option<&'a [u8]>,
    pub(crate) digest: Option<&'a [u8]>,
    pub(crate) expires_at: Option<i64>,
}

/// What is written to a row once the work is done.
pub struct Settle<'a> {
    pub(crate) key: &'a Key,
    pub(crate) state: State,
    /// `None`: keep the present one.
    pub(crate) reply: Option<&'a [u8]>,
    /// [`Record::seen`].
    pub(crate) seen: i64,
}

/// Which rows are old: in a final state, changed at least `retention` ago, and expired at least `margin` ago.
#[derive(Debug)]
pub struct Old {
    pub(crate) retention_millis: i64,
    pub(crate) margin_millis: i64,
    /// At most so many of them.
    pub(crate) limit: i64,
}

/// Which rows are overdue: of this action, still tried, and expired at least `margin` ago.
#[derive(Debug)]
pub struct Overdue<'a> {
    pub(crate) action: &'a str,
    pub(crate) margin_millis: i64,
    /// At most so many of them.
    pub(crate) limit: i64,
}

/// A row as a call finds it.
pub struct Record {
    pub(crate) state: State,
    pub(crate) action: String,
    /// The payload that Try got. Read only of a row that is still tried.
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) reply: Option<Vec<u8>>,
    pub(crate) digest: Option<Vec<u8>>,
    /// How many calls have come for this branch, this one included. 1: this call made the row.
    pub(crate) seen: i64,
    /// The time, read when the row's lock was held.
    pub(crate) now: i64,
}

/// A [`Record`] as it is selected.
pub(crate) type RecordRow =
    (i16, String, Option<Vec<u8>>, Option<Vec<u8>>, Option<Vec<u8>>, i64, i64);

impl TryFrom<RecordRow> for Record {
    type Error = Error;

    fn try_from(row: RecordRow) -> Result<Self, Error> {
        let (code, action, payload, reply, digest, seen, now) = row;
        let state = State::from_code(code).ok_or_else(|| {
            Error::Decode(format!("handfast_fence.state is {code}; it is 1 to 4").into())
        })?;
        Ok(Self { state, action, payload, reply, digest, seen, now })
    }
}

/// What [`Statements::find_many`] reads of a row: its [`KeyRow`], and of the [`Record`] what phase two needs: state, action, payload, seen,
/// now.
#[cfg(any(feature = "mysql", feature = "postgres"))]
pub(crate) type FoundRow = (Vec<u8>, Vec<u8>, i16, String, Option<Vec<u8>>, i64, i64);

/// Brings the rows that were found into the order of the keys.
#[cfg(any(feature = "mysql", feature = "postgres"))]
pub(crate) fn in_order(keys: &[Key], rows: Vec<FoundRow>) -> Result<Vec<Option<Record>>, Error> {
    let mut found = BTreeMap::new();
    for (xid, branch_id, code, action, payload, seen, now) in rows {
        let record = Record::try_from((code, action, payload, None, None, seen, now))?;
        found.insert((xid, branch_id), record);
    }
    let name = |key: &Key| (key.xid.to_vec(), key.branch_id.to_vec());
    Ok(keys.iter().map(|key| found.remove(&name(key))).collect())
}
