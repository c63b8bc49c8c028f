//! Copies of a store that are whole, and what must be done to use one. A copy that is used again lacks what was recorded after
//! it was made, and callers may have been told about that. So all of its epochs are marked: what they lack is answered LOST, and
//! no transaction that was undecided in them is decided again.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{Connection as _, SqliteConnection as Connection, sqlite::SqliteConnectOptions};
use tempfile::NamedTempFile;

use super::{
    InSqlite,
    file::{self, LockedFile},
    mark::{self, Mark, beside},
    refusal::OpenError,
};
use crate::{
    store::{Error, sql::write},
    transaction::Timestamp,
};

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Why a store was not copied. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is a file with the name of the copy.
    #[error("{} is there already, and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("cannot copy {} to {}: {source}", from.display(), to.display())]
    Failed {
        /// The file that is copied.
        from: PathBuf,
        /// The copy.
        to: PathBuf,
        /// The error.
        #[source]
        source: Error,
    },
}

/// What [`restore`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Where the store is that was there before. `None`: there was none.
    pub earlier: Option<PathBuf>,
    /// How many transactions the store has now.
    pub transactions: u64,
    /// When the backup was made; `None`: it is a plain copy of a store.
    pub made_at: Option<Timestamp>,
    /// How many epochs were marked.
    pub epochs: u64,
}

/// Writes a copy of the store into a new file, in one piece. A coordinator may have the store open, and goes on. `progress` is told
/// the bytes that are written, and about how many there will be. Returns the size of the copy.
///
/// # Errors
///
/// When the file exists, and see [`CopyError`].
pub async fn backup(
    store: &Path,
    to: &Path,
    now: Timestamp,
    progress: impl Fn(u64, u64),
) -> Result<u64, CopyError> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(CopyError::Exists { path: to.to_owned() });
    }
    exists(store)?;
    // Held until the end: no coordinator starts meanwhile, or one is running.
    let locked = match LockedFile::lock(store) {
        Ok(locked) => Some(locked),
        Err(OpenError::InUse { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut source = Source::open(store, locked.is_some(), Missing::Refused).await?;
    let failed = |source| CopyError::Failed { from: store.to_owned(), to: to.to_owned(), source };
    let copy = async {
        let copy = source.copy_beside(to, TELL_EVERY, progress).await?;
        let mut connection = copy.connect().await?;
        mark::call_whole(&mut connection, Some(now.0)).await?;
        connection.close().await?;
        let bytes = copy.sync().map_err(Error::unavailable)?;
        let copy = copy.file.persist_noclobber(to).map_err(Error::unavailable)?;
        drop(copy);
        sync_folder(to).map_err(Error::unavailable)?;
        Ok(bytes)
    };
    copy.await.map_err(failed)
}

/// Makes the store a copy of `from`: a backup, or a whole copy of a store. The store that was there is kept under another name.
/// A crash at any moment leaves the earlier store, the restored one, or one that is refused with a text that says so.
///
/// # Errors
///
/// When a coordinator uses the store, and see [`CopyError`].
pub async fn restore(
    from: &Path,
    store: &Path,
    now: Timestamp,
    progress: impl Fn(u64, u64),
) -> Result<Restored, CopyError> {
    exists(from)?;
    let locked = LockedFile::lock(store)?;
    let store = locked.path();
    if fs::canonicalize(from).is_ok_and(|from| from == store) {
        return Err(CopyError::Exists { path: store.to_owned() });
    }
    let source = Source::open(from, true, Missing::Refused).await?;
    put(source, from, &locked, now, progress).await
}

/// Puts a marked copy of the source in the place of the store.
async fn put(
    mut source: Source,
    from: &Path,
    locked: &LockedFile,
    now: Timestamp,
    progress: impl Fn(u64, u64),
) -> Result<Restored, CopyError> {
    let store = locked.path();
    let made_at = source.mark.and_then(|mark| mark.backup_at).map(Timestamp);
    let failed = |source| CopyError::Failed { from: from.to_owned(), to: store.to_owned(), source };
    let copy = async {
        let copy = source.copy_beside(store, TELL_EVERY, progress).await?;
        source.connection.close().await?;
        let mut connection = copy.connect().await?;
        let epochs = write::mark_restored::<InSqlite>(&mut connection).await?;
        mark::call_whole(&mut connection, None).await?;
        let transactions: i64 = sqlx::query_scalar("SELECT count(*) FROM global_transaction")
            .fetch_one(&mut connection)
            .await?;
        connection.close().await?;
        copy.sync().map_err(Error::unavailable)?;
        let earlier = replace(locked, copy.file, now).map_err(Error::unavailable)?;
        Ok(Restored { earlier, transactions: transactions.cast_unsigned(), made_at, epochs })
    };
    copy.await.map_err(failed)
}

/// Marks a store that was restored by other means, or that has lost its WAL for good. The marked store is a copy: in the file as
/// it is, SQLite would make a WAL before the mark is written, and a kill then would leave a store that looks whole. The store that
/// was there is kept under another name.
///
/// # Errors
///
/// When a coordinator uses the store, and see [`CopyError`].
pub async fn mark_restored(
    store: &Path,
    now: Timestamp,
    progress: impl Fn(u64, u64),
) -> Result<Restored, CopyError> {
    exists(store)?;
    let locked = LockedFile::lock(store)?;
    file::refuse_several_names(locked.path())?;
    let source = Source::open(locked.path(), true, Missing::Accepted).await?;
    put(source, locked.path(), &locked, now, progress).await
}

fn exists(path: &Path) -> Result<(), OpenError> {
    match fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(OpenError::File { path: path.to_owned(), source }),
    }
}

/// What to do with a store that lacks commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Refused,
    /// Somebody has said that they are gone for good.
    Accepted,
}

/// A store that is read to be copied.
pub(super) struct Source {
    connection: Connection,
    mark: Option<Mark>,
}

impl Source {
    /// Checks that it is a whole store. `is_alone`: no coordinator has it open.
    pub(super) async fn open(
        path: &Path,
        is_alone: bool,
        missing: Missing,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Database { path: path.to_owned(), source };
        let main = if is_alone { Mark::of_main_file(path).await } else { None };
        // A backup has no WAL.
        if main.is_none_or(|main| main.backup_at.is_none()) {
            file::refuse_several_names(path)?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .read_only(true)
            .busy_timeout(super::BUSY_TIMEOUT);
        let mut connection = Connection::connect_with(&options).await.map_err(failed)?;
        file::check_is_store(&mut connection, path).await?;
        let mark = Mark::read(&mut connection).await.map_err(failed)?;
        if let Some(mark) = mark
            && mark.backup_at.is_none()
            && is_alone
        {
            match mark.check(main, path) {
                Err(OpenError::NoWal { .. }) if missing == Missing::Accepted => {}
                checked => checked?,
            }
        }
        Ok(Self { connection, mark })
    }

    /// Copies it into a new file in the folder of `to`, with the tables of this version.
    pub(super) async fn copy_beside(
        &mut self,
        to: &Path,
        tell_every: Duration,
        progress: impl Fn(u64, u64),
    ) -> Result<Copy, Error> {
        let pages: i64 =
            sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut self.connection).await?;
        let page_size: i64 =
            sqlx::query_scalar("PRAGMA page_size").fetch_one(&mut self.connection).await?;
        let total = (pages * page_size).cast_unsigned();
        let mut builder = tempfile::Builder::new();
        let file = builder.prefix(".handfast-copy-").tempfile_in(folder(to));
        let copy = Copy { file: file.map_err(Error::unavailable)? };
        let path = copy.file.path().to_str().ok_or_else(|| {
            Error::Corrupt("the name of the folder is no text in UTF-8".to_owned())
        })?;
        // All of it in one snapshot. Commits of others go on meanwhile.
        let copying =
            sqlx::query("VACUUM INTO ?").bind(path.to_owned()).execute(&mut self.connection);
        let mut copying = std::pin::pin!(copying);
        loop {
            match tokio::time::timeout(tell_every, &mut copying).await {
                Ok(copied) => {
                    copied?;
                    break;
                }
                Err(_) => progress(copy.bytes(), total),
            }
        }
        let mut connection = copy.connect().await?;
        file::migrate(&mut connection).await?;
        connection.close().await?;
        Ok(copy)
    }
}

/// A copy that has no name yet. Deleted when dropped.
pub(super) struct Copy {
    file: NamedTempFile,
}

impl Copy {
    async fn connect(&self) -> Result<Connection, sqlx::Error> {
        Connection::connect_with(&SqliteConnectOptions::new().filename(self.file.path())).await
    }

    fn bytes(&self) -> u64 {
        self.file.as_file().metadata().map_or(0, |metadata| metadata.len())
    }

    fn sync(&self) -> io::Result<u64> {
        self.file.as_file().sync_all()?;
        Ok(self.bytes())
    }
}

/// Puts the copy in the place of the store. The place is never empty: an empty place would become a new store. In between the
/// earlier store has two names, or no WAL, or the new one has the WAL of the earlier: each of these is refused.
fn replace(
    locked: &LockedFile,
    copy: NamedTempFile,
    now: Timestamp,
) -> io::Result<Option<PathBuf>> {
    let store = locked.path();
    let earlier = beside(store, &format!(".before-restore-{}", now.0));
    if !locked.is_new() {
        fs::hard_link(store, &earlier)?;
    }
    for ending in ["-wal", "-journal"] {
        if_it_exists(fs::rename(beside(store, ending), beside(&earlier, ending)))?;
    }
    if_it_exists(fs::remove_file(beside(store, "-shm")))?;
    copy.persist(store)?;
    sync_folder(store)?;
    Ok((!locked.is_new()).then_some(earlier))
}

fn if_it_exists(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes the names in a file's folder durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(folder(path))?.sync_all()
}
