//! Which files a coordinator opens.

use std::{fs, os::unix::fs::PermissionsExt as _};

use super::{
    super::file::{APPLICATION_ID, STEPS},
    *,
};
use crate::store::{Guard, conformance::Owner};

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
    let mut connection = Connection::connect_with(&options).await.unwrap();
    sqlx::raw_sql("CREATE TABLE partition (mine TEXT)").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let before = fs::read(&other).unwrap();
    assert!(error(&other).await.contains("another program"));
    assert_eq!(fs::read(&other).unwrap(), before);
}

/// SQLite deletes a WAL that lies beside an empty file.
#[tokio::test]
async fn a_wal_whose_main_file_was_moved_away_is_refused_and_kept() {
    let store_files = whole::StoreFiles::new();
    let store = store_files.open().await.unwrap();
    whole::record(&mut Owner::of(&store).await).await;
    let killed = store_files.as_it_is();
    let moved = killed.folder.path().join("moved.db");
    let link = killed.folder.path().join("link.db");
    std::os::unix::fs::symlink("store.db", &link).unwrap();
    fs::rename(killed.main(), &moved).unwrap();
    let wal = fs::read(killed.wal()).unwrap();
    for empty in [false, true] {
        if empty {
            fs::write(killed.main(), []).unwrap();
        }
        for name in [killed.main(), link.clone()] {
            let said = SqliteStore::open(&name).await.expect_err("it opened").to_string();
            assert!(said.contains("main file is missing") && said.contains("store.db"), "{said}");
            assert_eq!(killed.main().exists(), empty, "an empty file was made");
            assert_eq!(fs::read(killed.wal()).unwrap(), wal);
        }
    }
    fs::rename(&moved, killed.main()).unwrap();
    killed.open().await.unwrap();
}

#[tokio::test]
async fn a_newer_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    drop(SqliteStore::open(&path).await.unwrap());
    let mut connection =
        Connection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    sqlx::raw_sql("PRAGMA user_version = 99").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let error = error(&path).await;
    assert!(error.contains("99") && error.contains("newer"), "{error}");
}

/// Rows of version 1: an undecided transaction, one that is stuck, and one that has finished and has a key.
const ROWS: &str = "
INSERT INTO epoch (partition, epoch, nonce, owner, taken_at) VALUES (3, 1, 77, 'one', 0);
INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, decided_at, finished_at, due_at, key_hash) VALUES
    (x'0003000000010000000000010000004D', 'trying', 1, 1, '{}', 1, 2, NULL, NULL, 2, NULL),
    (x'0003000000010000000000020000004D', 'stuck', 1, 2, '{}', 1, 2, 2, NULL, 2, NULL),
    (x'0003000000010000000000030000004D', 'keyed', 1, 4, '{}', 1, 2, 2, 3, NULL, zeroblob(32));
INSERT INTO idempotency (key_hash, xid, key_digest)
    VALUES (zeroblob(32), x'0003000000010000000000030000004D', zeroblob(32));
INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
    SELECT xid, 0, '1', 'inventory.deduct', 'inventory', '', 1, 0, 0 FROM global_transaction;
INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
    SELECT xid, 1, '2', 'points.add', 'points', '', 2, 1, 0 FROM global_transaction;
UPDATE branch SET attempts = 9, needs_attention = 1, error_code = 'INTERNAL', error_message = 'no', error_at = 2, due_at = 2
    WHERE xid = x'0003000000010000000000020000004D' AND position = 0;";

#[tokio::test]
async fn a_store_of_an_earlier_version_becomes_one_of_this_version() {
    for from in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let mut connection = Connection::connect_with(&options).await.unwrap();
        let position = ["", "position", "batches"][from];
        let steps = STEPS[..from].concat();
        let earlier = format!(
            "{steps}; {ROWS} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {from};
             INSERT INTO partition (partition, epoch, {position}, owner) VALUES (3, 1, 5, 'one');"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(earlier)).execute(&mut connection).await.unwrap();
        if from == 2 {
            let since =
                "UPDATE partition SET nonce = 77; UPDATE global_transaction SET branches = 2";
            sqlx::raw_sql(since).execute(&mut connection).await.unwrap();
        }
        connection.close().await.unwrap();
        let store = SqliteStore::open(&path).await.unwrap();
        // A program of an earlier version can neither take over nor write a batch.
        let mut connection = Connection::connect_with(&options).await.unwrap();
        for (statement, column) in [
            ("UPDATE partition SET epoch = epoch + 1, position = 0, owner = 'one'", "position"),
            ("UPDATE partition SET position = position + 1 WHERE partition = 3", "position"),
            ("UPDATE partition SET batches = 0 WHERE partition = 3", "batches"),
            ("UPDATE partition SET batches = batches + 1 WHERE partition = 3", "batches"),
            ("UPDATE epoch SET purges = purges + 1 WHERE partition = 3", "purges"),
        ] {
            let error = sqlx::raw_sql(statement).execute(&mut connection).await.unwrap_err();
            assert!(error.to_string().contains(&format!("no such column: {column}")), "{error}");
        }
        let waiting = "SELECT waiting_for FROM readable_transaction WHERE name = 'stuck'";
        let waiting: String = sqlx::query_scalar(waiting).fetch_one(&mut connection).await.unwrap();
        assert_eq!(waiting, "inventory");
        connection.close().await.unwrap();
        // A batch of the previous owner, if it could go on: epoch and nonce are its own.
        let guard = Guard { partition: 3, epoch: 1, nonce: 77, position: 6 };
        let batch = Batch { guards: vec![guard], writes: Vec::new() };
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
        let ownership = store.acquire(&[3], "two", Timestamp(1)).await.unwrap()[0];
        assert_eq!(ownership.epoch, 2);
        let known = Known { ownership, position: 0 };
        let due = store.due(Timestamp(10), None, 10, known).await.unwrap().transactions;
        let names: Vec<_> = due.iter().map(|global| global.name.as_str()).collect();
        assert_eq!(names, ["trying", "stuck"]);
        let branches: Vec<_> = due[1]
            .branches
            .iter()
            .map(|branch| (branch.attempts, branch.needs_attention))
            .collect();
        assert_eq!(branches, [(9, true), (1, false)]);
        let later = Timestamp(100);
        assert_eq!(store.purge(ownership, later, later, None, 10).await.unwrap(), (1, None));
        assert_eq!(store.find_keys(&[[0; 32]], known).await.unwrap(), [None]);
        drop(store);
        SqliteStore::open(&path).await.unwrap();
    }
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
                .journal_mode(SqliteJournalMode::Wal);
            Connection::connect_with(&options).await.unwrap().close().await.unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), bytes);
        }
        let store = SqliteStore::open(&path).await.unwrap();
        let after = StuckAfter { attempts: 8, time: Duration::from_secs(120) };
        assert_eq!(store.summary(Timestamp(0), after).await.unwrap(), Summary::default());
    }
}
