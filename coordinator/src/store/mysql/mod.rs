//! The store for production: MySQL 8 and 9, MariaDB 10.6 and later, with the same SQL.
//!
//! Other processes may write here too: a coordinator that does not know yet that it was replaced, or a standby. Every batch
//! checks epoch, nonce and position, and so keeps them out. A connection that missed its deadline may still carry out its
//! statement. So it is killed at the server before a retry, and never used again.

mod addresses;
mod batch;
#[cfg(test)]
pub(super) mod fixture;
mod home;
mod member;
mod schema;
mod server;
mod session;
#[cfg(test)]
mod tests;

pub use addresses::Addresses;
pub use schema::{migrate, pending};
pub use server::{OpenError, SchemaError};

use std::{sync::Arc, time::Duration};

use handfast_proto::{BranchId, Xid};
use sqlx::{Connection as _, MySql as Db, MySqlConnection as Connection};
use tokio::time::Instant;
use tracing::warn;

use self::{home::Home, member::Session};

use super::{
    Appended, Batch, DuePage, Error, Known, ListFilter, Listing, Lookup, Ownership, Seat, Store,
    Summary, Written, XidBytes,
    sql::{
        self, CALL_TIMEOUT, Connections, Counter, Dialect, End, FromAnyRow, Query, Role, Wrote,
        read, write,
    },
};
use crate::transaction::{Decision, StuckAfter, Timestamp};

/// How often an idle owner appends an empty batch. The batch keeps the connection open, shows a standby that the owner is
/// alive, and tells the owner if it was replaced.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Writing connections; each writes its own partitions. While the server handles one batch or waits for its disk, it can handle
/// another one. It also flushes two concurrent commits in one write.
const WRITERS: u16 = 2;
/// Connections for reads.
const READERS: usize = 4;
/// A takeover of a partition is tried at least so often, and at least for so long. An attempt fails if it waits too long for a batch
/// of the previous owner, or if a batch of a busy owner is certified meanwhile (Galera).
const ACQUIRE_ATTEMPTS_MIN: u32 = 6;
const ACQUIRE_PATIENCE: Duration = Duration::from_secs(15);
/// The same for all partitions together. After that, an attempt that fails ends the takeover.
const ACQUIRE_PATIENCE_IN_ALL: Duration = Duration::from_secs(90);
/// Pauses between attempts, in milliseconds. Random, so that they do not keep step with the owner's batches.
const ACQUIRE_PAUSE_MILLIS: std::ops::Range<u64> = 10..200;

/// How often the most contested partition was taken over. Bind: from, until.
const TAKEOVERS: &str = "SELECT CAST(COALESCE(MAX(times), 0) AS SIGNED) FROM (SELECT COUNT(*) AS times FROM epoch \
                         WHERE taken_at BETWEEN ? AND ? GROUP BY `partition`) AS of_each";

/// See the module's comment.
#[derive(Debug)]
pub struct MySqlStore {
    /// One connection for each writer.
    writers: Vec<Connections<InMySql>>,
    readers: Connections<InMySql>,
    /// One connection for the purge. No journal waits for it.
    cleaner: Connections<InMySql>,
    home: Arc<Home>,
    counter: Counter,
}

/// The SQL dialect of MySQL and MariaDB.
#[derive(Debug)]
struct InMySql;

impl Dialect for InMySql {
    type Db = Db;
    type Options = Arc<Home>;
    type Session = Session;

    const BEGIN_WRITING: &'static str = "BEGIN";
    /// InnoDB takes snapshots only in REPEATABLE READ. Reading connections use it, writing connections do not.
    const BEGIN_READING: &'static str = "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";
    const UPSERT_PURGED: &'static str = "INSERT INTO purged (`partition`, through) VALUES (?, ?) \
                                         ON DUPLICATE KEY UPDATE through = GREATEST(through, ?)";
    // The hints keep the server from a scan, which it prefers if it believes that the table is small. A scan waits for rows that
    // others have locked. So `branch` is looked up row by row: a range would also wait for the row after it.
    const DELETE_KEYS: &'static str = "DELETE i FROM global_transaction AS g FORCE INDEX (PRIMARY) \
         STRAIGHT_JOIN idempotency AS i FORCE INDEX (PRIMARY) ON i.key_hash = g.key_hash AND i.xid = g.xid \
         WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?";
    const DELETE_BRANCHES: &'static str = "DELETE b FROM global_transaction AS g FORCE INDEX (PRIMARY) \
         STRAIGHT_JOIN branch AS b FORCE INDEX (PRIMARY) ON b.xid = g.xid \
         WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?";
    const DELETE_TRANSACTIONS: &'static str = "DELETE g FROM global_transaction AS g FORCE INDEX (PRIMARY) \
         WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?";
    const CLOCK: &'static str = "SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)";

    async fn connect(
        home: &Arc<Home>,
        role: Role,
        doubtful: &[Session],
    ) -> Result<(Connection, Session), Error> {
        home.connect(role, doubtful).await
    }

    fn is_current(home: &Arc<Home>, session: &Session) -> bool {
        home.has(session)
    }

    async fn write(
        connection: &mut Connection,
        batch: &Batch,
        end: End,
        counter: &Counter,
    ) -> Result<Wrote, Error> {
        batch::write(connection, batch, end, counter).await
    }

    async fn fetch<T: FromAnyRow>(
        connection: &mut Connection,
        query: Query,
    ) -> Result<Vec<T>, sqlx::Error> {
        sql::fetch::<Db, T>(connection, query).await
    }

    async fn execute(connection: &mut Connection, query: Query) -> Result<u64, sqlx::Error> {
        Ok(sql::execute::<Db>(connection, query).await?.rows_affected())
    }

    async fn run(connection: &mut Connection, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(sql).execute(connection).await?;
        Ok(())
    }
}

impl MySqlStore {
    /// Connects to the store at `url` (`mysql://user:password@host:3306/database`, with several hosts for a group). Checks that the schema has this program's
    /// version, and that the server keeps what it acknowledges. With `allow_unsafe`, settings that could lose commits cause
    /// only a warning.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. Nothing was changed in the database.
    pub async fn open(url: &str, allow_unsafe: bool) -> Result<Self, OpenError> {
        let home = Home::of(Addresses::parse(url)?);
        let mut connection = home.connect_once().await?;
        tokio::time::timeout(CALL_TIMEOUT, schema::check(&mut connection)).await??;
        server::check(&mut connection, allow_unsafe).await?;
        drop(connection.close().await);
        let connections = |role, max| Connections::new(role, home.clone(), max);
        Ok(Self {
            writers: (0..WRITERS).map(|_| connections(Role::Write, 1)).collect(),
            readers: connections(Role::Read, READERS),
            cleaner: connections(Role::CleanUp, 1),
            home: home.clone(),
            counter: Counter::default(),
        })
    }

    /// Marks a store that was restored from an older copy: what its epochs lack is answered LOST from now on. Returns how many epochs
    /// were marked. No coordinator may own it.
    ///
    /// # Errors
    ///
    /// See [`Error`]. A repeat does no harm.
    pub async fn mark_restored(&self) -> Result<u64, Error> {
        let mark =
            async |connection: &mut Connection| write::mark_restored::<InMySql>(connection).await;
        self.writer_of(0).run(mark).await
    }

    async fn acquire_once(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        let acquire = async |connection: &mut Connection| {
            write::acquire::<InMySql>(connection, partitions, owner, now).await
        };
        self.writer_of(0).run(acquire).await
    }

    /// The connection that writes this partition. A retry of a batch uses the same pool, which first kills the connection whose
    /// result is unknown.
    fn writer_of(&self, partition: u16) -> &Connections<InMySql> {
        &self.writers[usize::from(partition % WRITERS)]
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
        let seats = async |connection: &mut Connection| {
            if !self.home.is_settled() {
                // The connection of a standby may stay open at a server that is not the primary any more.
                if let Some(unfit) = self.home.look(connection).await?.unfit {
                    return Err(Error::unavailable(format!("the store has moved: {unfit}")));
                }
            }
            write::seats::<InMySql>(connection).await
        };
        self.readers.run(seats).await
    }

    async fn takeovers(&self, from: Timestamp, until: Timestamp) -> Result<u64, Error> {
        let count = async |connection: &mut Connection| {
            let takeovers = Query::new(TAKEOVERS).bind(from).bind(until);
            let most: Option<(i64,)> = InMySql::fetch(connection, takeovers).await?.pop();
            Ok(most.map_or(0, |(times,)| times.cast_unsigned()))
        };
        self.readers.run(count).await
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        self.home.choose_for_takeover().await?;
        // One local transaction, if nobody is in the way.
        match self.acquire_once(partitions, owner, now).await {
            Err(Error::Unavailable(cause)) => {
                warn!(cause, "the store was not taken over; trying again");
            }
            ended => return ended,
        }
        // The previous owner is alive and busy, or has a batch in flight that the server will end. On Galera a long local
        // transaction loses against each of its batches, so take one partition after the other.
        let mut taken = Vec::with_capacity(partitions.len());
        let all_began = Instant::now();
        for partition in partitions {
            let (mut attempts, began) = (1_u32, Instant::now());
            loop {
                match self.acquire_once(&[*partition], owner, now).await {
                    Ok(ownership) => break taken.extend(ownership),
                    Err(Error::Unavailable(cause))
                        if may_try_again(attempts, began.elapsed(), all_began.elapsed()) =>
                    {
                        if attempts.is_power_of_two() {
                            warn!(
                                partition,
                                attempts, cause, "the partition was not taken over; trying again"
                            );
                        }
                        attempts += 1;
                        let pause = rand::random_range(ACQUIRE_PAUSE_MILLIS);
                        tokio::time::sleep(Duration::from_millis(pause)).await;
                    }
                    Err(error) => {
                        drop(self.release(&taken).await); // as far as it goes: the next owner takes them all the same
                        return Err(error);
                    }
                }
            }
        }
        Ok(taken)
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let partition = batch.guards.first().map_or(0, |guard| guard.partition);
        let appended = write::append(self.writer_of(partition), batch, &self.counter).await;
        if let Ok(Appended::Durable) = &appended {
            self.home.recorded(&batch.guards);
        }
        if let Err(Error::Unavailable(_)) = &appended {
            // A server that must not be written cannot take a batch that finds out whether this owner was replaced.
            let replaced = self.home.replaced(&batch.guards).await?;
            if !replaced.is_empty() {
                return Ok(Appended::Fenced(replaced));
            }
        }
        appended
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        let load = async move |connection: &mut Connection| {
            read::load::<InMySql>(connection, xid, known).await
        };
        sql::reading(&self.readers, self.writer_of(xid.partition), load).await
    }

    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error> {
        let resolved = async move |connection: &mut Connection| {
            sql::resolutions::resolved::<InMySql>(connection, xid, known).await
        };
        sql::reading(&self.readers, self.writer_of(xid.partition), resolved).await
    }

    async fn find_keys(
        &self,
        hashes: &[[u8; 32]],
        known: Known,
    ) -> Result<Vec<Option<Xid>>, Error> {
        let find = async move |connection: &mut Connection| {
            read::find_keys::<InMySql>(connection, hashes, known).await
        };
        sql::reading(&self.readers, self.writer_of(known.ownership.partition), find).await
    }

    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, XidBytes)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error> {
        let after = after.as_ref();
        let due = async move |connection: &mut Connection| {
            read::due::<InMySql>(connection, until, after, limit, known).await
        };
        sql::reading(&self.readers, self.writer_of(known.ownership.partition), due).await
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        let list = async move |connection: &mut Connection| {
            read::list::<InMySql>(connection, filter, limit).await
        };
        sql::reading(&self.readers, self.writer_of(0), list).await
    }

    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        let clock = async |connection: &mut Connection| read::clock::<InMySql>(connection).await;
        self.readers.run(clock).await.map(Some)
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        let summary = async move |connection: &mut Connection| {
            read::summary::<InMySql>(connection, now, stuck).await
        };
        sql::reading(&self.readers, self.writer_of(0), summary).await
    }

    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<XidBytes>,
        limit: usize,
    ) -> Result<(u64, Option<XidBytes>), Error> {
        let after = after.as_deref();
        let partition = ownership.partition;
        let find = async |connection: &mut Connection| {
            read::finished::<InMySql>(connection, partition, finished_before, now, after, limit)
                .await
        };
        let (finished, next) = self.cleaner.run(find).await?;
        if finished.ranges.is_empty() {
            return Ok((0, next));
        }
        let purge = async |connection: &mut Connection| {
            write::purge::<InMySql>(connection, ownership, finished_before, &finished).await
        };
        let deleted = self.cleaner.run(purge).await?;
        Ok(deleted.map_or((0, None), |deleted| (deleted, next)))
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        let release = async |connection: &mut Connection| {
            write::release::<InMySql>(connection, ownerships).await
        };
        self.writer_of(0).run(release).await
    }
}

/// Whether a takeover of a partition is tried again after so many attempts, which took `this` long. `all`: how long the takeover of all
/// partitions has taken so far.
fn may_try_again(attempts: u32, this: Duration, all: Duration) -> bool {
    (attempts < ACQUIRE_ATTEMPTS_MIN || this < ACQUIRE_PATIENCE) && all < ACQUIRE_PATIENCE_IN_ALL
}
