mod copies;
mod damaged;
mod file;
mod whole;

use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{
    store::{
        ALL_PARTITIONS, Damage, Guard, Head, Write,
        conformance::{Owner, begun, inserted},
    },
    transaction::{BranchSet, Drive, GlobalTransaction, NewTransaction},
};

#[tokio::test]
async fn a_full_disk_loses_nothing_and_is_got_over() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
    let Ownership { epoch, nonce, .. } =
        store.acquire(&ALL_PARTITIONS, "test", Timestamp(0)).await.unwrap()[0];
    let known = Known {
        ownership: Ownership { partition: 0, epoch, nonce, lost_from: None, lost_through: None },
        position: 0,
    };
    let writes = (1..=1000).map(|sequence| {
        let new = NewTransaction {
            at_decision: false,
            name: "x".repeat(100),
            drive: Drive::Initiator,
            timeout: Duration::from_secs(30),
            labels: BTreeMap::new(),
            key: None,
            branches: Vec::new(),
        };
        let xid = Xid { partition: 0, epoch, sequence, nonce };
        let global = Arc::new(GlobalTransaction::begin(xid, new, Timestamp(0)));
        Write {
            global,
            head: Head::Insert,
            before: None,
            new_branches: 0,
            changed_branches: BranchSet::EMPTY,
        }
    });
    let batch = Batch {
        guards: vec![Guard { partition: 0, epoch, nonce, position: 1 }],
        writes: writes.collect(),
    };
    // Limit the file to its present size: SQLite then reports a full disk. A new connection has no limit.
    let full = store.writer.run(async |connection| {
        sqlx::raw_sql("PRAGMA max_page_count = 1").execute(connection).await?;
        Ok(())
    });
    full.await.unwrap();
    let error = store.append(&batch).await.unwrap_err();
    assert!(error.to_string().contains("full"), "{error}");
    let xid = batch.writes[0].global.xid;
    assert!(
        matches!(store.load(xid, known).await.unwrap(), Lookup::Absent { .. }),
        "half of a batch"
    );
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
    assert!(matches!(store.load(xid, known).await.unwrap(), Lookup::Found(_)));
}

#[tokio::test]
async fn a_damaged_file_is_not_taken_for_one_that_does_not_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let ownership = store.acquire(&[3], "test", Timestamp(0)).await.unwrap()[0];
    let known = Known { ownership, position: 0 };
    let into_file = store.writer.run(async |connection| {
        Ok(InSqlite::run(connection, "PRAGMA wal_checkpoint(TRUNCATE)").await?)
    });
    into_file.await.unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096..].fill(0xff); // all but the first page
    std::fs::write(&path, bytes).unwrap();
    let Ownership { partition, epoch, nonce, .. } = ownership;
    let error = store.load(Xid { partition, epoch, sequence: 1, nonce }, known).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[tokio::test]
async fn what_is_committed_is_on_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
    let settings = store.writer.run(async |connection| {
        let journal: String =
            sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *connection).await?;
        let synchronous: i64 =
            sqlx::query_scalar("PRAGMA synchronous").fetch_one(connection).await?;
        Ok((journal, synchronous))
    });
    assert_eq!(settings.await.unwrap(), ("wal".to_owned(), 2), "2 is FULL");
}

#[tokio::test]
async fn people_can_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
    let Ownership { epoch, nonce, .. } =
        store.acquire(&ALL_PARTITIONS, "test", Timestamp(0)).await.unwrap()[3];
    let xid = Xid { partition: 3, epoch, sequence: 70_000, nonce };
    let new = NewTransaction {
        at_decision: false,
        name: "checkout".to_owned(),
        drive: Drive::Initiator,
        timeout: Duration::from_secs(30),
        labels: BTreeMap::new(),
        key: None,
        branches: Vec::new(),
    };
    let global = Arc::new(GlobalTransaction::begin(xid, new, Timestamp(1_700_000_000_123)));
    let write = Write {
        global,
        head: Head::Insert,
        before: None,
        new_branches: 0,
        changed_branches: BranchSet::EMPTY,
    };
    let batch = Batch {
        guards: vec![Guard { partition: 3, epoch, nonce, position: 1 }],
        writes: vec![write],
    };
    store.append(&batch).await.unwrap();
    let readable = store.readers.run(async |connection| {
        let readable = "SELECT xid, state, begun_at FROM readable_transaction";
        Ok(InSqlite::fetch(connection, Query::new(readable)).await?.pop())
    });
    let row: Option<(String, String, String)> = readable.await.unwrap();
    assert_eq!(
        row,
        Some((xid.to_string(), "trying".to_owned(), "2023-11-14 22:13:20.123".to_owned()))
    );

    // A decided transaction; one of its three branches has acknowledged.
    let path = folder.path().join("store.db");
    let mut db = Connection::connect(&path.display().to_string()).await.unwrap();
    let decided = "UPDATE global_transaction SET state = 2, branches = NULL"; // as an earlier version has recorded it
    sqlx::query(decided).execute(&mut db).await.unwrap();
    for (position, participant, state) in [(0, "order", 1), (1, "inventory", 2), (2, "points", 1)] {
        let branch = "INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
                      SELECT xid, ?, ?, 'a.b', ?, '', ?, 0, 0 FROM global_transaction";
        let branch = sqlx::query(branch).bind(position).bind(position).bind(participant);
        branch.bind(state).execute(&mut db).await.unwrap();
    }
    let waiting = sqlx::query_scalar("SELECT waiting_for FROM readable_transaction");
    let waiting: String = waiting.fetch_one(&mut db).await.unwrap();
    assert_eq!(waiting, "order, points");
    // Only one of them has a row of its own, and the other transaction is damaged.
    let own = r#"DELETE FROM branch WHERE position <> 1;
        UPDATE global_transaction SET branches = '[{"id":"0","action":"a.b","participant":"order","target":""},
            {"id":"1","action":"a.b","participant":"inventory","target":""},{"id":"2","action":"a.b","participant":"points","target":""}]';
        INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, branches)
            SELECT substr(xid, 1, 15) || x'00', name, drive, 1, labels, begun_at, expires_at, '[' FROM global_transaction"#;
    sqlx::raw_sql(own).execute(&mut db).await.unwrap();
    let waiting = "SELECT waiting_for FROM readable_transaction WHERE state = 'confirming'";
    let waiting: String = sqlx::query_scalar(waiting).fetch_one(&mut db).await.unwrap();
    assert_eq!(waiting, "order, points");
    let branches = "SELECT branch_id || ' ' || participant || ' ' || state FROM readable_branch ORDER BY branch_id";
    let branches: Vec<String> = sqlx::query_scalar(branches).fetch_all(&mut db).await.unwrap();
    assert_eq!(branches, ["0 order registered", "1 inventory confirmed", "2 points registered"]);

    // A view must not compute the text of every xid before it returns its first row.
    for view in ["readable_transaction", "readable_branch"] {
        let plan = format!("EXPLAIN QUERY PLAN SELECT xid FROM {view} WHERE state = 'confirming'");
        let plan: Vec<(i64, i64, i64, String)> =
            sqlx::query_as(sqlx::AssertSqlSafe(plan)).fetch_all(&mut db).await.unwrap();
        assert!(matches!(plan[0].3.as_str(), "SCAN g" | "SCAN b"), "{plan:?}");
    }
}

#[tokio::test]
async fn what_is_there_twice_is_an_alarm() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
    let Ownership { epoch, nonce, .. } =
        store.acquire(&ALL_PARTITIONS, "test", Timestamp(0)).await.unwrap()[3];
    let new = NewTransaction {
        at_decision: false,
        name: "checkout".to_owned(),
        drive: Drive::Initiator,
        timeout: Duration::from_secs(30),
        labels: BTreeMap::new(),
        key: Some(crate::transaction::Key { hash: [1; 32], digest: [1; 32] }),
        branches: Vec::new(),
    };
    for n in 1..=2 {
        let xid = Xid { partition: 3, epoch, sequence: n, nonce };
        let global = Arc::new(GlobalTransaction::begin(xid, new.clone(), Timestamp(0)));
        let write = Write {
            global,
            head: Head::Insert,
            before: None,
            new_branches: 0,
            changed_branches: BranchSet::EMPTY,
        };
        let batch = Batch {
            guards: vec![Guard { partition: 3, epoch, nonce, position: n }],
            writes: vec![write],
        };
        let answer = store.append(&batch).await;
        if n == 2 {
            assert!(matches!(answer, Ok(Appended::Damaged(_))), "{answer:?}");
        }
    }
}

/// A statement may hold rows of several partitions.
#[tokio::test]
async fn a_row_that_sqlite_refuses_ends_only_its_own_partition() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
    let strict = store.writer.run(async |connection| {
        let strict =
            "ALTER TABLE global_transaction ADD COLUMN strict INTEGER CHECK (length(name) < 129)";
        Ok(InSqlite::run(connection, strict).await?)
    });
    strict.await.unwrap();
    let mut owner = Owner::of(&store).await;
    let sound = begun(owner.xid(2), &["1"]);
    let too_long = GlobalTransaction { name: "x".repeat(200), ..begun(owner.xid(1), &["1"]) };
    let batch = owner.batch(vec![inserted(&sound), inserted(&too_long)]);
    let Ok(Appended::Damaged(damaged)) = store.append(&batch).await else {
        panic!("its partition was to be named")
    };
    let [Damage { partition: 1, what, lost: 0 }] = &damaged[..] else { panic!("{damaged:?}") };
    assert!(what.contains("CHECK"), "{what}");
}
