//! Whether a file is whole. The newest commits of a running store are in the file `-wal` beside the main file. Somebody who
//! copies the main file alone, restores it beside the WAL of another copy, or deletes the WAL, loses them. SQLite does not
//! notice: it takes every WAL that it finds, and none if there is none.
//!
//! So the main file names the WAL that it needs, with a random number, and the WAL says its own name:
//!
//! 1. A commit sets `needed` to a new name. A checkpoint brings it into the main file, with all earlier commits.
//! 2. The next commit, the first of the new WAL, sets `present` to the same name. No batch comes in between.
//!
//! Both commits also write a part of the name into the header of the file (`PRAGMA user_version`). The header is on the first page of
//! every file, so a WAL always brings its own. The row may be on another page of another copy, and then the two do not fit.
//!
//! Between the two, main file and WAL say what the main file alone says. So the WAL must not become empty there. If a read holds
//! the checkpoint up, a commit sets `needed` back: the main file has not got the new name.
//!
//! The main file alone then says that something is missing. Main file and WAL together say that nothing is. So does the main file
//! alone after the last connection was closed: SQLite then copies the whole WAL into it. SQLite must not make checkpoints by
//! itself meanwhile, since those copy `present` too.
//!
//! What cannot be noticed: a WAL that is cut off at its end, or an older copy of the same WAL beside the main file as it was then
//! (nobody else knows of the newer commits); and a missing WAL if another program made a checkpoint while the store was open, or
//! kept a read open during ours, until the next checkpoint. A whole store is refused if the process was killed between 1 and 2, and
//! another program then opened and closed it: its WAL is gone.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{Connection as _, SqliteConnection as Connection, sqlite::SqliteConnectOptions};
use tokio::time::Instant;
use tracing::warn;

use super::refusal::OpenError;
use crate::store::sql::Counter;

/// Pages of the WAL after which a checkpoint is made.
const PAGES: i64 = 2000;
/// Batches and rows after which it is worth asking how many pages the WAL has.
const LOOK_AFTER: Work = Work { batches: 16, rows: 512 };
/// Pause after a checkpoint that somebody's read has held up.
const REPEAT_AFTER: Duration = Duration::from_secs(1);

/// The lower bits of the header's number are the version of the tables, the others are of the name.
const VERSION_BITS: u32 = 8;
/// The header's number has 32 bits, and one is its sign.
const NAME_BITS: u32 = 23;

/// The row of `mark`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub(super) struct Mark {
    needed: i64,
    present: i64,
    pub(super) backup_at: Option<i64>,
    /// The header's number.
    #[sqlx(rename = "user_version")]
    header: i64,
}

impl Mark {
    /// `None`: the file is of an earlier version, or has no tables yet.
    pub(super) async fn read(connection: &mut Connection) -> Result<Option<Self>, sqlx::Error> {
        let is_there = "SELECT count(*) FROM sqlite_schema WHERE name = 'mark'";
        let is_there: i64 = sqlx::query_scalar(is_there).fetch_one(&mut *connection).await?;
        if is_there == 0 {
            return Ok(None);
        }
        let mark = "SELECT needed, present, backup_at, user_version FROM mark, pragma_user_version";
        sqlx::query_as(mark).fetch_optional(connection).await
    }

    /// Writes it into the file, in a local transaction.
    pub(super) async fn write(self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        let Self { needed, present, backup_at, header } = self;
        let header = in_header(needed) | version(header);
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        let row = sqlx::query("UPDATE mark SET needed = ?, present = ?, backup_at = ?");
        row.bind(needed).bind(present).bind(backup_at).execute(&mut *tx).await?;
        let header = format!("PRAGMA user_version = {header}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(header)).execute(&mut *tx).await?;
        tx.commit().await
    }

    /// What the main file alone says. `None` also if it cannot be read: a checkpoint was cut off, and the WAL has it all.
    pub(super) async fn of_main_file(path: &Path) -> Option<Self> {
        let options = SqliteConnectOptions::new().filename(path).immutable(true).read_only(true);
        let mut connection = Connection::connect_with(&options).await.ok()?;
        let mark = Self::read(&mut connection).await.ok().flatten();
        drop(connection.close().await); // it was only read
        mark
    }

    /// What a store says whose process ended during a checkpoint, if its WAL has the name that the main file has.
    pub(super) fn after(self, main: Self) -> Option<Self> {
        let name = main.needed;
        (!self.is_whole()).then_some(Self { needed: name, present: name, ..self })
    }

    fn is_whole(self) -> bool {
        self.needed == self.present
    }

    /// Checks that nothing is missing of a store that nobody has open. `main` is what the main file says, `self` what it says
    /// together with the WAL.
    pub(super) fn check(self, main: Option<Self>, path: &Path) -> Result<(), OpenError> {
        let path = || path.to_owned();
        if let Some(at) = self.backup_at {
            let made_at = jiff::Timestamp::from_millisecond(at);
            let made_at = made_at.map_or_else(|_| at.to_string(), |at| format!("{at:.0}"));
            return Err(OpenError::Backup { path: path(), made_at });
        }
        let has_wal = fs::metadata(beside(&path(), "-wal")).is_ok_and(|wal| wal.len() > 0);
        if self.header >> VERSION_BITS << VERSION_BITS != in_header(self.needed) {
            return Err(OpenError::OtherWal { path: path() });
        }
        match main {
            Some(main) if self.is_whole() && main.needed != self.needed => {
                Err(OpenError::OtherWal { path: path() })
            }
            Some(_) if !self.is_whole() && !has_wal => Err(OpenError::NoWal { path: path() }),
            // The process ended during a checkpoint.
            Some(main) if !self.is_whole() && main.needed != self.present && main != self => {
                Err(OpenError::OtherWal { path: path() })
            }
            None | Some(_) => Ok(()),
        }
    }
}

/// The version of the tables, from the header's number.
pub(super) fn version(header: i64) -> i64 {
    header & ((1 << VERSION_BITS) - 1)
}

/// The part of a name that is in the header, at its place.
fn in_header(name: i64) -> i64 {
    (name & ((1 << NAME_BITS) - 1)) << VERSION_BITS
}

/// The file that belongs to a store and has this ending.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    PathBuf::from(name)
}

/// Makes a file that nobody else has open a whole one: no WAL that exists belongs to it.
pub(super) async fn call_whole(
    connection: &mut Connection,
    backup_at: Option<i64>,
) -> Result<(), sqlx::Error> {
    let Some(mark) = Mark::read(&mut *connection).await? else {
        return Err(sqlx::Error::RowNotFound);
    };
    let name = rand::random();
    Mark { needed: name, present: name, backup_at, ..mark }.write(connection).await
}

/// Makes checkpoints. See the module's comment.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// What was written when the WAL was looked at last.
    looked_at: Work,
    batches: u64,
    /// When to try again, after a checkpoint that was held up.
    again_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Work {
    batches: u64,
    rows: u64,
}

/// The answer to `PRAGMA wal_checkpoint`: whether somebody was in its way, the pages of the WAL, and how many of them are in the
/// main file.
type Pages = (i64, i64, i64);

impl Checkpoints {
    /// Counts a batch. Says whether it may be time for a checkpoint.
    pub(super) fn count(&mut self, counter: &Counter) -> bool {
        self.batches += 1;
        let now = Work { batches: self.batches, rows: counter.written().rows };
        let is_due = match self.again_at {
            Some(at) => at <= Instant::now(),
            None => {
                now.batches - self.looked_at.batches >= LOOK_AFTER.batches
                    || now.rows - self.looked_at.rows >= LOOK_AFTER.rows
            }
        };
        if is_due {
            self.looked_at = now;
        }
        is_due
    }

    /// Notes how a checkpoint went.
    pub(super) fn went(&mut self, is_complete: bool) {
        self.again_at = (!is_complete).then(|| Instant::now() + REPEAT_AFTER);
    }
}

/// Makes a checkpoint if the WAL has grown long enough. Returns `false` if a read of somebody holds it up.
pub(super) async fn checkpoint_if_long(connection: &mut Connection) -> Result<bool, sqlx::Error> {
    let noop: Pages =
        sqlx::query_as("PRAGMA wal_checkpoint(NOOP)").fetch_one(&mut *connection).await?;
    if noop.1 < PAGES {
        return Ok(true);
    }
    checkpoint(connection).await
}

/// Gives the WAL a new name, with a checkpoint. Returns `false` if a read of somebody holds it up: the WAL then goes on under
/// its old name.
pub(super) async fn checkpoint(connection: &mut Connection) -> Result<bool, sqlx::Error> {
    let Some(before) = Mark::read(&mut *connection).await? else {
        return Err(sqlx::Error::RowNotFound);
    };
    let mut mark = before;
    if before.is_whole() {
        mark.needed = rand::random();
        mark.write(&mut *connection).await?;
    }
    // PASSIVE does not cut the WAL off. An empty WAL would look like a missing one before `present` is written.
    let passive = "PRAGMA wal_checkpoint(PASSIVE)";
    let (busy, pages, copied): Pages = sqlx::query_as(passive).fetch_one(&mut *connection).await?;
    let is_complete = busy == 0 && copied == pages;
    if is_complete {
        Mark { present: mark.needed, ..mark }.write(connection).await?;
    } else if busy == 0 && before.is_whole() {
        // The new name has not come into the main file. Whoever closes the store last copies the whole WAL and deletes it.
        before.write(connection).await?;
    }
    Ok(is_complete)
}

/// Brings everything into the main file, at the end of an orderly run. Returns `false` if the WAL must stay beside the file:
/// nothing is lost then.
pub(super) async fn checkpoint_at_the_end(
    connection: &mut Connection,
) -> Result<bool, sqlx::Error> {
    checkpoint(&mut *connection).await?;
    if !Mark::read(&mut *connection).await?.is_some_and(Mark::is_whole) {
        return Ok(false);
    }
    // Now the commit that says that nothing is missing.
    let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
    let (busy, ..): Pages = sqlx::query_as(truncate).fetch_one(connection).await?;
    if busy != 0 {
        warn!(
            "another program reads the store: its newest commits stay in the file that ends with -wal"
        );
    }
    Ok(true)
}
