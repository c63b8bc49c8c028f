//! The journal against a store that fails on demand.

mod sizes;

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use handfast_proto::Xid;

use super::{health::OUTAGE_GRACE, outbox::BATCH_ROWS_MAX, *};
use crate::{
    clock::ManualClock,
    store::{
        ALL_PARTITIONS, Head, Known, Lookup, Write,
        scripted::{Fault, ScriptedStore},
    },
    transaction::{
        BranchSet, CancelCause, DecisionRequest, Drive, Event, GlobalTransaction, NewTransaction,
        State, Timestamp,
    },
};

struct Rig {
    store: Arc<ScriptedStore>,
    outboxes: BTreeMap<u16, Arc<Outbox>>,
    health: Arc<JournalHealth>,
    clock: ManualClock,
    stop: CancellationToken,
    journal: tokio::task::JoinHandle<()>,
    sequence: u64,
}

impl Rig {
    async fn new() -> Self {
        let store = Arc::new(ScriptedStore::default());
        let clock = ManualClock::at(Timestamp(1_000_000));
        let ownerships = store.acquire(&ALL_PARTITIONS, "test", clock.now()).await.unwrap();
        let journal = Journal::new(store.clone(), Arc::new(clock.clone()));
        let (outboxes, health) = (add(&journal, ownerships), journal.health().clone());
        let stop = CancellationToken::new();
        let journal = tokio::spawn(journal.run(stop.clone()));
        Self { store, outboxes, health, clock, stop, journal, sequence: 0 }
    }

    fn begin(&mut self, partition: u16) -> GlobalTransaction {
        let Ownership { epoch, nonce, .. } = self.outboxes[&partition].ownership;
        self.sequence += 1;
        let new = NewTransaction {
            at_decision: false,
            name: "checkout".to_owned(),
            drive: Drive::Initiator,
            timeout: Duration::from_secs(30),
            labels: BTreeMap::new(),
            key: None,
            branches: Vec::new(),
        };
        let xid = Xid { partition, epoch, sequence: self.sequence, nonce };
        GlobalTransaction::begin(xid, new, Timestamp(0))
    }

    fn put(&self, global: &GlobalTransaction, head: Head, urgency: Urgency) -> u64 {
        let new_branches = if head == Head::Insert { 0 } else { global.branches.len() };
        let before = (head != Head::Insert).then_some(State::Trying);
        let write = Write {
            global: Arc::new(global.clone()),
            head,
            before,
            new_branches,
            changed_branches: BranchSet::EMPTY,
        };
        self.outboxes[&global.xid.partition].put(write, urgency)
    }

    fn durable(&self, partition: u16) -> Durable {
        *self.outboxes[&partition].durable().borrow()
    }

    async fn until_durable(&self, partition: u16, number: u64) {
        let mut durable = self.outboxes[&partition].durable();
        let reached = durable.wait_for(|durable| durable.upto >= number || durable.ended.is_some());
        timeout(Duration::from_secs(10), reached).await.expect("in time").unwrap();
    }

    async fn until_batches(&self, count: usize) {
        while self.store.batches().len() < count {
            tokio::task::yield_now().await;
        }
    }

    async fn stored(&self, global: &GlobalTransaction) -> Option<State> {
        self.store.inner.get(global.xid).map(|global| global.state)
    }
}

/// The outboxes of these partitions.
fn add(journal: &Journal, ownerships: Vec<Ownership>) -> BTreeMap<u16, Arc<Outbox>> {
    ownerships.into_iter().map(|owned| (owned.partition, journal.add(owned))).collect()
}

fn cancelled(global: &GlobalTransaction) -> GlobalTransaction {
    let mut global = global.clone();
    let request = DecisionRequest::Cancel(CancelCause::TimedOut);
    global.apply(Event::DecisionRequested(request), Timestamp(1)).unwrap();
    global
}

#[tokio::test]
async fn what_comes_while_a_batch_is_under_way_shares_the_next_one() {
    let mut rig = Rig::new().await;
    rig.store.hold();
    let first = rig.begin(0);
    rig.put(&first, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    for n in 0..100 {
        let global = rig.begin(n % 16);
        rig.put(&global, Head::Insert, Urgency::Awaited);
    }
    assert_eq!(rig.durable(0).upto, 0, "told before the store has answered");
    rig.store.release();
    for partition in 0..16 {
        rig.until_durable(partition, 6).await;
    }
    let batches = rig.store.batches();
    assert_eq!(batches.iter().map(|batch| batch.writes.len()).collect::<Vec<_>>(), [1, 100]);
    assert_eq!(batches[1].guards.len(), 16);
}

#[tokio::test]
async fn a_lost_answer_repeats_the_same_batch_and_nothing_else() {
    let mut rig = Rig::new().await;
    let (one, two) = (rig.begin(1), rig.begin(2));
    rig.store.hold();
    rig.put(&one, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    // What comes now must not slip into the repeats.
    rig.put(&two, Head::Insert, Urgency::Awaited);
    rig.put(&cancelled(&one), Head::Update, Urgency::Awaited);
    rig.store.fail([Fault::Unreached, Fault::AnswerLost, Fault::Unreached]);
    rig.store.release();
    rig.until_durable(1, 2).await;
    rig.until_durable(2, 1).await;
    let batches = rig.store.batches();
    assert_eq!(batches.len(), 5, "three without an answer, one with, and the next");
    assert!(
        batches[..4].iter().all(|batch| *batch == batches[0]),
        "a batch number got other content"
    );
    assert_eq!(batches[4].guards.iter().map(|guard| guard.position).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(rig.stored(&one).await, Some(State::Cancelled));
}

#[tokio::test]
async fn a_transaction_that_changes_while_it_waits_is_written_once_and_counts_from_its_first_place()
{
    let mut rig = Rig::new().await;
    let blocker = rig.begin(0);
    rig.store.hold();
    rig.put(&blocker, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;

    // Enough to need two batches; the first of them changes again, last of all.
    let first = rig.begin(1);
    assert_eq!(rig.put(&first, Head::Insert, Urgency::Awaited), 1);
    for _ in 0..BATCH_ROWS_MAX {
        let other = rig.begin(1);
        rig.put(&other, Head::Insert, Urgency::Awaited);
    }
    let last = rig.put(&cancelled(&first), Head::Update, Urgency::Awaited);
    assert_eq!(last, BATCH_ROWS_MAX as u64 + 2);
    // The first part lands, the second one is slow.
    rig.store.fail([Fault::Nothing, Fault::Nothing].into_iter().chain([Fault::Unreached; 5]));
    let mut durable = rig.outboxes[&1].durable();
    rig.store.release();
    durable.changed().await.unwrap();
    // The first part holds change `last`, but not the one before it: neither counts yet.
    assert_eq!(durable.borrow().upto, BATCH_ROWS_MAX as u64);
    rig.until_durable(1, last).await;
    let batches = rig.store.batches();
    let write = &batches[1].writes[0];
    assert_eq!(
        (write.head, write.global.state),
        (Head::Insert, State::Cancelled),
        "first place, last content"
    );
    assert_eq!(batches[1].writes.len(), BATCH_ROWS_MAX);
    assert_eq!(
        batches[2].guards[0].position,
        batches[1].guards[0].position + 1,
        "each part has its own number"
    );
    assert_eq!(rig.stored(&first).await, Some(State::Cancelled));
}

#[tokio::test]
async fn what_nobody_waits_for_goes_with_the_next_batch_or_after_a_while() {
    let mut rig = Rig::new().await;
    let (lazy, awaited) = (rig.begin(0), rig.begin(0));
    rig.put(&lazy, Head::Insert, Urgency::Lazy);
    tokio::task::yield_now().await;
    assert_eq!(rig.store.batches(), [], "not by itself");
    rig.put(&awaited, Head::Insert, Urgency::Awaited);
    rig.until_durable(0, 2).await;
    assert_eq!(rig.store.batches().len(), 1, "together");
    let alone = rig.begin(0);
    rig.put(&alone, Head::Insert, Urgency::Lazy);
    rig.until_durable(0, 3).await;
}

#[tokio::test]
async fn a_partition_that_was_taken_over_stops_and_the_others_go_on() {
    let mut rig = Rig::new().await;
    // Another owner takes all; only partition 3 of ours is still the old one.
    let newer = rig.store.acquire(&ALL_PARTITIONS, "other", rig.clock.now()).await.unwrap();
    let mut mixed = newer;
    mixed.retain(|owned| owned.partition != 3);
    mixed.push(rig.outboxes[&3].ownership);
    let journal = Journal::new(rig.store.clone(), Arc::new(rig.clock.clone()));
    rig.outboxes = add(&journal, mixed);
    tokio::spawn(journal.run(rig.stop.clone()));
    let (fenced, other) = (rig.begin(3), rig.begin(4));
    rig.store.hold();
    let blocker = rig.begin(5);
    rig.put(&blocker, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    rig.put(&fenced, Head::Insert, Urgency::Awaited);
    rig.put(&other, Head::Insert, Urgency::Awaited);
    rig.store.release();
    rig.until_durable(4, 1).await;
    rig.until_durable(3, 1).await;
    assert_eq!(rig.durable(3), Durable { upto: 0, position: 0, ended: Some(Ended::Fenced) });
    assert_eq!(rig.stored(&fenced).await, None);
    assert_eq!(rig.stored(&other).await, Some(State::Trying));
}

/// A replica was promoted without the last batches of two partitions. One of them has nothing more to write.
#[tokio::test]
async fn a_loss_that_one_partition_notices_is_looked_for_in_all() {
    let mut rig = Rig::new().await;
    let backup = rig.store.inner.copy();
    let (one, two) = (rig.begin(3), rig.begin(4));
    for lost in [&one, &two] {
        rig.put(lost, Head::Insert, Urgency::Awaited);
        rig.until_durable(lost.xid.partition, 1).await;
    }
    rig.store.inner.go_back_to(&backup);
    let next = rig.begin(3);
    rig.put(&next, Head::Insert, Urgency::Awaited);
    for partition in [3, 4] {
        rig.until_durable(partition, 2).await;
        assert_eq!(rig.durable(partition).ended, Some(Ended::Corrupt), "{partition}");
    }
    assert_eq!(rig.durable(5).ended, None);
    // Whoever comes next does not call it unheard of.
    let owned = rig.store.acquire(&ALL_PARTITIONS, "next", rig.clock.now()).await.unwrap();
    for (xid, lost) in [(one.xid, true), (two.xid, true), (rig.begin(5).xid, false)] {
        let known = Known { ownership: owned[usize::from(xid.partition)], position: 0 };
        let looked = rig.store.load(xid, known).await.unwrap();
        assert!(matches!(looked, Lookup::Absent { lost: told, .. } if told == lost), "{looked:?}");
    }
}

#[tokio::test]
async fn a_batch_that_is_refused_for_its_data_stops_its_partitions_loudly() {
    let mut rig = Rig::new().await;
    rig.store.fail([Fault::Refused]);
    let global = rig.begin(7);
    rig.put(&global, Head::Insert, Urgency::Awaited);
    rig.until_durable(7, 1).await;
    assert_eq!(rig.durable(7), Durable { upto: 0, position: 0, ended: Some(Ended::Corrupt) });
    let other = rig.begin(8);
    rig.put(&other, Head::Insert, Urgency::Awaited);
    rig.until_durable(8, 1).await;
    assert_eq!(rig.durable(8), Durable { upto: 1, position: 1, ended: None });
}

#[tokio::test]
async fn an_outage_of_the_store_holds_expiry_back_for_a_while() {
    let mut rig = Rig::new().await;
    // A start counts as one.
    assert_eq!(rig.health.expiry_held_until(), Some(rig.clock.now() + OUTAGE_GRACE));
    rig.clock.advance(OUTAGE_GRACE);
    assert_eq!(rig.health.expiry_held_until(), None);
    rig.store.hold();
    let global = rig.begin(0);
    rig.put(&global, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    assert_eq!(rig.health.expiry_held_until(), None, "a batch under way is no outage yet");
    rig.clock.advance(Duration::from_millis(1_001));
    assert!(rig.health.is_store_silent());
    assert_eq!(rig.health.expiry_held_until(), Some(rig.clock.now() + OUTAGE_GRACE));
    rig.store.release();
    rig.until_durable(0, 1).await;
    assert!(!rig.health.is_store_silent());
    assert_eq!(
        rig.health.expiry_held_until(),
        Some(rig.clock.now() + OUTAGE_GRACE),
        "the queue is still full"
    );
    rig.clock.advance(OUTAGE_GRACE);
    assert_eq!(rig.health.expiry_held_until(), None);
}

/// It finds out whether the store has lost batches. The next owner could not: it does not know how many there were.
#[tokio::test]
async fn an_orderly_stop_ends_with_a_heartbeat() {
    let mut rig = Rig::new().await;
    rig.store.beats.store(true, Ordering::SeqCst);
    let global = rig.begin(3);
    rig.put(&global, Head::Insert, Urgency::Awaited);
    rig.until_durable(3, 1).await;
    rig.stop.cancel();
    rig.journal.await.unwrap();
    let last = rig.store.batches().pop().unwrap();
    assert_eq!(last.guards.len(), ALL_PARTITIONS.len());
    assert!(last.writes.is_empty(), "{last:?}");
    assert_eq!(last.guards[3].position, 2, "it names how many batches were acknowledged");
}

#[tokio::test]
async fn stopping_writes_what_is_left() {
    let mut rig = Rig::new().await;
    let (lazy, awaited) = (rig.begin(0), rig.begin(1));
    rig.put(&lazy, Head::Insert, Urgency::Lazy);
    rig.put(&awaited, Head::Insert, Urgency::Awaited);
    rig.stop.cancel();
    (&mut rig.journal).await.unwrap();
    assert_eq!(rig.stored(&lazy).await, Some(State::Trying));
    assert_eq!(rig.stored(&awaited).await, Some(State::Trying));
}

/// What one write must do after two that waited together: all that either was to do.
#[tokio::test]
async fn changes_that_wait_together_lose_none_of_their_branches() {
    let mut rig = Rig::new().await;
    rig.store.hold();
    let blocker = rig.begin(0);
    rig.put(&blocker, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    let global = Arc::new(rig.begin(1));
    let branches = |indexes: &[usize]| {
        indexes.iter().fold(BranchSet::EMPTY, |all, index| all.union(BranchSet::only(*index)))
    };
    for (head, new_branches, changed) in
        [(Head::Keep, 4, [0]), (Head::Update, 3, [1]), (Head::Keep, 5, [2])]
    {
        let changed_branches = branches(&changed);
        let before = (head != Head::Insert).then_some(State::Trying);
        let write = Write { global: global.clone(), head, before, new_branches, changed_branches };
        rig.outboxes[&1].put(write, Urgency::Awaited);
    }
    rig.store.release();
    rig.until_batches(2).await;
    let write = &rig.store.batches()[1].writes[0];
    assert_eq!((write.head, write.new_branches), (Head::Update, 3));
    assert_eq!(write.changed_branches, branches(&[0, 1, 2]));
}

#[tokio::test]
async fn what_is_fenced_does_not_keep_the_journal_busy() {
    let mut rig = Rig::new().await;
    rig.store.acquire(&ALL_PARTITIONS, "other", rig.clock.now()).await.unwrap();
    let (one, two, three) = (rig.begin(0), rig.begin(0), rig.begin(0));
    rig.store.hold();
    rig.put(&one, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    rig.put(&two, Head::Insert, Urgency::Lazy);
    rig.store.release();
    rig.until_durable(0, 1).await;
    rig.put(&three, Head::Insert, Urgency::Awaited);
    assert!(rig.outboxes[&0].is_empty(), "it waits for what never comes");
}

#[test]
fn a_journal_that_was_replaced_is_idle() {
    let (done, idle) = std::sync::mpsc::channel();
    // In a thread of its own, since a journal that never rests would never let go of it.
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let store = Arc::new(ScriptedStore::default());
            store.beats.store(true, Ordering::SeqCst);
            let ownerships =
                store.acquire(&ALL_PARTITIONS, "the first", Timestamp(1)).await.unwrap();
            let clock = Arc::new(ManualClock::at(Timestamp(1)));
            let journal = Journal::new(store.clone(), clock);
            let outboxes = add(&journal, ownerships);
            tokio::spawn(journal.run(CancellationToken::new()));
            store.acquire(&ALL_PARTITIONS, "the second", Timestamp(2)).await.unwrap();
            for outbox in outboxes.into_values() {
                outbox.durable().wait_for(|durable| durable.ended.is_some()).await.unwrap();
            }
            // Time only moves while nobody has anything to do.
            tokio::time::sleep(Duration::from_secs(3600)).await;
            done.send(store.batches().len()).unwrap();
        });
    });
    let batches = idle.recv_timeout(Duration::from_secs(20)).expect("it never rests");
    assert_eq!(batches, 1, "the heartbeat that was told of the other owner");
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_joins_an_idle_journal_is_kept_alive() {
    let store = Arc::new(ScriptedStore::default());
    store.beats.store(true, Ordering::SeqCst);
    let journal = Journal::new(store.clone(), Arc::new(ManualClock::at(Timestamp(1))));
    tokio::spawn(journal.clone().run(CancellationToken::new()));
    tokio::time::sleep(Duration::from_secs(1)).await; // it waits, without a partition
    let ownerships = store.acquire(&ALL_PARTITIONS, "the first", Timestamp(1)).await.unwrap();
    let _outboxes = add(&journal, ownerships);
    let beat_every = store.heartbeat().unwrap();
    tokio::time::sleep(beat_every * 3).await;
    assert!(store.batches().len() >= 2, "{} heartbeats", store.batches().len());
}

/// A partition that is taken again by the same process has another outbox, and the end of the first ownership is not its end.
#[tokio::test]
async fn a_partition_that_is_taken_again_is_recorded_again() {
    let store = Arc::new(ScriptedStore::default());
    let clock = ManualClock::at(Timestamp(1_000_000));
    let journal = Journal::new(store.clone(), Arc::new(clock.clone()));
    tokio::spawn(journal.clone().run(CancellationToken::new()));
    let first = store.acquire(&[3], "test", clock.now()).await.unwrap()[0];
    let mut rig = Rig::new().await; // only for what it begins
    rig.outboxes = add(&journal, vec![first]);
    let mine = rig.outboxes[&3].clone();
    // The first batch is in flight when the partition is taken again.
    store.hold();
    let lost = rig.begin(3);
    rig.put(&lost, Head::Insert, Urgency::Awaited);
    while store.batches().is_empty() {
        tokio::task::yield_now().await;
    }
    let again = store.acquire(&[3], "test", clock.now()).await.unwrap();
    rig.outboxes = add(&journal, again);
    let kept = rig.begin(3);
    rig.put(&kept, Head::Insert, Urgency::Awaited);
    store.release();
    rig.until_durable(3, 1).await;
    assert_eq!(rig.durable(3), Durable { upto: 1, position: 1, ended: None });
    assert_eq!(mine.durable().borrow().ended, Some(Ended::Fenced));
    assert!(store.inner.get(kept.xid).is_some());
    assert!(store.inner.get(lost.xid).is_none());
}

/// Reads that stay old ask for an empty batch again and again.
#[tokio::test]
async fn doubts_leave_every_other_batch_to_the_changes() {
    let mut rig = Rig::new().await;
    rig.store.hold();
    rig.outboxes[&0].doubt();
    rig.until_batches(1).await;
    let global = rig.begin(0);
    rig.put(&global, Head::Insert, Urgency::Awaited);
    rig.outboxes[&0].doubt();
    rig.store.release();
    rig.until_batches(3).await;
    let writes: Vec<_> = rig.store.batches().iter().map(|batch| batch.writes.len()).collect();
    assert_eq!(writes, [0, 1, 0], "the doubt comes after what waits, and is not forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_last_heartbeat_that_is_given_up_is_not_in_flight_any_more() {
    let rig = Rig::new().await;
    rig.store.beats.store(true, Ordering::SeqCst);
    rig.store.hold();
    rig.stop.cancel();
    rig.journal.await.unwrap();
    rig.clock.advance(Duration::from_secs(10));
    assert!(!rig.health.is_store_silent(), "the shutdown would wait for an answer to it");
}
