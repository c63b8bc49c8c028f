//! A store in memory that fails on demand and keeps what it was given. For tests of the store's callers.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tokio::sync::watch;

use super::{memory::MemoryStore, *};

/// What happens to one `append`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It succeeds.
    Nothing,
    /// The batch never reaches the store.
    Unreached,
    /// The batch is applied, but the answer is lost.
    AnswerLost,
    /// The store refuses the batch permanently.
    Refused,
}

#[derive(Debug, Default)]
pub(crate) struct ScriptedStore {
    pub(crate) inner: Arc<MemoryStore>,
    faults: Mutex<VecDeque<Fault>>,
    batches: Mutex<Vec<Batch>>,
    /// While true, appends are not answered.
    held: watch::Sender<bool>,
    /// Whether an owner must write a heartbeat.
    pub(crate) beats: AtomicBool,
    /// While true, reads of one transaction read the store, but are not answered.
    loads_held: watch::Sender<bool>,
    /// While true, reads of one transaction and of keys fail.
    reads_fail: AtomicBool,
    /// While true, reads of due transactions read the store, but are not answered.
    dues_held: watch::Sender<bool>,
    dues: AtomicUsize,
    /// The content that reads see, if the store's reads are behind.
    replica: Mutex<Option<Arc<MemoryStore>>>,
    /// The time of the store's own clock. `None`: it has none.
    pub(crate) clock: Mutex<Option<Timestamp>>,
    /// How long a step of the purge takes, and how much longer for each transaction that it may look at.
    pub(crate) purge_takes: Mutex<(Duration, Duration)>,
    loads: Mutex<Vec<Xid>>,
    key_looks: Mutex<Vec<usize>>,
    /// Reads of keys from this one on read the store, but are not answered. `None`: all are answered.
    key_looks_held_from: watch::Sender<Option<usize>>,
}

impl ScriptedStore {
    /// The next appends have these results, in order.
    pub(crate) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        lock(&self.faults).extend(faults);
    }

    /// From now on, appends are not answered.
    pub(crate) fn hold(&self) {
        self.held.send_replace(true);
    }

    /// Appends are answered again.
    pub(crate) fn release(&self) {
        self.held.send_replace(false);
    }

    /// Whether reads of one transaction read the store but are not answered.
    pub(crate) fn hold_loads(&self, hold: bool) {
        self.loads_held.send_replace(hold);
    }

    /// Reads of keys from this one on (0 is the first) read the store, but are not answered. `None`: all are answered.
    pub(crate) fn hold_key_looks_from(&self, first: Option<usize>) {
        self.key_looks_held_from.send_replace(first);
    }

    pub(crate) fn fail_reads(&self, fail: bool) {
        self.reads_fail.store(fail, Ordering::SeqCst);
    }

    /// From now on reads see `replica`. With `None`, they see what is recorded.
    pub(crate) fn read_from(&self, replica: Option<MemoryStore>) {
        *lock(&self.replica) = replica.map(Arc::new);
    }

    fn replica(&self) -> Arc<MemoryStore> {
        lock(&self.replica).clone().unwrap_or_else(|| self.inner.clone())
    }

    fn readable(&self) -> Result<(), Error> {
        match self.reads_fail.load(Ordering::SeqCst) {
            true => Err(Error::unavailable("it was told to fail")),
            false => Ok(()),
        }
    }

    /// Whether reads of due transactions read the store but are not answered.
    pub(crate) fn hold_dues(&self, hold: bool) {
        self.dues_held.send_replace(hold);
    }

    /// How many reads of due transactions there were.
    pub(crate) fn dues(&self) -> usize {
        self.dues.load(Ordering::SeqCst)
    }

    /// Every batch that was appended so far, with repeats.
    pub(crate) fn batches(&self) -> Vec<Batch> {
        lock(&self.batches).clone()
    }

    /// Every xid that was looked up, in order.
    pub(crate) fn loads(&self) -> Vec<Xid> {
        lock(&self.loads).clone()
    }

    /// The number of keys in each read of keys.
    pub(crate) fn key_looks(&self) -> Vec<usize> {
        lock(&self.key_looks).clone()
    }
}

async fn answered(held: &watch::Sender<bool>) {
    let mut held = held.subscribe();
    held.wait_for(|held| !held).await.expect("the store lives");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}

#[async_trait::async_trait]
impl Store for ScriptedStore {
    fn heartbeat(&self) -> Option<Duration> {
        self.beats.load(Ordering::SeqCst).then_some(Duration::from_secs(2))
    }

    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        self.readable()?;
        self.inner.seats().await
    }

    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        Ok(*lock(&self.clock))
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        self.inner.acquire(partitions, owner, now).await
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        lock(&self.batches).push(batch.clone());
        answered(&self.held).await;
        let fault = lock(&self.faults).pop_front();
        match fault {
            None | Some(Fault::Nothing) => self.inner.append(batch).await,
            Some(Fault::Unreached) => Err(Error::unavailable("connection refused")),
            Some(Fault::AnswerLost) => {
                self.inner.append(batch).await?;
                Err(Error::unavailable("expected to read 4 bytes, got 0 bytes at EOF"))
            }
            Some(Fault::Refused) => Err(Error::Corrupt("data too long for column".to_owned())),
        }
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        lock(&self.loads).push(xid);
        self.readable()?;
        let lookup = self.replica().load(xid, known).await; // what was there when the read began
        answered(&self.loads_held).await;
        lookup
    }

    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error> {
        self.readable()?;
        self.replica().resolved(xid, known).await
    }

    async fn find_keys(
        &self,
        hashes: &[[u8; 32]],
        known: Known,
    ) -> Result<Vec<Option<Xid>>, Error> {
        let earlier = {
            let mut looks = lock(&self.key_looks);
            looks.push(hashes.len());
            looks.len() - 1
        };
        self.readable()?;
        let found = self.replica().find_keys(hashes, known).await;
        let mut held_from = self.key_looks_held_from.subscribe();
        let is_answered = |from: &Option<usize>| from.is_none_or(|from| earlier < from);
        held_from.wait_for(is_answered).await.expect("the store lives");
        found
    }

    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, XidBytes)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error> {
        let page = self.replica().due(until, after, limit, known).await;
        self.dues.fetch_add(1, Ordering::SeqCst);
        answered(&self.dues_held).await;
        page
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        self.inner.list(filter, limit).await
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        self.inner.summary(now, stuck).await
    }

    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<XidBytes>,
        limit: usize,
    ) -> Result<(u64, Option<XidBytes>), Error> {
        let (step, each) = *lock(&self.purge_takes);
        tokio::time::sleep(step + each * u32::try_from(limit).unwrap_or(u32::MAX)).await;
        self.inner.purge(ownership, finished_before, now, after, limit).await
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        self.inner.release(ownerships).await
    }
}
