//! How a journal is doing.

use std::{
    iter::Sum,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{clock::Clock, transaction::Timestamp};

/// A batch without an answer for longer than this is an outage of the store.
const OUTAGE_AFTER: Duration = Duration::from_secs(1);
/// Transactions may time out again this long after an outage: Decides that came during it are still queued.
pub(super) const OUTAGE_GRACE: Duration = Duration::from_secs(2);

/// Whether the store answers a journal, and how much was recorded.
#[derive(Debug)]
pub struct JournalHealth {
    clock: Arc<dyn Clock>,
    /// When the batch in flight was sent; 0: no batch is in flight.
    begun_at: AtomicI64,
    /// When the latest outage of the store ended; 0: there was none.
    outage_ended_at: AtomicI64,
    /// When a batch was durable last; 0: none was yet.
    landed_at: AtomicI64,
    batches: AtomicU64,
    /// Batches that something waited for.
    awaited: AtomicU64,
    transactions: AtomicU64,
}

/// What was recorded since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Batches, including heartbeats. Each is one durable commit.
    pub batches: u64,
    /// Batches that something waited for.
    pub awaited: u64,
    /// Transactions in the batches. One that was recorded three times counts three times.
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
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        // A start counts as the end of an outage: Decides may be on their way again.
        let started_at = clock.now().0;
        Self {
            clock,
            begun_at: AtomicI64::new(0),
            outage_ended_at: AtomicI64::new(started_at),
            landed_at: AtomicI64::new(0),
            batches: AtomicU64::new(0),
            awaited: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
        }
    }

    /// Whether the store has left a batch without an answer for too long.
    pub fn is_store_silent(&self) -> bool {
        let begun_at = self.begun_at.load(Ordering::Relaxed);
        begun_at != 0 && self.clock.now() - Timestamp(begun_at) > OUTAGE_AFTER
    }

    /// Whether a batch was durable within that time.
    pub fn has_landed_within(&self, time: Duration) -> bool {
        let landed_at = self.landed_at.load(Ordering::Relaxed);
        landed_at != 0 && self.clock.now() - Timestamp(landed_at) <= time
    }

    /// Until when no transaction may time out, because the store was silent and Decides may be queued behind it. `None`: they may
    /// time out now.
    pub fn expiry_held_until(&self) -> Option<Timestamp> {
        let now = self.clock.now();
        if self.is_store_silent() {
            return Some(now + OUTAGE_GRACE);
        }
        let ended_at = self.outage_ended_at.load(Ordering::Relaxed);
        let held_until = Timestamp(ended_at) + OUTAGE_GRACE;
        (ended_at != 0 && now < held_until).then_some(held_until)
    }

    /// What was recorded since the start.
    pub fn counts(&self) -> Counts {
        Counts {
            batches: self.batches.load(Ordering::Relaxed),
            awaited: self.awaited.load(Ordering::Relaxed),
            transactions: self.transactions.load(Ordering::Relaxed),
        }
    }

    /// A batch was sent.
    pub(super) fn begun(&self) {
        self.begun_at.store(self.clock.now().0, Ordering::Relaxed);
    }

    /// A batch was durable, with so many transactions.
    pub(super) fn recorded(&self, transactions: usize) {
        self.landed_at.store(self.clock.now().0, Ordering::Relaxed);
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.transactions.fetch_add(transactions as u64, Ordering::Relaxed);
    }

    /// Something waited for the batch that comes next.
    pub(super) fn awaited(&self) {
        self.awaited.fetch_add(1, Ordering::Relaxed);
    }

    /// The store has said what became of the batch in flight.
    pub(super) fn answered(&self) {
        if self.is_store_silent() {
            self.outage_ended_at.store(self.clock.now().0, Ordering::Relaxed);
        }
        self.given_up();
    }

    /// Nothing waits any more for an answer to the batch in flight.
    pub(super) fn given_up(&self) {
        self.begun_at.store(0, Ordering::Relaxed);
    }
}
