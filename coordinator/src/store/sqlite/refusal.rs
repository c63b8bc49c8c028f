//! Why a store is not opened, and what to do about it.

use std::path::PathBuf;

/// Why a store cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has locked it.
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
    /// The file has hard links.
    #[error(
        "the store {} has {names} names (hard links), and each would have a WAL of its own: remove the other names. The one to keep \
         has a file beside it that ends with -wal, if there is one",
        path.display()
    )]
    SeveralNames {
        /// The store's file.
        path: PathBuf,
        /// How many names it has.
        names: u64,
    },
    /// The WAL is missing, and commits with it.
    #[error(
        "the store {path} is not whole: its newest commits are in a file {path}-wal, and that is not here. Was the main file copied \
         without it, or was it deleted? Put that file back beside it, or restore a backup (`handfast restore`). If it is gone for \
         good: `handfast restore --mark` lets the store be used without those commits, and what they held is answered LOST",
        path = path.display()
    )]
    NoWal {
        /// The store's file.
        path: PathBuf,
    },
    /// There is a WAL, and no main file.
    #[error(
        "the store {path} has a file {path}-wal with commits, and its main file is missing; put it back. A new store would delete \
         these commits. If the main file is gone for good: move {path}-wal away and restore a backup (`handfast restore`)",
        path = path.display()
    )]
    NoMainFile {
        /// The store's file.
        path: PathBuf,
    },
    /// The WAL belongs to another copy of the file.
    #[error(
        "the store {path} and {path}-wal do not belong together: one of them is an older or a newer copy. Together they would be \
         damaged. Put back both files of one moment, or restore a backup (`handfast restore` removes the other WAL)",
        path = path.display()
    )]
    OtherWal {
        /// The store's file.
        path: PathBuf,
    },
    /// The file is a backup that was not restored.
    #[error(
        "{} is a backup, made at {}: `handfast restore {} --store sqlite:PATH` makes a store of it, which knows that it lacks what \
         came later",
        path.display(), made_at, path.display()
    )]
    Backup {
        /// The file.
        path: PathBuf,
        /// When it was made.
        made_at: String,
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
        "the store {} has schema version {found}, and this program knows versions up to {known}; it was written by a \
         newer version: run that version",
        path.display()
    )]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
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
