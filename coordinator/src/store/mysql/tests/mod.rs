//! Behaviour that only a real server shows: which statements it prepares, and which locks are waited for.

mod connections;
mod versions;

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, Connection as _, Row as _};

use super::{
    fixture::{Database, servers},
    session::SILENCE_MAX_SECONDS,
    *,
};
use crate::{
    clock::{Clock as _, SystemClock},
    store::{
        Damage, Guard, Head, Show, Store as _, Write,
        conformance::{NOW, Owner, begun, call, confirm, failed, inserted, updated},
    },
    transaction::{BranchSet, GlobalTransaction, Key, Outcome, State},
};

/// How often the writing connection of partition 0 has asked the server to prepare a statement.
async fn prepared(store: &MySqlStore) -> u64 {
    let asked = store.writer_of(0).run(async |connection| {
        let status = sqlx::raw_sql("SHOW SESSION STATUS LIKE 'Com_stmt_prepare'");
        let asked: String = status.fetch_one(&mut *connection).await?.get(1);
        Ok(asked.parse().unwrap())
    });
    asked.await.unwrap()
}

#[tokio::test]
async fn nothing_is_prepared_for_a_batch() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut owner = Owner::of(&store).await;
        let before = prepared(&store).await;
        let mut globals: Vec<_> = (0..100).map(|n| keyed(&mut owner, 2 * (n % 8))).collect();
        owner.append(globals.iter().map(inserted).collect()).await;
        for global in &mut globals {
            confirm(global);
            call(global, 0, failed(false));
        }
        let write = |global| updated(global, BranchSet::only(0));
        owner.append(globals.iter().map(write).collect()).await;
        assert_eq!(prepared(&store).await, before);
        database.drop().await;
    }
}

/// Another connection holds a lock on the row that a replaced owner would change.
#[tokio::test]
async fn who_was_replaced_waits_for_no_row() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut owner = Owner::of(&store).await;
        let mut global = keyed(&mut owner, 2);
        owner.insert(&global).await;
        let _its_successor = Owner::of(&store).await;
        let mut holder = database.connect().await;
        let mut hold = holder.begin().await.unwrap();
        let rows = "SELECT 1 FROM global_transaction FOR UPDATE";
        sqlx::raw_sql(rows).fetch_all(&mut *hold).await.unwrap();
        confirm(&mut global);
        let batch = owner.batch(vec![updated(&global, BranchSet::EMPTY)]);
        let waits = Duration::from_secs(u64::from(SILENCE_MAX_SECONDS) - 1);
        let answer = tokio::time::timeout(waits, store.append(&batch)).await;
        assert_eq!(answer.expect("it waits").unwrap(), Appended::Fenced(vec![2]));
        hold.rollback().await.unwrap();
        database.drop().await;
    }
}

/// A transaction with two branches and a key.
fn keyed(owner: &mut Owner<'_>, partition: u16) -> GlobalTransaction {
    let mut global = begun(owner.xid(partition), &["1", "2"]);
    global.key = Some(Key { hash: rand::random(), digest: [0; 32] });
    global
}

/// Finished transactions of partition 2.
fn old(owner: &mut Owner<'_>, count: usize) -> Vec<GlobalTransaction> {
    let finished = |_| {
        let mut global = keyed(owner, 2);
        confirm(&mut global);
        call(&mut global, 0, Outcome::Done { reply: None });
        call(&mut global, 1, Outcome::Done { reply: None });
        global
    };
    (0..count).map(finished).collect()
}

/// Two new transactions of each of partitions 1 to 3.
fn new(owner: &mut Owner<'_>) -> Vec<GlobalTransaction> {
    (1..4).flat_map(|partition| [keyed(owner, partition), keyed(owner, partition)]).collect()
}

/// Another connection locks all rows except those to be deleted.
#[tokio::test]
async fn a_purge_waits_only_for_what_it_deletes() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut holder = database.connect().await;
        for table in ["global_transaction", "branch", "idempotency"] {
            // If the server believes that a table is empty, it prefers to scan it.
            let sql = format!("ALTER TABLE {table} STATS_AUTO_RECALC = 0; ANALYZE TABLE {table}");
            sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut holder).await.unwrap();
        }
        let mut owner = Owner::of(&store).await;
        let new = new(&mut owner);
        owner.append(new.iter().map(inserted).collect()).await;
        sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            .execute(&mut holder)
            .await
            .unwrap();
        let mut hold = holder.begin().await.unwrap();
        for table in ["global_transaction", "branch", "idempotency"] {
            let sql = format!("SELECT 1 FROM {table} FOR UPDATE");
            sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *hold).await.unwrap();
        }
        for count in [1, 20, 300] {
            let old = old(&mut owner, count);
            owner.append(old.iter().map(inserted).collect()).await;
            let purge = store
                .purge(
                    owner.ownership(2),
                    NOW + Duration::from_secs(60),
                    NOW + Duration::from_secs(60),
                    None,
                    1000,
                )
                .await;
            assert_eq!(purge.unwrap().0, count as u64);
        }
        hold.rollback().await.unwrap();
        database.drop().await;
    }
}

/// Another connection locks a row that is to be deleted. The purge waits, but batches of all partitions go on.
#[tokio::test]
async fn a_purge_that_waits_holds_nobody_up() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = Arc::new(database.store().await);
        let mut owner = Owner::of(&*store).await;
        let old = old(&mut owner, 300);
        let new = new(&mut owner);
        owner.append(old.iter().map(inserted).collect()).await;

        let mut holder = database.connect().await;
        let mut hold = holder.begin().await.unwrap();
        sqlx::query("SELECT 1 FROM global_transaction WHERE xid = ? FOR UPDATE")
            .bind(old[99].xid.to_bytes().to_vec())
            .execute(&mut *hold)
            .await
            .unwrap();
        let purging = store.clone();
        let (ownership, limit) = (owner.ownership(2), 100);
        let purge = tokio::spawn(async move {
            purging
                .purge(
                    ownership,
                    NOW + Duration::from_secs(60),
                    NOW + Duration::from_secs(60),
                    None,
                    limit,
                )
                .await
        });
        let mut looking = database.connect().await;
        let key = "SELECT xid FROM idempotency WHERE key_hash = ? FOR UPDATE SKIP LOCKED";
        loop {
            let free = sqlx::query(key).bind(old[0].key.unwrap().hash.to_vec());
            if free.fetch_all(&mut looking).await.unwrap().is_empty() {
                break; // it has deleted keys
            }
            assert!(!purge.is_finished(), "it waits for nobody");
        }
        owner.append(new.iter().map(inserted).collect()).await;
        let confirmed = new.into_iter().map(|mut global| {
            confirm(&mut global);
            updated(&global, BranchSet::EMPTY)
        });
        owner.append(confirmed.collect()).await;
        assert!(!purge.is_finished(), "it waits for nobody");

        hold.rollback().await.unwrap();
        let (deleted, next) = purge.await.unwrap().unwrap();
        assert_eq!(
            (deleted, next),
            (100, Some(old[99].xid.to_bytes().to_vec())),
            "a step takes as many as it may"
        );
        database.drop().await;
    }
}

#[tokio::test]
async fn a_read_after_a_purge_of_nothing_sees_one_moment() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut other = database.connect().await;
        let owner = Owner::of(&store).await;
        let purges = (0..READERS).map(|_| store.purge(owner.ownership(2), NOW, NOW, None, 10));
        for purged in futures_util::future::join_all(purges).await {
            assert_eq!(purged.unwrap(), (0, None));
        }
        let counts = store.readers.run(async |connection| {
            let count = "SELECT COUNT(*) FROM resolution";
            InMySql::run(connection, InMySql::BEGIN_READING).await?;
            let before: i64 = sqlx::query_scalar(count).fetch_one(&mut *connection).await?;
            let written = "INSERT INTO resolution VALUES (x'00', '1', 1, '', '', '', '', 0)";
            sqlx::raw_sql(written).execute(&mut other).await?;
            let after: i64 = sqlx::query_scalar(count).fetch_one(&mut *connection).await?;
            InMySql::run(connection, "ROLLBACK").await?;
            Ok((before, after))
        });
        assert_eq!(counts.await.unwrap(), (0, 0));
        database.drop().await;
    }
}

#[tokio::test]
async fn a_read_whose_caller_goes_away_costs_no_connection() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store_with_slow_answers().await;
        let all = ListFilter::of(Show::All);
        for millis in 0..60 {
            let list = store.list(&all, 10);
            drop(tokio::time::timeout(Duration::from_millis(millis), list).await);
        }
        let lists = (0..READERS).map(|_| store.list(&all, 10));
        for list in futures_util::future::join_all(lists).await {
            assert_eq!(list.unwrap(), Listing::default());
        }
        database.drop().await;
    }
}

/// New connections lead to a server that is behind, because of a load balancer, a changed name or a replica.
#[tokio::test]
async fn a_reader_that_is_behind_is_not_believed() {
    for server in servers() {
        let database = Database::new(&server).await;
        let mut store = database.store().await;
        let mut global;
        let mut owner = Owner::of(&store).await;
        global = keyed(&mut owner, 2);
        owner.insert(&global).await;
        let replica = database.copy().await;
        confirm(&mut global);
        let later = keyed(&mut owner, 2);
        owner.append(vec![updated(&global, BranchSet::EMPTY), inserted(&later)]).await;
        let known = owner.known(2);
        store.readers = replica.store().await.readers;
        let Lookup::Found(found) = store.load(global.xid, known).await.unwrap() else {
            panic!("it was recorded long ago")
        };
        assert_eq!(found.state, State::Confirming);
        assert!(matches!(store.load(later.xid, known).await.unwrap(), Lookup::Found(_)));
        let key = later.key.unwrap().hash;
        assert_eq!(store.find_keys(&[key], known).await.unwrap(), [Some(later.xid)]);
        let due = store.due(NOW + Duration::from_secs(60), None, 10, known).await.unwrap();
        assert_eq!(due.transactions.len(), 2);
        drop(store);
        replica.drop().await;
        database.drop().await;
    }
}

#[tokio::test]
async fn what_the_user_may_not_do_is_told_at_once() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store_of_a_user_who_may_only_read().await;
        let acquire = store.acquire(&[3], "test", NOW);
        let at_once = Duration::from_millis(400); // before a second attempt
        let error =
            tokio::time::timeout(at_once, acquire).await.expect("it is repeated").unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
        assert!(error.to_string().contains("needs SELECT, INSERT, UPDATE and DELETE"), "{error}");
        database.drop().await;
    }
}

/// A batch with an unknown result must not be carried out after its retry. A step of the purge holds rows that a takeover writes.
#[tokio::test]
async fn a_connection_in_doubt_is_ended_at_the_server_before_another_writes() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        for writer in [store.writer_of(0), &store.cleaner] {
            let id = async |connection: &mut Connection| {
                let id: u64 =
                    sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(connection).await?;
                Ok(id)
            };
            let first = writer.run(id).await.unwrap();
            assert_eq!(writer.run(id).await.unwrap(), first, "while all goes well there is one");

            let fails = async |connection: &mut Connection| {
                sqlx::raw_sql("START TRANSACTION").execute(connection).await?;
                Err::<(), _>(Error::unavailable("as if"))
            };
            writer.run(fails).await.unwrap_err();
            let second = writer.run(id).await.unwrap();
            assert_ne!(second, first, "a connection that failed was used again");

            let is_busy = async |connection: &mut Connection| {
                sqlx::raw_sql("SELECT SLEEP(60)").execute(connection).await?;
                Ok(())
            };
            let given_up =
                tokio::time::timeout(Duration::from_millis(200), writer.run(is_busy)).await;
            assert!(given_up.is_err(), "{given_up:?}");
            let third = writer.run(id).await.unwrap();
            assert_ne!(third, second, "a connection that was given up was used again");
            let alive = "SELECT COUNT(*) FROM information_schema.processlist WHERE id IN (?, ?) AND command <> 'Killed'";
            let mut connection = database.connect().await;
            let alive: i64 = loop {
                let alive = sqlx::query_scalar(alive).bind(first).bind(second);
                match alive.fetch_one(&mut connection).await {
                    // MySQL cannot show the list while another test sends a batch, whose text is not UTF-8.
                    Err(sqlx::Error::Database(error))
                        if error.message().contains("convert string") =>
                    {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    counted => break counted.unwrap(),
                }
            };
            assert_eq!(alive, 0, "the server may still carry out what was given up");
        }
        database.drop().await;
    }
}

#[tokio::test]
async fn the_server_tells_its_time() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let before = SystemClock::default().now();
        let told = store.clock().await.unwrap().expect("it has a clock");
        let after = SystemClock::default().now();
        let apart = Duration::from_secs(1);
        assert!(told + apart >= before && after + apart >= told, "{before:?} {told:?} {after:?}");
        database.drop().await;
    }
}

/// On Galera, a member that is behind learns of another takeover in the middle of its own.
#[tokio::test]
async fn an_epoch_that_somebody_else_begins_is_not_taken_for_damage() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        Owner::of(&store).await;
        let other = "INSERT INTO epoch (`partition`, epoch, nonce, owner, taken_at) \
                     SELECT `partition`, epoch + 1, nonce, owner, taken_at FROM epoch";
        sqlx::raw_sql(other).execute(&mut database.connect().await).await.unwrap();
        let error = store.acquire_once(&[0], "late", NOW).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error}");
        database.drop().await;
    }
}

/// Its statement may hold rows of several partitions.
#[tokio::test]
async fn a_row_that_the_server_refuses_ends_only_its_own_partition() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut owner = Owner::of(&store).await;
        let sound = begun(owner.xid(2), &["1"]);
        let too_long = GlobalTransaction { name: "x".repeat(200), ..begun(owner.xid(1), &["1"]) };
        let batch = owner.batch(vec![inserted(&sound), inserted(&too_long)]);
        let Ok(Appended::Damaged(damaged)) = store.append(&batch).await else {
            panic!("its partition was to be named")
        };
        let [Damage { partition: 1, what, lost: 0 }] = &damaged[..] else { panic!("{damaged:?}") };
        assert!(what.contains("name"), "{what}");
        let of_2 = |guard: &&Guard| guard.partition == 2;
        let guards = batch.guards.iter().filter(of_2).copied().collect();
        let rest = Batch { guards, writes: vec![inserted(&sound)] };
        assert_eq!(store.append(&rest).await.unwrap(), Appended::Durable);
        database.drop().await;
    }
}

/// Each of them may be taken over at its last attempt only.
#[test]
fn the_takeover_of_all_partitions_does_not_take_minutes() {
    let attempt = Duration::from_secs(2);
    let mut all = Duration::ZERO;
    for _ in crate::store::ALL_PARTITIONS {
        let (mut attempts, mut this) = (0, Duration::ZERO);
        loop {
            (attempts, this, all) = (attempts + 1, this + attempt, all + attempt);
            if !may_try_again(attempts, this, all) {
                break;
            }
        }
    }
    assert!(all < ACQUIRE_PATIENCE_IN_ALL + attempt * 16, "{all:?}");
}
