//! The store's file: which process may use it, and whether it belongs to Handfast.

use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tracing::{info, warn};

use crate::store::PARTITIONS;

/// The value of `PRAGMA application_id` in our files: "HFST".
const APPLICATION_ID: i64 = 0x4846_5354;
/// The steps from each version of the schema to the next, oldest first. A released step never changes.
const STEPS: [&str; 2] = [include_str!("schema.sql"), include_str!("schema-2.sql")];
/// The value of `PRAGMA user_version`: the number of steps that were done.
const SCHEMA_VERSION: i64 = 2;

/// Why a store cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the lock file.
    #[error(
        "the store {} is in use by another coordinator (process {pid}); stop that one first, or give this one a file of its own",
        path.display()
    )]
    InUse {
        /// The store's file.
        path: PathBuf,
        /// The other process's id, as it wrote it into the lock file.
        pid: String,
    },
    /// The file is read-only.
    #[error("the store {} is read-only; a coordinator has to write it: chmod u+w, or choose another file", path.display())]
    ReadOnly {
        /// The store's file.
        path: PathBuf,
    },
    /// The file is not a store.
    #[error("{} is not a store of Handfast ({what}); choose another file, or move this one away", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What it seems to be.
        what: String,
    },
    /// The file was written by a newer program.
    #[error(
        "the store {} has schema version {found}, and this program knows versions up to {SCHEMA_VERSION}; it was written by a \
         newer Handfast: use that one",
        path.display()
    )]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// The file system reports an error.
    #[error("the store {} cannot be opened: {source}", path.display())]
    File {
        /// The store's file, or the lock file beside it.
        path: PathBuf,
        /// The error.
        #[source]
        source: std::io::Error,
    },
    /// SQLite reports an error.
    #[error("the store {} cannot be opened: {source}", path.display())]
    Database {
        /// The store's file.
        path: PathBuf,
        /// The error.
        #[source]
        source: sqlx::Error,
    },
}

/// The store's file, locked until this process ends for whatever reason.
#[derive(Debug)]
pub(super) struct LockedFile {
    path: PathBuf,
    /// Held open: the operating system releases the lock when the process ends, even after a kill.
    _lock: File,
}

impl LockedFile {
    pub(super) fn lock(path: &Path) -> Result<Self, OpenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::File { path, source }
        };
        // Root can write a read-only file, but whoever marked it read-only did not want that.
        if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().readonly()) {
            return Err(OpenError::ReadOnly { path: path.to_owned() });
        }
        let lock_path = beside(path, ".lock");
        let mut lock = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&lock_path)
            .map_err(failed(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).map_err(failed(&lock_path))?;
                return Err(OpenError::InUse { path: path.to_owned(), pid: pid.trim().to_owned() });
            }
            Err(TryLockError::Error(source)) => {
                return Err(OpenError::File { path: lock_path, source });
            }
        }
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        written.map_err(failed(&lock_path))?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Connects, checks that the file is a store, and makes the tables if it is new.
    pub(super) async fn open_database(
        &self,
        options: &SqliteConnectOptions,
    ) -> Result<SqliteConnection, OpenError> {
        let path = || self.path.clone();
        let is_new = fs::metadata(&self.path).map_or(true, |metadata| metadata.len() == 0);
        if !is_new {
            self.check_header()?;
        }
        let failed = |source| OpenError::Database { path: path(), source };
        let mut connection = SqliteConnection::connect_with(options).await.map_err(failed)?;
        let version: i64 = sqlx::query_scalar("PRAGMA user_version")
            .fetch_one(&mut connection)
            .await
            .map_err(failed)?;
        if version > SCHEMA_VERSION {
            return Err(OpenError::Newer { path: path(), found: version });
        }
        // Version 0: the file is new, or the process was killed before the tables were made. All tables are made in one
        // transaction.
        if version == 0 {
            warn!(path = %self.path.display(), "there was no store: this is a new one, and knows no transactions");
        }
        if version < SCHEMA_VERSION {
            migrate(&mut connection, version).await.map_err(failed)?;
            info!(path = %self.path.display(), from = version, to = SCHEMA_VERSION, "the store's tables are of this version now");
        }
        Ok(connection)
    }

    /// Checks the file's first bytes before SQLite opens it. Opening another program's database in WAL mode would change it.
    fn check_header(&self) -> Result<(), OpenError> {
        let not_ours =
            |what: &str| Err(OpenError::NotOurs { path: self.path.clone(), what: what.to_owned() });
        // https://www.sqlite.org/fileformat.html#the_database_header
        let mut header = [0; 100];
        let read = File::open(&self.path).and_then(|mut file| file.read_exact(&mut header));
        if let Err(source) = read {
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

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    PathBuf::from(name)
}

/// Runs the missing steps, all of them or none.
async fn migrate(connection: &mut SqliteConnection, from: i64) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let done = usize::try_from(from).unwrap_or(0);
    for step in STEPS.into_iter().skip(done) {
        sqlx::raw_sql(step).execute(&mut *tx).await?;
    }
    if done == 0 {
        for partition in 0..PARTITIONS {
            sqlx::query("INSERT INTO partition (partition, epoch, batches) VALUES (?, 0, 0)")
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::{super::SqliteStore, *};
    use crate::{
        store::{Appended, Batch, Guard, Store as _, Summary},
        transaction::{StuckAfter, Timestamp},
    };

    async fn error(path: &Path) -> String {
        let error = SqliteStore::open(path).await.expect_err("it opened");
        assert!(error.to_string().contains(&path.display().to_string()), "which file? {error}");
        error.to_string()
    }

    #[tokio::test]
    async fn one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        // No folder is made. Otherwise a wrong path or a missing disk would give a coordinator with an empty store.
        assert!(error(&folder.path().join("missing/store.db")).await.contains("No such file"));
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path).await.unwrap();
        let error = error(&path).await;
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        drop(store);
        SqliteStore::open(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_read_only_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        drop(SqliteStore::open(&path).await.unwrap());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        assert!(error(&path).await.contains("read-only"));
    }

    #[tokio::test]
    async fn what_is_not_ours_is_refused_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("notes.txt");
        fs::write(&text, "Dear diary, ".repeat(100)).unwrap();
        assert!(error(&text).await.contains("no SQLite database"));
        assert_eq!(fs::read_to_string(&text).unwrap(), "Dear diary, ".repeat(100));

        let other = folder.path().join("other.db");
        let options = SqliteConnectOptions::new().filename(&other).create_if_missing(true);
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::raw_sql("CREATE TABLE partition (mine TEXT)").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let before = fs::read(&other).unwrap();
        assert!(error(&other).await.contains("another program"));
        assert_eq!(fs::read(&other).unwrap(), before);
    }

    #[tokio::test]
    async fn a_newer_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        drop(SqliteStore::open(&path).await.unwrap());
        let mut connection =
            SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path))
                .await
                .unwrap();
        sqlx::raw_sql("PRAGMA user_version = 99").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let error = error(&path).await;
        assert!(error.contains("99") && error.contains("newer"), "{error}");
    }

    #[tokio::test]
    async fn a_store_of_version_1_becomes_one_of_this_version() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        let version_1 = format!(
            "{}; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;
             INSERT INTO partition (partition, epoch, position, owner) VALUES (3, 1, 5, 'one');
             INSERT INTO epoch (partition, epoch, nonce, owner, taken_at) VALUES (3, 1, 77, 'one', 0);",
            STEPS[0]
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(version_1)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let store = SqliteStore::open(&path).await.unwrap();
        // A program of version 1 can neither take over nor write a batch.
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        for of_version_1 in [
            "UPDATE partition SET epoch = epoch + 1, position = 0, owner = 'one'",
            "UPDATE partition SET position = position + 1 WHERE partition = 3 AND epoch = 1 AND position = 5",
        ] {
            let error = sqlx::raw_sql(of_version_1).execute(&mut connection).await.unwrap_err();
            assert!(error.to_string().contains("no such column: position"), "{error}");
        }
        connection.close().await.unwrap();
        // A batch of the previous owner, if it could go on: epoch and nonce are its own.
        let guard = Guard { partition: 3, epoch: 1, nonce: 77, position: 6 };
        let batch = Batch { guards: vec![guard], writes: Vec::new() };
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
        assert_eq!(store.acquire(&[3], "two", Timestamp(1)).await.unwrap()[0].epoch, 2);
        drop(store);
        SqliteStore::open(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_start_that_was_killed_before_the_tables_were_there_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        for bytes in [0, 4096] {
            let path = folder.path().join(format!("{bytes}.db"));
            if bytes == 0 {
                fs::write(&path, []).unwrap();
            } else {
                // The file as `PRAGMA journal_mode = WAL` leaves it.
                let options = SqliteConnectOptions::new()
                    .filename(&path)
                    .create_if_missing(true)
                    .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal);
                SqliteConnection::connect_with(&options).await.unwrap().close().await.unwrap();
                assert_eq!(fs::metadata(&path).unwrap().len(), bytes);
            }
            let store = SqliteStore::open(&path).await.unwrap();
            let after = StuckAfter { attempts: 8, time: std::time::Duration::from_secs(120) };
            assert_eq!(store.summary(Timestamp(0), after).await.unwrap(), Summary::default());
        }
    }
}
