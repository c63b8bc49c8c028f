//! The interface between the fence and a database. The implementations are in `sqlite.rs`, `mysql.rs` and `postgres.rs`. All SQL
//! of this crate is in these files and in `schema/`.

#![expect(
    missing_debug_implementations,
    reason = "what is here holds payloads, and those are never printed"
)]

#[cfg(any(feature = "mysql", feature = "postgres"))]
use std::collections::BTreeMap;
use std::{future::Future, time::Duration};

use handfast_proto::{BranchId, Xid};
use sqlx::{Database, Error, Pool, pool::PoolConnection};
use sqlx_core::transaction::TransactionManager as _;

use super::verdict::State;
use crate::branch::Branch;

/// How long a statement in a local transaction waits for a lock. Shorter than the deadline of a call. Otherwise, ten Cancels
/// whose callers have given up could occupy the whole pool while they wait for one row.
pub const LOCK_WAIT: Duration = Duration::from_secs(3);

/// A database that can hold a fence: [`Sqlite`](sqlx::Sqlite), [`MySql`](sqlx::MySql) (MariaDB too) or
/// [`Postgres`](sqlx::Postgres), each behind the feature of its name.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot hold a fence",
    note = "enable one of the features `sqlite`, `mysql`, `postgres` of crate `handfast`"
)]
pub trait FenceDb: Statements {}

/// The statements. Each is harmless if it is executed late, after its caller has given up.
///
/// All times are UTC milliseconds since 1970, by the clock of this database.
pub trait Statements: Database {
    /// Begins a local transaction that waits for locks no longer than [`LOCK_WAIT`].
    const BEGIN: &'static str;
    /// Begins a local transaction that only reads, and keeps no writer away.
    const BEGIN_READING: &'static str = Self::BEGIN;
    /// Creates the table, the index and the view, unless they exist.
    const SCHEMA: &'static str;
    /// The file that [`Statements::SCHEMA`] comes from.
    const SCHEMA_FILE: &'static str;
    /// The table's columns: the name, and the type as [`Statements::columns`] reports it. The first two are the primary key.
    const COLUMNS: [(&'static str, &'static str); 12];
    /// Adds the column `asks` to a table that an earlier version made. Earlier versions go on with it.
    const ADD_ASKS: &'static str;

    /// The statement that adds the index over what is tried to a table of an earlier version.
    const ADD_TRIED_INDEX: &'static str;

    /// How many batches of one action and phase run concurrently.
    const BATCHES_AT_A_TIME: usize;

    /// Takes a connection from the pool.
    fn acquire(
        pool: &Pool<Self>,
    ) -> impl Future<Output = Result<PoolConnection<Self>, Error>> + Send {
        pool.acquire()
    }

    /// Try and Cancel: inserts the row, or increments `seen` if it exists. Locks the row and reads it.
    ///
    /// Inserting comes first. If two repeats read first, both could find nothing and insert, and MySQL would abort one of them
    /// (deadlock).
    fn claim(
        connection: &mut Self::Connection,
        claim: &Claim<'_>,
    ) -> impl Future<Output = Result<Record, Error>> + Send;

    /// Confirm: increments `seen` if the row exists. Locks the row and reads it.
    fn find(
        connection: &mut Self::Connection,
        key: &Key,
    ) -> impl Future<Output = Result<Option<Record>, Error>> + Send;

    /// Confirm and Cancel of several branches: as [`Statements::find`] for each of the keys, which are sorted and all different.
    /// May leave out rows that another local transaction has locked. Must not wait for such a row while others could be waiting
    /// for this batch.
    fn find_many(
        connection: &mut Self::Connection,
        keys: &[Key],
    ) -> impl Future<Output = Result<Vec<Option<Record>>, Error>> + Send;

    /// Writes the new state, and the reply if there is one. Returns the number of rows written: one, or none if the row no
    /// longer has the `seen` that this local transaction gave it.
    fn settle(
        connection: &mut Self::Connection,
        settle: &Settle<'_>,
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// As [`Statements::settle`] for several rows, all with the same state and without a reply. Returns the number of rows
    /// written.
    fn settle_many(
        connection: &mut Self::Connection,
        settles: &[Settle<'_>],
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// The current time by the database's clock.
    fn now(connection: &mut Self::Connection) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Executes statements without parameters and results.
    fn execute(
        connection: &mut Self::Connection,
        sql: &'static str,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// [`Statements::settle`] as a statement that [`Statements::commit`] sends in one message with COMMIT. There, a row that is
    /// not written must prevent COMMIT. `None`: call [`Statements::settle`] before COMMIT.
    fn settle_at_commit(_: &Settle<'_>) -> Option<String> {
        None
    }

    /// Commits the local transaction, or releases the author's innermost savepoint. Once this returns `Ok`, it is durable.
    /// `last` is the statement of [`Statements::settle_at_commit`].
    ///
    /// Fails if the local transaction that [`Statements::BEGIN`] has begun has ended already.
    fn commit(
        connection: &mut Self::Connection,
        _last: Option<String>,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        Self::TransactionManager::commit(connection)
    }

    /// Rolls the local transaction back, or the author's innermost savepoint. Returns whether that has undone all of the work.
    fn rollback(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<bool, Error>> + Send {
        let rollback = Self::TransactionManager::rollback(connection);
        async { rollback.await.map(|()| true) }
    }

    /// Whether the error says that this connection's server takes no changes. A new connection may lead to another server.
    fn cannot_write(error: &Error) -> bool;

    /// Deletes some of the rows that no call can need any more. Returns their number.
    fn delete_old(
        connection: &mut Self::Connection,
        old: &Old,
    ) -> impl Future<Output = Result<u64, Error>> + Send;

    /// The next rows that are still tried although phase one ended at least `margin` ago, in order of their [`OverdueKey`]. Finds them
    /// by an index, so it reads no other rows.
    fn overdue(
        connection: &mut Self::Connection,
        overdue: &Overdue<'_>,
    ) -> impl Future<Output = Result<Vec<OverdueColumns>, Error>> + Send;

    /// The columns of the existing table: name, type, and whether it is in the primary key. Empty if there is no table.
    fn columns(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<Vec<(String, String, bool)>, Error>> + Send;

    /// The reservations of a transaction that ask: branch id and action.
    fn asking(
        connection: &mut Self::Connection,
        xid: &[u8; 16],
    ) -> impl Future<Output = Result<Vec<(Vec<u8>, String)>, Error>> + Send;

    /// Runs [`Statements::SCHEMA`] or [`Statements::ADD_ASKS`]. A lock prevents that several processes do so at once.
    fn define(
        connection: &mut Self::Connection,
        sql: &'static str,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Whether the table has the index over what is tried, and the index can be used.
    fn has_tried_index(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<bool, Error>> + Send;

    /// Adds that index to a table that is in use. Keeps no call waiting for more than a few seconds (SQLite: for as long as it takes).
    /// May leave it to another process that does the same at this moment. Not in a local transaction.
    fn add_tried_index(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        Self::execute(connection, Self::ADD_TRIED_INDEX)
    }

    /// Undoes the session settings that [`Statements::BEGIN`] has changed, because the author's other work uses the connection
    /// next. Only for a local transaction that had ended by itself. Otherwise, COMMIT and ROLLBACK have done it.
    fn restore(_: &mut Self::Connection) -> impl Future<Output = Result<(), Error>> + Send {
        async { Ok(()) }
    }

    /// Ends a local transaction that was dropped, perhaps in the middle of a statement. Rolls it back, and frees its place in
    /// the pool in bounded time. The connection is reused only if its state is beyond doubt.
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

    /// Parses the key of a row. `None`: the SDK did not write this row.
    pub(crate) fn read(xid: &[u8], branch_id: &[u8]) -> Option<(Xid, BranchId)> {
        let text = branch_id.split(|byte| *byte == 0).next().unwrap_or_default();
        let branch_id = std::str::from_utf8(text).ok()?.parse().ok()?;
        Some((Xid::from_bytes(xid.try_into().ok()?), branch_id))
    }
}

/// The place of an overdue row among the others. Every row is after the default.
#[derive(Debug, Clone, Default)]
pub(crate) struct OverdueKey {
    pub(crate) expires_at: i64,
    pub(crate) xid: Vec<u8>,
    pub(crate) branch_id: Vec<u8>,
}

/// An overdue row.
pub(crate) struct OverdueRow {
    pub(crate) key: OverdueKey,
    pub(crate) action: String,
    /// Whether it asks about its branch. `None`: an earlier version of the SDK wrote it.
    pub(crate) asks: Option<i16>,
}

/// The columns of an [`OverdueRow`], in the order in which all databases select them.
pub(crate) type OverdueColumns = (i64, Vec<u8>, Vec<u8>, String, Option<i16>);

impl OverdueRow {
    pub(crate) fn of((expires_at, xid, branch_id, action, asks): OverdueColumns) -> Self {
        Self { key: OverdueKey { expires_at, xid, branch_id }, action, asks }
    }
}

/// The row that a Try or a Cancel inserts if there is none.
pub struct Claim<'a> {
    pub(crate) key: &'a Key,
    pub(crate) state: State,
    pub(crate) action: &'a str,
    pub(crate) payload: Option<&'a [u8]>,
    pub(crate) digest: Option<&'a [u8]>,
    pub(crate) expires_at: Option<i64>,
    /// [`Branch::at_decision`]; 1 is yes.
    pub(crate) asks: Option<i16>,
}

/// The changes to a row once the work is done.
pub struct Settle<'a> {
    pub(crate) key: &'a Key,
    pub(crate) state: State,
    /// `None`: leave the reply unchanged.
    pub(crate) reply: Option<&'a [u8]>,
    /// Only a row with this [`Record::seen`] is written.
    pub(crate) seen: i64,
}

/// Selects old rows: in a final state, last changed at least `retention` ago, and expired at least `margin` ago.
#[derive(Debug)]
pub struct Old {
    pub(crate) retention_millis: i64,
    pub(crate) margin_millis: i64,
    /// The maximum number of rows.
    pub(crate) limit: i64,
}

/// Selects overdue rows: still tried, expired at least `margin` ago, and after this place.
#[derive(Debug)]
pub struct Overdue<'a> {
    pub(crate) margin_millis: i64,
    pub(crate) after: &'a OverdueKey,
    /// The maximum number of rows.
    pub(crate) limit: i64,
}

/// A row as a call reads it.
pub struct Record {
    pub(crate) state: State,
    pub(crate) action: String,
    /// The payload of the branch's Try. Read only if the row is still tried.
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) reply: Option<Vec<u8>>,
    pub(crate) digest: Option<Vec<u8>>,
    /// How many calls have arrived for this branch, including this one. 1: this call inserted the row.
    pub(crate) seen: i64,
    /// The database's time, read after the row was locked.
    pub(crate) now: i64,
}

/// A [`Record`] as selected from the table.
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

/// A row of [`Statements::find_many`]: its [`KeyRow`], and the parts of the [`Record`] that phase two needs (state, action,
/// payload, seen, now).
#[cfg(any(feature = "mysql", feature = "postgres"))]
pub(crate) type FoundRow = (Vec<u8>, Vec<u8>, i16, String, Option<Vec<u8>>, i64, i64);

/// Sorts the rows that were found into the order of the keys.
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
