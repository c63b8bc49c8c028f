//! On PostgreSQL: on every server of TEST_POSTGRES_SERVERS.

pub(crate) use sqlx::Postgres as Db;
use sqlx::{AssertSqlSafe, PgPool as Pool, postgres::PgPoolOptions as PoolOptions};

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

use crate::fence::fixture::Level;

/// Where the servers are.
const SERVERS: &str = "TEST_POSTGRES_SERVERS";
/// Levels at which a call may be given up, and whether in memory, which is nothing else here.
const GIVEN_UP: [(Level, bool); 3] =
    [(Level::Enter, false), (Level::Action, false), (Level::Batch, false)];
/// How a local transaction begins that is not the fence's.
const BEGIN: &str = "BEGIN";
/// Isolation levels that a service may have set, as a statement for a new connection.
const ISOLATIONS: [&str; 2] = [
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
];
/// At which of them a row that has changed since the local transaction began cannot be changed.
const SERIALIZES: Option<&str> = Some(ISOLATIONS[1]);
/// What the database calls a deadlock.
const DEADLOCK: &str = "40P01";

/// How a database is taken away. The connections of a pool that was just dropped may still be there.
fn drop_database(name: &str) -> String {
    format!("DROP DATABASE {name} WITH (FORCE)")
}

/// A statement with a question mark for each value.
fn sql(text: &str) -> AssertSqlSafe<String> {
    let mut parts = text.split('?');
    let mut sql = parts.next().unwrap_or_default().to_owned();
    for (n, part) in parts.enumerate() {
        sql.push_str(&format!("${}{part}", n + 1));
    }
    AssertSqlSafe(sql)
}
