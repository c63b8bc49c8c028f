//! What the stores in SQL databases have in common. Reading, writing and the care for connections are written once, for any
//! [`Dialect`]; what differs between databases is what a dialect says.

mod connections;
mod error;
mod query;
pub(in crate::store) mod read;
pub(in crate::store) mod record;
mod sight;
pub(in crate::store) mod write;

pub(in crate::store) use connections::{CALL_TIMEOUT, Connections, Role};
pub(in crate::store) use query::{Cell, FromAnyRow, Query, execute, fetch};
pub(in crate::store) use sight::reading;

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use handfast_proto::Xid;
use sqlx::Database;

use crate::store::{Batch, Error, Written};

/// A database's connection.
pub(in crate::store) type Connection<D> = <<D as Dialect>::Db as Database>::Connection;

/// What differs between databases.
pub(in crate::store) trait Dialect: fmt::Debug + Send + Sync + 'static {
    type Db: Database;
    /// How to connect.
    type Options: fmt::Debug + Send + Sync;

    /// Begins a local transaction that writes.
    const BEGIN_WRITING: &'static str;
    /// Begins a local transaction in which all queries see one moment.
    const BEGIN_READING: &'static str;
    /// Raises the mark of a partition, never lowers it. Bind: partition, xid, xid.
    const UPSERT_PURGED: &'static str;

    /// Makes a connection, and what the server calls it. Before that it ends at the server what `doubtful` connections of the same
    /// role may still be doing.
    fn connect(
        options: &Self::Options,
        role: Role,
        doubtful: &[u64],
    ) -> impl Future<Output = Result<(Connection<Self>, u64), Error>> + Send;

    /// Begins a local transaction, moves the partitions' positions by one where the guards fit, and if those are all of them, writes
    /// the rows and checks that each one counted. Does not end the local transaction.
    fn write(
        connection: &mut Connection<Self>,
        batch: &Batch,
        counter: &Counter,
    ) -> impl Future<Output = Result<Wrote, Error>> + Send;

    /// Deletes these transactions, with all that belongs to them.
    fn delete(
        connection: &mut Connection<Self>,
        finished: &[Xid],
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// All rows of a query.
    fn fetch<T: FromAnyRow>(
        connection: &mut Connection<Self>,
        query: Query,
    ) -> impl Future<Output = Result<Vec<T>, sqlx::Error>> + Send;

    /// Runs a statement with values. Returns how many rows it wrote.
    fn execute(
        connection: &mut Connection<Self>,
        query: Query,
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Runs statements without values or rows, unprepared: BEGIN and the like.
    fn run(
        connection: &mut Connection<Self>,
        sql: &'static str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

/// What [`Dialect::write`] has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Wrote {
    /// All of it.
    All,
    /// So many of the positions, which are not all, and nothing else.
    Positions(u64),
    /// Not all of the rows: this is what was noticed first.
    NotAllRows(String),
}

impl Wrote {
    /// What a statement has written that was to write `rows`.
    pub(in crate::store) fn rows(table: &str, rows: usize, written: u64) -> Self {
        if written == rows as u64 {
            return Self::All;
        }
        Self::NotAllRows(format!("{written} of {rows} rows of `{table}` were as they must be"))
    }

    /// What an error says about the rows that were to be written, if it is about them: one that must be new is there.
    pub(in crate::store) fn failed(error: sqlx::Error) -> Result<Self, Error> {
        if let sqlx::Error::Database(refused) = &error
            && refused.is_unique_violation()
        {
            return Ok(Self::NotAllRows(refused.to_string()));
        }
        Err(error.into())
    }
}

/// Counts what becomes [`Written`].
#[derive(Debug, Default)]
pub(in crate::store) struct Counter {
    statements: AtomicU64,
    rows: AtomicU64,
}

impl Counter {
    pub(in crate::store) fn statement(&self, rows: usize) {
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
