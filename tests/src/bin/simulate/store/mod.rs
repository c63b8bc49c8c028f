//! The database of the coordinators: one server, in memory, that fails as databases do.
//!
//! It keeps acknowledged batches, and promises nothing else. A batch may be slow, or fail (1213, 1205), or be done with its reply lost,
//! or land seconds after its caller has given up. The server may die; of the batches in flight some are kept then and some are lost.
//!
//! It runs beside the hosts, not on one of them: a batch takes effect whether or not the coordinator that sent it is alive.

mod replica;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use handfast_coordinator::{
    store::{
        Appended, Batch, DuePage, Error, Known, ListFilter, Listing, Lookup, Ownership, Seat,
        Store, Summary, XidBytes, memory::MemoryStore,
    },
    transaction::{Decision, GlobalTransaction, StuckAfter, Timestamp},
};
use handfast_proto::{BranchId, Xid};
use tokio::sync::oneshot;

use self::replica::{Failovers, Replica};
use crate::{chronicle::Chronicle, clock::true_time, mix::StoreMix};

/// How often an owner sends a heartbeat.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// The longest wait, in milliseconds, of a caller that cannot reach the server. Every call ends.
const GIVE_UP: u64 = 3000;
/// The longest time, in milliseconds, between the end of a call and the moment when its batch lands.
const LATE: u64 = 8000;

/// The server.
pub(crate) struct Database {
    tables: Mutex<Arc<MemoryStore>>,
    chronicle: Arc<Chronicle>,
    state: Mutex<State>,
}

struct State {
    now: Duration,
    rng: fastrand::Rng,
    mix: StoreMix,
    /// How many times longer a batch takes than usual.
    slowness: u64,
    jobs: BTreeMap<(Duration, u64), Job>,
    serial: u64,
    /// The server is dead until then.
    down_until: Duration,
    /// Coordinators that cannot reach it.
    cut: BTreeSet<usize>,
    /// A server that answers some of the reads, and lags.
    replica: Option<Replica>,
    failovers: Failovers,
    /// Every decision that was ever durable.
    decisions: BTreeMap<Xid, Decision>,
}

struct Job {
    /// When the server dies, its effect may be kept or lost.
    writes: bool,
    run: Box<dyn FnOnce(&Database) + Send>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

impl Database {
    pub(crate) fn new(seed: u64, mix: StoreMix, chronicle: Arc<Chronicle>) -> Arc<Self> {
        let state = State {
            now: Duration::ZERO,
            rng: fastrand::Rng::with_seed(seed ^ 0x7374_6f72),
            mix,
            slowness: 1,
            jobs: BTreeMap::new(),
            serial: 0,
            down_until: Duration::ZERO,
            cut: BTreeSet::new(),
            replica: None,
            failovers: Failovers::default(),
            decisions: BTreeMap::new(),
        };
        Arc::new(Self { tables: Mutex::default(), chronicle, state: Mutex::new(state) })
    }

    fn tables(&self) -> Arc<MemoryStore> {
        self.tables.lock().expect("nothing panics while it is locked").clone()
    }

    fn set_tables(&self, tables: Arc<MemoryStore>) {
        *self.tables.lock().expect("nothing panics while it is locked") = tables;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it is locked")
    }

    /// Runs the jobs that are due.
    pub(crate) fn advance(&self, now: Duration) {
        self.state().now = now;
        self.replicate();
        loop {
            let job = {
                let mut state = self.state();
                match state.jobs.first_entry() {
                    Some(first) if first.key().0 <= now => first.remove(),
                    _ => return,
                }
            };
            (job.run)(self);
        }
    }

    /// The server dies. Some of the batches in flight are kept. There are no replies.
    pub(crate) fn crash(&self, down_for: Duration) {
        let jobs = std::mem::take(&mut self.state().jobs);
        for job in jobs.into_values() {
            if job.writes && self.state().rng.bool() {
                (job.run)(self);
            }
        }
        let mut state = self.state();
        state.jobs.clear(); // the replies
        state.down_until = state.now + down_for;
    }

    pub(crate) fn cut(&self, coordinator: usize) {
        self.state().cut.insert(coordinator);
    }

    pub(crate) fn heal(&self, coordinator: usize) {
        self.state().cut.remove(&coordinator);
    }

    pub(crate) fn slow_down(&self, times: u64) {
        self.state().slowness = times;
    }

    /// Ends all failures.
    pub(crate) fn behave(&self) {
        let mut state = self.state();
        let StoreMix { millis, has_clock, .. } = state.mix;
        state.mix = StoreMix { millis, has_clock, ..StoreMix::default() };
        (state.slowness, state.down_until) = (1, Duration::ZERO);
        state.replica = None;
        state.cut.clear();
    }

    /// The durable decision.
    pub(crate) fn decision(&self, xid: Xid) -> Option<Decision> {
        self.state().decisions.get(&xid).copied()
    }

    /// How many transactions were confirmed, and how many cancelled.
    pub(crate) fn decided(&self) -> (u64, u64) {
        let state = self.state();
        let confirmed = state.decisions.values().filter(|decision| **decision == Decision::Confirm);
        let confirmed = confirmed.count() as u64;
        (confirmed, state.decisions.len() as u64 - confirmed)
    }

    /// The recorded transactions that are not final.
    pub(crate) fn open(&self) -> Vec<GlobalTransaction> {
        let filter = ListFilter::of(handfast_coordinator::store::Show::Open);
        at_once(self.tables().list(&filter, usize::MAX)).expect("memory answers").transactions
    }

    /// The record of a transaction.
    pub(crate) fn recorded(&self, xid: Xid) -> Option<GlobalTransaction> {
        self.tables().get(xid)
    }

    /// Appends the batch, and checks that no decision has changed.
    fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let appended = at_once(self.tables().append(batch));
        match &appended {
            Ok(Appended::Durable) => {
                for write in &batch.writes {
                    self.look_at(write.global.xid);
                }
            }
            Ok(Appended::Damaged(_)) => {} // see `Client::append`
            Ok(Appended::Fenced(_)) => self.chronicle.count("store: batch of a replaced owner"),
            Err(_) => {} // a batch that lands late may not fit any more; otherwise its owner gets the error
        }
        appended
    }

    fn look_at(&self, xid: Xid) {
        let Some(global) = self.recorded(xid) else { return };
        let (before, now) = (self.decision(xid), global.state.decision());
        match (before, now) {
            (Some(before), now) if now != Some(before) => {
                self.chronicle.violation(
                    "I7",
                    format!("{xid}: {before:?} was durable, and now it is {now:?}"),
                );
            }
            (None, Some(decision)) => {
                self.state().decisions.insert(xid, decision);
                self.chronicle.note(format_args!("durable {xid} {decision:?}"));
            }
            _ => {}
        }
    }

    /// A call from this coordinator arrives now.
    fn call<T: Send + 'static>(
        &self,
        coordinator: usize,
        kind: Kind,
        work: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> oneshot::Receiver<Result<T, Error>> {
        let (reply, answer) = oneshot::channel();
        let mut state = self.state();
        if state.down_until > state.now {
            let pause = state.rng.u64(1..50);
            state.fail(pause, reply, "connection refused");
            return answer;
        }
        if state.cut.contains(&coordinator) {
            let pause = state.rng.u64(GIVE_UP / 10..GIVE_UP);
            state.fail(pause, reply, "no answer in time");
            return answer;
        }
        let takes = (state.mix.millis * state.slowness).max(1);
        let mut takes = state.rng.u64(takes / 3..=takes * 2);
        let StoreMix { deadlocks, lock_waits, answers_lost, lands_late, reads_fail, .. } =
            state.mix;
        let mut dice = state.rng.u32(..10_000);
        let mut falls = |odds: u32| match dice.checked_sub(odds) {
            None => true,
            Some(rest) => {
                dice = rest;
                false
            }
        };
        if kind == Kind::Read {
            if falls(reads_fail) {
                self.chronicle.count("store: read failed");
                state.fail(takes, reply, "the connection broke");
                return answer;
            }
            // The read happens after a while, and its reply takes a while too.
            let answer_takes = state.rng.u64(0..=takes);
            state.push(takes, false, move |database| {
                let found = work(database);
                database.state().push(answer_takes, false, move |_| drop(reply.send(found)));
            });
            return answer;
        }
        if falls(deadlocks) {
            self.chronicle.count("store: 1213");
            state.fail(takes, reply, "1213 (40001): Deadlock found when trying to get lock");
        } else if falls(lock_waits) {
            self.chronicle.count("store: 1205");
            takes += state.rng.u64(500..3000);
            state.fail(takes, reply, "1205 (HY000): Lock wait timeout exceeded");
        } else if falls(answers_lost) {
            self.chronicle.count("store: answer lost");
            let notices = takes + state.rng.u64(1..2000);
            state.push(takes, true, |database| drop(work(database)));
            state.fail(notices, reply, "expected to read 4 bytes, got 0 bytes at EOF");
        } else if falls(lands_late) {
            self.chronicle.count("store: landed late");
            let lands = takes + state.rng.u64(1..LATE);
            state.push(lands, true, |database| drop(work(database)));
            state.fail(takes, reply, "expected to read 4 bytes, got 0 bytes at EOF");
        } else {
            let answer_takes = state.rng.u64(0..=takes / 4 + 1);
            state.push(takes, true, move |database| {
                let done = work(database);
                database.state().push(answer_takes, false, move |_| drop(reply.send(done)));
            });
        }
        answer
    }
}

impl State {
    fn push(
        &mut self,
        after_millis: u64,
        writes: bool,
        run: impl FnOnce(&Database) + Send + 'static,
    ) {
        self.serial += 1;
        let due = self.now + Duration::from_millis(after_millis);
        self.jobs.insert((due, self.serial), Job { writes, run: Box::new(run) });
    }

    fn fail<T: Send + 'static>(
        &mut self,
        after_millis: u64,
        reply: oneshot::Sender<Result<T, Error>>,
        why: &'static str,
    ) {
        self.push(after_millis, false, move |_| drop(reply.send(Err(Error::unavailable(why)))));
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Database")
    }
}

fn at_once<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory answers at once")
}

/// The connections of one coordinator to the server.
#[derive(Debug)]
pub(crate) struct Client {
    database: Arc<Database>,
    coordinator: usize,
    /// Of the process that uses it.
    process: u64,
}

impl Client {
    pub(crate) fn new(database: Arc<Database>, coordinator: usize) -> Self {
        let process = database.begins();
        Self { database, coordinator, process }
    }

    /// The process stops. It hands its partitions back, and nobody notices a loss between that and the next takeover.
    pub(crate) fn stops(&self) {
        self.database.ends(self.process);
    }

    /// Reads on the replica or on the server. A read that is too old is made again on the server, as the real stores do.
    async fn read<T: Send + 'static>(
        &self,
        work: impl Fn(&MemoryStore) -> Result<T, Error> + Clone + Send + 'static,
    ) -> Result<T, Error> {
        if let Some(replica) = self.database.reader() {
            let work = work.clone();
            let found = self.call(Kind::Read, move |_| work(&replica)).await;
            if !matches!(found, Err(Error::Old(_) | Error::Replaced(_))) {
                return found;
            }
            self.database.chronicle.count("store: read too old");
        }
        self.call(Kind::Read, move |database| work(&database.tables())).await
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.call(Kind::Write, work).await
    }

    async fn call<T: Send + 'static>(
        &self,
        kind: Kind,
        work: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let answer = self.database.call(self.coordinator, kind, work);
        answer.await.unwrap_or_else(|_| Err(Error::unavailable("the server is gone")))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.database.ends(self.process);
    }
}

#[async_trait]
impl Store for Client {
    fn heartbeat(&self) -> Option<Duration> {
        Some(HEARTBEAT)
    }

    fn batches_at_a_time(&self) -> u16 {
        2
    }

    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        if !self.database.state().mix.has_clock {
            return Ok(None);
        }
        let clock = |database: &Database| Ok(Some(true_time(database.state().now)));
        self.call(Kind::Read, clock).await
    }

    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        self.call(Kind::Read, |database| at_once(database.tables().seats())).await
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        let (partitions, owner, process) = (partitions.to_vec(), owner.to_owned(), self.process);
        self.database.takes_over(process);
        let acquire = move |database: &Database| {
            let acquired = at_once(database.tables().acquire(&partitions, &owner, now));
            database.owns(process, &partitions);
            acquired
        };
        let acquired = self.write(acquire).await;
        if acquired.is_ok() {
            self.database.has_taken_over(process);
        }
        acquired
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let batch = batch.clone();
        let appended = self.write(move |database| database.append(&batch)).await;
        let wrong = match &appended {
            Err(Error::Corrupt(what)) => Some(what.clone()),
            Ok(Appended::Damaged(_)) if self.database.has_lost_batches() => {
                self.database.chronicle.count("store: loss noticed");
                None
            }
            Ok(Appended::Damaged(damaged)) => Some(format!("{damaged:?}")),
            Ok(Appended::Durable | Appended::Fenced(_))
            | Err(Error::Unavailable(_) | Error::Old(_) | Error::Replaced(_)) => None,
        };
        if let Some(what) = wrong {
            let text = format!("the store was handed a batch that cannot be: {what}");
            self.database.chronicle.violation("I7", text);
        }
        appended
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        self.read(move |tables| at_once(tables.load(xid, known))).await
    }

    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error> {
        self.read(move |tables| at_once(tables.resolved(xid, known))).await
    }

    async fn find_keys(
        &self,
        hashes: &[[u8; 32]],
        known: Known,
    ) -> Result<Vec<Option<Xid>>, Error> {
        let hashes = hashes.to_vec();
        self.read(move |tables| at_once(tables.find_keys(&hashes, known))).await
    }

    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, XidBytes)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error> {
        self.read(move |tables| at_once(tables.due(until, after.clone(), limit, known))).await
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        let filter = filter.clone();
        self.read(move |tables| at_once(tables.list(&filter, limit))).await
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        self.read(move |tables| at_once(tables.summary(now, stuck))).await
    }

    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<XidBytes>,
        limit: usize,
    ) -> Result<(u64, Option<XidBytes>), Error> {
        let purge = move |database: &Database| {
            at_once(database.tables().purge(ownership, finished_before, now, after, limit))
        };
        self.write(purge).await
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        let ownerships = ownerships.to_vec();
        self.write(move |database| at_once(database.tables().release(&ownerships))).await
    }
}
