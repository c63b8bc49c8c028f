//! Fence tests on SQLite. Each shop has its own file, or is in memory.

use std::{sync::Arc, time::Duration};

pub(crate) use sqlx::Sqlite as Db;
use sqlx::{
    AssertSqlSafe, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions},
};
use tempfile::TempDir;

#[path = "shop.rs"]
pub(crate) mod shop;
#[path = "suite/mod.rs"]
mod suite;

use shop::Shop;

use crate::{
    Fence, Phase,
    fence::{
        TableError,
        fixture::{Level, branch, payload, word},
    },
};

/// The levels at which calls are dropped, and whether the database is in memory. Level 0 with an in-memory database is left out:
/// its local transaction is sqlx's, sqlx may close the connection, and the database would be gone.
const GIVEN_UP: [(Level, bool); 7] = [
    (Level::Enter, false),
    (Level::Run, false),
    (Level::Run, true),
    (Level::Action, false),
    (Level::Action, true),
    (Level::Batch, false),
    (Level::Batch, true),
];
/// Begins a local transaction without the fence.
const BEGIN: &str = "BEGIN IMMEDIATE";
/// Makes a connection refuse all changes. A file has no other server to connect to.
const READ_ONLY: Option<&str> = None;

/// Brings the statistics of the fence's table up to date. SQLite needs none.
const ANALYZE: &str = "SELECT 1";
/// A key of 16 bytes that is made of a number.
const NUMBERED: &str = "CAST(printf('%016d', {n}) AS BLOB)";
/// Steps of a plan that read more than they return.
const TOO_MUCH: [&str; 2] = ["TEMP B-TREE", "SCAN"];
const DROP_INDEX: &str = "DROP INDEX handfast_fence_tried";

/// How the database would find what is overdue.
async fn plan(pool: &SqlitePool) -> String {
    let explain = format!("EXPLAIN QUERY PLAN {}", crate::fence::sqlite::OVERDUE);
    let query = sqlx::query_as::<_, (i64, i64, i64, String)>(AssertSqlSafe(explain));
    let query = query.bind(0_i64).bind(0_i64).bind(vec![0_u8; 16]).bind(vec![0_u8; 32]);
    let steps = query.bind(500_i64).fetch_all(pool).await.unwrap();
    steps.into_iter().map(|(.., step)| step).collect::<Vec<_>>().join("; ")
}

/// SQLite has no servers. This one stands for the machine.
struct Server;

/// A folder with a database file.
#[derive(Clone)]
pub(crate) struct Home(Arc<TempDir>);

async fn servers() -> [Server; 1] {
    [Server]
}

impl Server {
    /// A shop whose pool has this many connections.
    async fn open(&self, connections: u32) -> Shop {
        let home = Home(Arc::new(tempfile::tempdir().unwrap()));
        Shop::open(home.connect(connections).await, Some(home)).await
    }

    /// A shop with a single connection.
    async fn alone(&self) -> Shop {
        Shop::in_memory().await
    }
}

impl Home {
    async fn connect(&self, connections: u32) -> SqlitePool {
        let options = SqliteConnectOptions::new()
            .filename(self.0.path().join("shop.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal);
        SqlitePoolOptions::new().max_connections(connections).connect_with(options).await.unwrap()
    }
}

impl Shop {
    /// A shop whose database lives in memory, in its only connection.
    pub(crate) async fn in_memory() -> Self {
        let pool = SqlitePoolOptions::new().max_connections(1);
        Self::open(pool.connect("sqlite::memory:").await.unwrap(), None).await
    }
}

/// Takes SQL with a question mark for each value.
fn sql(text: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.to_owned())
}

#[tokio::test]
async fn a_call_that_cannot_have_the_lock_fails_and_the_next_one_does_not() {
    let shop = Server.open(8).await;
    let mut other = shop.pool.acquire().await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *other).await.unwrap();
    let impatient = SqlitePoolOptions::new().max_connections(1).connect_with(
        (*shop.pool.connect_options()).clone().busy_timeout(Duration::from_millis(50)),
    );
    let pool = impatient.await.unwrap();
    let waiting = Shop { fence: Fence::new(pool.clone()), pool, ..shop.clone() };
    for (phase, expected) in [(Phase::Try, "Unknown"), (Phase::Cancel, "Retry")] {
        let answer = waiting.deliver(Level::Run, &branch(1, phase), &payload(2)).await;
        assert_eq!(word(&answer), expected, "{answer:?}");
    }
    sqlx::raw_sql("ROLLBACK").execute(&mut *other).await.unwrap();
    let answer = waiting.deliver(Level::Run, &branch(1, Phase::Try), &payload(2)).await;
    assert_eq!(word(&answer), "Done", "{answer:?}");
}

#[tokio::test]
async fn what_is_overdue_can_be_read_while_somebody_writes() {
    let [server] = servers().await;
    let shop = server.open(2).await;
    let mut other = shop.pool.acquire().await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut *other).await.unwrap();
    let from_the_first = Default::default();
    let overdue = shop.fence.overdue("inventory.deduct", &from_the_first);
    let page = tokio::time::timeout(Duration::from_secs(2), overdue).await.expect("at once");
    assert!(page.unwrap().branches.is_empty());
    sqlx::raw_sql("ROLLBACK").execute(&mut *other).await.unwrap();
}

#[tokio::test]
async fn verify_says_what_is_wrong_and_what_to_do() {
    let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
    let fence = Fence::new(pool.clone());
    let run = async |sql: &'static str| {
        sqlx::raw_sql(sql).execute(&pool).await.unwrap();
    };
    let text = fence.verify().await.unwrap_err().to_string();
    assert!(text.contains("no table `handfast_fence` here (SQLite)"), "{text}");
    assert!(text.contains("create_table_if_missing") && text.contains("schema/sqlite.sql"));

    run("CREATE TABLE handfast_fence (xid BLOB, branch_id TEXT, state INTEGER, PRIMARY KEY (xid))")
        .await;
    let text = fence.verify().await.unwrap_err().to_string();
    for difference in [
        "column branch_id is TEXT, not blob",
        "column payload is missing",
        "column seen is missing",
        "primary key is not (xid, branch_id)",
        "schema/sqlite.sql",
    ] {
        assert!(text.contains(difference), "{text}");
    }
    let error = fence.create_table_if_missing().await.unwrap_err();
    assert!(matches!(error, TableError::Differs { .. }), "one that is there is left alone");

    run("DROP TABLE handfast_fence").await;
    fence.create_table_if_missing().await.unwrap();
    fence.create_table_if_missing().await.unwrap();
    run("ALTER TABLE handfast_fence ADD COLUMN note TEXT").await;
    fence.verify().await.unwrap();
}

/// Operators read the view with their own SQLite; Debian 12 and its Python have 3.40. That version cannot parse hexadecimal
/// numbers as JSON ("malformed JSON"), so the view uses no JSON function.
#[tokio::test]
async fn an_older_sqlite_can_read_the_view() {
    let shop = Shop::in_memory().await;
    let view: String = sqlx::query_scalar("SELECT sql FROM sqlite_schema WHERE type = 'view'")
        .fetch_one(&shop.pool)
        .await
        .unwrap();
    assert!(!view.to_lowercase().contains("json"), "{view}");

    let xids =
        ["0-1-10-0000000f", "10-4096-1-abcdef01", "65535-4294967295-281474976710655-ffffffff"];
    for xid in xids {
        let mut branch = branch(1, Phase::Try);
        branch.xid = xid.parse().unwrap();
        shop.deliver(Level::Run, &branch, &payload(1)).await;
    }
    let found: Vec<String> =
        sqlx::query_scalar("SELECT xid FROM handfast_fence_readable ORDER BY xid")
            .fetch_all(&shop.pool)
            .await
            .unwrap();
    assert_eq!(found, xids);
}
