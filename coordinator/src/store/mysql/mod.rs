//! The store for production: MySQL 8 and 9, MariaDB 10.6 and later, with the same SQL.
//!
//! Other processes may write here too: a coordinator that does not know yet that it was replaced, or a standby. Every batch
//! checks epoch, nonce and position, and so keeps them out. A connection that missed its deadline may still carry out its
//! statement. So it is killed at the server before a retry, and never used again.

mod batch;
#[cfg(test)]
pub(super) mod fixture;
mod schema;
mod server;
#[cfg(test)]
mod tests;

pub use schema::{migrate, pending};
pub use server::{OpenError, SchemaError, options};

use std::time::Duration;

use handfast_proto::Xid;
use sqlx::{
    AssertSqlSafe, Connection as _, MySql as Db, MySqlConnection as Connection,
    mysql::MySqlConnectOptions,
};
use tracing::{info, warn};

use super::{
    Appended, Batch, DuePage, Error, Known, ListFilter, Listing, Lookup, Ownership, Seat, Store,
    Summary, Written,
    sql::{
        self, CALL_TIMEOUT, Connections, Counter, Dialect, FromAnyRow, Query, Role, Wrote, read,
        write,
    },
};
use crate::transaction::{StuckAfter, Timestamp};

/// A writing connection without a statement for this many seconds is closed by the server. Otherwise an owner that died with an
/// open batch would keep its rows locked.
const SILENCE_MAX_SECONDS: u32 = 5;
/// The same for the connection of the purge. It is longer than the pause between two rounds of the purge.
const CLEANER_SILENCE_MAX_SECONDS: u32 = 15;
/// How often an idle owner appends an empty batch. The batch keeps the connection open, shows a standby that the owner is
/// alive, and tells the owner if it was replaced.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Writing connections; each writes its own partitions. While the server handles one batch or waits for its disk, it can handle
/// another one. It also flushes two concurrent commits in one write.
const WRITERS: u16 = 2;
/// Connections for reads.
const READERS: usize = 4;
/// Attempts at a takeover. An attempt fails if it waits too long for a batch of the previous owner.
const ACQUIRE_ATTEMPTS: usize = 6;

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
    counter: Counter,
}

/// The SQL dialect of MySQL and MariaDB.
#[derive(Debug)]
struct InMySql;

impl Dialect for InMySql {
    type Db = Db;
    type Options = MySqlConnectOptions;

    const BEGIN_WRITING: &'static str = "BEGIN";
    /// InnoDB takes snapshots only in REPEATABLE READ. Reading connections use it, writing connections do not.
    const BEGIN_READING: &'static str = "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";
    const UPSERT_PURGED: &'static str = "INSERT INTO purged (`partition`, through) VALUES (?, ?) \
                                         ON DUPLICATE KEY UPDATE through = GREATEST(through, ?)";
    const CLOCK: &'static str = "SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)";

    async fn connect(
        options: &MySqlConnectOptions,
        role: Role,
        doubtful: &[u64],
    ) -> Result<(Connection, u64), Error> {
        let mut connection = Connection::connect_with(options).await?;
        for id in doubtful {
            // Ignore errors: most likely the server has closed the connection itself, and the id does not exist any more.
            let kill = AssertSqlSafe(format!("KILL {id}"));
            if sqlx::raw_sql(kill).execute(&mut connection).await.is_ok() {
                info!(connection = id, "a connection in doubt was ended at the server");
            }
        }
        match role {
            Role::Write => server::set_up_writer(&mut connection, SILENCE_MAX_SECONDS).await?,
            Role::Read => server::set_up_reader(&mut connection).await?,
            Role::CleanUp => {
                server::set_up_cleaner(&mut connection, CLEANER_SILENCE_MAX_SECONDS).await?;
            }
        }
        let id = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut connection).await?;
        Ok((connection, id))
    }

    async fn write(
        connection: &mut Connection,
        batch: &Batch,
        counter: &Counter,
    ) -> Result<Wrote, Error> {
        batch::write(connection, batch, counter).await
    }

    async fn delete(connection: &mut Connection, finished: &[Xid]) -> Result<(), Error> {
        batch::delete(connection, finished).await
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
    /// Connects to the store at `url` (`mysql://user:password@host:3306/database`). Checks that the schema has this program's
    /// version, and that the server keeps what it acknowledges. With `allow_unsafe`, settings that could lose commits cause
    /// only a warning.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. Nothing was changed in the database.
    pub async fn open(url: &str, allow_unsafe: bool) -> Result<Self, OpenError> {
        let options = options(url)?;
        let mut connection = server::connect(&options).await?;
        tokio::time::timeout(CALL_TIMEOUT, schema::check(&mut connection)).await??;
        server::check(&mut connection, allow_unsafe).await?;
        drop(connection.close().await);
        let connections = |role, max| Connections::new(role, options.clone(), max);
        Ok(Self {
            writers: (0..WRITERS).map(|_| connections(Role::Write, 1)).collect(),
            readers: connections(Role::Read, READERS),
            cleaner: connections(Role::CleanUp, 1),
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
        self.readers.run(async |connection| write::seats::<InMySql>(connection).await).await
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
        let mut attempts = 1;
        loop {
            let acquire = async |connection: &mut Connection| {
                write::acquire::<InMySql>(connection, partitions, owner, now).await
            };
            match self.writer_of(0).run(acquire).await {
                Err(Error::Unavailable(cause)) if attempts < ACQUIRE_ATTEMPTS => {
                    // The previous owner may have a batch in flight. The server will end it.
                    warn!(attempts, cause, "the store was not taken over; trying again");
                    attempts += 1;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                ended => return ended,
            }
        }
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let partition = batch.guards.first().map_or(0, |guard| guard.partition);
        write::append(self.writer_of(partition), batch, &self.counter).await
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        let load = async move |connection: &mut Connection| {
            read::load::<InMySql>(connection, xid, known).await
        };
        sql::reading(&self.readers, self.writer_of(xid.partition), load).await
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
        after: Option<(Timestamp, Xid)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error> {
        let due = async move |connection: &mut Connection| {
            read::due::<InMySql>(connection, until, after, limit, known).await
        };
        sql::reading(&self.readers, self.writer_of(known.ownership.partition), due).await
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        let list = async |connection: &mut Connection| {
            read::list::<InMySql>(connection, filter, limit).await
        };
        self.readers.run(list).await
    }

    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        let clock = async |connection: &mut Connection| read::clock::<InMySql>(connection).await;
        self.readers.run(clock).await.map(Some)
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        let summary = async |connection: &mut Connection| {
            read::summary::<InMySql>(connection, now, stuck).await
        };
        self.readers.run(summary).await
    }

    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<Xid>,
        limit: usize,
    ) -> Result<(u64, Option<Xid>), Error> {
        let partition = ownership.partition;
        let find = async |connection: &mut Connection| {
            read::finished::<InMySql>(connection, partition, finished_before, now, after, limit)
                .await
        };
        let (finished, next) = self.cleaner.run(find).await?;
        if finished.is_empty() {
            return Ok((0, next));
        }
        let purge = async |connection: &mut Connection| {
            write::purge::<InMySql>(connection, ownership, &finished).await
        };
        Ok(match self.cleaner.run(purge).await? {
            0 => (0, None),
            deleted => (deleted, next),
        })
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        let release = async |connection: &mut Connection| {
            write::release::<InMySql>(connection, ownerships).await
        };
        self.writer_of(0).run(release).await
    }
}
