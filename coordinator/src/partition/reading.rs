//! How transactions come back into memory: because a caller asks for one, or because one is due. Both kinds of read run outside
//! the partition's task.
//!
//! A row may be out of date when it arrives. It enters memory only if its transaction was not in memory at any time since the
//! read began. Otherwise the partition may have changed the transaction after the row was read. So while a read is in flight,
//! the partition notes every transaction that leaves memory, and drops the row of such a transaction. (A partition reads only
//! after its takeover, so no row is older than the takeover.)
//!
//! A read does not prove that the partition is still ours: an old primary that is cut off answers reads, but takes no batch. After a
//! loss, the xid of a newer owner looks like a lost one there. So [`Error::Lost`] is answered only when a batch is durable that was
//! sent after the read.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map},
    time::Duration,
};

use handfast_proto::{Xid, crash_point, planted::Bug};
use tracing::warn;

use super::{
    Ask, Entry, Error, PARK_AFTER, Partition, What, answer_now,
    missing::{self, Resolved},
};
use crate::{
    store::{self, DuePage, Known, Lookup, XidBytes},
    transaction::{Event, State, Timestamp},
};

/// Reads of single transactions that may be in flight at a time.
const READS_MAX: usize = 8;
/// Due transactions in one page.
const PAGE: usize = 128;
/// Most transactions in memory that were read because they were due. Above this, other due transactions stay in the store for a
/// while. Their changes share a queue with those of new transactions, which should not wait. For the same reason the last third
/// of `limits.open` is kept for new transactions.
const IN_HAND_MAX: usize = 256;
/// Pause before the next look for room in memory.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(100);
/// Shortest pause between scans for transactions that are due.
const SCAN_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Reading {
    /// Transactions that are being read, and the callers that wait for each.
    asks: BTreeMap<Xid, Vec<Ask>>,
    /// How many callers wait, those of `unproven` included.
    waiting: usize,
    /// Reads that found their transaction lost, in order of the batch that has to prove it.
    unproven: VecDeque<Unproven>,
    /// Transactions in `asks` whose read has not begun.
    queue: VecDeque<Xid>,
    /// Transactions in `asks` whose read is in flight.
    in_flight: BTreeSet<Xid>,
    /// When the reads in flight began, in units of `moment`, and how many began at each moment.
    under_way: BTreeMap<u64, usize>,
    /// Transactions that left memory while a read was in flight, with the `moment` at which they left.
    left: BTreeMap<Xid, u64>,
    /// Counts departures from memory. Serves as a clock for reads.
    moment: u64,
    /// When the next scan for due transactions starts. `None`: as soon as a transaction that will be due again leaves memory.
    scan_at: Option<Timestamp>,
    /// The end of the last page, where the next scan starts.
    scan_after: Option<(Timestamp, XidBytes)>,
    /// Whether a page is being read, or the partition has ended.
    scan_blocked: bool,
    /// The look for transactions that were recorded while the clock was ahead.
    ahead: AheadScan,
    /// When the next transaction becomes due, as the first scan has found.
    next_due_at: Option<Timestamp>,
    /// Transactions in memory that were read because they were due.
    in_hand: usize,
    /// When the next scan may start, once `in_hand` has gone down.
    scan_once_fewer: Option<Timestamp>,
    /// The earliest due time of the transactions that left memory since this scan began. The scan may have missed them.
    left_due: Option<Timestamp>,
}

/// An owner looks once, after its first scan, at what is due later than after the longest pause between two attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AheadScan {
    NotYet,
    UnderWay,
    Done,
}

/// A transaction is lost, if this partition is still ours.
#[derive(Debug)]
struct Unproven {
    /// The number of the batch that proves it.
    batch: u64,
    lost: Error,
    asks: Vec<Ask>,
}

/// What a read has found about a key.
#[derive(Debug)]
pub(super) enum FoundKey {
    /// The transaction that the key belongs to.
    Belongs(Xid),
    /// The store has no such key.
    Unknown,
    /// Its record is damaged.
    Unreadable(store::Error),
}

impl From<Option<Xid>> for FoundKey {
    fn from(xid: Option<Xid>) -> Self {
        xid.map_or(Self::Unknown, Self::Belongs)
    }
}

/// The result of a read.
#[derive(Debug)]
pub(super) enum ReadResult {
    One { xid: Xid, began: u64, found: Result<Lookup, store::Error>, resolved: Resolved },
    Due { began: u64, page: Result<DuePage, store::Error> },
    Keys { hashes: Vec<[u8; 32]>, found: Result<Vec<FoundKey>, store::Error> },
}

impl Reading {
    pub(super) fn from_the_start(now: Timestamp) -> Self {
        Self {
            asks: BTreeMap::new(),
            waiting: 0,
            unproven: VecDeque::new(),
            queue: VecDeque::new(),
            in_flight: BTreeSet::new(),
            under_way: BTreeMap::new(),
            left: BTreeMap::new(),
            moment: 0,
            scan_at: Some(now),
            scan_after: None,
            scan_blocked: false,
            ahead: AheadScan::NotYet,
            next_due_at: None,
            in_hand: 0,
            scan_once_fewer: None,
            left_due: None,
        }
    }

    /// When the next scan starts.
    pub(super) fn scan_at(&self) -> Option<Timestamp> {
        self.scan_at.filter(|_| !self.scan_blocked)
    }

    /// Notes that a transaction has left memory.
    pub(super) fn left(&mut self, entry: &Entry, now: Timestamp) {
        let (xid, due_at) = (entry.global.xid, entry.global.due_at());
        self.in_hand -= usize::from(entry.was_due);
        if self.in_hand <= IN_HAND_MAX / 2 {
            let once_fewer = self.scan_once_fewer.take();
            self.scan_by(once_fewer);
        }
        if !self.under_way.is_empty() {
            self.moment += 1;
            self.left.insert(xid, self.moment);
        }
        if self.scan_blocked || self.scan_after.is_some() {
            self.left_due = [self.left_due, due_at].into_iter().flatten().min();
        } else {
            self.scan_by(due_at.map(|at| at.max(now + SCAN_PAUSE)));
        }
    }

    fn scan_by(&mut self, at: Option<Timestamp>) {
        self.scan_at = [self.scan_at, at].into_iter().flatten().min();
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Forgets callers that have given up. Also forgets queued reads without a caller.
    pub(super) fn forget_gone(&mut self) {
        let Self { asks, waiting, unproven, queue, in_flight, .. } = self;
        let mut forget = |asks: &mut Vec<Ask>| {
            let before = asks.len();
            asks.retain(|ask| !ask.reply.is_closed());
            *waiting -= before - asks.len();
            asks.is_empty()
        };
        unproven.retain_mut(|unproven| !forget(&mut unproven.asks));
        asks.retain(|xid, asks| !forget(asks) || in_flight.contains(xid));
        queue.retain(|xid| asks.contains_key(xid));
    }

    /// Removes and returns the first operator's decision among the callers that wait for this transaction.
    fn resolution_of(&mut self, xid: Xid) -> Option<Ask> {
        let asks = self.asks.get_mut(&xid)?;
        let first =
            asks.iter().position(|ask| matches!(ask.what, What::ResolveTransaction { .. }))?;
        self.waiting -= 1;
        Some(asks.remove(first))
    }

    /// Removes and returns the callers that waited for this transaction.
    fn answered(&mut self, xid: Xid) -> Vec<Ask> {
        let asks = self.asks.remove(&xid).unwrap_or_default();
        self.waiting -= asks.len();
        asks
    }

    pub(super) fn end(&mut self, why: &Error) {
        self.waiting = 0;
        let unproven = self.unproven.drain(..).flat_map(|unproven| unproven.asks);
        for ask in std::mem::take(&mut self.asks).into_values().flatten().chain(unproven) {
            answer_now(ask.reply, Err(why.clone()));
        }
        self.queue.clear();
        self.scan_blocked = true;
    }

    fn begin(&mut self) -> u64 {
        *self.under_way.entry(self.moment).or_default() += 1;
        self.moment
    }

    /// Ends a read. Called after its rows were handled.
    fn done(&mut self, began: u64) {
        if let btree_map::Entry::Occupied(mut entry) = self.under_way.entry(began) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        match self.under_way.first_key_value() {
            None => self.left.clear(),
            Some((first, _)) => self.left.retain(|_, moment| *moment > *first),
        }
    }

    /// Whether a row of a read that began at moment `began` may be out of date.
    fn is_stale(&self, xid: Xid, began: u64) -> bool {
        self.left.get(&xid).is_some_and(|moment| *moment > began)
    }
}

impl Partition {
    /// Reads a transaction that a caller asks for.
    pub(super) fn read_for(&mut self, ask: Ask) {
        let xid = ask.xid;
        self.reading.waiting += 1;
        match self.reading.asks.entry(xid) {
            btree_map::Entry::Occupied(mut entry) => entry.get_mut().push(ask), // one read for all callers
            btree_map::Entry::Vacant(entry) => {
                entry.insert(vec![ask]);
                self.reading.queue.push_back(xid);
                self.begin_reads();
            }
        }
    }

    /// Starts queued reads of single transactions, as many as may be in flight.
    fn begin_reads(&mut self) {
        while self.reading.in_flight.len() < READS_MAX
            && let Some(xid) = self.reading.queue.pop_front()
        {
            self.reading.in_flight.insert(xid);
            let began = self.reading.begin();
            let (store, reads) = (self.parts.store.clone(), self.reads_sender.clone());
            let known = self.known();
            self.parts.tasks.spawn(async move {
                let (found, resolved) = missing::look_up(&*store, xid, known).await;
                drop(reads.send(ReadResult::One { xid, began, found, resolved })); // the partition may be gone
            });
        }
    }

    /// How new a read must be to be accepted.
    pub(super) fn known(&self) -> Known {
        Known { ownership: self.ownership, position: self.position }
    }

    /// The error for callers whose read failed. If the read suggests that another coordinator owns the partition, or that
    /// records are lost, the journal is told to check.
    pub(super) fn read_failed(&self, error: &store::Error) -> Error {
        match error {
            store::Error::Old(_) | store::Error::Replaced(_) => {
                warn!(%error, "discarded an outdated read");
                self.outbox.doubt();
            }
            store::Error::Unavailable(_) | store::Error::Corrupt(_) => {}
        }
        Error::from(error)
    }

    pub(super) fn take_read(&mut self, read: ReadResult) {
        match read {
            ReadResult::One { xid, began, found, resolved } => {
                self.take_one(xid, began, found, &resolved);
            }
            ReadResult::Due { began, page } => self.take_due(began, page),
            ReadResult::Keys { hashes, found } => self.take_keys(hashes, found),
        }
    }

    fn take_one(
        &mut self,
        xid: Xid,
        began: u64,
        found: Result<Lookup, store::Error>,
        resolved: &Resolved,
    ) {
        let stale = self.reading.is_stale(xid, began);
        self.reading.done(began);
        self.reading.in_flight.remove(&xid);
        if self.ended.is_some() {
            return; // the callers have been told
        }
        self.begin_reads();
        if !self.entries.contains_key(&xid) {
            if stale {
                // It came into memory and left again during the read, so read it again.
                self.reading.queue.push_back(xid);
                return self.begin_reads();
            }
            let missing = match found {
                Ok(Lookup::Found(global))
                    if self.ownership.may_have_lost_the_decision_of(&global) =>
                {
                    match self.reading.resolution_of(xid) {
                        None => Some(Error::Lost(xid)),
                        // It is decided at once, so that it is never in memory undecided.
                        Some(resolution) => {
                            self.insert(Entry::loaded(*global));
                            self.ask(resolution);
                            None
                        }
                    }
                }
                Ok(Lookup::Found(global)) => {
                    self.take_in(Entry::loaded(*global));
                    None
                }
                Ok(Lookup::Absent { lost: true, nonce, .. })
                    if nonce == Some(xid.nonce) && !Bug::ForgetLoss.is_planted() =>
                {
                    Some(Error::Lost(xid))
                }
                // The store has lost everything from some moment on. The epochs that it began after that have the numbers of lost
                // ones, or have not come as far: this xid is of a lost one.
                Ok(Lookup::Absent { nonce, .. })
                    if nonce != Some(xid.nonce) && self.is_since_a_loss(xid) =>
                {
                    Some(Error::Lost(xid))
                }
                Ok(Lookup::Absent { purged_through, nonce, lost: _ }) => {
                    // A different nonce: the xid is from a store that was deleted, or from before a backup was restored. This
                    // store does not know what happened to that transaction. It must not say that it has forgotten it: then
                    // participants could give back what is confirmed.
                    let purged = purged_through.is_some_and(|through| xid <= through);
                    Some(match nonce == Some(xid.nonce) {
                        true if purged => Error::Forgotten(xid),
                        true => Error::NeverRecorded(xid),
                        false => Error::Lost(xid),
                    })
                }
                Err(error) => Some(self.read_failed(&error)),
            };
            if let Some(lost @ Error::Lost(_)) = missing {
                return self.prove_lost(xid, lost);
            }
            if let Some(missing) = missing {
                for ask in self.reading.answered(xid) {
                    let missing = missing::told(&missing, &ask.what, resolved);
                    self.answer_missing(ask, missing);
                }
                return;
            }
        }
        for ask in self.reading.answered(xid) {
            self.ask(ask);
        }
        self.leave_if_idle(xid);
    }

    /// Answers that the transaction is lost once a batch has proved that nobody has replaced this owner.
    fn prove_lost(&mut self, xid: Xid, lost: Error) {
        let batch = self.outbox.prove();
        let asks = self.reading.asks.remove(&xid).unwrap_or_default();
        self.reading.unproven.push_back(Unproven { batch, lost, asks });
    }

    /// Sends the answers that the latest durable batch proves.
    pub(super) fn tell_proven(&mut self) {
        let position = self.position;
        while let Some(Unproven { lost, asks, .. }) =
            self.reading.unproven.pop_front_if(|unproven| unproven.batch <= position)
        {
            self.reading.waiting -= asks.len();
            for ask in asks {
                self.answer_missing(ask, lost.clone());
            }
        }
    }

    /// A transaction leaves memory if its next attempt is further away than this. When others need the memory, every transaction
    /// between attempts leaves. Otherwise the retries of one dead participant would keep new or other due transactions out of
    /// memory.
    pub(super) fn park_after(&self, was_due: bool) -> Duration {
        let others_wait_in_the_store = was_due && self.reading.scan_once_fewer.is_some();
        let is_half_full = self.parts.held.is_half_full(&self.parts.settings);
        if others_wait_in_the_store || is_half_full { Duration::ZERO } else { PARK_AFTER }
    }

    /// Reads the next page of due transactions, if it is time.
    pub(super) fn scan(&mut self) {
        let now = self.now();
        if self.reading.scan_at().is_none_or(|at| at > now) {
            return;
        }
        if !self.parts.held.has_room_for_due(&self.parts.settings) {
            self.reading.scan_at = Some(now + NO_ROOM_PAUSE);
            return;
        }
        if self.reading.in_hand >= IN_HAND_MAX {
            self.reading.scan_once_fewer = self.reading.scan_at.take();
            return;
        }
        let began = self.reading.begin();
        let after = self.reading.scan_after.take();
        self.reading.scan_at = None;
        self.reading.scan_blocked = true;
        let (store, reads) = (self.parts.store.clone(), self.reads_sender.clone());
        let known = self.known();
        let looks_ahead = self.reading.ahead == AheadScan::UnderWay;
        let until = if looks_ahead { Timestamp(i64::MAX) } else { now };
        self.parts.tasks.spawn(async move {
            let page = store.due(until, after, PAGE, known).await;
            drop(reads.send(ReadResult::Due { began, page })); // the partition may be gone
        });
    }

    fn take_due(&mut self, began: u64, page: Result<DuePage, store::Error>) {
        if self.ended.is_some() {
            return;
        }
        let now = self.now();
        let soon = now + SCAN_PAUSE;
        let looks_ahead = self.reading.ahead == AheadScan::UnderWay;
        match page {
            Err(error) => {
                drop(self.read_failed(&error));
                warn!(%error, "cannot read due transactions; will retry");
                if looks_ahead {
                    self.reading.ahead = AheadScan::NotYet; // it begins after another first scan
                }
                self.reading.scan_by(Some(soon));
            }
            Ok(page) => {
                if !page.transactions.is_empty() {
                    crash_point!("recovery.page");
                }
                for global in page.transactions {
                    if global.state == State::Trying && Bug::ForgetTrying.is_planted() {
                        continue;
                    }
                    let xid = global.xid;
                    let newer =
                        self.entries.contains_key(&xid) || self.reading.is_stale(xid, began);
                    if newer || (looks_ahead && !global.was_ahead(now)) {
                        continue;
                    }
                    self.reading.in_hand += 1;
                    self.take_in(Entry::due(global));
                    if looks_ahead {
                        self.record_due(xid);
                    }
                    self.leave_if_idle(xid);
                }
                if page.next.is_some() {
                    self.reading.scan_after = page.next;
                    self.reading.scan_by(Some(now)); // at once
                } else if self.reading.ahead == AheadScan::NotYet {
                    self.reading.ahead = AheadScan::UnderWay;
                    self.reading.next_due_at = page.next_due_at;
                    let longest_pause = self.parts.settings.retry.max;
                    self.reading.scan_after = Some((now + longest_pause, XidBytes::new()));
                    self.reading.scan_by(Some(now));
                } else {
                    self.reading.ahead = AheadScan::Done;
                    let next = page.next_due_at.or(self.reading.next_due_at.take());
                    let due = [next, self.reading.left_due.take()].into_iter().flatten().min();
                    self.reading.scan_by(due.map(|at| at.max(soon)));
                }
            }
        }
        self.reading.scan_blocked = false;
        self.reading.done(began);
    }

    /// Takes a transaction from the store into memory.
    fn take_in(&mut self, entry: Entry) {
        let xid = entry.global.xid;
        self.insert(entry);
        self.apply_fitting(xid, Event::Recovered { longest_pause: self.parts.settings.retry.max });
    }
}
