//! Races that only a database server can show: concurrent calls for one branch and for its neighbours, on many connections, and
//! calls that wait for each other. The code is compiled for each kind of server.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::Executor as _;

use super::{DEADLOCK, Db, ISOLATIONS, Pool, PoolOptions, SERIALIZES, servers, shop::Shop, sql};
use crate::{
    Action, ActionInBatches, Answer, Branch, Contract, Failed, Fence, Json, Participant, Phase,
    Tried, TryError, Tx, Xid,
    fence::{
        LOCK_WAIT,
        db::{Key, Old, Statements as _},
        fixture::{Level, UNTOUCHED, branch as branch_of_shop, payload, payload_that, word},
    },
    participant::batches::in_sequence,
};

/// Concurrent transactions, each with three branches of this participant.
const TRANSACTIONS: u64 = 40;
/// How often each call is delivered.
const TIMES: usize = 3;
/// How long connections may be occupied by statements that wait for a lock. (MySQL keeps a dropped connection until its
/// statement has answered, that is, until the lock wait times out; the server checks once a second.) Without our own timeout it
/// would take 50 s.
const BUSY_MAX: Duration = Duration::from_secs(LOCK_WAIT.as_secs() * 3);
/// How often a call is retried before the test fails.
const REPEATS_MAX: usize = 400;

struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = "stock.deduct";
    type Args = Json<i64>;
    type Reply = ();
}

#[derive(Clone, Default)]
struct Stock {
    /// How many branches have run in batches.
    together: Arc<AtomicUsize>,
}

/// One row for each branch, so that the test measures the fence and not contention on a hot row.
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

impl ActionInBatches for Stock {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<i64>>],
    ) -> Result<(), Failed> {
        self.together.fetch_add(tried.len(), Ordering::Relaxed);
        in_sequence(self, tx, tried).await
    }

    async fn on_cancel_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<i64>>],
    ) -> Result<(), Failed> {
        self.together.fetch_add(tried.len(), Ordering::Relaxed);
        in_sequence(self, tx, tried).await
    }
}

fn name(branch: &Branch) -> String {
    format!("{}/{}", branch.xid, branch.branch_id)
}

fn branch(n: u64, id: usize, phase: Phase) -> Branch {
    // Consecutive sequence numbers, so that the rows are neighbours in the primary key, as for concurrent transactions.
    let xid = Xid { partition: 3, epoch: 7, sequence: n, nonce: 0x9f3c_01d2 };
    Branch::new(xid, id.to_string().parse().unwrap(), Deduct::NAME, phase)
}

/// Delivers a call and retries it until it has a final answer. Records all answers.
async fn deliver(participant: &Participant, branch: &Branch, answers: &Mutex<Vec<Answer>>) {
    for _ in 0..REPEATS_MAX {
        let answer = participant.handle(branch, b"3").await;
        let again = matches!(answer, Answer::Unknown(_) | Answer::Retry(_))
            // In this test a Confirm may arrive before its Try. The coordinator never lets that happen.
            || (branch.phase == Phase::Confirm && !matches!(answer, Answer::Done(_)));
        answers.lock().unwrap().push(answer);
        if !again {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} of {} never ends", branch.phase, name(branch));
}

async fn connect(url: &str, isolation: &'static str) -> Pool {
    let pool = PoolOptions::new().max_connections(16).after_connect(move |connection, _| {
        Box::pin(async move { connection.execute(isolation).await.map(drop) })
    });
    pool.connect(url).await.unwrap()
}

async fn race(url: &str, isolation: &'static str) {
    let pool = connect(url, isolation).await;
    let fence = Fence::new(pool.clone());
    fence.create_table_if_missing().await.unwrap();
    let held = "DROP TABLE IF EXISTS held; DELETE FROM handfast_fence; \
                CREATE TABLE held (branch VARCHAR(64) PRIMARY KEY, pieces BIGINT NOT NULL, sold BIGINT NOT NULL)";
    sqlx::raw_sql(held).execute(&pool).await.unwrap();

    // Three programs that serve the same action: two with batches, one without.
    let stock = Stock::default();
    let builder = || Participant::builder("stock");
    let participants = [
        builder().action_in_batches(&fence, stock.clone()).build(),
        builder().action(&fence, stock.clone()).build(),
        builder().action_in_batches(&fence, stock.clone()).build(),
    ];
    let answers = Arc::new(Mutex::new(Vec::new()));
    let mut calls = tokio::task::JoinSet::new();
    for n in 1..=TRANSACTIONS {
        for id in 1..=3 {
            // Every second transaction is confirmed. For the others, Try, Cancel and their repeats arrive in any order.
            let phases = [Phase::Try, if n % 2 == 0 { Phase::Confirm } else { Phase::Cancel }];
            for phase in phases.repeat(TIMES) {
                let participant = participants[calls.len() % participants.len()].clone();
                let answers = answers.clone();
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

    if SERIALIZES != Some(isolation) {
        assert_eq!(fence.failed_batches(), 0, "{isolation}: batches disturb somebody");
    }
    let together = stock.together.load(Ordering::Relaxed);
    assert!(together > 0, "{isolation}: there were no batches");

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
    for server in servers().await {
        let home = server.home().await;
        for isolation in ISOLATIONS {
            race(&home.url(), isolation).await;
        }
    }
}

/// A Try hangs in its author's code while its row is locked. Calls that wait for that row time out, and other calls still get
/// connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hung_try_does_not_empty_the_pool() {
    for server in servers().await {
        let shop = server.open(4).await;
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

        // A Cancel with a patient caller times out as well, long before its caller would.
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

/// Another connection has locked one branch's row. The other branches of the batch do not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_row_that_is_held_holds_up_its_own_branch_only() {
    for server in servers().await {
        let shop = server.open(8).await;
        let batches = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        let (held, last) = (batches + 1, batches + 3);
        for n in 1..=last {
            shop.deliver(Level::Action, &branch_of_shop(n, Phase::Try), &payload(1)).await;
        }
        let mut other = shop.pool.begin().await.unwrap();
        let hold = sql("UPDATE handfast_fence SET seen = seen WHERE xid = ?");
        let xid = branch_of_shop(held, Phase::Try).xid.to_bytes();
        sqlx::query(hold).bind(&xid[..]).execute(&mut *other).await.unwrap();

        let calls: Vec<_> = (1..=last).map(|n| branch_of_shop(n, Phase::Confirm)).collect();
        let mut waiting = tokio::spawn({
            let (shop, calls) = (shop.clone(), calls.clone());
            async move { shop.together(&calls).await }
        });
        // The rest of the batch is committed at once. The call of the locked row waits alone.
        let rest = async {
            while shop.state(last).await.as_deref() != Some("confirmed") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LOCK_WAIT, rest).await.expect("they wait for the row that is held");
        assert!(!waiting.is_finished());
        other.rollback().await.unwrap();
        let answers = (&mut waiting).await.unwrap();
        assert!(answers.iter().all(|answer| word(answer) == "Done"), "{answers:?}");
    }
}

/// A Confirm hangs in its author's code. Confirms that queue behind it wait only for a limited time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hung_confirm_does_not_hold_up_the_others() {
    for server in servers().await {
        let shop = server.open(8).await;
        let batches = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        for n in 1..=batches + 3 {
            shop.deliver(Level::Action, &branch_of_shop(n, Phase::Try), &payload(0)).await;
        }
        let participant = shop.participant_in_batches();
        let confirm = |n| {
            let (participant, confirm) = (participant.clone(), branch_of_shop(n, Phase::Confirm));
            tokio::spawn(async move { participant.handle(&confirm, &[]).await })
        };
        let runs = shop.runs();
        for n in 1..=batches {
            shop.change_payload(n, payload_that(0, "hang")).await;
        }
        let hanging: Vec<_> = (1..=batches).map(confirm).collect();
        while shop.runs() < runs + hanging.len() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let others: Vec<_> = (batches + 1..=batches + 3).map(confirm).collect();
        for other in others {
            let answer = tokio::time::timeout(LOCK_WAIT, other).await.expect("they wait for it");
            assert_eq!(word(&answer.unwrap()), "Done");
        }
        for hanging in hanging {
            assert!(!hanging.is_finished());
            hanging.abort();
            drop(hanging.await);
        }
    }
}

/// A batch's statements read and lock only the rows that they name: no query plan may scan the whole table.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_batch_locks_no_rows_but_its_own() {
    for server in servers().await {
        for isolation in ISOLATIONS {
            let home = server.home().await;
            let shop = Shop::open(connect(&home.url(), isolation).await, Some(home)).await;
            for n in 1..=10 {
                shop.deliver(Level::Action, &branch_of_shop(n, Phase::Try), &payload(0)).await;
            }
            // While a batch holds the even rows, the odd rows must not be locked.
            let even = (2..=10).step_by(2).map(|n| branch_of_shop(n, Phase::Confirm));
            let even: Vec<_> = even.collect();
            let free = shop.clone();
            let answers = shop.fence.run_many(Phase::Confirm, &even, async move |(_, to_run)| {
                assert_eq!(to_run.len(), 5);
                for n in (1..=11).step_by(2) {
                    let cancel = branch_of_shop(n, Phase::Cancel);
                    let cancel = free.deliver(Level::Run, &cancel, &[]);
                    let cancelled = tokio::time::timeout(LOCK_WAIT / 2, cancel).await;
                    assert_eq!(word(&cancelled.expect("it is locked")), "Done", "{n}");
                }
                Ok(())
            });
            let answers = answers.await;
            assert!(answers.iter().flatten().all(|answer| word(answer) == "Done"), "{answers:?}");
            assert_eq!(answers.iter().flatten().count(), 5);
        }
    }
}

/// Other connections have locked new rows. The clean-up still deletes the old rows, and meanwhile new rows can be inserted.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clean_up_waits_for_nobody_and_nobody_for_it() {
    for server in servers().await {
        for isolation in ISOLATIONS {
            let home = server.home().await;
            let shop = Shop::open(connect(&home.url(), isolation).await, Some(home)).await;
            for n in 1..=10 {
                shop.deliver(Level::Action, &branch_of_shop(2 * n, Phase::Cancel), &[]).await;
            }
            let age = "UPDATE handfast_fence SET changed_at = 0, expires_at = 0";
            sqlx::raw_sql(age).execute(&shop.pool).await.unwrap();
            for n in [1, 11, 21] {
                shop.deliver(Level::Action, &branch_of_shop(n, Phase::Try), &payload(0)).await;
            }
            let mut other = shop.pool.begin().await.unwrap();
            for n in [1, 11, 21] {
                let held = Db::find(&mut other, &Key::of(&branch_of_shop(n, Phase::Try))).await;
                assert!(held.unwrap().is_some());
            }
            let mut cleaning = shop.pool.begin().await.unwrap();
            let old = Old { retention_millis: 3_600_000, margin_millis: 3_600_000, limit: 500 };
            assert_eq!(Db::delete_old(&mut cleaning, &old).await.unwrap(), 10, "{isolation}");
            for n in [3, 13, 23] {
                let new = branch_of_shop(n, Phase::Try);
                let payload = payload(0);
                let tried = shop.deliver(Level::Run, &new, &payload);
                let tried = tokio::time::timeout(LOCK_WAIT / 2, tried).await;
                assert_eq!(word(&tried.expect("it waits")), "Done", "{isolation}: {n}");
            }
            cleaning.commit().await.unwrap();
            other.rollback().await.unwrap();
        }
    }
}

/// The clock is read after the wait for the row, and not before it.
#[tokio::test]
async fn a_try_that_waits_for_its_row_until_phase_one_has_ended_is_too_late() {
    for server in servers().await {
        let shop = server.open(2).await;
        let mut first = shop.pool.begin().await.unwrap();
        let mut branch = branch_of_shop(1, Phase::Try);
        shop.fence.enter(&mut first, &branch, &payload(2)).await.unwrap();
        let clock = || std::time::UNIX_EPOCH.elapsed().unwrap();
        let expires_at = clock() + Duration::from_millis(500);
        branch.expires_at = Some(i64::try_from(expires_at.as_millis()).unwrap());
        let repeat = tokio::spawn({
            let shop = shop.clone();
            async move { shop.deliver(Level::Run, &branch, &payload(2)).await }
        });
        while clock() <= expires_at + Duration::from_millis(1) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!repeat.is_finished(), "it waits for the row");
        first.rollback().await.unwrap();
        let answer = repeat.await.unwrap();
        assert_eq!(word(&answer), handfast_proto::reason::EXPIRED, "{answer:?}");
        assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));
    }
}
