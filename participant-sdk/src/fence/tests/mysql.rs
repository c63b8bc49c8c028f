//! Fence tests on MySQL and MariaDB: on every server in TEST_MYSQL_SERVERS.

pub(crate) use sqlx::MySql as Db;
use sqlx::{AssertSqlSafe, MySqlPool as Pool, mysql::MySqlPoolOptions as PoolOptions};

#[path = "races.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod races;
#[path = "server.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod server;
#[path = "shop.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod shop;
#[path = "suite/mod.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
mod suite;

use server::{Home, Place, places};

use crate::{
    branch::Phase,
    error::TryError,
    fence::{
        Tx,
        fixture::{Level, branch, payload, word},
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
    for place in places().await {
        let shop = place.open(4).await;
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
