//! The store for production: MySQL 8 and 9, MariaDB 10.6 and later, with the same SQL.
//!
//! Other processes may write here too: a coordinator that was replaced and does not know it yet, and one that waits for its turn.
//! Epoch and position, checked by every batch, keep them out. What may be in doubt is thrown away: a connection that did not
//! answer in time may still carry out what it was told, so it is ended at the server before anything is repeated, and never used
//! again.

mod batch;
#[cfg(test)]
pub(super) mod fixture;
mod schema;
mod server;
#[cfg(test)]
mod tests;

#[path = "../sql/read.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod read;
#[path = "../sql/write.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod write;

pub use schema::{SchemaError, migrate, pending};
pub use server::{OpenError, options};

use std::time::Duration;

use handfast_proto::Xid;
use sqlx::{
    AssertSqlSafe, Connection as _, MySql as Db, MySqlConnection as Connection, MySqlPool,
    mysql::{MySqlConnectOptions, MySqlPoolOptions},
};
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::{
    Appended, Batch, Counter, DuePage, Error, ListFilter, Lookup, Ownership, Seat, Store, Summary,
    Written,
};
use crate::transaction::{GlobalTransaction, StuckAfter, Timestamp};

/// Longest wait for one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// After so many seconds of silence the server itself ends a connection that writes: the batch of an owner that is gone must not
/// keep its rows locked.
const SILENCE_MAX_SECONDS: u32 = 5;
/// How often an idle owner writes an empty batch. It keeps the connection open, shows a process that waits that the owner is
/// alive, and tells the owner if it is not the owner any more.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Connections that write, each for partitions of its own: while the server works on a batch, or waits for its disk, it can work on another
/// one, and it makes one write to the disk of two commits that come together.
const WRITERS: u16 = 2;
/// Connections for reading and cleaning up, beside those that write.
const READERS: u32 = 4;
/// How often a takeover is tried again that has waited too long for the batch of the owner before.
const ACQUIRE_ATTEMPTS: usize = 6;

const BEGIN_WRITING: &str = "BEGIN";
/// One moment for all its queries. (InnoDB's snapshots are of REPEATABLE READ; what reads has it, what writes has not.)
const BEGIN_READING: &str = "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";
/// For the next local transaction. One in REPEATABLE READ locks the gaps beside the branches that it deletes too, and whoever
/// writes there, next to the newest that is deleted, would wait for it.
const LOCK_ROWS_ONLY: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
/// Takeovers of the partition that was taken over most often. Bind: from, until.
const TAKEOVERS: &str = "SELECT CAST(COALESCE(MAX(times), 0) AS SIGNED) FROM (SELECT COUNT(*) AS times FROM epoch \
                         WHERE taken_at BETWEEN ? AND ? GROUP BY `partition`) AS of_each";
/// Bind: partition, xid, xid.
const UPSERT_PURGED: &str = "INSERT INTO purged (`partition`, through) VALUES (?, ?) \
                             ON DUPLICATE KEY UPDATE through = GREATEST(through, ?)";

/// See the module's comment.
#[derive(Debug)]
pub struct MySqlStore {
    writers: Vec<Mutex<Writer>>,
    readers: MySqlPool,
    counter: Counter,
}

/// A connection that writes.
#[derive(Debug)]
struct Writer {
    options: MySqlConnectOptions,
    /// `None`: the last one was thrown away, in doubt.
    connection: Option<Connection>,
    /// What the server calls that one.
    id: u64,
}

impl MySqlStore {
    /// Connects to the store at `url` (`mysql://user:password@host:3306/database`), and checks that it can be trusted: that its
    /// schema is ours and of this version, and that the server keeps what it has acknowledged. With `allow_unsafe`, what would
    /// lose commits is only warned of.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. Nothing was changed.
    pub async fn open(url: &str, allow_unsafe: bool) -> Result<Self, OpenError> {
        let options = options(url)?;
        let mut connection = server::connect(&options).await?;
        tokio::time::timeout(CALL_TIMEOUT, schema::check(&mut connection)).await??;
        server::check(&mut connection, allow_unsafe).await?;
        drop(connection.close().await);
        let readers = MySqlPoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(CALL_TIMEOUT)
            .after_connect(|connection, _| Box::pin(server::set_up_reader(connection)))
            .connect_lazy_with(options.clone());
        let writer = |_| Mutex::new(Writer { options: options.clone(), connection: None, id: 0 });
        let writers = (0..WRITERS).map(writer).collect();
        Ok(Self { writers, readers, counter: Counter::default() })
    }

    /// Runs `work` on a connection that writes. After an error, or without an answer in time, that one is thrown away.
    async fn writing<T>(
        &self,
        writer: u16,
        work: impl AsyncFnOnce(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut writer = self.writers[usize::from(writer)].lock().await;
        let result = tokio::time::timeout(CALL_TIMEOUT, async {
            let mut connection = match writer.connection.take() {
                Some(connection) => connection,
                None => writer.connect().await?,
            };
            let result = work(&mut connection).await;
            if result.is_ok() {
                writer.connection = Some(connection);
            }
            result
        });
        result.await.unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed)))
    }

    /// Runs `work` on one of the other connections. After an error, or without an answer in time, that one is thrown away.
    async fn reading<T>(
        &self,
        work: impl AsyncFnOnce(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut connection = self.readers.acquire().await?;
        let result = tokio::time::timeout(CALL_TIMEOUT, work(&mut connection))
            .await
            .unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed)));
        if result.is_err() {
            connection.close_on_drop();
        }
        result
    }
}

impl Writer {
    /// A new connection. What the one before it may still be at is ended.
    async fn connect(&mut self) -> Result<Connection, Error> {
        let mut connection = Connection::connect_with(&self.options).await?;
        if self.id != 0 {
            // Most likely the server has noticed by itself, and there is nobody of that number any more.
            let kill = AssertSqlSafe(format!("KILL {}", self.id));
            if sqlx::raw_sql(kill).execute(&mut connection).await.is_ok() {
                info!(connection = self.id, "a connection in doubt was ended at the server");
            }
        }
        server::set_up_writer(&mut connection, SILENCE_MAX_SECONDS).await?;
        let id = sqlx::query_scalar("SELECT CONNECTION_ID()");
        self.id = id.fetch_one(&mut connection).await?;
        Ok(connection)
    }
}

#[async_trait::async_trait]
impl Store for MySqlStore {
    fn heartbeat(&self) -> Option<Duration> {
        Some(HEARTBEAT)
    }

    fn batches_at_a_time(&self) -> u16 {
        WRITERS
    }

    fn written(&self) -> Written {
        self.counter.written()
    }

    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        self.reading(async |connection| write::seats(connection).await).await
    }

    async fn takeovers(&self, from: Timestamp, until: Timestamp) -> Result<u64, Error> {
        self.reading(async |connection| {
            let takeovers: i64 = sqlx::query_scalar(TAKEOVERS)
                .bind(from.0)
                .bind(until.0)
                .fetch_one(connection)
                .await?;
            Ok(takeovers.cast_unsigned())
        })
        .await
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        let mut attempts = 1;
        loop {
            let acquire = async |connection: &mut Connection| {
                write::acquire(connection, partitions, owner, now).await
            };
            let acquired = self.writing(0, acquire).await;
            match acquired {
                Err(Error::Unavailable(cause)) if attempts < ACQUIRE_ATTEMPTS => {
                    // The owner before may have a batch under way; the server ends that one in time.
                    warn!(attempts, cause, "the store was not taken over; trying again");
                    attempts += 1;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                ended => return ended,
            }
        }
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        // What repeats a batch comes to the same connection, and so ends the one that is in doubt.
        let partition = batch.guards.first().map_or(0, |guard| guard.partition);
        let append = async |connection: &mut Connection| {
            write::append(connection, batch, &self.counter).await
        };
        self.writing(partition % WRITERS, append).await
    }

    async fn load(&self, xid: Xid) -> Result<Lookup, Error> {
        self.reading(async |connection| read::load(connection, xid).await).await
    }

    async fn find_keys(&self, hashes: &[[u8; 32]]) -> Result<Vec<Option<Xid>>, Error> {
        self.reading(async |connection| read::find_keys(connection, hashes).await).await
    }

    async fn due(
        &self,
        partition: u16,
        until: Timestamp,
        after: Option<(Timestamp, Xid)>,
        limit: usize,
    ) -> Result<DuePage, Error> {
        self.reading(async |connection| read::due(connection, partition, until, after, limit).await)
            .await
    }

    async fn list(
        &self,
        filter: &ListFilter,
        limit: usize,
    ) -> Result<Vec<GlobalTransaction>, Error> {
        self.reading(async |connection| read::list(connection, filter, limit).await).await
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        self.reading(async |connection| read::summary(connection, now, stuck).await).await
    }

    async fn purge(
        &self,
        partition: u16,
        finished_before: Timestamp,
        after: Option<Xid>,
        limit: usize,
    ) -> Result<(u64, Option<Xid>), Error> {
        // Not on a connection that writes: no journal waits for it.
        self.reading(async |connection| {
            let (finished, next) =
                read::finished(connection, partition, finished_before, after, limit).await?;
            sqlx::raw_sql(LOCK_ROWS_ONLY).execute(&mut *connection).await?;
            write::purge(connection, partition, &finished).await?;
            Ok((u64::try_from(finished.len()).expect("a page of them"), next))
        })
        .await
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        self.writing(0, async |connection| write::release(connection, ownerships).await).await
    }
}
