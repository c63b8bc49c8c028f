//! The embedded store: one SQLite file and no server. A commit is as durable as on a server: WAL with `synchronous=FULL`.
//!
//! One process holds the locks for as long as it runs, so a live owner is never replaced. Still, every batch checks epoch
//! and position. They show whether a COMMIT whose answer was lost has taken effect (a full disk, an I/O error).
//!
//! A file can be copied, moved and deleted. `file` keeps others away and notices when it is not there any more, `mark` notices
//! when a part of it is missing, and `copy` makes copies that are whole.

mod batch;
mod copy;
mod file;
mod mark;
mod refusal;
#[cfg(test)]
mod tests;

pub use copy::{CopyError, Restored, backup, mark_restored, restore};
pub use refusal::OpenError;

use std::{
    path::Path,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use handfast_proto::{BranchId, Xid};
use sqlx::{
    Connection as _, Sqlite as Db, SqliteConnection as Connection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tracing::warn;

use self::{
    file::LockedFile,
    mark::{Checkpoints, Mark},
};
use super::{
    Appended, Batch, DuePage, Error, Known, ListFilter, Listing, Lookup, Ownership, Store, Summary,
    Written, XidBytes,
    sql::{self, Connections, Counter, Dialect, End, FromAnyRow, Query, Role, Wrote, read, write},
};
use crate::transaction::{Decision, StuckAfter, Timestamp};

/// How long a statement waits for another process's lock, such as that of a shell in the middle of a write.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections for reads, in addition to the one that writes.
const READERS: usize = 4;
/// Connections that write. SQLite allows one at a time.
const WRITERS: usize = 1;
/// Bytes of the WAL file that are kept after a checkpoint.
const JOURNAL_BYTES_KEPT: u32 = 64 * 1024 * 1024;
/// A larger WAL file indicates a problem, most likely a read that never ends.
const JOURNAL_BYTES_WARN: u64 = 256 * 1024 * 1024;

/// Transactions that one step of the purge looks at. Batches wait for it: there is one connection that writes.
const PURGED_AT_ONCE_MAX: usize = 512;

/// How often an idle coordinator checks that the file is where it was.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// See the module's comment.
#[derive(Debug)]
pub struct SqliteStore {
    /// One connection that writes.
    writer: Connections<InSqlite>,
    readers: Connections<InSqlite>,
    /// Open for as long as the store is. SQLite deletes the WAL when the last connection closes.
    keeper: Mutex<Option<Connection>>,
    counter: Counter,
    checkpoints: Mutex<Checkpoints>,
    file: LockedFile,
}

/// The SQL dialect of SQLite.
#[derive(Debug)]
struct InSqlite;

impl Dialect for InSqlite {
    type Db = Db;
    type Options = SqliteConnectOptions;
    type Session = ();

    /// IMMEDIATE: nobody else can write from here on, so what is read still holds at COMMIT.
    const BEGIN_WRITING: &'static str = "BEGIN IMMEDIATE";
    const BEGIN_READING: &'static str = "BEGIN";
    const UPSERT_PURGED: &'static str = "INSERT INTO purged (partition, through) VALUES (?, ?) \
                                         ON CONFLICT (partition) DO UPDATE SET through = max(through, ?)";
    const DELETE_KEYS: &'static str = "DELETE FROM idempotency WHERE (key_hash, xid) IN \
         (SELECT g.key_hash, g.xid FROM global_transaction AS g WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?)";
    const DELETE_BRANCHES: &'static str = "DELETE FROM branch WHERE xid IN \
         (SELECT g.xid FROM global_transaction AS g WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?)";
    const DELETE_TRANSACTIONS: &'static str = "DELETE FROM global_transaction AS g WHERE {xids} AND g.state IN (4, 5) AND g.finished_at < ?";
    const CLOCK: &'static str = "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)";

    /// Closing a connection ends its local transaction, so nothing remains to be killed.
    async fn connect(
        options: &SqliteConnectOptions,
        _role: Role,
        _doubtful: &[()],
    ) -> Result<(Connection, ()), Error> {
        Ok((Connection::connect_with(options).await?, ()))
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

impl SqliteStore {
    /// Opens the store in `path`, and creates it if the file does not exist.
    ///
    /// # Errors
    ///
    /// When another process uses the file, it is read-only, it is not a store, or it has a newer version.
    pub async fn open(path: &Path) -> Result<Self, OpenError> {
        let file = LockedFile::lock(path)?;
        file::refuse_several_names(file.path())?;
        let options = options(file.path())
            .statement_cache_capacity(batch::STATEMENTS_MAX)
            .pragma("journal_size_limit", JOURNAL_BYTES_KEPT.to_string());
        let mut connection = file.open_database(&options).await?;
        let failed = |source| OpenError::Database { path: file.path().to_owned(), source };
        let mut keeper = Connection::connect_with(&options).await.map_err(failed)?;
        Mark::read(&mut keeper).await.map_err(failed)?; // from the first read on, SQLite counts it
        let mut checkpoints = Checkpoints::default();
        checkpoints.went(mark::checkpoint(&mut connection).await.map_err(failed)?);
        file.watch_wal()?;
        let reading = options.clone().read_only(true).create_if_missing(false);
        Ok(Self {
            writer: Connections::new(Role::Write, options, WRITERS).with_first(connection, ()),
            readers: Connections::new(Role::Read, reading, READERS),
            keeper: Mutex::new(Some(keeper)),
            counter: Counter::default(),
            checkpoints: Mutex::new(checkpoints),
            file,
        })
    }

    /// Makes a checkpoint if it is time. If that fails, the next one is tried later: the WAL has everything.
    async fn checkpoint(&self) {
        if !self.checkpoints().count(&self.counter) {
            return;
        }
        let checkpoint =
            async |connection: &mut Connection| Ok(mark::checkpoint_if_long(connection).await?);
        match self.writer.run(checkpoint).await {
            Ok(is_complete) => self.checkpoints().went(is_complete),
            Err(error) => {
                warn!(%error, "the store's WAL file could not be copied into its main file; will retry");
                self.checkpoints().went(false);
            }
        }
    }

    fn checkpoints(&self) -> MutexGuard<'_, Checkpoints> {
        self.checkpoints.lock().expect("nothing panics while it is locked")
    }

    fn keeper(&self) -> MutexGuard<'_, Option<Connection>> {
        self.keeper.lock().expect("nothing panics while it is locked")
    }
}

/// How a store is opened to be written. SQLite makes no checkpoints by itself: see `mark`.
fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(false)
        .pragma("wal_autocheckpoint", "0")
}

#[async_trait::async_trait]
impl Store for SqliteStore {
    fn written(&self) -> Written {
        self.counter.written()
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        self.writer
            .run(async |connection| {
                write::acquire::<InSqlite>(connection, partitions, owner, now).await
            })
            .await
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let appended = write::append(&self.writer, batch, &self.counter).await?;
        if let Some(what) = self.file.is_gone() {
            return Err(Error::unavailable(what));
        }
        self.checkpoint().await;
        Ok(appended)
    }

    async fn gone(&self) -> String {
        let mut every = tokio::time::interval(LOOK_EVERY);
        loop {
            every.tick().await;
            if let Some(what) = self.file.is_gone() {
                // Never closed: SQLite would delete the file that now has the name of the WAL.
                let keeper = self.keeper().take();
                keeper.map(|keeper| Box::leak(Box::new(keeper)));
                return what;
            }
        }
    }

    async fn close(&self) {
        self.readers.close(READERS).await;
        let checkpoint =
            async |connection: &mut Connection| Ok(mark::checkpoint_at_the_end(connection).await?);
        let is_whole = match self.writer.run(checkpoint).await {
            Ok(is_whole) => is_whole,
            Err(error) => {
                warn!(%error, "the store's newest commits stay in the file that ends with -wal: keep it with the main file");
                false
            }
        };
        self.writer.close(WRITERS).await;
        let Some(keeper) = self.keeper().take() else { return };
        if is_whole {
            drop(keeper.close().await); // the process ends anyway
        } else {
            Box::leak(Box::new(keeper)); // SQLite would delete the WAL
        }
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        let load = async move |connection: &mut Connection| {
            read::load::<InSqlite>(connection, xid, known).await
        };
        sql::reading(&self.readers, &self.writer, load).await
    }

    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error> {
        let resolved = async move |connection: &mut Connection| {
            sql::resolutions::resolved::<InSqlite>(connection, xid, known).await
        };
        sql::reading(&self.readers, &self.writer, resolved).await
    }

    async fn find_keys(
        &self,
        hashes: &[[u8; 32]],
        known: Known,
    ) -> Result<Vec<Option<Xid>>, Error> {
        let find = async move |connection: &mut Connection| {
            read::find_keys::<InSqlite>(connection, hashes, known).await
        };
        sql::reading(&self.readers, &self.writer, find).await
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
            read::due::<InSqlite>(connection, until, after, limit, known).await
        };
        sql::reading(&self.readers, &self.writer, due).await
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        self.readers
            .run(async |connection| read::list::<InSqlite>(connection, filter, limit).await)
            .await
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        let journal_bytes = self.file.journal_bytes();
        if journal_bytes > JOURNAL_BYTES_WARN {
            warn!(
                journal_bytes,
                "the store's WAL file grows: does another program hold the file open for reading?"
            );
        }
        self.readers
            .run(async |connection| read::summary::<InSqlite>(connection, now, stuck).await)
            .await
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
        let (partition, limit) = (ownership.partition, limit.min(PURGED_AT_ONCE_MAX));
        let find = async |connection: &mut Connection| {
            read::finished::<InSqlite>(connection, partition, finished_before, now, after, limit)
                .await
        };
        let (finished, next) = self.readers.run(find).await?;
        if finished.ranges.is_empty() {
            return Ok((0, next));
        }
        let purge = async |connection: &mut Connection| {
            write::purge::<InSqlite>(connection, ownership, finished_before, &finished).await
        };
        let deleted = self.writer.run(purge).await?;
        self.checkpoint().await;
        Ok(deleted.map_or((0, None), |deleted| (deleted, next)))
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        self.writer
            .run(async |connection| write::release::<InSqlite>(connection, ownerships).await)
            .await
    }
}
