//! SIGKILL at random moments under load: nothing that was acknowledged is lost, nothing is half done, nothing stays reserved.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast::{Confirmed, Handfast, Json, Outcome, Remote, TransactionError, Xid};
use handfast_tests::{
    database::{Database, Server, kinds, servers},
    process::Coordinator,
    wait_for,
    warehouse::{Deduct, PIECES, Warehouse},
};

const KILLS: usize = 20;
const DATABASE_KILLS: usize = 5;
const INITIATORS: usize = 8;

/// What initiators were told.
#[derive(Default)]
struct Told {
    confirmed: BTreeSet<Xid>,
    cancelled: BTreeSet<Xid>,
    /// Keys of orders whose answer was lost.
    unknown: Vec<String>,
}

async fn order(
    handfast: &Handfast,
    key: &str,
    east: &Remote,
    west: &Remote,
) -> Result<Confirmed<()>, TransactionError> {
    handfast
        .transaction("order")
        .idempotency_key(key)
        .timeout(Duration::from_secs(5))
        .patience(Duration::from_secs(3))
        .until_decided()
        .run(async |global| {
            tokio::try_join!(
                global.call::<Deduct>(east, Json(3)),
                global.call::<Deduct>(west, Json(2))
            )?;
            Ok(())
        })
        .await
}

/// Orders until `stop`, one after the other.
async fn initiate(
    url: String,
    east: Remote,
    west: Remote,
    next: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) -> Told {
    let handfast = Handfast::connect(&url).unwrap();
    let mut told = Told::default();
    while !stop.load(Ordering::Relaxed) {
        let key = format!("order-{}", next.fetch_add(1, Ordering::Relaxed));
        match order(&handfast, &key, &east, &west).await {
            Ok(confirmed) => drop(told.confirmed.insert(confirmed.xid)),
            Err(
                TransactionError::Cancelled { xid, .. }
                | TransactionError::Refused { xid, .. }
                | TransactionError::TimedOut { xid, .. },
            ) => drop(told.cancelled.insert(xid)),
            Err(TransactionError::Unknown { .. }) => told.unknown.push(key),
            Err(TransactionError::NotBegun { .. }) => {} // nothing was tried, it says; the audit will see
            Err(other) => panic!("a new outcome: {other:?}"),
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_lose_nothing_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", folder.path().join("store.db").display());
    kills_lose_nothing(&store, Victim::Coordinator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_lose_nothing_on_mysql() {
    for server in servers() {
        let database = Database::migrated(&server).await;
        kills_lose_nothing(&database.url(), Victim::Coordinator).await;
        database.drop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_killed_loses_nothing() {
    for kind in kinds() {
        let server = Server::start(&kind).await;
        let database = Database::migrated(&server.url()).await;
        kills_lose_nothing(&database.url(), Victim::Database(&server)).await;
    }
}

/// Who is killed.
enum Victim<'a> {
    Coordinator,
    Database(&'a Server),
}

async fn kills_lose_nothing(store: &str, victim: Victim<'_>) {
    let folder = tempfile::tempdir().unwrap();
    let (east, west) = (
        Warehouse::open("east", folder.path()).await,
        Warehouse::open("west", folder.path()).await,
    );
    let mut coordinator = Coordinator::start_on(store, &[]).await;
    let (address, url) = (coordinator.address.clone(), coordinator.url());
    let (next, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
    let initiators: Vec<_> = (0..INITIATORS)
        .map(|_| {
            tokio::spawn(initiate(
                url.clone(),
                east.remote(),
                west.remote(),
                next.clone(),
                stop.clone(),
            ))
        })
        .collect();
    let kills = if matches!(victim, Victim::Coordinator) { KILLS } else { DATABASE_KILLS };
    for _ in 0..kills {
        tokio::time::sleep(Duration::from_millis(rand::random_range(20..400))).await;
        if let Victim::Database(server) = victim {
            // It takes longer to come back; in between there must be something to lose.
            tokio::time::sleep(Duration::from_secs(1)).await;
            server.kill();
            server.start_again().await;
            continue;
        }
        coordinator.kill().await;
        // On SQLite nobody has to be taken over: the lock is gone with the process.
        coordinator = Coordinator::start_on(store, &["--listen", &address, "--take-over"]).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let (mut confirmed, mut cancelled, mut unknown) =
        (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for initiator in initiators {
        let told = initiator.await.unwrap();
        confirmed.extend(told.confirmed);
        cancelled.extend(told.cancelled);
        unknown.extend(told.unknown);
    }

    // Everything comes to its end.
    let settled = wait_for("nothing is held any more", async || {
        let ((_, east_held, _), (_, west_held, _)) = (east.stock().await, west.stock().await);
        (east_held == 0 && west_held == 0).then_some(())
    });
    settled.await;
    let handfast = coordinator.handfast();
    for key in &unknown {
        let outcome = wait_for("a lost answer is told", async || {
            Some(handfast.outcome_of_key(key).await.unwrap())
                .filter(|outcome| *outcome != Outcome::Undecided)
        });
        outcome.await;
    }

    // The audit, from the participants' own tables.
    let sold = |rows: Vec<(String, i64)>, pieces: i64| -> BTreeSet<Xid> {
        let count = rows.len();
        let xids: BTreeSet<_> = rows
            .into_iter()
            .map(|(xid, n)| {
                assert_eq!(n, pieces);
                xid.parse().unwrap()
            })
            .collect();
        assert_eq!(xids.len(), count, "an order was sold twice");
        xids
    };
    let (in_east, in_west) = (sold(east.sold().await, 3), sold(west.sold().await, 2));
    assert_eq!(in_east, in_west, "an order was sold in one place and not in the other");
    let lost: Vec<_> = confirmed.difference(&in_east).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let both: Vec<_> = cancelled.intersection(&in_east).collect();
    assert!(both.is_empty(), "told to be cancelled, and sold: {both:?}");
    for (warehouse, pieces) in [(&east, 3), (&west, 2)] {
        let sold = i64::try_from(in_east.len()).unwrap() * pieces;
        assert_eq!(warehouse.stock().await, (PIECES - sold, 0, sold));
    }
    assert!(
        confirmed.len() > 50,
        "too little went on to show anything: {} confirmed",
        confirmed.len()
    );
    println!(
        "{store}: {kills} kills: {} confirmed, {} cancelled, {} unknown, {} sold",
        confirmed.len(),
        cancelled.len(),
        unknown.len(),
        in_east.len()
    );
}
