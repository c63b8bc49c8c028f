//! The common part of the stores in SQL databases. Reads, writes and connection pools are written once, for any [`Dialect`]. A
//! dialect supplies what differs between databases.

mod branches;
pub(in crate::store) mod changes;
mod connections;
mod error;
mod query;
pub(in crate::store) mod read;
pub(in crate::store) mod record;
pub(in crate::store) mod resolutions;
mod sight;
pub(in crate::store) mod write;

pub(in crate::store) use connections::{CALL_TIMEOUT, Connections, Role};
pub(in crate::store) use error::is_damaged_file;
pub(in crate::store) use query::{Cell, FromAnyRow, Query, execute, fetch};
pub(in crate::store) use sight::reading;

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use sqlx::Database;

use crate::store::{Batch, Error, Written};

pub(in crate::store) type Connection<D> = <<D as Dialect>::Db as Database>::Connection;

/// The differences between databases.
pub(in crate::store) trait Dialect: fmt::Debug + Send + Sync + 'static {
    type Db: Database;
    /// How to connect.
    type Options: fmt::Debug + Send + Sync;

    /// Begins a local transaction that writes.
    const BEGIN_WRITING: &'static str;
    /// Begins a local transaction in which all queries see the same snapshot.
    const BEGIN_READING: &'static str;
    /// Raises the purge mark of a partition, and never lowers it. Bind: partition, xid, xid.
    const UPSERT_PURGED: &'static str;
    /// Deletes the keys of transactions that finished before a moment. `{xids}` stands for a condition on their xids. It demands that
    /// they finished: one may have been recorded since they were read. Bind: the values of the condition, the moment.
    const DELETE_KEYS: &'static str;
    /// The same for their rows of `branch`.
    const DELETE_BRANCHES: &'static str;
    /// The same for their own rows, which the others look at.
    const DELETE_TRANSACTIONS: &'static str;
    /// A query for the database's time, in milliseconds since 1970.
    const CLOCK: &'static str;

    /// A connection, as its server knows it.
    type Session: fmt::Debug + Clone + PartialEq + Send + Sync;

    /// Opens a connection and sets it up. Also kills at the server the `doubtful` connections of the same role, which may still
    /// be running a statement.
    fn connect(
        options: &Self::Options,
        role: Role,
        doubtful: &[Self::Session],
    ) -> impl Future<Output = Result<(Connection<Self>, Self::Session), Error>> + Send;

    /// Whether an idle connection leads to where the store is now.
    fn is_current(_options: &Self::Options, _session: &Self::Session) -> bool {
        true
    }

    /// Begins a local transaction and adds one to the position of each partition whose guard fits. If all guards fit, writes
    /// the rows and checks that each was written. Only if everything was written, it ends as `end` says. Otherwise the local
    /// transaction stays open.
    fn write(
        connection: &mut Connection<Self>,
        batch: &Batch,
        end: End,
        counter: &Counter,
    ) -> impl Future<Output = Result<Wrote, Error>> + Send;

    /// Returns all rows of a query.
    fn fetch<T: FromAnyRow>(
        connection: &mut Connection<Self>,
        query: Query,
    ) -> impl Future<Output = Result<Vec<T>, sqlx::Error>> + Send;

    /// Runs a statement with values. Returns the number of rows written.
    fn execute(
        connection: &mut Connection<Self>,
        query: Query,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Runs statements without values or result rows, unprepared, such as BEGIN.
    fn run(
        connection: &mut Connection<Self>,
        sql: &'static str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

/// How [`Dialect::write`] ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum End {
    /// COMMIT. After an error, it is not known whether it has taken effect.
    Commit,
    /// The local transaction stays open, so that it can be looked at.
    StayOpen,
}

/// How much [`Dialect::write`] has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Wrote {
    /// Everything.
    All,
    /// Only this many of the positions, and nothing else.
    Positions(u64),
    /// Not all of the rows. Holds the first problem that was noticed.
    NotAllRows(String),
}

impl Wrote {
    /// The result of a statement that should have written `rows` rows and wrote `written`.
    pub(in crate::store) fn counted(table: &str, rows: usize, written: u64) -> Self {
        if written == rows as u64 {
            return Self::All;
        }
        Self::NotAllRows(format!("{written} of {rows} rows of `{table}` were as they must be"))
    }

    /// The result if the error is about the rows to be written, such as a new row that exists already, or a value that does not
    /// fit its column. Other errors are passed on.
    pub(in crate::store) fn failed(error: sqlx::Error) -> Result<Self, Error> {
        if let sqlx::Error::Database(refused) = &error
            && error::is_about_rows(&**refused)
        {
            return Ok(Self::NotAllRows(refused.to_string()));
        }
        Err(error.into())
    }
}

/// Counts statements and rows for [`Written`].
#[derive(Debug, Default)]
pub(in crate::store) struct Counter {
    statements: AtomicU64,
    rows: AtomicU64,
}

impl Counter {
    /// Counts a statement that moves positions. Rows of partitions are not counted.
    pub(in crate::store) fn positions(&self) {
        self.rows(0);
    }

    /// Counts a statement that writes this many rows.
    pub(in crate::store) fn rows(&self, rows: usize) {
        self.statements.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub(in crate::store) fn written(&self) -> Written {
        Written {
            statements: self.statements.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
        }
    }
}
