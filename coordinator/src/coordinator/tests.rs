//! Partitions that come and go, one by one.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{running::ended_by_itself, *};
use crate::{
    clock::{Clock as _, ManualClock},
    dispatch::{CallRequest, Later, Returned},
    journal::Ended,
    store::{
        Appended, Batch, Guard, Head, Ownership, Store as _, Write, memory::MemoryStore,
        scripted::ScriptedStore,
    },
    transaction::{
        BranchSet, DecisionRequest, Drive, Event, GlobalTransaction, Key, Timestamp,
        retry::RetryPolicy,
    },
};

/// No participant is ever called.
#[derive(Debug)]
struct Nobody;

impl Dispatch for Nobody {
    fn submit(&self, _: CallRequest, _: &mpsc::Sender<Returned>) -> Result<(), Later> {
        Err(Later(Duration::from_secs(3600)))
    }
}

fn at_start() -> ManualClock {
    ManualClock::at(Timestamp(1_700_000_000_000))
}

fn running(store: &Arc<MemoryStore>) -> Running {
    running_on(store.clone(), at_start())
}

fn running_on(store: Arc<dyn Store>, clock: ManualClock) -> Running {
    let second = Duration::from_secs(1);
    let settings = Settings {
        retry: RetryPolicy { initial: second, max: second },
        call_timeout: second,
        call_timeout_max: second,
        open_max: 1000,
        open_bytes_max: 1_000_000_000,
        stuck_after: StuckAfter { attempts: 3, time: 120 * second },
        log_labels: Arc::default(),
        record_after: Duration::from_millis(500),
    };
    Running::new(store, Arc::new(Nobody), Arc::new(clock), settings)
}

fn new(key: Option<u16>) -> NewTransaction {
    let key = key.map(|partition| {
        let mut hash = [7; 32];
        hash[..2].copy_from_slice(&partition.to_be_bytes());
        Key { hash, digest: [1; 32] }
    });
    NewTransaction {
        at_decision: false,
        name: "checkout".to_owned(),
        drive: Drive::Initiator,
        timeout: Duration::from_secs(30),
        labels: std::collections::BTreeMap::new(),
        key,
        branches: Vec::new(),
    }
}

async fn get(coordinator: &Coordinator, xid: Xid) -> Result<Answer, Error> {
    coordinator.ask(xid, What::Get, Until::Now, Duration::ZERO).await
}

#[tokio::test]
async fn each_answers_for_the_partitions_that_it_has_taken() {
    let store = Arc::new(MemoryStore::default());
    let (low, high) = (running(&store), running(&store));
    low.take_over(&[0, 1, 2, 3]).await.unwrap();
    high.take_over(&[4, 5]).await.unwrap();
    let (low, high) = (Coordinator::of(&low, RETENTION), Coordinator::of(&high, RETENTION));
    for _ in 0..3 * IN_A_ROW {
        let xid = low.begin(new(None), Until::Now).await.unwrap().global.xid;
        assert!(xid.partition < 4, "{xid}");
    }
    let keyed = high.begin(new(Some(5)), Until::Now).await.unwrap().global.xid;
    assert_eq!(keyed.partition, 5);
    assert_eq!(get(&high, keyed).await.unwrap().global.xid, keyed);
    // What belongs to the other was not taken in.
    assert!(matches!(get(&low, keyed).await, Err(Error::NotHere(Some(xid))) if xid == keyed));
    let begun = low.begin(new(Some(5)), Until::Now).await;
    assert!(matches!(begun, Err(Error::NotHere(None))), "{begun:?}");
}

#[tokio::test]
async fn without_a_partition_nothing_is_taken_in() {
    let nothing = Coordinator::of(&running(&Arc::default()), RETENTION);
    let begun = nothing.begin(new(None), Until::Now).await;
    assert!(matches!(begun, Err(Error::NotHere(None))), "{begun:?}");
}

#[tokio::test]
async fn a_partition_ends_by_itself_and_can_be_taken_again() {
    let store = Arc::new(MemoryStore::default());
    let mut first = running(&store);
    first.take_over(&[3, 4]).await.unwrap();
    let coordinator = Coordinator::of(&first, RETENTION);
    let before = coordinator.begin(new(Some(3)), Until::Now).await.unwrap().global.xid;
    // Another process takes one of them. The owner learns of it with its next batch.
    let second = running(&store);
    second.take_over(&[3]).await.unwrap();
    let mut key = new(Some(3));
    key.key.as_mut().unwrap().hash[31] = 8;
    let late = coordinator.begin(key, Until::Now).await;
    assert!(matches!(late, Err(Error::StoreSilent)), "it was taken in: {late:?}");
    let End::Partition(ownership, Ended::Fenced) = first.ended().await else { panic!() };
    assert_eq!(ownership.partition, 3);
    let asked = get(&coordinator, before).await;
    assert!(matches!(asked, Err(Error::NotHere(Some(_)))), "{asked:?}");
    // The other partition goes on.
    coordinator.begin(new(Some(4)), Until::Now).await.unwrap();
    // Taken again, it has a new owner, who reads what there is.
    first.take_over(&[3]).await.unwrap();
    assert_eq!(get(&coordinator, before).await.unwrap().global.xid, before);
    coordinator.begin(new(Some(3)), Until::Now).await.unwrap();
    first.stop().await;
    let free: Vec<_> = (store.seats().await.unwrap().into_iter())
        .filter(|seat| seat.owner.is_none())
        .map(|seat| seat.partition)
        .collect();
    assert!(free.contains(&3) && free.contains(&4), "{free:?}");
}

#[tokio::test]
async fn a_partition_whose_ownership_a_late_loss_has_ended_is_taken_again() {
    let store = Arc::new(MemoryStore::default());
    let first = store.acquire(&[3], "the first", Timestamp(1)).await.unwrap()[0];
    let mut second = running(&store);
    second.take_over(&[3]).await.unwrap();
    let coordinator = Coordinator::of(&second, RETENTION);
    let before = coordinator.begin(new(Some(3)), Until::Now).await.unwrap().global.xid;
    // The first owner knows of batches that the second one has not found.
    let Ownership { partition, epoch, nonce, .. } = first;
    let guards = vec![Guard { partition, epoch, nonce, position: 20 }];
    let late = store.append(&Batch { guards, writes: Vec::new() }).await.unwrap();
    assert_eq!(late, Appended::Fenced(vec![3]));
    // The second one notices with its next batch, and goes on as the owner of a later epoch.
    let mut key = new(Some(3));
    key.key.as_mut().unwrap().hash[31] = 8;
    let during = coordinator.begin(key, Until::Now).await;
    assert!(matches!(during, Err(Error::StoreSilent)), "it was taken in: {during:?}");
    let goes_on = tokio::time::timeout(Duration::from_millis(50), second.ended()).await;
    assert!(goes_on.is_err(), "{goes_on:?}");
    assert_eq!(get(&coordinator, before).await.unwrap().global.xid, before);
    let ownership = second.doors.ownerships()[0];
    assert_eq!((ownership.epoch, ownership.lost_through), (epoch + 3, Some(epoch)));
    second.stop().await;
}

#[tokio::test]
async fn a_task_that_ends_without_order_is_told() {
    let mut running = running(&Arc::default());
    running.take_over(&[3]).await.unwrap();
    let task = tokio::spawn(async { panic!("a fault of our own") });
    assert!(ended_by_itself(task, &CancellationToken::new()).await);
    // In order, nothing is told.
    let ended = tokio::time::timeout(Duration::from_millis(50), running.ended()).await;
    assert!(ended.is_err(), "{ended:?}");
}

/// A coordinator of partition 3 whose purge is at work, with a finished transaction.
async fn purging(store: Arc<ScriptedStore>, clock: &ManualClock) -> (Arc<Coordinator>, Xid) {
    let running = running_on(store, clock.clone());
    running.take_over(&[3]).await.unwrap();
    let coordinator = Coordinator::of(&running, RETENTION);
    let xid = coordinator.begin(new(Some(3)), Until::Now).await.unwrap().global.xid;
    let confirm = What::Decide(DecisionRequest::Confirm { tried: [].into(), result: None });
    coordinator.ask(xid, confirm, Until::Now, Duration::ZERO).await.unwrap();
    let purging = coordinator.clone();
    tokio::spawn(async move { purging.purge(RETENTION).await });
    (coordinator, xid)
}

const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// Time passes, for the clock too.
async fn pass(clock: &ManualClock, time: Duration) {
    let step = Duration::from_millis(100);
    for _ in 0..time.as_millis() / step.as_millis() {
        clock.advance(step);
        tokio::time::sleep(step).await;
    }
}

fn is_there(store: &ScriptedStore, xid: Xid) -> bool {
    store.inner.get(xid).is_some()
}

/// Otherwise a clock that is ahead for a minute would delete keys, and the same key would begin a second transaction.
#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_on_the_word_of_a_clock_that_has_jumped() {
    let (store, clock) = (Arc::new(ScriptedStore::default()), at_start());
    let (_coordinator, xid) = purging(store.clone(), &clock).await;
    pass(&clock, Duration::from_secs(660)).await;
    clock.advance(2 * RETENTION);
    pass(&clock, Duration::from_secs(300)).await;
    assert!(is_there(&store, xid), "it was deleted as soon as the clock had jumped");
    pass(&clock, Duration::from_secs(330)).await;
    assert!(!is_there(&store, xid), "it is never deleted");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_while_the_store_says_another_time() {
    let (store, clock) = (Arc::new(ScriptedStore::default()), at_start());
    let started = clock.now();
    *store.clock.lock().unwrap() = Some(started);
    let (_coordinator, xid) = purging(store.clone(), &clock).await;
    clock.advance(2 * RETENTION);
    pass(&clock, Duration::from_secs(1200)).await;
    assert!(is_there(&store, xid), "the store's clock says that it is young");
    *store.clock.lock().unwrap() = Some(clock.now() + Duration::from_secs(1));
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(!is_there(&store, xid), "both say that it is old");
}

/// The purge of a coordinator with 11,000 new transactions a second must not fall behind. Its steps take as long as on a loaded server.
#[tokio::test(start_paused = true)]
async fn a_backlog_of_old_transactions_is_worked_off_faster_than_new_ones_begin() {
    const SECONDS: u64 = 10;
    let (store, clock) = (Arc::new(ScriptedStore::default()), at_start());
    *store.purge_takes.lock().unwrap() = (Duration::from_millis(40), Duration::from_micros(20));
    *store.clock.lock().unwrap() = Some(clock.now());
    let ownership = store.acquire(&[3], "an earlier owner", clock.now()).await.unwrap()[0];
    let Ownership { partition, epoch, nonce, .. } = ownership;
    let old = Timestamp(1);
    let writes = (1..=11_000 * SECONDS).map(|sequence| {
        let xid = Xid { partition, epoch, sequence, nonce };
        let mut global = GlobalTransaction::begin(xid, new(None), old);
        let confirm = DecisionRequest::Confirm { tried: [].into(), result: None };
        global.apply(Event::DecisionRequested(confirm), old).unwrap();
        let (head, changed_branches) = (Head::Insert, BranchSet::EMPTY);
        Write { global: Arc::new(global), head, before: None, new_branches: 0, changed_branches }
    });
    let guards = vec![Guard { partition, epoch, nonce, position: 1 }];
    let batch = Batch { guards, writes: writes.collect() };
    assert_eq!(store.inner.append(&batch).await.unwrap(), Appended::Durable);
    let last = batch.writes.last().unwrap().global.xid;
    drop(batch);
    let _coordinator = purging(store.clone(), &clock).await;
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    assert!(!is_there(&store, last), "it is behind");
}
