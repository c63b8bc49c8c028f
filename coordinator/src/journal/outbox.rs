//! What a partition hands to the journal, until it is durable.

use std::{
    collections::{BTreeMap, btree_map},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use handfast_proto::Xid;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    store::{Batch, Guard, Ownership, Write},
    transaction::BranchSpec,
};

/// Rows of one batch. At a few microseconds a row a batch stays well below a tenth of a second.
pub(super) const BATCH_ROWS_MAX: usize = 4096;
/// Bytes of one batch, roughly: below a quarter of MySQL's smallest usual `max_allowed_packet`.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a row without its payload and its branches, roughly.
const ROW_BYTES: usize = 256;
/// Bytes of a branch in its transaction's row without its texts, roughly.
const REGISTRATION_BYTES: usize = 64;
/// How long a write that nothing waits for may wait for others to share a batch with.
const LAZY_WAIT_MAX: Duration = Duration::from_millis(100);

/// How far a partition's changes are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// Every change up to this number is durable.
    pub upto: u64,
    /// The number of the latest batch of the partition that is durable. A read that does not show it is old.
    pub position: u64,
    /// Why no further change ever will be durable; `None` while changes are recorded.
    pub ended: Option<Ended>,
}

/// Why a partition's changes are not recorded any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The partition has another owner.
    Fenced,
    /// The store refused a batch for what is in it. A person must look.
    Corrupt,
}

/// Whether an answer or a call waits for a change to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Nothing waits. The change goes with the next batch, or after a short while.
    Lazy,
    /// Something waits. A batch starts as soon as the one before it is done.
    Awaited,
}

/// The changes of one partition that are not recorded yet. It is made for one ownership and ends with it: a process that takes the
/// partition again has another outbox.
#[derive(Debug)]
pub struct Outbox {
    pub(super) ownership: Ownership,
    waiting: Mutex<Waiting>,
    durable: watch::Sender<Durable>,
    wake: Arc<Notify>,
    /// Shared with the journal: asks it for an empty batch of all partitions.
    doubted: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The queue: one write for each transaction, by the number of the first change in it.
    writes: BTreeMap<u64, Write>,
    /// Where in the queue a transaction's write is.
    first_changes: BTreeMap<Xid, u64>,
    /// The number of the latest change.
    latest: u64,
    /// One of the writes is awaited.
    awaited: bool,
    /// When the oldest lazy write was put here.
    lazy_since: Option<Instant>,
    /// The number of the latest batch.
    position: u64,
}

impl Outbox {
    pub(super) fn new(ownership: Ownership, wake: Arc<Notify>, doubted: Arc<AtomicBool>) -> Self {
        Self {
            ownership,
            waiting: Mutex::default(),
            durable: watch::Sender::new(Durable { upto: 0, position: 0, ended: None }),
            wake,
            doubted,
        }
    }

    /// Hands a change to the journal, and returns its number.
    pub fn put(&self, write: Write, urgency: Urgency) -> u64 {
        let mut waiting = self.waiting();
        waiting.latest += 1;
        let number = waiting.latest;
        if self.durable.borrow().ended.is_some() {
            return number; // it will never be durable
        }
        let xid = write.global.xid;
        let first = *waiting.first_changes.entry(xid).or_insert(number);
        match waiting.writes.entry(first) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(write);
            }
            btree_map::Entry::Occupied(mut entry) => {
                let merged = entry.get_mut();
                merged.global = write.global;
                merged.head = merged.head.max(write.head); // and `before` stays that of the first
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

    /// How far the changes are durable, now and in future.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.subscribe()
    }

    /// How many transactions wait to be recorded.
    pub fn len(&self) -> usize {
        self.waiting().writes.len()
    }

    /// Whether no transaction waits to be recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Moves writes into `batch` until one does not fit, and says whether one of them was awaited.
    pub(super) fn take(&self, batch: &mut Batch, room: &mut Room) -> bool {
        let mut waiting = self.waiting();
        let awaited = waiting.awaited;
        let before = batch.writes.len();
        while let Some((first, write)) = waiting.writes.pop_first() {
            if !room.fits(&write) {
                waiting.writes.insert(first, write);
                break;
            }
            waiting.first_changes.remove(&write.global.xid);
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

    /// A read has shown another owner, or lacks what was recorded. It proves nothing: the next batch does, and that is written at once.
    pub fn doubt(&self) {
        self.doubted.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Asks for an empty batch. When the batch of this number is durable, the partition had no other owner at the time of this call.
    pub fn prove(&self) -> u64 {
        let number = self.waiting().position + 1;
        self.doubt();
        number
    }

    pub(super) fn next_guard(&self) -> Guard {
        let mut waiting = self.waiting();
        waiting.position += 1;
        let Ownership { partition, epoch, nonce, .. } = self.ownership;
        Guard { partition, epoch, nonce, position: waiting.position }
    }

    /// The batch with everything that was taken is durable.
    pub(super) fn landed(&self) {
        let waiting = self.waiting();
        // A write that still waits may hold later changes too, but none before its first one.
        let upto = waiting.writes.first_key_value().map_or(waiting.latest, |(first, _)| first - 1);
        let position = waiting.position; // of a partition one batch is in flight at a time
        drop(waiting);
        self.durable.send_modify(|durable| (durable.upto, durable.position) = (upto, position));
    }

    /// No further change will be durable.
    pub(super) fn end(&self, why: Ended) {
        // Under the lock that `put` takes before it looks: no change can slip in and wait for ever.
        let mut waiting = self.waiting();
        self.durable.send_modify(|durable| durable.ended = Some(why));
        waiting.writes.clear();
        waiting.first_changes.clear();
        (waiting.awaited, waiting.lazy_since) = (false, None);
    }

    /// Whether a batch should start for what waits here.
    pub(super) fn is_due(&self) -> bool {
        let waiting = self.waiting();
        waiting.awaited || waiting.lazy_since.is_some_and(|since| since.elapsed() >= LAZY_WAIT_MAX)
    }

    /// When a batch should start at the latest; `None`: there is no lazy write.
    pub(super) fn due_by(&self) -> Option<Instant> {
        self.waiting().lazy_since.map(|since| since + LAZY_WAIT_MAX)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("nothing panics while it is locked")
    }
}

/// How much more fits into a batch.
pub(super) struct Room {
    rows: usize,
    bytes: usize,
}

impl Room {
    pub(super) const OF_EMPTY_BATCH: Self = Self { rows: BATCH_ROWS_MAX, bytes: BATCH_BYTES_MAX };

    /// Takes the room that `write` needs, and says whether there was enough. An empty batch has room for any write.
    fn fits(&mut self, write: &Write) -> bool {
        let all = &write.global.branches;
        let new = &all[write.new_branches.min(all.len())..];
        let carried = new.iter().filter(|branch| branch.spec.carry_payload);
        let payloads = carried.filter_map(|branch| branch.spec.payload.as_ref());
        // The transaction's row has all its branches. It is written anew when one joins.
        let registered = if new.is_empty() { new } else { &all[..] };
        let registered = registered.iter().map(|branch| {
            let BranchSpec { branch_id, action, participant, target, .. } = &*branch.spec;
            let texts = branch_id.as_str().len() + action.len() + participant.len() + target.len();
            REGISTRATION_BYTES + texts
        });
        let result = write.new_result().map_or(0, |result| result.data.len());
        let rows = 1 + payloads.clone().count() + write.changed_branches.len();
        let payloads = payloads.map(|payload| payload.data.len());
        let bytes = rows * ROW_BYTES + registered.chain(payloads).sum::<usize>() + result;
        let is_empty = self.rows == BATCH_ROWS_MAX;
        if !is_empty && (rows > self.rows || bytes > self.bytes) {
            return false;
        }
        self.rows = self.rows.saturating_sub(rows);
        self.bytes = self.bytes.saturating_sub(bytes);
        true
    }
}
