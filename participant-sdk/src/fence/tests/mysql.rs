//! On MySQL and MariaDB: on every server of TEST_MYSQL_SERVERS.

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

/// Where the servers are.
const SERVERS: &str = "TEST_MYSQL_SERVERS";
/// Levels at which a call may be given up, and whether in memory, which is nothing else here. At level 0 the local transaction is sqlx's, and that loses a connection of MySQL for ever
/// if it is dropped in the middle of a statement.
const GIVEN_UP: [(Level, bool); 2] = [(Level::Action, false), (Level::Batch, false)];
/// How a local transaction begins that is not the fence's.
const BEGIN: &str = "BEGIN";
/// Isolation levels that a service may have set, as a statement for a new connection.
const ISOLATIONS: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
];
/// At which of them a row that has changed since the local transaction began cannot be changed.
const SERIALIZES: Option<&str> = None;
/// What the database calls a deadlock.
const DEADLOCK: &str = "1213";

/// How a database is taken away. Who has left a local transaction open in it keeps it for ever, unless there is a limit.
fn drop_database(name: &str) -> String {
    format!("SET lock_wait_timeout = 10; DROP DATABASE {name}")
}

/// A statement with a question mark for each value.
fn sql(text: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.to_owned())
}

/// DDL commits, and lets go of the fence's row in the middle of the work. What another call does with the branch then stands.
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
