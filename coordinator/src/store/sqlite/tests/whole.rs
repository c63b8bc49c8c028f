//! A store that lacks a part of itself is refused.

use std::{fs, path::PathBuf};

use super::*;
use crate::store::conformance::{Owner, begun};

/// A folder with the files of one store.
pub(super) struct StoreFiles {
    pub(super) folder: tempfile::TempDir,
}

impl StoreFiles {
    pub(super) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(super) fn main(&self) -> PathBuf {
        self.folder.path().join("store.db")
    }

    pub(super) fn wal(&self) -> PathBuf {
        self.folder.path().join("store.db-wal")
    }

    pub(super) async fn open(&self) -> Result<SqliteStore, OpenError> {
        SqliteStore::open(&self.main()).await
    }

    /// Its files as they are at this moment, as a kill would leave them.
    pub(super) fn as_it_is(&self) -> Self {
        let copy = Self::new();
        fs::copy(self.main(), copy.main()).unwrap();
        if self.wal().exists() {
            fs::copy(self.wal(), copy.wal()).unwrap();
        }
        copy
    }

    pub(super) fn without_wal(self) -> Self {
        fs::remove_file(self.wal()).unwrap();
        self
    }

    /// Opens and closes it with another program, which reads something.
    async fn looked_at(self) -> Self {
        let options = SqliteConnectOptions::new().filename(self.main());
        let mut other = Connection::connect_with(&options).await.unwrap();
        sqlx::raw_sql("SELECT * FROM partition").execute(&mut other).await.unwrap();
        other.close().await.unwrap();
        self
    }

    async fn refused(&self) -> OpenError {
        let error = self.open().await.expect_err("it opened");
        assert!(error.to_string().contains(&self.main().display().to_string()), "{error}");
        error
    }
}

/// Records a transaction in partition 3.
pub(super) async fn record(owner: &mut Owner<'_>) -> Xid {
    let xid = owner.xid(3);
    owner.insert(&begun(xid, &["a"])).await;
    xid
}

/// Records so much that the WAL is copied into the main file at least once.
async fn record_much(owner: &mut Owner<'_>, main: &Path) {
    let before = fs::metadata(main).unwrap().len();
    while fs::metadata(main).unwrap().len() == before {
        let writes = (0..200).map(|_| {
            let xid = owner.xid(5);
            inserted(&begun(xid, &["a", "b", "c"]))
        });
        let writes = writes.collect();
        owner.append(writes).await;
    }
}

async fn has(store: &SqliteStore, xid: Xid) -> bool {
    let ownership = store.acquire(&[xid.partition], "looks", Timestamp(0)).await.unwrap()[0];
    let found = store.load(xid, Known { ownership, position: 0 }).await.unwrap();
    matches!(found, Lookup::Found(_))
}

#[tokio::test]
async fn after_an_orderly_stop_the_main_file_is_all_there_is() {
    let store_files = StoreFiles::new();
    let mut xids = Vec::new();
    for _ in 0..2 {
        let store = store_files.open().await.unwrap();
        xids.push(record(&mut Owner::of(&store).await).await);
        store.close().await;
        assert!(!store_files.wal().exists(), "something is left in the WAL");
        let copy = store_files.as_it_is();
        let store = copy.open().await.unwrap();
        for xid in &xids {
            assert!(has(&store, *xid).await);
        }
    }
}

#[tokio::test]
async fn a_main_file_without_its_wal_is_refused() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let at_the_start = store_files.as_it_is();
    let mut owner = Owner::of(&store).await;
    let early = record(&mut owner).await;
    let after_a_batch = store_files.as_it_is();
    record_much(&mut owner, &store_files.main()).await;
    let after_a_checkpoint = store_files.as_it_is();
    let late = record(&mut owner).await;
    let at_the_end = store_files.as_it_is();

    // Both files are whole, at each of these moments.
    let copy = at_the_end.as_it_is();
    let whole = copy.open().await.unwrap();
    assert!(has(&whole, early).await && has(&whole, late).await);
    for copy in [at_the_start, after_a_batch, after_a_checkpoint, at_the_end] {
        drop(copy.as_it_is().open().await.unwrap());
        let copy = copy.without_wal();
        let before = fs::read(copy.main()).unwrap();
        let error = copy.refused().await;
        assert!(matches!(error, OpenError::NoWal { .. }), "{error}");
        assert!(error.to_string().contains("store.db-wal"), "{error}");
        assert_eq!(fs::read(copy.main()).unwrap(), before, "it was changed");
    }
}

#[tokio::test]
async fn a_wal_of_another_moment_is_refused() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    record(&mut owner).await;
    let early = store_files.as_it_is();
    record_much(&mut owner, &store_files.main()).await;
    record(&mut owner).await;
    let late = store_files.as_it_is();
    drop(owner);
    store.close().await;
    let stopped = store_files.as_it_is();

    for (main, wal) in [(&early, &late), (&late, &early), (&stopped, &early), (&stopped, &late)] {
        let mixed = main.as_it_is();
        fs::copy(wal.wal(), mixed.wal()).unwrap();
        let error = mixed.refused().await;
        assert!(matches!(error, OpenError::OtherWal { .. }), "{error}");
    }
}

/// SQLite itself copies the WAL into the main file and deletes it when the last connection closes.
#[tokio::test]
async fn a_store_that_another_program_has_closed_is_whole() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    let xid = record(&mut owner).await;
    let killed = store_files.as_it_is().looked_at().await;
    assert!(!killed.wal().exists());
    let after = killed.open().await.unwrap();
    assert!(has(&after, xid).await);
}

#[tokio::test]
async fn a_read_that_holds_a_checkpoint_up_loses_nothing() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    record(&mut owner).await;
    let options = SqliteConnectOptions::new().filename(store_files.main()).read_only(true);
    let mut slow = Connection::connect_with(&options).await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT * FROM partition").execute(&mut slow).await.unwrap();
    let xid = record(&mut owner).await;
    let checkpoint = async |connection: &mut Connection| Ok(mark::checkpoint(connection).await?);
    assert!(!store.writer.run(checkpoint).await.unwrap(), "nobody held it up");
    let held_up = store_files.as_it_is();
    let later = record(&mut owner).await;
    let killed = store_files.as_it_is();
    for (files, xid) in [(&held_up, xid), (&killed, xid), (&killed, later)] {
        let copy = files.as_it_is();
        assert!(has(&copy.open().await.unwrap(), xid).await);
    }
    sqlx::raw_sql("ROLLBACK").execute(&mut slow).await.unwrap();
    assert!(store.writer.run(checkpoint).await.unwrap());
    let error = store_files.as_it_is().without_wal().refused().await;
    assert!(matches!(error, OpenError::NoWal { .. }), "{error}");
    slow.close().await.unwrap();
    drop(owner);
    store.close().await;
    let stopped = store_files.as_it_is();
    assert!(!stopped.wal().exists());
    assert!(has(&stopped.open().await.unwrap(), later).await);
}

#[tokio::test]
async fn a_kill_at_any_moment_of_a_checkpoint_loses_nothing() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    let xid = record(&mut owner).await;
    let run = async |sql: &'static str| {
        let run = async |connection: &mut Connection| Ok(InSqlite::run(connection, sql).await?);
        store.writer.run(run).await.unwrap();
    };
    let steps = [
        "BEGIN; UPDATE mark SET needed = 1; PRAGMA user_version = 259; COMMIT", // 1 * 256 + 3
        "PRAGMA wal_checkpoint(PASSIVE)",
        "BEGIN; UPDATE mark SET present = needed; PRAGMA user_version = 259; COMMIT",
        "PRAGMA wal_checkpoint(TRUNCATE)", // at the end only
    ];
    let mut copies = Vec::new();
    for step in steps {
        run(step).await;
        copies.push(store_files.as_it_is());
    }
    // The WAL of before, when only half of it is copied.
    let half = copies[0].as_it_is();
    fs::copy(copies[1].main(), half.main()).unwrap();
    copies.push(half);
    for (n, copy) in copies.iter().enumerate() {
        let store = copy.open().await.unwrap_or_else(|error| panic!("{n}: {error}"));
        assert!(has(&store, xid).await, "{n}");
    }
}

/// The commit that gives the new WAL its name fails, as it does on a full disk.
#[tokio::test]
async fn a_stop_that_cannot_end_its_checkpoint_leaves_a_whole_store() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let xid = record(&mut Owner::of(&store).await).await;
    let full = async |connection: &mut Connection| {
        let full =
            "CREATE TEMP TRIGGER full BEFORE UPDATE ON main.mark WHEN new.present <> old.present
                    BEGIN SELECT RAISE(ABORT, 'full'); END";
        Ok(InSqlite::run(connection, full).await?)
    };
    store.writer.run(full).await.unwrap();
    store.close().await;
    drop(store);
    // Also as a kill would have left it before that commit.
    for copy in [store_files.as_it_is(), store_files] {
        let store = copy.open().await.unwrap();
        assert!(has(&store, xid).await);
    }
}

/// SQLite then copies the WAL into the main file and deletes it when the other program closes the store, as the last one.
#[tokio::test]
async fn a_stop_while_another_program_reads_leaves_a_whole_store() {
    for is_old in [false, true] {
        let store_files = StoreFiles::new();
        let store = store_files.open().await.unwrap();
        let mut owner = Owner::of(&store).await;
        let mut xid = record(&mut owner).await;
        let options = SqliteConnectOptions::new().filename(store_files.main());
        let mut other = Connection::connect_with(&options).await.unwrap();
        sqlx::raw_sql("BEGIN; SELECT * FROM partition").execute(&mut other).await.unwrap();
        if is_old {
            xid = record(&mut owner).await;
        }
        drop(owner);
        store.close().await;
        drop(store);
        let stopped = store_files.as_it_is();
        sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
        other.close().await.unwrap();
        assert!(!store_files.wal().exists(), "the other one was not the last");
        for store_files in [store_files, stopped] {
            let store = store_files.open().await.unwrap();
            assert!(has(&store, xid).await);
        }
    }
}

#[tokio::test]
async fn a_start_while_another_program_reads_leaves_a_whole_store() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let xid = record(&mut Owner::of(&store).await).await;
    let killed = store_files.as_it_is();
    let options = SqliteConnectOptions::new().filename(killed.main()).read_only(true);
    let mut other = Connection::connect_with(&options).await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT * FROM partition").execute(&mut other).await.unwrap();
    let next = killed.open().await.unwrap();
    let again = killed.as_it_is();
    other.close().await.unwrap();
    drop(next);
    assert!(has(&again.as_it_is().open().await.unwrap(), xid).await);
    assert!(has(&again.looked_at().await.open().await.unwrap(), xid).await);
}

#[tokio::test]
async fn one_file_under_two_names_is_locked_once() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let (symbolic, hard) =
        (store_files.folder.path().join("s.db"), store_files.folder.path().join("h.db"));
    std::os::unix::fs::symlink(store_files.main(), &symbolic).unwrap();
    fs::hard_link(store_files.main(), &hard).unwrap();
    for name in [&symbolic, &hard] {
        let error = SqliteStore::open(name).await.expect_err("it opened");
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    }
    drop(store);
    for name in [&store_files.main(), &hard, &symbolic] {
        let error = SqliteStore::open(name).await.expect_err("it opened");
        assert!(matches!(error, OpenError::SeveralNames { names: 2, .. }), "{error}");
    }
    fs::remove_file(&hard).unwrap();
    // The WAL is beside the file, and not beside the link.
    let store = SqliteStore::open(&symbolic).await.unwrap();
    assert!(store_files.wal().exists());
    drop(store);
}

#[tokio::test]
async fn a_file_that_is_not_where_it_was_is_noticed_and_nothing_more_is_acknowledged() {
    type Change = fn(&StoreFiles);
    let changes: [(&str, Change); 4] = [
        ("store.db was deleted", |store_files| fs::remove_file(store_files.main()).unwrap()),
        ("store.db was deleted or moved", |store_files| {
            fs::rename(store_files.main(), store_files.folder.path().join("moved.db")).unwrap();
        }),
        ("store.db was replaced", |store_files| {
            fs::copy(store_files.main(), store_files.folder.path().join("other.db")).unwrap();
            fs::rename(store_files.folder.path().join("other.db"), store_files.main()).unwrap();
        }),
        ("store.db-wal was deleted", |store_files| fs::remove_file(store_files.wal()).unwrap()),
    ];
    for (told, change) in changes {
        let store_files = StoreFiles::new();
        let store = store_files.open().await.unwrap();
        let mut owner = Owner::of(&store).await;
        record(&mut owner).await;
        let early = tokio::time::timeout(LOOK_EVERY * 2, store.gone()).await;
        assert!(early.is_err(), "{early:?}");
        change(&store_files);
        let xid = owner.xid(3);
        let batch = owner.batch(vec![inserted(&begun(xid, &[]))]);
        for _ in 0..2 {
            let appended = store.append(&batch).await;
            assert!(matches!(appended, Err(Error::Unavailable(_))), "{told}: {appended:?}");
        }
        let gone = tokio::time::timeout(Duration::from_secs(1), store.gone()).await.unwrap();
        assert!(gone.contains(told), "{gone}");
    }
}
