//! A local transaction that cannot be left half done.
//!
//! `sqlx::Transaction` is not used. If one is dropped while its server is silent, its connection waits for ever, and its place
//! in the pool is lost (sqlx #4349). A dropped [`Tx`] hands its connection to
//! [`Statements::abandon`](super::db::Statements::abandon), which ends the wait in bounded time.

use std::{
    fmt, mem,
    ops::{Deref, DerefMut},
    time::Duration,
};

use bytes::Bytes;
use sqlx::{Connection as _, Error, Pool, SqlSafeStr as _, pool::PoolConnection};
use sqlx_core::transaction::TransactionManager as _;

use super::db::{FenceDb, Settle};

/// How long each step of returning a connection to its pool may take, such as ROLLBACK. After that, the connection is closed.
/// Closing ends the local transaction too, but later.
pub(super) const GIVE_BACK_WITHIN: Duration = Duration::from_secs(2);

// A savepoint is gone once its local transaction has ended. So its absence shows that the transaction has ended.
const MARK: &str = "SAVEPOINT handfast";
const MARK_AGAIN: &str = "RELEASE SAVEPOINT handfast; SAVEPOINT handfast";

/// The local transaction that the fence and your own statements share.
///
/// Write to your database only through `&mut **tx`. Writes through another connection are not rolled back with the rest. You
/// cannot commit or roll back; the fence does it after you return. You may use savepoints (`tx.begin()` of
/// [`sqlx::Connection`]).
///
/// On MySQL and MariaDB, keep statements out of it that commit implicitly, such as CREATE TABLE and TRUNCATE. The fence notices
/// them and reports an error, but what they have committed stays.
///
/// ```
/// # #[cfg(feature = "sqlite")]
/// # async fn example(tx: &mut handfast::Tx<sqlx::Sqlite>) -> Result<(), sqlx::Error> {
/// sqlx::query("UPDATE stock SET available = available - 1 WHERE sku = ?")
///     .bind(1042)
///     .execute(&mut **tx)
///     .await?;
/// # Ok(())
/// # }
/// ```
pub struct Tx<DB: FenceDb> {
    /// `None` only once the local transaction has ended.
    connection: Option<PoolConnection<DB>>,
    payload: Bytes,
    reply: Bytes,
    marked: bool,
    /// The statement to send with COMMIT.
    last: Option<String>,
}

impl<DB: FenceDb> Tx<DB> {
    /// The payload of the branch's Try, in Confirm and Cancel too; their requests' own payload is ignored. In a batch it is
    /// empty: each [`Tried`](crate::Tried) has its own.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Sets the reply of a Try, at most 64 KiB. The fence stores it, and a repeated Try returns it. Confirm and Cancel have no
    /// reply; one that they set is dropped.
    pub fn reply(&mut self, reply: impl Into<Bytes>) {
        self.reply = reply.into();
    }

    pub(crate) fn set_payload(&mut self, payload: Bytes) {
        self.payload = payload;
    }

    pub(super) fn take_reply(&mut self) -> Bytes {
        mem::take(&mut self.reply)
    }

    /// Sets a mark. Fails if the local transaction of the last mark has ended.
    pub(crate) async fn mark(&mut self) -> Result<(), Error> {
        let sql = if self.marked { MARK_AGAIN } else { MARK };
        self.marked = true;
        DB::execute(self, sql).await
    }

    /// Waits for a connection, and begins a local transaction.
    pub(super) async fn begin(pool: &Pool<DB>) -> Result<Self, Error> {
        Self::begin_with(pool, DB::BEGIN).await
    }

    /// The same for a local transaction that only reads.
    pub(super) async fn begin_reading(pool: &Pool<DB>) -> Result<Self, Error> {
        Self::begin_with(pool, DB::BEGIN_READING).await
    }

    /// A connection without a local transaction. It is not used again for anything else.
    pub(super) async fn not_begun(pool: &Pool<DB>) -> Result<Self, Error> {
        let connection = Some(DB::acquire(pool).await?);
        let (payload, reply) = (Bytes::new(), Bytes::new());
        Ok(Self { connection, payload, reply, marked: false, last: None })
    }

    async fn begin_with(pool: &Pool<DB>, begin: &'static str) -> Result<Self, Error> {
        let mut tx = Self::not_begun(pool).await?;
        // BEGIN goes through sqlx's own counter of nested transactions, so that the author's `tx.begin()` creates a savepoint.
        // After a BEGIN that sqlx does not know of, it would send a second BEGIN, and MySQL would commit the first.
        DB::TransactionManager::begin(&mut tx, Some(begin.into_sql_str())).await?;
        Ok(tx)
    }

    /// As [`write`], now or together with COMMIT. Nothing may be executed in between.
    pub(super) async fn settle(&mut self, settle: &Settle<'_>) -> Result<(), Error> {
        self.last = DB::settle_at_commit(settle);
        if self.last.is_some() {
            return Ok(());
        }
        write::<DB>(self, settle).await
    }

    /// Once this returns `Ok`, the work is durable. After an error, it may or may not be durable.
    pub(super) async fn commit(mut self) -> Result<(), Error> {
        let last = self.last.take();
        DB::commit(&mut self, last).await?;
        if self.is_in_transaction() {
            return Err(Error::InvalidArgument("the work left a savepoint open".to_owned()));
        }
        drop(self.connection.take());
        Ok(())
    }

    /// Once this returns `Ok`, nothing that was done in this local transaction takes effect, now or later.
    ///
    /// # Errors
    ///
    /// When the local transaction had ended before, so a part of the work may be committed.
    pub(super) async fn rollback(mut self) -> Result<(), Error> {
        let rollback = DB::rollback(&mut self);
        let Ok(Ok(undone)) = tokio::time::timeout(GIVE_BACK_WITHIN, rollback).await else {
            return Ok(()); // the connection is closed, which rolls back
        };
        // If the work has left a savepoint open, only that was rolled back.
        if !self.is_in_transaction() && (undone || self.restored().await) {
            drop(self.connection.take());
        }
        if undone { Ok(()) } else { Err(ended()) }
    }

    /// As [`Tx::rollback`], after a statement has failed with this error.
    pub(super) async fn rollback_after(self, error: &Error) {
        if !DB::cannot_write(error) {
            drop(self.rollback().await); // the statement's error says more
        }
    }

    /// Whether the connection has its settings back. If not, it is not reused.
    async fn restored(&mut self) -> bool {
        let restore = DB::restore(self);
        matches!(tokio::time::timeout(GIVE_BACK_WITHIN, restore).await, Ok(Ok(())))
    }
}

impl<DB: FenceDb> Drop for Tx<DB> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            DB::abandon(connection);
        }
    }
}

impl<DB: FenceDb> Deref for Tx<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        self.connection.as_ref().expect("taken only by methods that own the Tx")
    }
}

impl<DB: FenceDb> DerefMut for Tx<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.connection.as_mut().expect("taken only by methods that own the Tx")
    }
}

/// Writes to the row, if this local transaction still holds it.
///
/// Some errors end the whole local transaction (a deadlock on MySQL, a full disk on SQLite). If the author's code continues
/// after such an error, COMMIT would keep only the later work, and report success. The earlier work is rolled back, and so is
/// this call's count in the row. So this write does not find the row, and fails. After an error, PostgreSQL refuses every
/// further statement, including this one; its COMMIT alone would report success.
pub(crate) async fn write<DB: FenceDb>(
    connection: &mut DB::Connection,
    settle: &Settle<'_>,
) -> Result<(), Error> {
    wrote_all(DB::settle(connection, settle).await?, 1)
}

/// As [`write`], for several rows.
pub(crate) async fn write_many<DB: FenceDb>(
    connection: &mut DB::Connection,
    settles: &[Settle<'_>],
) -> Result<(), Error> {
    wrote_all(DB::settle_many(connection, settles).await?, settles.len())
}

fn wrote_all(written: u64, rows: usize) -> Result<(), Error> {
    if usize::try_from(written) == Ok(rows) {
        return Ok(());
    }
    Err(ended())
}

/// The error when the author's code has ended the local transaction, or gone on after its end.
pub(super) fn ended() -> Error {
    Error::InvalidArgument(
        "the local transaction ended before its work was done: a statement failed in it and the code went on, the code ended it, or \
         a statement committed it (on MySQL and MariaDB, CREATE TABLE and many others do)"
            .to_owned(),
    )
}

/// Never prints a payload.
impl<DB: FenceDb> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (payload, reply) = (self.payload.len(), self.reply.len());
        write!(f, "Tx({}, payload {payload} bytes, reply {reply} bytes)", DB::NAME)
    }
}
