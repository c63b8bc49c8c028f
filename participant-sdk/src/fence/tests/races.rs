//! What only a server can show: calls for one branch and for its neighbours all at once, on many connections; and calls that wait for
//! each other. The same text for each kind of server.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use sqlx::Executor as _;

use super::{DEADLOCK, Db, ISOLATIONS, Pool, PoolOptions, places, sql};
use crate::{
    Action, Answer, Branch, Contract, Failed, Fence, Json, Participant, Phase, TryError, Tx, Xid,
    fence::{
        LOCK_WAIT,
        fixture::{Level, UNTOUCHED, branch as branch_of_shop, payload, word},
    },
};

/// Transactions that race, each with three branches of this participant.
const TRANSACTIONS: u64 = 40;
/// How often each call is delivered.
const TIMES: usize = 2;
/// How long connections may be busy with statements that wait for a lock. (To MySQL, one is closed when it has answered, which is when
/// its statement has waited long enough; the server looks once a second.) Without a limit of ours it would be 50 s.
const BUSY_MAX: Duration = Duration::from_secs(LOCK_WAIT.as_secs() * 3);
/// How often a call is asked for again until it must have ended.
const REPEATS_MAX: usize = 400;

struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = "stock.deduct";
    type Args = Json<i64>;
    type Reply = ();
}

struct Stock;

/// One row for each branch, so that what is tested is the fence and not a hot row of the test's own.
impl Action for Stock {
    type Contract = Deduct;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        of: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), TryError> {
        let hold = sql("INSERT INTO held (branch, pieces, sold) VALUES (?, ?, 0)");
        sqlx::query(hold).bind(name(of)).bind(n).execute(&mut **tx).await?;
        Ok(())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        of: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sell = sql("UPDATE held SET sold = sold + ? WHERE branch = ?");
        sqlx::query(sell).bind(n).bind(name(of)).execute(&mut **tx).await?;
        Ok(())
    }

    async fn on_cancel(&self, tx: &mut Tx<Db>, of: &Branch, _: &Json<i64>) -> Result<(), Failed> {
        let give_back = sql("DELETE FROM held WHERE branch = ?");
        sqlx::query(give_back).bind(name(of)).execute(&mut **tx).await?;
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

/// The end of a call, asked for again while its answer says so; and what was answered until then.
async fn deliver(participant: &Participant, branch: &Branch, answers: &Mutex<Vec<Answer>>) {
    for _ in 0..REPEATS_MAX {
        let answer = participant.handle(branch, b"3").await;
        let again = matches!(answer, Answer::Unknown(_) | Answer::Retry(_))
            // Here a Confirm may come before its Try; the coordinator never lets that happen.
            || (branch.phase == Phase::Confirm && !matches!(answer, Answer::Done(_)));
        answers.lock().unwrap().push(answer);
        if !again {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} of {} never ends", branch.phase, name(branch));
}

async fn race(url: &str, isolation: &'static str) {
    let pool = PoolOptions::new().max_connections(16).after_connect(move |connection, _| {
        Box::pin(async move { connection.execute(isolation).await.map(drop) })
    });
    let pool: Pool = pool.connect(url).await.unwrap();
    let fence = Fence::new(pool.clone());
    fence.create_table_if_missing().await.unwrap();
    let held = "DROP TABLE IF EXISTS held; DELETE FROM handfast_fence; \
                CREATE TABLE held (branch VARCHAR(64) PRIMARY KEY, pieces BIGINT NOT NULL, sold BIGINT NOT NULL)";
    sqlx::raw_sql(held).execute(&pool).await.unwrap();

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
        answers.iter().filter(|answer| format!("{answer:?}").contains(DEADLOCK)).collect();
    assert!(deadlocks.is_empty(), "{isolation}: {} deadlocks: {:?}", deadlocks.len(), deadlocks[0]);

    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("SELECT branch, pieces, sold FROM held").fetch_all(&pool).await.unwrap();
    let confirmed = usize::try_from(TRANSACTIONS / 2 * 3).unwrap();
    assert_eq!(rows.len(), confirmed, "{isolation}: what was cancelled has left something behind");
    assert!(
        rows.iter().all(|(_, pieces, sold)| (*pieces, *sold) == (3, 3)),
        "{isolation}: {rows:?}"
    );
    let tried = "SELECT COUNT(*) FROM handfast_fence_readable WHERE state = 'tried'";
    let tried: i64 = sqlx::query_scalar(tried).fetch_one(&pool).await.unwrap();
    assert_eq!(tried, 0, "{isolation}");
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_and_repeats_race_without_a_deadlock() {
    for place in places().await {
        let home = place.home().await;
        for isolation in ISOLATIONS {
            race(&home.url(), isolation).await;
        }
    }
}

/// A Try hangs in its author's code, and its row is locked. Whoever waits for that row gives up, and others find connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hung_try_does_not_empty_the_pool() {
    for place in places().await {
        let shop = place.open(4).await;
        let (fence, hung) = (shop.fence.clone(), branch_of_shop(1, Phase::Try));
        let (began, has_begun) = tokio::sync::oneshot::channel();
        let hanging = tokio::spawn(async move {
            let never = async move |_: &mut Tx<Db>| {
                let _waited_for = began.send(());
                std::future::pending::<Result<(), TryError>>().await
            };
            fence.run(&hung, b"", never).await
        });
        has_begun.await.unwrap();

        let cancel = branch_of_shop(1, Phase::Cancel);
        let cancels = (0..10).map(|_| {
            let (shop, cancel) = (shop.clone(), cancel.clone());
            tokio::spawn(async move {
                let call = shop.deliver(Level::Run, &cancel, &[]);
                tokio::time::timeout(Duration::from_millis(500), call).await.unwrap_err();
            })
        });
        for given_up in cancels.collect::<Vec<_>>() {
            given_up.await.unwrap();
        }
        let (neighbour, payload) = (branch_of_shop(2, Phase::Try), payload(2));
        let neighbour = shop.deliver(Level::Run, &neighbour, &payload);
        let answer = tokio::time::timeout(BUSY_MAX, neighbour).await.expect("the pool is empty");
        assert_eq!(word(&answer), "Done", "{answer:?}");

        // Nor does it wait for as long as the caller would.
        let began = Instant::now();
        let answer = shop.deliver(Level::Run, &cancel, &[]).await;
        assert_eq!(word(&answer), "Retry", "{answer:?}");
        assert!(began.elapsed() < BUSY_MAX, "{:?}", began.elapsed());

        hanging.abort();
        drop(hanging.await);
        let answer = shop.deliver(Level::Run, &cancel, &[]).await;
        assert_eq!((word(&answer), shop.state(1).await.as_deref()), ("Done", Some("suspended")));
        shop.deliver(Level::Run, &branch_of_shop(2, Phase::Cancel), &[]).await;
        assert_eq!(shop.shelf().await, UNTOUCHED);
    }
}
