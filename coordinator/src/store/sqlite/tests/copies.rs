//! Backup and restore.

use std::{fs, os::unix::fs::MetadataExt as _};

use super::{
    whole::{StoreFiles, record},
    *,
};
use crate::store::conformance::{NOW, Owner, begun, confirm, updated};

fn quiet(_: u64, _: u64) {}

async fn looked_up(store: &SqliteStore, xid: Xid) -> (Ownership, Lookup) {
    let ownership = store.acquire(&[xid.partition], "looks", NOW).await.unwrap()[0];
    (ownership, store.load(xid, Known { ownership, position: 0 }).await.unwrap())
}

#[tokio::test]
async fn a_backup_of_a_running_store_is_restored_and_knows_what_it_lacks() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    let early = record(&mut owner).await;
    let file = store_files.folder.path().join("monday.backup");
    let bytes = backup(&store_files.main(), &file, NOW, quiet).await.unwrap();
    assert_eq!(bytes, fs::metadata(&file).unwrap().len());
    // It is not overwritten, and the store goes on.
    let again = backup(&store_files.main(), &file, NOW, quiet).await.unwrap_err();
    assert!(matches!(again, CopyError::Exists { .. }), "{again}");
    let mut decided = begun(early, &["a"]);
    confirm(&mut decided);
    owner.append(vec![updated(&decided, BranchSet::EMPTY)]).await;
    let late = record(&mut owner).await;
    drop(owner);

    // A coordinator does not start on it as it is.
    let error = SqliteStore::open(&file).await.expect_err("it opened");
    assert!(matches!(error, OpenError::Backup { .. }), "{error}");
    assert!(error.to_string().contains("2023-11-14T22:13:20Z"), "when? {error}");

    // Nothing is restored below a running coordinator.
    let running = restore(&file, &store_files.main(), NOW, quiet).await.unwrap_err();
    assert!(matches!(running, CopyError::Open(OpenError::InUse { .. })), "{running}");
    assert!(matches!(looked_up(&store, late).await.1, Lookup::Found(_)));
    drop(store);

    let restored = restore(&file, &store_files.main(), NOW, quiet).await.unwrap();
    assert_eq!((restored.transactions, restored.made_at), (1, Some(NOW)));
    let store = store_files.open().await.unwrap();
    let (ownership, found) = looked_up(&store, early).await;
    // It was decided after the backup. Whoever knows of `lost_through` does not decide it again.
    assert!(
        matches!(found, Lookup::Found(found) if found.state == crate::transaction::State::Trying)
    );
    assert!(ownership.lost_through >= Some(early.epoch));
    let (_, lacking) = looked_up(&store, late).await;
    assert!(matches!(lacking, Lookup::Absent { lost: true, .. }), "{lacking:?}");
    // New epochs have lost nothing.
    let never = Xid { sequence: 99, epoch: ownership.epoch, nonce: ownership.nonce, ..late };
    assert!(matches!(looked_up(&store, never).await.1, Lookup::Absent { lost: false, .. }));

    // The earlier store is kept, and is whole.
    let earlier = SqliteStore::open(&restored.earlier.unwrap()).await.unwrap();
    assert!(matches!(looked_up(&earlier, late).await.1, Lookup::Found(_)));
}

#[tokio::test]
async fn a_restore_that_is_killed_halfway_leaves_nothing_that_looks_whole() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let mut owner = Owner::of(&store).await;
    record(&mut owner).await;
    let file = store_files.folder.path().join("monday.backup");
    backup(&store_files.main(), &file, NOW, quiet).await.unwrap();
    let late = record(&mut owner).await;
    drop(owner);
    let old = store_files.as_it_is();
    // The new file is there, and so is the WAL of the earlier store, of which it is a copy.
    let halfway = StoreFiles::new();
    restore(&file, &halfway.main(), NOW, quiet).await.unwrap();
    fs::copy(old.wal(), halfway.wal()).unwrap();
    let error = halfway.open().await.expect_err("it opened");
    assert!(matches!(error, OpenError::OtherWal { .. }), "{error}");
    // The earlier store has two names by now, or no WAL any more.
    let error = old.as_it_is().without_wal().open().await.expect_err("it opened");
    assert!(matches!(error, OpenError::NoWal { .. }), "{error}");
    fs::hard_link(old.main(), old.folder.path().join("earlier.db")).unwrap();
    let error = old.open().await.expect_err("it opened");
    assert!(matches!(error, OpenError::SeveralNames { .. }), "{error}");
    // A repeat gets over each of them.
    for store_files in [halfway, old] {
        restore(&file, &store_files.main(), NOW, quiet).await.unwrap();
        let lacking = looked_up(&store_files.open().await.unwrap(), late).await.1;
        assert!(matches!(lacking, Lookup::Absent { lost: true, .. }), "{lacking:?}");
    }
}

#[tokio::test]
async fn a_plain_copy_is_restored_only_if_it_is_whole() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let xid = record(&mut Owner::of(&store).await).await;
    let target = StoreFiles::new();
    let torn = store_files.as_it_is().without_wal();
    let error = restore(&torn.main(), &target.main(), NOW, quiet).await.unwrap_err();
    assert!(matches!(error, CopyError::Open(OpenError::NoWal { .. })), "{error}");
    let error =
        backup(&torn.main(), &store_files.folder.path().join("b"), NOW, quiet).await.unwrap_err();
    assert!(matches!(error, CopyError::Open(OpenError::NoWal { .. })), "{error}");
    let whole = store_files.as_it_is();
    assert_eq!(restore(&whole.main(), &target.main(), NOW, quiet).await.unwrap().transactions, 1);
    let (ownership, found) = looked_up(&target.open().await.unwrap(), xid).await;
    assert!(matches!(found, Lookup::Found(_)) && ownership.lost_through.is_some());
    // Neither is something else.
    let text = store_files.folder.path().join("notes.txt");
    fs::write(&text, "Dear diary, ".repeat(1000)).unwrap();
    restore(&text, &target.main(), NOW, quiet).await.unwrap_err();
    restore(&whole.main(), &text, NOW, quiet).await.unwrap_err();
    assert_eq!(fs::read_to_string(&text).unwrap(), "Dear diary, ".repeat(1000));
    let itself = restore(&whole.main(), &whole.main(), NOW, quiet).await.unwrap_err();
    assert!(matches!(itself, CopyError::Exists { .. }), "{itself}");
}

/// The WAL is beside one of the names only.
#[tokio::test]
async fn a_store_with_hard_links_is_not_copied() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    record(&mut Owner::of(&store).await).await;
    let file = |name: &str| store_files.folder.path().join(name);
    let (monday, copy) = (file("monday.backup"), file("copy"));
    backup(&store_files.main(), &monday, NOW, quiet).await.unwrap();
    let several = |error: CopyError| {
        assert!(
            matches!(error, CopyError::Open(OpenError::SeveralNames { names: 2, .. })),
            "{error}"
        );
        assert!(!copy.exists());
    };
    fs::hard_link(store_files.main(), file("link.db")).unwrap();
    several(backup(&file("link.db"), &copy, NOW, quiet).await.unwrap_err());
    drop(store);
    several(backup(&file("link.db"), &copy, NOW, quiet).await.unwrap_err());
    let target = StoreFiles::new();
    several(restore(&file("link.db"), &target.main(), NOW, quiet).await.unwrap_err());
    // A backup is one file. Programs that keep many backups link those that are alike.
    fs::hard_link(&monday, file("tuesday.backup")).unwrap();
    restore(&file("tuesday.backup"), &target.main(), NOW, quiet).await.unwrap();
}

#[tokio::test]
async fn a_store_whose_wal_is_gone_for_good_is_used_again_once_it_is_marked() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    let late = record(&mut Owner::of(&store).await).await;
    let running = mark_restored(&store_files.main(), NOW, quiet).await.unwrap_err();
    assert!(matches!(running, CopyError::Open(OpenError::InUse { .. })), "{running}");
    // The next start brings it into the main file.
    let killed = store_files.as_it_is();
    let next = killed.open().await.unwrap();
    let torn = killed.as_it_is().without_wal();
    drop(next);
    let error = torn.open().await.expect_err("it opened");
    assert!(error.to_string().contains("handfast restore --mark"), "{error}");
    let before = (fs::read(torn.main()).unwrap(), fs::metadata(torn.main()).unwrap().ino());
    let marked = mark_restored(&torn.main(), NOW, quiet).await.unwrap();
    // A kill at any moment: the mark was not written into the file that is not whole.
    let earlier = marked.earlier.unwrap();
    assert_eq!((fs::read(&earlier).unwrap(), fs::metadata(&earlier).unwrap().ino()), before);
    assert_eq!(marked.epochs, 16);
    let store = torn.open().await.unwrap();
    let (ownership, found) = looked_up(&store, late).await;
    assert!(matches!(found, Lookup::Found(_)), "it was in the main file");
    assert_eq!(ownership.lost_through, Some(late.epoch));
    // Nothing is made of nothing.
    let missing = store_files.folder.path().join("missing.db");
    mark_restored(&missing, NOW, quiet).await.unwrap_err();
    backup(&missing, &store_files.folder.path().join("b"), NOW, quiet).await.unwrap_err();
    assert!(!missing.exists());
}

#[tokio::test]
async fn the_progress_of_a_long_copy_is_told() {
    let store_files = StoreFiles::new();
    let store = store_files.open().await.unwrap();
    record(&mut Owner::of(&store).await).await;
    let file = store_files.folder.path().join("b");
    let mut source =
        copy::Source::open(&store_files.main(), false, copy::Missing::Refused).await.unwrap();
    // A small copy may be made before there is progress to tell.
    for _ in 0..1000 {
        let told = Mutex::new(Vec::new());
        let copied = source.copy_beside(&file, Duration::ZERO, |done, total| {
            told.lock().unwrap().push((done, total));
        });
        copied.await.unwrap();
        let told = told.into_inner().unwrap();
        assert!(told.iter().all(|(done, total)| done <= total && *total > 4096), "{told:?}");
        if !told.is_empty() {
            return;
        }
    }
    panic!("no progress is told");
}
