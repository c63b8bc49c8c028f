//! The store's file: which process may use it, whether it belongs to Handfast, and whether it is still where it was.

use std::{
    fs::{self, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tracing::{info, warn};

use super::{
    mark::{self, Mark, beside},
    refusal::OpenError,
};
use crate::store::{PARTITIONS, sql::is_damaged_file};

/// The value of `PRAGMA application_id` in our files: "HFST".
pub(super) const APPLICATION_ID: i64 = 0x4846_5354;
/// The steps from each version of the schema to the next, oldest first. A released step never changes.
pub(super) const STEPS: [&str; 3] =
    [include_str!("schema.sql"), include_str!("schema-2.sql"), include_str!("schema-3.sql")];
/// The number of steps that were done: a part of `PRAGMA user_version`.
const SCHEMA_VERSION: i64 = 3;

/// Symbolic links that lead from one to the next. Linux follows no more.
const LINKS_MAX: usize = 40;

/// The store's file, locked until this process ends for whatever reason.
#[derive(Debug)]
pub(super) struct LockedFile {
    /// Without symbolic links.
    path: PathBuf,
    is_new: bool,
    id: Id,
    /// The WAL, once there is one.
    wal: OnceLock<Id>,
    /// Held open: the operating system releases a lock when the process ends, even after a kill.
    _lock: File,
    /// The file itself. Another name of it leads to the same lock. SQLite's locks are of another kind, but any close of a file
    /// takes them away: so this one stays open, and no second one is opened while SQLite has the file.
    file: File,
}

/// Which file it is, whatever its name: its device and its number there.
type Id = (u64, u64);

impl LockedFile {
    /// Locks the file, and creates it if it does not exist.
    pub(super) fn lock(path: &Path) -> Result<Self, OpenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::File { path, source }
        };
        // Root can write a read-only file, but whoever marked it read-only did not want that.
        if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().readonly()) {
            return Err(OpenError::ReadOnly { path: path.to_owned() });
        }
        refuse_wal_alone(path)?;
        let open = |path: &Path| {
            let mut options = File::options();
            options.create(true).truncate(false).read(true).write(true);
            options.open(path).map_err(failed(path))
        };
        let file = open(path)?;
        let path = &fs::canonicalize(path).map_err(failed(path))?;
        let lock_path = beside(path, ".lock");
        let mut lock = open(&lock_path)?;
        for (locked, name) in [(&lock, &lock_path), (&file, path)] {
            match locked.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let pid = fs::read_to_string(&lock_path).map_err(failed(&lock_path))?;
                    // Empty: the file is locked under another name.
                    let pid = if pid.trim().is_empty() { "unknown" } else { pid.trim() };
                    return Err(OpenError::InUse { path: path.clone(), pid: pid.to_owned() });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(OpenError::File { path: name.clone(), source });
                }
            }
        }
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        written.map_err(failed(&lock_path))?;
        let metadata = file.metadata().map_err(failed(path))?;
        let mut locked = Self {
            path: path.clone(),
            is_new: metadata.len() == 0,
            id: id(&metadata),
            wal: OnceLock::new(),
            _lock: lock,
            file,
        };
        if !locked.is_new {
            locked.check_header()?;
        }
        Ok(locked)
    }

    /// The file's name without symbolic links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there was no store when the file was locked.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Connects, checks that the file is a whole store, and makes the tables if it is new.
    pub(super) async fn open_database(
        &self,
        options: &SqliteConnectOptions,
    ) -> Result<SqliteConnection, OpenError> {
        let path = || self.path.clone();
        let failed = |source| OpenError::Database { path: path(), source };
        let main = if self.is_new { None } else { Mark::of_main_file(&self.path).await };
        let opened = async {
            let mut connection = SqliteConnection::connect_with(options).await.map_err(failed)?;
            let version = version(&mut connection, &self.path).await?;
            let mark = Mark::read(&mut connection).await.map_err(failed)?;
            Ok((connection, version, mark))
        };
        let (mut connection, version, mark) = match opened.await {
            // The main file is sound, and together with its WAL it is not.
            Err(OpenError::Database { source: sqlx::Error::Database(refused), .. })
                if main.is_some() && is_damaged_file(&*refused) =>
            {
                return Err(OpenError::OtherWal { path: path() });
            }
            opened => opened?,
        };
        if let Some(mark) = mark {
            mark.check(main, &self.path)?;
        }
        if let (Some(mark), Some(main)) = (mark, main)
            && let Some(settled) = mark.after(main)
        {
            // The commit must not be older than what the main file says.
            self.file.sync_all().map_err(|source| OpenError::File { path: path(), source })?;
            settled.write(&mut connection).await.map_err(failed)?;
        }
        // Version 0: the file is new, or the process was killed before the tables were made. All tables are made in one
        // transaction.
        if version == 0 {
            warn!(path = %self.path.display(), "there was no store: this is a new one, and knows no transactions");
        }
        if version < SCHEMA_VERSION {
            migrate(&mut connection).await.map_err(failed)?;
            info!(path = %self.path.display(), from = version, to = SCHEMA_VERSION, "the store's tables are of this version now");
        }
        Ok(connection)
    }

    /// Remembers which file the WAL is. It exists as long as a connection is open.
    pub(super) fn watch_wal(&self) -> Result<(), OpenError> {
        let path = beside(&self.path, "-wal");
        let metadata = fs::metadata(&path);
        let metadata = metadata.map_err(|source| OpenError::File { path, source })?;
        self.wal.get_or_init(|| id(&metadata));
        Ok(())
    }

    /// What is written to the file is lost if it is not where it was, because nobody will find it. Says so in words.
    pub(super) fn is_gone(&self) -> Option<String> {
        for (ending, id) in [("", Some(&self.id)), ("-wal", self.wal.get())] {
            let path = beside(&self.path, ending);
            let Some(id) = id else { continue };
            let what = match fs::metadata(&path) {
                Ok(metadata) if self::id(&metadata) == *id => continue,
                Ok(_) => "was replaced by another file".to_owned(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    "was deleted or moved away".to_owned()
                }
                Err(error) => format!("cannot be looked at: {error}"),
            };
            return Some(format!("the store's file {} {what}", path.display()));
        }
        None
    }

    /// Checks the file's first bytes before SQLite opens it. Opening another program's database in WAL mode would change it.
    fn check_header(&mut self) -> Result<(), OpenError> {
        let not_ours =
            |what: &str| Err(OpenError::NotOurs { path: self.path.clone(), what: what.to_owned() });
        // https://www.sqlite.org/fileformat.html#the_database_header
        let mut header = [0; 100];
        if let Err(source) = self.file.read_exact(&mut header) {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                return not_ours("it is no SQLite database");
            }
            return Err(OpenError::File { path: self.path.clone(), source });
        }
        let number = |at: usize| {
            i64::from(u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes")))
        };
        let (schema_version, application_id) = (number(60), number(68));
        if header[..16] != *b"SQLite format 3\0" {
            not_ours("it is no SQLite database")
        } else if application_id == APPLICATION_ID
            || (application_id == 0 && schema_version == 0 && number(28) <= 1)
        {
            Ok(()) // ours, or an empty database: a start that was killed before the tables were there
        } else {
            not_ours("it is the SQLite database of another program")
        }
    }

    /// The size of the WAL file.
    pub(super) fn journal_bytes(&self) -> u64 {
        fs::metadata(beside(&self.path, "-wal")).map_or(0, |metadata| metadata.len())
    }
}

/// Refuses a file with hard links: each name would have a WAL of its own.
pub(super) fn refuse_several_names(path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::File { path: path.to_owned(), source };
    match fs::metadata(path).map_err(failed)?.nlink() {
        0 | 1 => Ok(()),
        names => Err(OpenError::SeveralNames { path: path.to_owned(), names }),
    }
}

/// Refuses a WAL whose main file is missing or empty: SQLite would delete it.
fn refuse_wal_alone(path: &Path) -> Result<(), OpenError> {
    // A link may lead to a file that does not exist.
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let Ok(to) = fs::read_link(&path) else { break };
        path = path.parent().map_or_else(|| to.clone(), |folder| folder.join(&to));
    }
    let is_there = |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0);
    // In this order: a coordinator that starts at this moment writes the main file first.
    if is_there(&beside(&path, "-wal")) && !is_there(&path) {
        return Err(OpenError::NoMainFile { path });
    }
    Ok(())
}

fn id(metadata: &fs::Metadata) -> Id {
    (metadata.dev(), metadata.ino())
}

/// The version of the tables of a store; 0: it has none yet.
pub(super) async fn version(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<i64, OpenError> {
    let header = sqlx::query_scalar("PRAGMA user_version").fetch_one(connection).await;
    let failed = |source| OpenError::Database { path: path.to_owned(), source };
    match mark::version(header.map_err(failed)?) {
        found if found > SCHEMA_VERSION => {
            Err(OpenError::Newer { path: path.to_owned(), found, known: SCHEMA_VERSION })
        }
        version => Ok(version),
    }
}

/// Checks that a file that is only read is a store.
pub(super) async fn check_is_store(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let version = version(connection, path).await?;
    let id = sqlx::query_scalar("PRAGMA application_id").fetch_one(connection).await;
    let id: i64 = id.map_err(|source| OpenError::Database { path: path.to_owned(), source })?;
    if id == APPLICATION_ID && version > 0 {
        return Ok(());
    }
    let what = "it is the SQLite database of another program, or has no tables".to_owned();
    Err(OpenError::NotOurs { path: path.to_owned(), what })
}

/// Runs the missing steps, all of them or none.
pub(super) async fn migrate(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let header = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *tx).await?;
    let from = mark::version(header);
    if from == SCHEMA_VERSION {
        return Ok(());
    }
    let done = usize::try_from(from).unwrap_or(0);
    for step in STEPS.into_iter().skip(done) {
        sqlx::raw_sql(step).execute(&mut *tx).await?;
    }
    if done == 0 {
        for partition in 0..PARTITIONS {
            sqlx::query("INSERT INTO partition (partition, epoch, latest_batch) VALUES (?, 0, 0)")
                .bind(partition)
                .execute(&mut *tx)
                .await?;
        }
    }
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}"
    )))
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}
