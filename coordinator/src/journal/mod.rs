//! Group commit: records the changes of the partitions, many transactions in one durable commit.
//!
//! Each partition has an [`Outbox`]. A change that is put into it gets a number. The journal takes what waits in all outboxes,
//! appends it to the store as one batch, and then tells each partition up to which number its changes are durable. There is no
//! fixed delay: a batch starts when the one before it is done, so batches grow with the load.
//!
//! An example, with one partition and two transactions, A and B:
//!
//! ```text
//! the partition changes    the outbox holds         the store gets     the partition is told
//! 1: A begins              1: A, begun
//!                          nothing                  batch 1: A, begun
//! 2: B begins              2: B, begun              (in flight)
//! 3: B is decided          2: B, decided            (in flight)
//!                          2: B, decided            batch 1 landed     durable up to 1
//!                          nothing                  batch 2: B, decided
//!                                                   batch 2 landed     durable up to 3
//! ```
//!
//! Change 3 found change 2 in the outbox, and the two became one write. It keeps its first place (2) and takes its last content.
//! Had it moved to place 3, "durable up to 2" would have been told when batch 1 landed, though nothing of B was recorded. Had it
//! kept its first content, the decision would be lost, though "durable up to 3" is told in the end.
//!
//! What must always hold:
//!
//! - "Durable up to n" is told only when every change up to n is durable.
//! - One batch of a journal is in flight at a time, and the number of a batch never gets other content: while it is not known what
//!   became of a batch, the same batch is appended again until the store says.
//! - A partition ends by itself. If the store says that it has another owner, or refuses its batch, the others go on.
//!
//! Partitions come and go: [`Journal::add`] makes an outbox for an ownership, and the end of the ownership takes it away. For a
//! store that can take several batches at a time there are several journals, each with partitions of its own.

mod health;
mod outbox;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use handfast_proto::{crash_point, time::Pauses};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use self::outbox::Room;
pub use self::{
    health::{Counts, JournalHealth},
    outbox::{Durable, Ended, Outbox, Urgency},
};
use crate::{
    clock::Clock,
    store::{Appended, Batch, Damage, Error, Ownership, Store},
};

/// The pauses before a batch without an answer is appended again.
const RETRY_PAUSES: Pauses =
    Pauses { first: Duration::from_millis(20), longest: Duration::from_secs(1) };
/// An orderly stop waits this long for the answer to its last heartbeat.
const LAST_BEAT_TIMEOUT: Duration = Duration::from_secs(1);

/// See the module's comment.
#[derive(Debug)]
pub struct Journal {
    store: Arc<dyn Store>,
    /// The outboxes of the partitions that are recorded, by partition. One whose ownership has ended is not among them.
    outboxes: Mutex<BTreeMap<u16, Arc<Outbox>>>,
    wake: Arc<Notify>,
    /// Set when a read suggests that another coordinator owns a partition. The next batch is then empty and covers all partitions: it
    /// fails for those that were lost.
    doubted: Arc<AtomicBool>,
    health: Arc<JournalHealth>,
}

/// A batch, and the outboxes that it was taken from.
#[derive(Debug, Default)]
struct Taken {
    batch: Batch,
    outboxes: BTreeMap<u16, Arc<Outbox>>,
}

impl Journal {
    /// A journal without partitions.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            store,
            outboxes: Mutex::default(),
            wake: Arc::default(),
            doubted: Arc::default(),
            health: Arc::new(JournalHealth::new(clock)),
        })
    }

    /// Records the changes of this partition from now on. An earlier ownership of the same partition has ended.
    pub fn add(&self, ownership: Ownership) -> Arc<Outbox> {
        let outbox = Arc::new(Outbox::new(ownership, self.wake.clone(), self.doubted.clone()));
        if let Some(earlier) = self.outboxes().insert(ownership.partition, outbox.clone()) {
            earlier.end(Ended::Fenced);
        }
        self.wake.notify_one(); // the first partition needs heartbeats from now on
        outbox
    }

    /// How the journal is doing.
    pub fn health(&self) -> &Arc<JournalHealth> {
        &self.health
    }

    /// Records changes until `stop`, then what is left, and ends.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut appended_at = Instant::now();
        let mut beaten = false;
        // The partition that comes first in a batch: each in its turn, since a batch may be full before the last one.
        let mut first = 0;
        loop {
            let beat_every = self.store.heartbeat().filter(|_| !self.outboxes().is_empty());
            let stopping = stop.is_cancelled();
            // Never two such batches in a row while changes wait: reads that stay old must not keep changes from being
            // recorded.
            let is_due = self.is_due();
            beaten = !(beaten && is_due) && self.doubted.swap(false, Ordering::Relaxed);
            let taken = if beaten {
                self.heartbeat() // also at the end: what was lost is marked by the batch that finds it
            } else if stopping || is_due {
                self.take(&mut first)
            } else if beat_every.is_some_and(|every| appended_at.elapsed() >= every) {
                self.heartbeat()
            } else {
                Taken::default()
            };
            if !taken.batch.guards.is_empty() {
                self.append(taken).await;
                appended_at = Instant::now();
            } else if stopping {
                // Before the partitions are handed back: whoever takes them next cannot notice that batches are lost.
                if beat_every.is_some() {
                    let last_beat = timeout(LAST_BEAT_TIMEOUT, self.append(self.heartbeat()));
                    if last_beat.await.is_err() {
                        self.health.given_up();
                    }
                }
                return;
            } else {
                tokio::select! {
                    biased; // each only ends the wait
                    () = self.wake.notified() => {}
                    () = until(self.due_by()) => {}
                    () = until(beat_every.map(|every| appended_at + every)) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }

    /// Takes what waits in the outboxes, as far as it fits into one batch.
    fn take(&self, first: &mut u16) -> Taken {
        let (mut taken, mut room, mut awaited) = (Taken::default(), Room::OF_EMPTY_BATCH, false);
        let outboxes = self.outboxes();
        let in_order = outboxes.range(*first..).chain(outboxes.range(..*first));
        for (partition, outbox) in in_order {
            let guards = taken.batch.guards.len();
            awaited |= outbox.take(&mut taken.batch, &mut room);
            if taken.batch.guards.len() > guards {
                taken.outboxes.insert(*partition, outbox.clone());
            }
        }
        *first = outboxes.range(first.saturating_add(1)..).next().map_or(0, |(next, _)| *next);
        drop(outboxes);
        if awaited {
            self.health.awaited();
        }
        taken
    }

    /// An empty batch of all partitions.
    fn heartbeat(&self) -> Taken {
        let outboxes = self.outboxes().clone();
        let guards = outboxes.values().map(|outbox| outbox.next_guard()).collect();
        Taken { batch: Batch { guards, writes: Vec::new() }, outboxes }
    }

    fn is_due(&self) -> bool {
        self.outboxes().values().any(|outbox| outbox.is_due())
    }

    fn due_by(&self) -> Option<Instant> {
        self.outboxes().values().filter_map(|outbox| outbox.due_by()).min()
    }

    /// Appends a batch until the store says what became of it.
    async fn append(&self, mut taken: Taken) {
        let mut pause = RETRY_PAUSES.first;
        let mut attempts = 0_u32;
        self.health.begun();
        while !taken.batch.guards.is_empty() {
            attempts += 1;
            match self.store.append(&taken.batch).await {
                Ok(Appended::Durable) => break,
                Ok(Appended::Fenced(fenced)) => {
                    warn!(partitions = ?fenced, "another coordinator has taken over");
                    self.end(&mut taken, &fenced, Ended::Fenced);
                }
                Ok(Appended::Damaged(damaged)) => {
                    for Damage { partition, what, .. } in &damaged {
                        error!(
                            partition,
                            what, "the store does not fit what was recorded; the partition ends"
                        );
                    }
                    let damaged: Vec<_> = damaged.iter().map(|damage| damage.partition).collect();
                    self.end(&mut taken, &damaged, Ended::Corrupt);
                    // What one partition has lost the others may have lost too.
                    self.doubted.store(true, Ordering::Relaxed);
                }
                // The store cannot say which partition is wrong (that would be `Damaged`), because all of its data may be. Or it
                // has refused the COMMIT, and then a smaller batch with the same numbers could be applied beside this one.
                Err(Error::Corrupt(what)) => {
                    error!(what, "the store refused a batch; its partitions end");
                    let all: Vec<_> = taken.outboxes.keys().copied().collect();
                    self.end(&mut taken, &all, Ended::Corrupt);
                }
                Err(error @ (Error::Unavailable(_) | Error::Old(_) | Error::Replaced(_))) => {
                    if attempts.is_power_of_two() {
                        warn!(attempts, %error, "store did not answer; retrying the same batch");
                    }
                    tokio::time::sleep(pause).await;
                    pause = RETRY_PAUSES.after(pause);
                }
            }
        }
        self.health.answered();
        let Taken { batch, outboxes } = taken;
        if attempts > 1 && !batch.guards.is_empty() {
            info!(attempts, "the store answers again");
        }
        self.health.recorded(batch.writes.len());
        debug!(partitions = batch.guards.len(), transactions = batch.writes.len(), "batch");
        // Let go of the transactions first, so that the partitions can change them without copying.
        drop(batch);
        crash_point!("batch.before_told");
        for outbox in outboxes.values() {
            outbox.landed();
        }
    }

    /// Ends these partitions and takes them out of the batch. The rest of it keeps its numbers: they never get other content.
    fn end(&self, taken: &mut Taken, partitions: &[u16], why: Ended) {
        taken.batch.guards.retain(|guard| !partitions.contains(&guard.partition));
        taken.batch.writes.retain(|write| !partitions.contains(&write.global.xid.partition));
        for partition in partitions {
            let Some(outbox) = taken.outboxes.remove(partition) else { continue };
            outbox.end(why);
            let mut outboxes = self.outboxes();
            // The partition may have been taken again meanwhile: that is another outbox.
            if outboxes.get(partition).is_some_and(|present| Arc::ptr_eq(present, &outbox)) {
                outboxes.remove(partition);
            }
        }
    }

    fn outboxes(&self) -> MutexGuard<'_, BTreeMap<u16, Arc<Outbox>>> {
        self.outboxes.lock().expect("nothing panics while it is locked")
    }
}

/// Completes at that moment; with `None` never.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
