//! The fence on MySQL and MariaDB: calls for one branch and for its neighbours, all at once, on many connections.

use std::sync::{Arc, Mutex};

use handfast::{
    Action, Answer, Branch, Contract, Failed, Fence, Json, Participant, Phase, Refusal, TryError,
    Tx, Xid,
};
use handfast_tests::database::{Database, servers};
use sqlx::{
    AssertSqlSafe, Executor as _, MySql, MySqlPool,
    mysql::{MySqlConnectOptions, MySqlPoolOptions},
};

/// Pieces in the beginning.
const PIECES: i64 = 1_000_000;
/// Transactions that race, each with three branches of this participant.
const TRANSACTIONS: u64 = 60;
/// How often each call is delivered.
const TIMES: usize = 2;

struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = "stock.deduct";
    type Args = Json<i64>;
    type Reply = Json<i64>;
}

struct Stock;

/// One row for each branch, so that what is measured is the fence and not a hot row of the test's own.
impl Action for Stock {
    type Contract = Deduct;
    type Db = MySql;

    async fn on_try(
        &self,
        tx: &mut Tx<MySql>,
        branch: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        if *n > PIECES {
            return Err(Refusal::new("OUT_OF_STOCK").into());
        }
        sqlx::query("INSERT INTO held (branch, pieces) VALUES (?, ?)")
            .bind(name(branch))
            .bind(n)
            .execute(&mut **tx)
            .await?;
        Ok(Json(PIECES - n))
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<MySql>,
        branch: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sell = "UPDATE held SET sold = sold + ? WHERE branch = ?";
        sqlx::query(sell).bind(n).bind(name(branch)).execute(&mut **tx).await?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<MySql>,
        branch: &Branch,
        _: &Json<i64>,
    ) -> Result<(), Failed> {
        let give_back = "DELETE FROM held WHERE branch = ?";
        sqlx::query(give_back).bind(name(branch)).execute(&mut **tx).await?;
        Ok(())
    }
}

fn name(branch: &Branch) -> String {
    format!("{}/{}", branch.xid, branch.branch_id)
}

fn branch(n: u64, id: usize, phase: Phase) -> Branch {
    // Next to each other in the primary key, as transactions of one moment are.
    let xid = Xid { partition: 3, epoch: 7, sequence: n, nonce: 0x9f3c_01d2 };
    Branch::new(xid, id.to_string().parse().unwrap(), Deduct::NAME, phase)
}

/// A pool whose connections have this isolation level, as a service may have set it.
async fn pool(url: &str, isolation: &'static str) -> MySqlPool {
    let options: MySqlConnectOptions = url.parse().unwrap();
    let pool = MySqlPoolOptions::new().max_connections(16).after_connect(move |connection, _| {
        let set = format!("SET SESSION TRANSACTION ISOLATION LEVEL {isolation}");
        Box::pin(async move { connection.execute(AssertSqlSafe(set)).await.map(drop) })
    });
    pool.connect_with(options).await.unwrap()
}

/// The end of a call, asked for again while its answer says so; and what was answered until then.
async fn deliver(participant: &Participant, branch: &Branch, answers: &Mutex<Vec<Answer>>) {
    for _ in 0..200 {
        let answer = participant.handle(branch, b"3").await;
        let again = matches!(answer, Answer::Unknown(_) | Answer::Retry(_))
            // Here a Confirm may come before its Try; the coordinator never lets that happen.
            || (branch.phase == Phase::Confirm && !matches!(answer, Answer::Done(_)));
        answers.lock().unwrap().push(answer);
        if !again {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("{} of {} never ends", branch.phase, name(branch));
}

async fn race(url: &str, isolation: &'static str) {
    let pool = pool(url, isolation).await;
    let fence = Fence::new(pool.clone());
    fence.create_table_if_missing().await.unwrap();
    fence.verify().await.unwrap();
    for sql in [
        "DROP TABLE IF EXISTS held",
        "CREATE TABLE held (branch VARCHAR(64) PRIMARY KEY, pieces BIGINT NOT NULL, sold BIGINT NOT NULL DEFAULT 0)",
        "DELETE FROM handfast_fence",
    ] {
        pool.execute(sql).await.unwrap();
    }
    let participant = Participant::builder("stock").action(&fence, Stock).build();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=TRANSACTIONS {
        for id in 1..=3 {
            // Every other one is confirmed. A Try and a Cancel of the rest meet in any order, and so do their repeats.
            let phases = [Phase::Try, if n % 2 == 0 { Phase::Confirm } else { Phase::Cancel }];
            for phase in phases.repeat(TIMES) {
                let (participant, answers) = (participant.clone(), answers.clone());
                calls.spawn(async move {
                    deliver(&participant, &branch(n, id, phase), &answers).await;
                });
            }
        }
    }
    while let Some(ended) = calls.join_next().await {
        ended.unwrap();
    }
    let answers = std::mem::take(&mut *answers.lock().unwrap());
    let deadlocks: Vec<_> =
        answers.iter().filter(|answer| format!("{answer:?}").contains("1213")).collect();
    assert!(deadlocks.is_empty(), "{isolation}: {} deadlocks: {:?}", deadlocks.len(), deadlocks[0]);

    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("SELECT branch, pieces, sold FROM held").fetch_all(&pool).await.unwrap();
    let confirmed = usize::try_from(TRANSACTIONS / 2 * 3).unwrap();
    assert_eq!(rows.len(), confirmed, "{isolation}: what was cancelled has left something behind");
    assert!(
        rows.iter().all(|(_, pieces, sold)| (*pieces, *sold) == (3, 3)),
        "{isolation}: {rows:?}"
    );
    let tried: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM handfast_fence_readable WHERE state = 'tried'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(tried, 0, "{isolation}");
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_and_repeats_race_without_a_deadlock() {
    for server in servers() {
        let database = Database::empty(&server).await;
        for isolation in ["REPEATABLE READ", "READ COMMITTED"] {
            race(&database.url(), isolation).await;
        }
        database.drop().await;
    }
}

/// What each call answers, one after the other: the same as on SQLite.
#[tokio::test]
async fn repeats_late_calls_and_cancels_of_nothing() {
    for server in servers() {
        let database = Database::empty(&server).await;
        let pool = pool(&database.url(), "REPEATABLE READ").await;
        let fence = Fence::new(pool.clone());
        fence.create_table_if_missing().await.unwrap();
        fence.create_table_if_missing().await.unwrap();
        pool.execute("CREATE TABLE held (branch VARCHAR(64) PRIMARY KEY, pieces BIGINT NOT NULL, sold BIGINT NOT NULL DEFAULT 0)")
            .await
            .unwrap();
        let stock = Participant::builder("stock").action(&fence, Stock).build();
        let ask =
            async |n, phase, payload: &[u8]| stock.handle(&branch(n, 1, phase), payload).await;

        for _ in 0..2 {
            let answer = ask(1, Phase::Try, b"3").await;
            assert!(matches!(&answer, Answer::Done(reply) if **reply == *b"999997"), "{answer:?}");
        }
        let other = ask(1, Phase::Try, b"4").await;
        assert!(!matches!(other, Answer::Done(_)), "another payload: {other:?}");
        for _ in 0..2 {
            assert!(matches!(ask(1, Phase::Confirm, b"").await, Answer::Done(_)));
        }
        assert!(matches!(ask(2, Phase::Cancel, b"").await, Answer::Done(_)), "empty rollback");
        assert!(matches!(ask(2, Phase::Try, b"3").await, Answer::TooLate(_)), "suspension");
        let refused = ask(3, Phase::Try, b"2000000").await;
        assert!(
            matches!(&refused, Answer::Refused(refusal) if refusal.reason == "OUT_OF_STOCK"),
            "{refused:?}"
        );
        assert!(matches!(ask(3, Phase::Cancel, b"").await, Answer::Done(_)));
        assert!(!matches!(ask(4, Phase::Confirm, b"").await, Answer::Done(_)), "never tried");
        assert!(matches!(ask(5, Phase::Try, b"7").await, Answer::Done(_)));
        assert!(matches!(ask(5, Phase::Cancel, b"").await, Answer::Done(_)));

        let held: Vec<(i64, i64)> =
            sqlx::query_as("SELECT pieces, sold FROM held").fetch_all(&pool).await.unwrap();
        assert_eq!(held, [(3, 3)]);
        let states: Vec<String> =
            sqlx::query_scalar("SELECT state FROM handfast_fence_readable ORDER BY xid, branch_id")
                .fetch_all(&pool)
                .await
                .unwrap();
        assert_eq!(states, ["confirmed", "suspended", "suspended", "cancelled"]);
        pool.close().await;
        database.drop().await;
    }
}
