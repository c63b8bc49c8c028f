//! Group commit: carries what the partitions changed to the store, many transactions in one durable commit.
//!
//! Each partition has an [`Outbox`]. A change put into it gets a number; the journal takes what waits in all outboxes, appends
//! it as one batch, and then tells each partition up to which number its changes are durable. There is no fixed delay: a batch
//! starts when the one before it is done, so batches grow with the load.
//!
//! What must always hold:
//!
//! - "Durable up to n" is told only when every change numbered up to n is durable. A transaction that changed twice while it
//!   waited is written once: it keeps its first place in the queue and takes its last content. (Moved back to its last place,
//!   its first change would count as durable too early; kept with its first content, a decision would be lost.)
//! - One batch is under way at a time, and a batch number never gets other content: when nobody knows what became of a batch,
//!   the same one is appended again until the store says.
//!
//! For a store that can take several batches at a time there are several journals, each with partitions of its own.

use std::{
    collections::BTreeMap,
    iter::Sum,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use handfast_proto::{Xid, crash_point};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    clock::Clock,
    store::{Appended, Batch, Error, Guard, Ownership, Store, Write},
    transaction::{BranchSpec, Timestamp},
};

/// Rows of one batch. At a few microseconds a row a batch stays well below a tenth of a second.
const BATCH_ROWS_MAX: usize = 4096;
/// Bytes of one batch, roughly: below a quarter of MySQL's smallest usual `max_allowed_packet`.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a row beside its payload, roughly.
const ROW_BYTES: usize = 256;
/// How long what nobody waits for may wait for company.
const LAZY_WAIT_MAX: Duration = Duration::from_millis(100);
/// First and longest pause before a batch without an answer is appended again.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
/// A batch without an answer for longer than this is an outage of the store.
const OUTAGE_AFTER: Duration = Duration::from_secs(1);
/// After an outage, expiry waits so much longer: the Decides of good orders are still in the queue.
const OUTAGE_GRACE: Duration = Duration::from_secs(2);

/// How far a partition's changes are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// Every change with a number up to this one is.
    pub upto: u64,
    /// No further one ever will be, and this is why.
    pub ended: Option<Ended>,
}

/// Why a partition's changes are not recorded any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The partition has another owner.
    Fenced,
    /// The store found what cannot be; a person must look.
    Corrupt,
}

/// Whether anybody waits for a change to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Nobody; it goes with the next batch, or after a short while.
    Lazy,
    /// Somebody.
    Awaited,
}

/// What one partition has changed and the store does not know yet.
#[derive(Debug)]
pub struct Outbox {
    ownership: Ownership,
    waiting: Mutex<Waiting>,
    durable: watch::Sender<Durable>,
    wake: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By place in the queue: the number of the first change in it.
    writes: BTreeMap<u64, Write>,
    places: BTreeMap<Xid, u64>,
    /// Number of the latest change.
    latest: u64,
    /// Somebody waits for one of them.
    awaited: bool,
    /// When the first of them that nobody waits for was put in.
    lazy_since: Option<Instant>,
    /// Number of the latest batch.
    position: u64,
}

impl Outbox {
    /// Hands a change over, and gives its number.
    pub fn put(&self, write: Write, urgency: Urgency) -> u64 {
        let mut waiting = self.waiting();
        waiting.latest += 1;
        let number = waiting.latest;
        if self.durable.borrow().ended.is_some() {
            return number; // it never will be durable
        }
        let xid = write.global.xid;
        let place = *waiting.places.entry(xid).or_insert(number);
        match waiting.writes.entry(place) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(write);
            }
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                let merged = entry.get_mut();
                merged.global = write.global;
                merged.head = merged.head.max(write.head);
                merged.new_branches = merged.new_branches.min(write.new_branches);
                merged.changed_branches = merged.changed_branches.union(write.changed_branches);
            }
        }
        let wake = match urgency {
            Urgency::Awaited => !std::mem::replace(&mut waiting.awaited, true),
            Urgency::Lazy if waiting.lazy_since.is_none() => {
                waiting.lazy_since = Some(Instant::now());
                true
            }
            Urgency::Lazy => false,
        };
        drop(waiting);
        if wake {
            self.wake.notify_one();
        }
        number
    }

    /// How far the changes are durable, now and as it grows.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.subscribe()
    }

    /// How many transactions wait.
    pub fn len(&self) -> usize {
        self.waiting().writes.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Moves the first writes that fit into `batch`, and says whether somebody waits.
    fn take(&self, batch: &mut Batch, room: &mut Room) -> bool {
        let mut waiting = self.waiting();
        let awaited = waiting.awaited;
        let before = batch.writes.len();
        while let Some((place, write)) = waiting.writes.pop_first() {
            if !room.fits(&write) {
                waiting.writes.insert(place, write);
                break;
            }
            waiting.places.remove(&write.global.xid);
            batch.writes.push(write);
        }
        if waiting.writes.is_empty() {
            waiting.awaited = false;
            waiting.lazy_since = None;
        }
        drop(waiting);
        if batch.writes.len() > before {
            batch.guards.push(self.next_guard());
        }
        awaited
    }

    fn next_guard(&self) -> Guard {
        let mut waiting = self.waiting();
        waiting.position += 1;
        let Ownership { partition, epoch, .. } = self.ownership;
        Guard { partition, epoch, position: waiting.position }
    }

    /// What was taken is durable.
    fn landed(&self) {
        let waiting = self.waiting();
        // What still waits has later places than what was taken, but may have later content too: no number from the first
        // place on is durable.
        let upto = waiting.writes.first_key_value().map_or(waiting.latest, |(place, _)| place - 1);
        drop(waiting);
        self.durable.send_modify(|durable| durable.upto = upto);
    }

    fn end(&self, why: Ended) {
        // Under the lock, as `put` looks at it: nothing slips in between, to wait for what never comes.
        let mut waiting = self.waiting();
        self.durable.send_modify(|durable| durable.ended = Some(why));
        waiting.writes.clear();
        waiting.places.clear();
        (waiting.awaited, waiting.lazy_since) = (false, None);
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("nothing panics while it is locked")
    }
}

/// How much more fits into a batch.
struct Room {
    rows: usize,
    bytes: usize,
}

impl Room {
    const EMPTY_BATCH: Self = Self { rows: BATCH_ROWS_MAX, bytes: BATCH_BYTES_MAX };

    /// Takes the room that `write` needs; an empty batch has room for any.
    fn fits(&mut self, write: &Write) -> bool {
        let new = &write.global.branches[write.new_branches.min(write.global.branches.len())..];
        let carried =
            |spec: &BranchSpec| spec.payload.as_ref().map_or(0, |payload| payload.data.len());
        let rows = 1 + new.len() + write.changed_branches.len();
        let bytes =
            rows * ROW_BYTES + new.iter().map(|branch| carried(&branch.spec)).sum::<usize>();
        let is_empty = self.rows == BATCH_ROWS_MAX;
        if !is_empty && (rows > self.rows || bytes > self.bytes) {
            return false;
        }
        self.rows = self.rows.saturating_sub(rows);
        self.bytes = self.bytes.saturating_sub(bytes);
        true
    }
}

/// How the journal is doing, for whoever asks.
#[derive(Debug)]
pub struct JournalHealth {
    clock: Arc<dyn Clock>,
    /// When the batch under way was begun; 0: none is.
    begun_at: AtomicI64,
    /// When the latest outage ended; 0: there was none.
    outage_ended_at: AtomicI64,
    batches: AtomicU64,
    /// Of those, that somebody waited for.
    awaited: AtomicU64,
    transactions: AtomicU64,
}

/// What was appended since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Batches, heartbeats too: each is one durable commit.
    pub batches: u64,
    /// Of those, that somebody waited for.
    pub awaited: u64,
    /// Transactions in them; one that is recorded three times counts three times.
    pub transactions: u64,
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            batches: sum.batches + one.batches,
            awaited: sum.awaited + one.awaited,
            transactions: sum.transactions + one.transactions,
        })
    }
}

impl JournalHealth {
    /// Whether the store has left a batch without an answer for too long.
    pub fn is_store_silent(&self) -> bool {
        let begun_at = self.begun_at.load(Ordering::Relaxed);
        begun_at != 0 && self.clock.now() - Timestamp(begun_at) > OUTAGE_AFTER
    }

    /// Until when no transaction may be ended for having run out of time: the store was silent, and the Decides of good ones
    /// may be waiting behind it. `None`: they may be ended now.
    pub fn expiry_held_until(&self) -> Option<Timestamp> {
        let now = self.clock.now();
        if self.is_store_silent() {
            return Some(now + OUTAGE_GRACE);
        }
        let ended_at = self.outage_ended_at.load(Ordering::Relaxed);
        let held_until = Timestamp(ended_at) + OUTAGE_GRACE;
        (ended_at != 0 && now < held_until).then_some(held_until)
    }

    /// What was appended since the start.
    pub fn counts(&self) -> Counts {
        Counts {
            batches: self.batches.load(Ordering::Relaxed),
            awaited: self.awaited.load(Ordering::Relaxed),
            transactions: self.transactions.load(Ordering::Relaxed),
        }
    }

    fn begun(&self) {
        self.begun_at.store(self.clock.now().0, Ordering::Relaxed);
    }

    fn answered(&self) {
        if self.is_store_silent() {
            self.outage_ended_at.store(self.clock.now().0, Ordering::Relaxed);
        }
        self.begun_at.store(0, Ordering::Relaxed);
    }
}

/// See the module's comment.
#[derive(Debug)]
pub struct Journal {
    store: Arc<dyn Store>,
    outboxes: Vec<Arc<Outbox>>,
    wake: Arc<Notify>,
    health: Arc<JournalHealth>,
    /// Whose turn it is to be first in a batch.
    first: usize,
}

impl Journal {
    /// A journal for these partitions, and an outbox for each of them, in the same order.
    pub fn new(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        ownerships: &[Ownership],
    ) -> (Self, Vec<Arc<Outbox>>, Arc<JournalHealth>) {
        let wake = Arc::new(Notify::new());
        let outbox = |ownership: &Ownership| {
            Arc::new(Outbox {
                ownership: *ownership,
                waiting: Mutex::default(),
                durable: watch::Sender::new(Durable { upto: 0, ended: None }),
                wake: wake.clone(),
            })
        };
        let outboxes: Vec<_> = ownerships.iter().map(outbox).collect();
        // A start is the end of an outage: the initiators' Decides may be on their way again.
        let started_at = clock.now().0;
        let health = Arc::new(JournalHealth {
            clock,
            begun_at: AtomicI64::new(0),
            outage_ended_at: AtomicI64::new(started_at),
            batches: AtomicU64::new(0),
            awaited: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
        });
        let journal =
            Self { store, outboxes: outboxes.clone(), wake, health: health.clone(), first: 0 };
        (journal, outboxes, health)
    }

    /// Writes until `stop`, then what is left, and ends.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut appended_at = Instant::now();
        loop {
            let beat_every = self.store.heartbeat().filter(|_| self.live().next().is_some());
            let stopping = stop.is_cancelled();
            let batch = if stopping || self.is_due() {
                self.collect()
            } else if beat_every.is_some_and(|every| appended_at.elapsed() >= every) {
                self.heartbeat()
            } else {
                Batch::default()
            };
            if !batch.guards.is_empty() {
                self.append(batch).await;
                appended_at = Instant::now();
            } else if stopping {
                return;
            } else {
                tokio::select! {
                    biased; // each only ends the wait
                    () = self.wake.notified() => {}
                    () = self.lazy_wait() => {}
                    () = Self::until_beat(beat_every, appended_at) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }

    /// Completes when the next heartbeat is due.
    async fn until_beat(every: Option<Duration>, appended_at: Instant) {
        let Some(every) = every else { return std::future::pending().await };
        tokio::time::sleep_until(appended_at + every).await;
    }

    /// The partitions that are still ours.
    fn live(&self) -> impl Iterator<Item = &Arc<Outbox>> {
        self.outboxes.iter().filter(|outbox| outbox.durable.borrow().ended.is_none())
    }

    /// An empty batch of all partitions that are still ours.
    fn heartbeat(&self) -> Batch {
        Batch {
            guards: self.live().map(|outbox| outbox.next_guard()).collect(),
            writes: Vec::new(),
        }
    }

    fn is_due(&self) -> bool {
        self.outboxes.iter().any(|outbox| {
            let waiting = outbox.waiting();
            waiting.awaited
                || waiting.lazy_since.is_some_and(|since| since.elapsed() >= LAZY_WAIT_MAX)
        })
    }

    /// Completes when the first change that nobody waits for has waited long enough.
    async fn lazy_wait(&self) {
        let first = self.outboxes.iter().filter_map(|outbox| outbox.waiting().lazy_since).min();
        match first {
            Some(since) => tokio::time::sleep_until(since + LAZY_WAIT_MAX).await,
            None => std::future::pending().await,
        }
    }

    fn collect(&mut self) -> Batch {
        let (mut batch, mut room) = (Batch::default(), Room::EMPTY_BATCH);
        let live = self.outboxes.iter().cycle().skip(self.first).take(self.outboxes.len());
        let mut awaited = false;
        for outbox in live.filter(|outbox| outbox.durable.borrow().ended.is_none()) {
            awaited |= outbox.take(&mut batch, &mut room);
        }
        self.health.awaited.fetch_add(awaited.into(), Ordering::Relaxed);
        self.first = (self.first + 1) % self.outboxes.len();
        batch
    }

    /// Appends `batch` until the store says what became of it.
    async fn append(&self, mut batch: Batch) {
        let mut pause = RETRY_PAUSES[0];
        let mut attempts = 0_u32;
        self.health.begun();
        while !batch.guards.is_empty() {
            attempts += 1;
            match self.store.append(&batch).await {
                Ok(Appended::Durable) => break,
                Ok(Appended::Fenced(fenced)) => {
                    warn!(partitions = ?fenced, "another coordinator has taken over");
                    self.drop_from(&mut batch, &fenced, Ended::Fenced);
                }
                Err(Error::Unavailable(cause)) => {
                    if attempts.is_power_of_two() {
                        warn!(
                            attempts,
                            cause,
                            "the store has not answered a batch; the same one is appended again"
                        );
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_PAUSES[1]);
                }
                Err(Error::Corrupt(what)) => {
                    error!(what, "the store does not take a batch; its partitions stop");
                    let all: Vec<_> = batch.guards.iter().map(|guard| guard.partition).collect();
                    self.drop_from(&mut batch, &all, Ended::Corrupt);
                }
            }
        }
        self.health.answered();
        if attempts > 1 && !batch.guards.is_empty() {
            info!(attempts, "the store has answered");
        }
        self.health.batches.fetch_add(1, Ordering::Relaxed);
        self.health.transactions.fetch_add(batch.writes.len() as u64, Ordering::Relaxed);
        debug!(partitions = batch.guards.len(), transactions = batch.writes.len(), "batch");
        let landed: Vec<_> = batch.guards.iter().map(|guard| guard.partition).collect();
        // Let go of the transactions first, so that the partitions change them without copying them.
        drop(batch);
        crash_point!("batch.before_told");
        for outbox in
            self.outboxes.iter().filter(|outbox| landed.contains(&outbox.ownership.partition))
        {
            outbox.landed();
        }
    }

    /// These partitions are written no more. The rest of the batch keeps its numbers: it never gets other content.
    fn drop_from(&self, batch: &mut Batch, partitions: &[u16], why: Ended) {
        batch.guards.retain(|guard| !partitions.contains(&guard.partition));
        batch.writes.retain(|write| !partitions.contains(&write.global.xid.partition));
        for outbox in
            self.outboxes.iter().filter(|outbox| partitions.contains(&outbox.ownership.partition))
        {
            outbox.end(why);
        }
    }
}

#[cfg(test)]
mod tests;
