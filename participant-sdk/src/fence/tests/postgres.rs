//! Fence tests on PostgreSQL: on every server in TEST_POSTGRES_SERVERS.

pub(crate) use sqlx::Postgres as Db;
use sqlx::{AssertSqlSafe, PgPool as Pool, postgres::PgPoolOptions as PoolOptions};

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

use server::{Home, Server, servers};

use crate::fence::fixture::Level;

/// The environment variable with the servers' URLs.
const SERVERS: &str = "TEST_POSTGRES_SERVERS";
/// The levels at which calls are dropped, and whether the database is in memory (never, here).
const GIVEN_UP: [(Level, bool); 3] =
    [(Level::Enter, false), (Level::Action, false), (Level::Batch, false)];
/// Begins a local transaction without the fence.
const BEGIN: &str = "BEGIN";
/// The isolation levels that a service may use, each as a statement for a new connection.
const ISOLATIONS: [&str; 2] = [
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
];
/// The isolation level at which a row cannot be changed if it has changed since the local transaction began.
const SERIALIZES: Option<&str> = Some(ISOLATIONS[1]);
/// The database's error code for a deadlock.
const DEADLOCK: &str = "40P01";
/// Makes a connection refuse all changes.
const READ_ONLY: Option<&str> = Some("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY");
/// How often each call waits for the database. The author's statements and the pool's own messages come on top.
const ROUND_TRIPS: [(&str, usize); 9] = [
    ("Try", 4),
    ("repeated Try", 3),
    ("Confirm", 4),
    ("repeated Confirm", 3),
    ("Try with a reply", 4),
    ("Cancel", 4),
    ("empty rollback", 3),
    ("suspended Try", 3),
    ("refused Try", 3),
];

/// Brings the statistics of the fence's table up to date.
const ANALYZE: &str = "ANALYZE handfast_fence";
/// A key of 16 bytes that is made of a number.
const NUMBERED: &str = "convert_to(lpad({n}::text, 16, '0'), 'UTF8')";
/// Steps of a plan that read more than they return.
const TOO_MUCH: [&str; 1] = ["Seq Scan"];
const DROP_INDEX: &str = "DROP INDEX handfast_fence_tried";

/// How the database would find what is overdue.
async fn plan(pool: &Pool) -> String {
    let explain = format!("EXPLAIN {}", crate::fence::postgres::OVERDUE);
    let query = sqlx::query_scalar::<_, String>(AssertSqlSafe(explain));
    let query = query.bind(0_i64).bind(0_i64).bind(vec![0_u8; 16]).bind(vec![0_u8; 32]);
    query.bind(500_i64).fetch_all(pool).await.unwrap().join("; ")
}

/// Drops a database, even if connections of a dropped pool are still open.
fn drop_database(name: &str) -> String {
    format!("DROP DATABASE {name} WITH (FORCE)")
}

/// Takes SQL with a question mark for each value.
fn sql(text: &str) -> AssertSqlSafe<String> {
    let mut parts = text.split('?');
    let mut sql = parts.next().unwrap_or_default().to_owned();
    for (n, part) in parts.enumerate() {
        sql.push_str(&format!("${}{part}", n + 1));
    }
    AssertSqlSafe(sql)
}
