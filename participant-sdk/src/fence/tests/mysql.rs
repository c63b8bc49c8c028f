//! Fence tests on MySQL and MariaDB: on every server in TEST_MYSQL_SERVERS.

pub(crate) use sqlx::MySql as Db;
use sqlx::{AssertSqlSafe, MySqlPool as Pool, mysql::MySqlPoolOptions as PoolOptions};

#[path = "races.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod races;
#[path = "round_trips.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod round_trips;
#[path = "server.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod server;
#[path = "shop.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod shop;
#[path = "suite/mod.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod suite;

use std::time::Duration;

use server::{Home, Server, servers};
use sqlx::{Executor as _, Row as _};

use crate::{
    branch::Phase,
    error::{Refusal, TryError},
    fence::{
        Fence, Tx,
        fixture::{Level, STOCK, UNTOUCHED, branch, payload, payload_that, word},
    },
};

/// The environment variable with the servers' URLs.
const SERVERS: &str = "TEST_MYSQL_SERVERS";
/// The levels at which calls are dropped, and whether the database is in memory (never, here). Level 0 is left out: its local
/// transaction is sqlx's, and sqlx loses a MySQL connection for ever if it is dropped in the middle of a statement.
const GIVEN_UP: [(Level, bool); 2] = [(Level::Action, false), (Level::Batch, false)];
/// Begins a local transaction without the fence.
const BEGIN: &str = "BEGIN";
/// The isolation levels that a service may use, each as a statement for a new connection.
const ISOLATIONS: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
];
/// The isolation level at which a row cannot be changed if it has changed since the local transaction began.
const SERIALIZES: Option<&str> = None;
/// The database's error code for a deadlock.
const DEADLOCK: &str = "1213";
/// Makes a connection refuse all changes.
const READ_ONLY: Option<&str> = Some("SET SESSION TRANSACTION READ ONLY");
/// How often each call waits for the database. The author's statements and the pool's own messages come on top.
const ROUND_TRIPS: [(&str, usize); 9] = [
    ("Try", 3),
    ("repeated Try", 4),
    ("Confirm", 3),
    ("repeated Confirm", 3),
    ("Try with a reply", 4),
    ("Cancel", 3),
    ("empty rollback", 3),
    ("suspended Try", 4),
    ("refused Try", 3),
];

/// Brings the statistics of the fence's table up to date.
const ANALYZE: &str = "ANALYZE TABLE handfast_fence";
/// A key of 16 bytes that is made of a number.
const NUMBERED: &str = "CAST(LPAD({n}, 16, '0') AS BINARY(16))";
/// Steps of a plan that read more than they return.
const TOO_MUCH: [&str; 1] = ["filesort"];
const DROP_INDEX: &str = "ALTER TABLE handfast_fence DROP INDEX handfast_fence_tried";

/// How the database would find what is overdue: the index that it uses, and what else it does.
async fn plan(pool: &Pool) -> String {
    let explain = format!("EXPLAIN FORMAT=TRADITIONAL {}", crate::fence::mysql::OVERDUE);
    let query = sqlx::query(AssertSqlSafe(explain)).bind(0_i64).bind(0_i64).bind(0_i64);
    let query = query.bind(vec![0_u8; 16]).bind(vec![0_u8; 16]).bind(vec![0_u8; 32]).bind(500_i64);
    let step = query.fetch_one(pool).await.unwrap();
    let column = |name: &str| step.get::<Option<String>, _>(name).unwrap_or_default();
    format!("{}; {}", column("key"), column("Extra"))
}

/// Drops a database. The time limit is for tests that left a local transaction open: without it, DROP would wait for ever.
fn drop_database(name: &str) -> String {
    format!("SET lock_wait_timeout = 10; DROP DATABASE {name}")
}

/// Takes SQL with a question mark for each value.
fn sql(text: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.to_owned())
}

/// DDL commits implicitly, which releases the fence's row in the middle of the work. What another call then does with the branch
/// must stand.
#[tokio::test]
async fn work_that_commits_does_not_overwrite_what_others_have_done_meanwhile() {
    for server in servers().await {
        let shop = server.open(4).await;
        let commits = async |tx: &mut Tx<Db>| {
            sqlx::raw_sql("DROP TABLE IF EXISTS nothing").execute(&mut **tx).await?;
            let nothing = async |_: &mut Tx<Db>| Ok::<(), TryError>(());
            let cancel = shop.fence.run(&branch(1, Phase::Cancel), b"", nothing).await;
            assert_eq!(word(&cancel), "Done", "{cancel:?}");
            Ok::<(), TryError>(())
        };
        let answer = shop.fence.run(&branch(1, Phase::Try), &payload(2), commits).await;
        assert_eq!(word(&answer), "Unknown", "{answer:?}");
        assert_eq!(shop.state(1).await.as_deref(), Some("cancelled"));
    }
}

/// The same without another call in between. What was committed stays, so a repeat must not do it again.
#[tokio::test]
async fn work_that_commits_is_not_called_done_and_not_done_twice() {
    const TAKE: &str = "UPDATE shelf SET free = free - 2, held = held + 2";
    const SELL: &str = "UPDATE shelf SET held = held - 2, sold = sold + 2";
    const COMMITS: &str = "CREATE TABLE IF NOT EXISTS nothing (n INT)";
    for server in servers().await {
        let shop = server.open(4).await;
        let take = async |tx: &mut Tx<Db>| {
            sqlx::raw_sql(TAKE).execute(&mut **tx).await?;
            sqlx::raw_sql(COMMITS).execute(&mut **tx).await?;
            Ok::<(), TryError>(())
        };
        let answer = shop.fence.run(&branch(1, Phase::Try), &payload(2), take).await;
        assert!(
            format!("{answer:?}").starts_with("Unknown(the local transaction ended"),
            "{answer:?}"
        );
        let cancel = shop.deliver(Level::Action, &branch(1, Phase::Cancel), &[]).await;
        assert_eq!((word(&cancel), shop.shelf().await), ("Done", UNTOUCHED));

        let refuses = async |tx: &mut Tx<Db>| {
            take(tx).await?;
            Err::<(), TryError>(Refusal::new("OUT_OF_STOCK").into())
        };
        let answer = shop.fence.run(&branch(2, Phase::Try), &payload(2), refuses).await;
        assert_eq!(
            word(&answer),
            "Unknown",
            "a part of the refused work was committed: {answer:?}"
        );

        let shop = server.open(4).await;
        shop.deliver(Level::Action, &branch(3, Phase::Try), &payload(2)).await;
        let sell = async |tx: &mut Tx<Db>| {
            sqlx::raw_sql(COMMITS).execute(&mut **tx).await?;
            sqlx::raw_sql(SELL).execute(&mut **tx).await?;
            Ok::<(), TryError>(())
        };
        let answer = shop.fence.run(&branch(3, Phase::Confirm), &[], sell).await;
        assert_eq!(word(&answer), "Retry", "{answer:?}");
        let answer = shop.fence.run(&branch(3, Phase::Confirm), &[], sell).await;
        assert_eq!((word(&answer), shop.shelf().await), ("Done", (STOCK - 2, 0, 2)));
    }
}

/// The service's own work uses the connection next.
#[tokio::test]
async fn a_connection_returns_with_its_own_settings() {
    const SESSION: &str = "SELECT CAST(CONNECTION_ID() AS SIGNED), CAST(@@SESSION.innodb_lock_wait_timeout AS SIGNED)";
    for server in servers().await {
        let shop = server.open(1).await;
        let set = "SET SESSION innodb_lock_wait_timeout = 41";
        sqlx::raw_sql(set).execute(&shop.pool).await.unwrap();
        let session =
            async || -> (i64, i64) { sqlx::query_as(SESSION).fetch_one(&shop.pool).await.unwrap() };
        let before = session().await;
        assert_eq!(before.1, 41);
        let waits = async |tx: &mut Tx<Db>| {
            let (_, seconds): (i64, i64) = sqlx::query_as(SESSION).fetch_one(&mut **tx).await?;
            assert_eq!(seconds, 3);
            Ok::<(), TryError>(())
        };
        assert_eq!(word(&shop.fence.run(&branch(1, Phase::Try), b"", waits).await), "Done");
        assert_eq!(session().await, before);
        for (n, phase, how) in [
            (2, Phase::Try, ""),
            (2, Phase::Try, ""),
            (2, Phase::Confirm, ""),
            (2, Phase::Confirm, ""),
            (2, Phase::Cancel, ""),
            (3, Phase::Confirm, ""),
            (3, Phase::Cancel, ""),
            (3, Phase::Try, ""),
            (4, Phase::Try, "refuse"),
            (4, Phase::Try, "fail"),
        ] {
            shop.deliver(Level::Run, &branch(n, phase), &payload_that(2, how)).await;
            assert_eq!(session().await, before, "{phase} of {n} {how}");
        }
        let commits = async |tx: &mut Tx<Db>| {
            sqlx::raw_sql("DROP TABLE IF EXISTS nothing").execute(&mut **tx).await?;
            Err::<(), TryError>(Refusal::new("NO").into())
        };
        let answer = shop.fence.run(&branch(5, Phase::Try), b"", commits).await;
        assert_eq!((word(&answer), session().await), ("Unknown", before));
    }
}

/// Some servers are set up for programs that were written for another database, or for people who forget WHERE.
#[tokio::test]
async fn every_mode_of_a_session_will_do() {
    const MODES: [&str; 5] = ["", "ANSI", "ANSI_QUOTES", "TRADITIONAL", "NO_BACKSLASH_ESCAPES"];
    const OF_MARIADB: [&str; 5] = ["ORACLE", "MSSQL", "DB2", "POSTGRESQL", "MAXDB"];
    for server in servers().await {
        let shop = server.open(1).await;
        let version: String =
            sqlx::query_scalar("SELECT VERSION()").fetch_one(&shop.pool).await.unwrap();
        let others: &[&str] = if version.contains("MariaDB") { &OF_MARIADB } else { &[] };
        for mode in MODES.iter().chain(others) {
            let url = shop.home.as_ref().unwrap().url();
            let set = format!("SET SESSION sql_mode = '{mode}', sql_safe_updates = 1");
            let pool = PoolOptions::new().max_connections(4).after_connect(move |connection, _| {
                let set = AssertSqlSafe(set.clone());
                Box::pin(async move { connection.execute(set).await.map(drop) })
            });
            let drop_table = "DROP VIEW handfast_fence_readable; DROP TABLE handfast_fence";
            shop.pool.execute(drop_table).await.unwrap();
            let pool = pool.connect(&url).await.unwrap();
            let fence = Fence::new(pool).retention(Duration::ZERO);
            fence.create_table_if_missing().await.unwrap();
            let work = async |tx: &mut Tx<Db>| {
                sqlx::raw_sql("INSERT INTO shelf VALUES (1, 1, 1)").execute(&mut **tx).await?;
                Ok::<_, TryError>(())
            };
            for n in 1..=3 {
                let phase = if n == 1 { Phase::Cancel } else { Phase::Confirm };
                let answer = fence.run(&branch(n, Phase::Try), &payload(2), work).await;
                assert_eq!(word(&answer), "Done", "{mode}: {answer:?}");
                let answer = if n == 3 {
                    let work = async |(tx, _): (&mut Tx<Db>, _)| Ok(tx.mark().await?);
                    fence.run_many(phase, &[branch(n, phase)], work).await.remove(0).unwrap()
                } else {
                    fence.run(&branch(n, phase), &[], work).await
                };
                assert_eq!(word(&answer), "Done", "{mode}: {answer:?}");
            }
            assert_eq!(shop.state(3).await.as_deref(), Some("confirmed"), "{mode}");
            assert_eq!(
                fence.overdue("inventory.deduct", &Default::default()).await.unwrap().branches,
                []
            );
            assert_eq!(fence.clean_up().await.map_err(|error| format!("{mode}: {error}")), Ok(3));
        }
    }
}
