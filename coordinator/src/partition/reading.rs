//! How transactions come back into memory: because somebody asks for one, or because one is due and nobody is working on it.
//! Both happen off the partition's task.
//!
//! What is read may be old by the time it arrives. A row enters memory only if this partition has not held its transaction since
//! the read began: what it held it may have changed, and then the row is the past. (That the read began after the takeover is
//! a matter of course: a partition exists only since then.) Everything that leaves memory while a read is under way is noted,
//! and a row of it is dropped.

use std::{
    collections::{BTreeMap, btree_map},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use handfast_proto::{Xid, crash_point, planted::Bug};
use tokio::sync::Semaphore;
use tracing::warn;

use super::{Ask, Entry, Error, Partition, Settings};
use crate::{
    store::{self, DuePage, Known, Lookup},
    transaction::{Event, State, Timestamp},
};

/// Single reads of one partition at a time.
const READS_MAX: usize = 8;
/// Transactions of one page of what is due.
const PAGE: usize = 128;
/// A partition with so many transactions in hand that it has brought back because they were due leaves the others in the store for a
/// while: what they change waits in the same queue as what is new, and that is to be served at once. It also leaves the last third
/// of what all partitions may hold together to what is new.
const IN_HAND_MAX: usize = 256;
/// How long until it looks whether there is room.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(100);
/// Shortest pause between looks for what is due.
const SCAN_PAUSE: Duration = Duration::from_secs(1);

/// See the module's comment.
#[derive(Debug)]
pub(super) struct Reading {
    /// Single reads under way, and who waits for each.
    asks: BTreeMap<Xid, Vec<Ask>>,
    permits: Arc<Semaphore>,
    /// When each read that is under way began, on the scale of `moment`, and how many began then.
    under_way: BTreeMap<u64, usize>,
    /// What has left memory while a read was under way, and when.
    left: BTreeMap<Xid, u64>,
    /// Counts what leaves.
    moment: u64,
    /// When to look for what is due; `None`: when something leaves memory that will be due.
    scan_at: Option<Timestamp>,
    /// Where that look starts.
    scan_after: Option<(Timestamp, Xid)>,
    /// One look is under way, or there will be none any more.
    scan_blocked: bool,
    /// So many in memory were brought back because they were due.
    in_hand: usize,
    /// When to look again, once there are fewer of them.
    scan_once_fewer: Option<Timestamp>,
    /// When the first of those is due that have left memory since this look began: it may have passed them by.
    left_due: Option<Timestamp>,
}

/// What was read.
#[derive(Debug)]
pub(super) enum ReadResult {
    One { xid: Xid, began: u64, found: Result<Lookup, store::Error> },
    Due { began: u64, until: Timestamp, page: Result<DuePage, store::Error> },
    Keys { hashes: Vec<[u8; 32]>, found: Result<Vec<Option<Xid>>, store::Error> },
}

impl Reading {
    pub(super) fn from_the_start(now: Timestamp) -> Self {
        Self {
            asks: BTreeMap::new(),
            permits: Arc::new(Semaphore::new(READS_MAX)),
            under_way: BTreeMap::new(),
            left: BTreeMap::new(),
            moment: 0,
            scan_at: Some(now),
            scan_after: None,
            scan_blocked: false,
            in_hand: 0,
            scan_once_fewer: None,
            left_due: None,
        }
    }

    /// When the next look for what is due starts.
    pub(super) fn scan_at(&self) -> Option<Timestamp> {
        self.scan_at.filter(|_| !self.scan_blocked)
    }

    /// A transaction has left memory, and is due again then.
    pub(super) fn left(&mut self, entry: &Entry) {
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
            self.scan_by(due_at);
        }
    }

    fn scan_by(&mut self, at: Option<Timestamp>) {
        self.scan_at = [self.scan_at, at].into_iter().flatten().min();
    }

    pub(super) fn end(&mut self, why: &Error) {
        for ask in std::mem::take(&mut self.asks).into_values().flatten() {
            Partition::answer_now(ask.reply, Err(why.clone()));
        }
        self.scan_blocked = true;
    }

    fn begin(&mut self) -> u64 {
        *self.under_way.entry(self.moment).or_default() += 1;
        self.moment
    }

    /// Ends a read. Call it when its rows have been taken in.
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

    /// Whether a row that was read since `began` may be the past.
    fn is_stale(&self, xid: Xid, began: u64) -> bool {
        self.left.get(&xid).is_some_and(|moment| *moment > began)
    }
}

impl Partition {
    /// Somebody asks for a transaction that is not in memory.
    pub(super) fn read_for(&mut self, ask: Ask) {
        let xid = ask.xid;
        match self.reading.asks.entry(xid) {
            btree_map::Entry::Occupied(mut entry) => entry.get_mut().push(ask), // one read for all of them
            btree_map::Entry::Vacant(entry) => {
                entry.insert(vec![ask]);
                self.read_one(xid);
            }
        }
    }

    fn read_one(&mut self, xid: Xid) {
        let began = self.reading.begin();
        let (store, reads) = (self.parts.store.clone(), self.reads.0.clone());
        let (permits, known) = (self.reading.permits.clone(), self.known());
        self.parts.tasks.spawn(async move {
            let _permit = permits.acquire_owned().await.expect("never closed");
            let found = store.load(xid, known).await;
            drop(reads.send(ReadResult::One { xid, began, found })); // the partition may be gone
        });
    }

    /// What a read must show to be believed.
    pub(super) fn known(&self) -> Known {
        Known { ownership: self.ownership, position: self.position }
    }

    /// What to tell whoever waits for a read that failed. If it shows that the partition may not be ours any more, or that something is
    /// lost, the journal finds out.
    pub(super) fn read_failed(&self, error: &store::Error) -> Error {
        match error {
            store::Error::Old(_) | store::Error::Replaced(_) => {
                warn!(%error, "a read was not believed");
                self.outbox.doubt();
            }
            store::Error::Unavailable(_) | store::Error::Corrupt(_) => {}
        }
        Error::from(error)
    }

    pub(super) fn take_read(&mut self, read: ReadResult) {
        match read {
            ReadResult::One { xid, began, found } => self.take_one(xid, began, found),
            ReadResult::Due { began, until, page } => self.take_due(began, until, page),
            ReadResult::Keys { hashes, found } => self.take_keys(hashes, found),
        }
    }

    fn take_one(&mut self, xid: Xid, began: u64, found: Result<Lookup, store::Error>) {
        let stale = self.reading.is_stale(xid, began);
        self.reading.done(began);
        if self.ended.is_some() {
            return; // whoever waited has been told
        }
        if !self.entries.contains_key(&xid) {
            if stale {
                return self.read_one(xid); // it was here meanwhile, and left again
            }
            let missing = match found {
                Ok(Lookup::Found(global)) => {
                    self.take_in(Entry::loaded(*global));
                    None
                }
                Ok(Lookup::Absent { lost: true, nonce, .. }) if nonce == Some(xid.nonce) => {
                    Some(Error::Lost(xid))
                }
                Ok(Lookup::Absent { purged_through, nonce, lost: _ }) => {
                    // Another nonce: the xid is from a store that was deleted, or restored to before it, and what became of
                    // its transaction nobody here can say.
                    let purged = purged_through.is_some_and(|through| xid <= through);
                    Some(if nonce == Some(xid.nonce) && !purged {
                        Error::NeverRecorded(xid)
                    } else {
                        Error::Forgotten(xid)
                    })
                }
                Err(error) => Some(self.read_failed(&error)),
            };
            if let Some(missing) = missing {
                for ask in self.reading.asks.remove(&xid).unwrap_or_default() {
                    Self::answer_now(ask.reply, Err(missing.clone()));
                }
                return;
            }
        }
        for ask in self.reading.asks.remove(&xid).unwrap_or_default() {
            self.ask(ask);
        }
        self.leave_if_idle(xid);
    }

    /// Starts the look for what is due, when it is time.
    pub(super) fn scan(&mut self) {
        let now = self.now();
        if self.reading.scan_at().is_none_or(|at| at > now) {
            return;
        }
        let Settings { open_max, .. } = self.parts.settings;
        let held = self.parts.open.load(Ordering::Relaxed);
        if held >= open_max - open_max / 3 {
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
        let (store, reads) = (self.parts.store.clone(), self.reads.0.clone());
        let known = self.known();
        self.parts.tasks.spawn(async move {
            let page = store.due(now, after, PAGE, known).await;
            drop(reads.send(ReadResult::Due { began, until: now, page })); // the partition may be gone
        });
    }

    fn take_due(&mut self, began: u64, until: Timestamp, page: Result<DuePage, store::Error>) {
        if self.ended.is_some() {
            return;
        }
        self.reading.scan_blocked = false;
        let soon = self.now() + SCAN_PAUSE;
        match page {
            Err(error) => {
                drop(self.read_failed(&error));
                warn!(%error, "cannot read what is due; will look again");
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
                    if !self.entries.contains_key(&global.xid)
                        && !self.reading.is_stale(global.xid, began)
                    {
                        let xid = global.xid;
                        self.reading.in_hand += 1;
                        self.take_in(Entry::due(global));
                        self.leave_if_idle(xid);
                    }
                }
                if page.next.is_some() {
                    self.reading.scan_after = page.next;
                    self.reading.scan_by(Some(until)); // at once
                } else {
                    self.reading.scan_by(page.next_due_at.map(|at| at.max(soon)));
                    let left_due = self.reading.left_due.take();
                    self.reading.scan_by(left_due);
                }
            }
        }
        self.reading.done(began);
    }

    /// Takes a recorded transaction into memory.
    fn take_in(&mut self, entry: Entry) {
        let xid = entry.global.xid;
        self.insert(entry);
        self.apply_fitting(xid, Event::Recovered);
    }
}
