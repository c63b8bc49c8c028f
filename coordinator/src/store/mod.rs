//! Where global transactions are recorded. A store saves what it is given, in one local transaction. It decides nothing. Every
//! implementation passes the same tests, `conformance/`.
//!
//! A store is safe because it applies a batch exactly once, and only for the owner of the batch's partitions.
//!
//! - A partition has a row `(partition, epoch, nonce, position)`. A takeover adds one to the epoch and draws a new nonce.
//! - A batch moves the position of each of its partitions from n - 1 to n, in its own local transaction. It does so only if
//!   epoch and nonce are still those of its owner. So a batch of a replaced owner changes nothing, however late it arrives.
//! - The nonce tells histories apart. After a failover that lost a takeover, or on a restored backup, the same epoch can be
//!   given out twice.
//! - If the answer to a COMMIT is lost, the same batch is appended again with the same n. Either the first attempt was applied
//!   (the position is already n), or the repeat is applied.
//! - A read counts only if the partition's row that it shows is at least as new as its owner knows ([`Known`]).
//! - A write names the state that its transaction must have before ([`Write::before`]).

#[cfg(test)]
mod conformance;
mod judge;
pub mod memory;
pub mod mysql;
#[cfg(test)]
pub(crate) mod scripted;
mod sql;
pub mod sqlite;

use std::{collections::BTreeMap, error::Error as StdError, fmt, sync::Arc, time::Duration};

use handfast_proto::{BranchId, Xid};

use self::judge::{Epoch, PartitionRow, Row, judge, loss};
use crate::transaction::{
    BranchSet, Decision, GlobalTransaction, Payload, State, StuckAfter, Timestamp,
};

/// The number of partitions. Fixed when the store is made, since an xid contains its partition.
pub const PARTITIONS: u16 = 16;

/// All partitions, for an owner of the whole store.
pub const ALL_PARTITIONS: [u16; PARTITIONS as usize] = {
    let mut all = [0; PARTITIONS as usize];
    let mut partition = 0;
    while partition < PARTITIONS {
        all[partition as usize] = partition;
        partition += 1;
    }
    all
};

/// The right to write a partition, until another process takes the partition over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    /// The number of the partition, below [`PARTITIONS`].
    pub partition: u16,
    /// Grows by one with each takeover.
    pub epoch: u32,
    /// Random. It is part of every xid of this epoch.
    pub nonce: u32,
    /// The oldest epoch of which the store has lost batches. `None`: no loss is known. Since then, a lost epoch may have the number
    /// of a recorded one.
    pub lost_from: Option<u32>,
    /// The store has lost batches of epochs up to this one. `None`: no loss is known. An undecided transaction of these epochs
    /// may have had a decision that callers were told. So the owner does not decide it. A loss that is noticed later ends the
    /// ownership.
    pub lost_through: Option<u32>,
}

/// The recorded owner of a partition. A live owner changes the position every few seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// The number of the partition, below [`PARTITIONS`].
    pub partition: u16,
    /// The owner's epoch.
    pub epoch: u32,
    /// The nonce of that epoch.
    pub nonce: u32,
    /// The number of the owner's latest batch.
    pub position: u64,
    /// The owner's name, for people. `None`: the partition was handed back.
    pub owner: Option<String>,
}

/// Changes that become durable together, or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// One guard for each partition with changes in this batch.
    pub guards: Vec<Guard>,
    /// At most one write for each transaction. Each belongs to a partition with a guard.
    pub writes: Vec<Write>,
}

/// States that a batch is number `position` of this epoch of this partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// The number of the partition, below [`PARTITIONS`].
    pub partition: u16,
    /// The epoch of the batch's owner.
    pub epoch: u32,
    /// The nonce of that epoch.
    pub nonce: u32,
    /// 1, 2, 3, … within the epoch. A number is never reused for other content.
    pub position: u64,
}

/// A transaction to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Its new state.
    pub global: Arc<GlobalTransaction>,
    /// How its own row changes.
    pub head: Head,
    /// The state that its row must have; `None`: it must have no row. Otherwise nothing is written. If several changes are
    /// written as one, this is the state before the first of them. So a faulty writer cannot change one decision into the
    /// other.
    pub before: Option<State>,
    /// Branches from this index on are not recorded yet. All earlier branches must be recorded; otherwise nothing is written.
    pub new_branches: usize,
    /// Earlier branches of which there is more to record.
    pub changed_branches: BranchSet,
}

impl Write {
    /// The result that is recorded with this write. Later writes leave it as it is.
    pub(crate) fn new_result(&self) -> Option<&Payload> {
        let is_new = self.before.is_none_or(|before| before == State::Trying);
        self.global.result.as_deref().filter(|_| is_new)
    }
}

/// How a transaction's own row changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Head {
    /// Leave it as it is, except for the number of branches.
    Keep,
    /// Only mark the transaction as finished: its decision is already recorded.
    Finish,
    /// Update it.
    Update,
    /// Insert it.
    Insert,
}

/// What a reader knows about its partition. A read that shows less comes from a server that is behind, or from another history
/// of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The ownership under which the partition is read.
    pub ownership: Ownership,
    /// The number of this ownership's latest batch that is known to be durable.
    pub position: u64,
}

impl Ownership {
    /// The last xid that a transaction of a lost epoch can have. `None`: no loss is known.
    #[must_use]
    pub fn last_lost(&self) -> Option<Xid> {
        let epoch = self.lost_through?;
        Some(Xid { epoch, ..xids_of(self.partition).1 })
    }

    /// Whether the transaction is undecided and of a lost epoch. Its decision may have been lost after callers were told, so no
    /// new decision may be made.
    #[must_use]
    pub fn may_have_lost_the_decision_of(&self, global: &GlobalTransaction) -> bool {
        global.state == State::Trying && self.last_lost().is_some_and(|last| global.xid <= last)
    }
}

/// The result of appending a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// It is durable, since now or since an earlier attempt.
    Durable,
    /// Nothing was applied, and nothing ever will be: these partitions have another owner.
    Fenced(Vec<u16>),
    /// Nothing was applied. The records of these partitions contradict their owner's batch, and a person must look. The same
    /// batch without these partitions may be appended.
    Damaged(Vec<Damage>),
}

/// A problem with a partition's records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The number of the partition, below [`PARTITIONS`].
    pub partition: u16,
    /// The problem in words, for the log.
    pub what: String,
    /// How many acknowledged batches are missing. The takeover counts as one. 0: it is another problem.
    pub lost: u64,
}

/// The result of looking up one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// Its recorded state.
    Found(Box<GlobalTransaction>),
    /// It is not recorded. The fields say what is known about the place where it would be.
    Absent {
        /// The largest xid of its partition that was deleted after its retention.
        purged_through: Option<Xid>,
        /// The nonce of its epoch, if its partition had such an epoch.
        nonce: Option<u32>,
        /// Whether the store has lost batches of that epoch. Then the transaction may have been recorded, and callers may have
        /// been told.
        lost: bool,
    },
}

/// The bytes of an xid as they are recorded. In a damaged store they may be no xid, and pages go on after them all the same.
pub type XidBytes = Vec<u8>;

/// One page of due transactions. Their owner may not have them in memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DuePage {
    /// The transactions that are due by the given moment, in order of `(due_at, xid)`.
    pub transactions: Vec<GlobalTransaction>,
    /// Where the next page starts. `None`: this is the last page.
    pub next: Option<(Timestamp, XidBytes)>,
    /// When the next transaction becomes due. Set only on the last page.
    pub next_due_at: Option<Timestamp>,
}

/// Selects the transactions to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListFilter {
    /// Their state.
    pub show: Show,
    /// Only transactions with this name.
    pub name: Option<String>,
    /// Only transactions that have all these labels.
    pub labels: BTreeMap<String, String>,
    /// Only transactions after this one in the list: older ones, and equally old ones with a smaller xid.
    pub after: Option<Listed>,
    /// Names and labels have no index. A search for them with [`Show::All`] looks at this many transactions of each partition.
    pub looked_max: usize,
}

impl ListFilter {
    /// The default of `looked_max`: 160,000 transactions in all, which takes about a second.
    pub const LOOKED_MAX: usize = 10_000;

    /// Selects by state only.
    #[must_use]
    pub fn of(show: Show) -> Self {
        let labels = BTreeMap::new();
        Self { show, name: None, labels, after: None, looked_max: Self::LOOKED_MAX }
    }

    /// Whether a transaction has all the labels that are asked for.
    pub(crate) fn matches_labels(&self, global: &GlobalTransaction) -> bool {
        self.labels.iter().all(|(key, value)| global.labels.get(key) == Some(value))
    }

    /// Whether every row must be read to see if it matches.
    pub(crate) fn searches(&self) -> bool {
        self.show == Show::All && (self.name.is_some() || !self.labels.is_empty())
    }
}

/// What was found for a [`ListFilter`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Newest first. Their payloads may be left out.
    pub transactions: Vec<GlobalTransaction>,
    /// Where the search has ended: nothing that comes later in the list was looked at. `None`: at the end.
    pub looked_to: Option<Listed>,
}

/// A transaction's place in a list, which is in descending order of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// When it began.
    pub begun_at: Timestamp,
    /// The transaction.
    pub xid: Xid,
}

impl Listed {
    pub(crate) const fn of(global: &GlobalTransaction) -> Self {
        Self { begun_at: global.begun_at, xid: global.xid }
    }
}

/// The states to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// All transactions.
    All,
    /// Transactions that are not final.
    Open,
    /// Transactions that are stuck at this moment.
    Stuck(Timestamp, StuckAfter),
    /// Undecided transactions whose decision may have been in batches that the store has lost.
    Lost,
}

/// How many transactions are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Transactions that are not final.
    pub open: u64,
    /// Open transactions that are stuck.
    pub stuck: u64,
    /// When the oldest open transaction began.
    pub oldest: Option<Timestamp>,
}

/// The cost of all batches since the store was opened. The purge is not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Statements other than BEGIN and COMMIT.
    pub statements: u64,
    /// New or changed rows of transactions, branches, keys and resolutions. Each batch also changes one row for each of its
    /// partitions, which are not counted.
    pub rows: u64,
}

/// Why a store could not carry out a call.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store did not answer, or is unable to now. The call may or may not have taken effect: retry it.
    #[error("the store does not answer: {0}")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// The read was older than what is known, and was dropped. Retry, and append a batch: only that shows whether the partition
    /// is still ours and whether records were lost.
    #[error("the store's server is behind, or another one: {0}")]
    Old(String),
    /// The read shows a later owner of the partition. A read does not prove it: append a batch to be sure.
    #[error("the store shows another owner: {0}")]
    Replaced(String),
    /// A record is damaged, or the database refuses permanently. A retry does not help; a person must look.
    #[error("the store's records are inconsistent: {0}")]
    Corrupt(String),
}

impl Error {
    /// An [`Error::Unavailable`] with this cause.
    pub fn unavailable(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable(cause.into())
    }
}

/// Stores global transactions. All methods may be called at any time and from any task. Every call returns, even if the
/// database does not answer.
#[async_trait::async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// How often an idle owner must append an empty batch. The batch shows that the owner is alive, and tells it if it was
    /// replaced. `None`: a live owner cannot be replaced.
    fn heartbeat(&self) -> Option<Duration> {
        None
    }

    /// The number n of batches that may be appended at the same time. Batch k (0 to n - 1) contains only partitions whose
    /// number modulo n is k.
    fn batches_at_a_time(&self) -> u16 {
        1
    }

    /// The cost of batches so far, for benchmarks. Zeros in a store that does not count.
    fn written(&self) -> Written {
        Written::default()
    }

    /// The owners of the partitions. Empty in a store that only one process can open: [`Store::acquire`] never has to wait
    /// there.
    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        Ok(Vec::new())
    }

    /// The time of the store's own clock. `None`: it has only this machine's clock.
    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        Ok(None)
    }

    /// How often the most contested partition was taken over in that time, by the clocks of its owners. Zero in a store that
    /// only one process can open.
    async fn takeovers(&self, _from: Timestamp, _until: Timestamp) -> Result<u64, Error> {
        Ok(0)
    }

    /// Takes over all of `partitions`, or none. Each gets the next epoch and a new nonce. Returns the ownerships in the order
    /// of `partitions`. Other partitions do not change. After the return, batches of earlier owners of these partitions change
    /// nothing. `owner` names this process for people. A repeat is another takeover.
    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error>;

    /// Makes `batch` durable, exactly once. A crash before the return leaves all of the batch or nothing. After
    /// [`Error::Unavailable`] the result is unknown: append the same batch again before any other batch of its partitions.
    ///
    /// If the store lacks batches that this owner knows to be durable, it marks their epoch as lost, and ends the present
    /// ownership of the partition: its owner took over before the loss was known, and might decide what was decided already.
    async fn append(&self, batch: &Batch) -> Result<Appended, Error>;

    /// Looks up one transaction in the partition of `known`. Sees everything that is known to be durable, or fails with
    /// [`Error::Old`] or [`Error::Replaced`]. Every read proves that it is new enough, since a connection may lead to a server
    /// that is behind.
    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error>;

    /// The branches of a transaction that operators have resolved by hand, each with the decision that it was resolved for. They are
    /// kept for ever, also when the transaction itself is deleted. Sees the same as [`Store::load`].
    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error>;

    /// Looks up idempotency keys by their hashes, in the partition of `known`. Returns the transaction of each key, in order.
    /// Sees the same as [`Store::load`].
    async fn find_keys(&self, hashes: &[[u8; 32]], known: Known)
    -> Result<Vec<Option<Xid>>, Error>;

    /// Up to `limit` transactions of the partition of `known` that were due by `until`. Starts after the end of an earlier
    /// page. Sees the same as [`Store::load`]. A record that is too damaged to be carried
    /// out is logged and left out. A transaction that may have lost its decision is left out too
    /// ([`Ownership::may_have_lost_the_decision_of`]): only an operator can decide it.
    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, XidBytes)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error>;

    /// For operators: up to `limit` transactions that match, newest first.
    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error>;

    /// For operators: how many transactions are open, and how many of these are stuck at `now`.
    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error>;

    /// Deletes transactions that finished before that moment, with their branches and keys. Looks at up to `limit` transactions
    /// of one partition after `after`, in order of their xids. Returns how many it deleted and where it stopped. `None`: at the
    /// end of the partition, or where all later transactions are younger. A transaction that began after `now` says nothing
    /// about those that follow: the clock was ahead when it began. The largest deleted xid is remembered. Operators'
    /// resolutions are kept for ever. Only the owner may delete: for a replaced owner, nothing is deleted and the purge is
    /// over.
    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<XidBytes>,
        limit: usize,
    ) -> Result<(u64, Option<XidBytes>), Error>;

    /// Completes when the store is not where it was: its file was deleted, moved or replaced. Says so in words. From then on no
    /// batch is [`Appended::Durable`].
    async fn gone(&self) -> String {
        std::future::pending().await
    }

    /// Closes the store in order. Nothing is asked of it afterwards. Safety does not depend on it.
    async fn close(&self) {}

    /// Hands these partitions back. Each is handed back only if its epoch and nonce are still the given ones. Safety does not
    /// depend on it.
    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error>;
}

/// The first and the last xid that a partition could ever have.
#[must_use]
pub fn xids_of(partition: u16) -> (Xid, Xid) {
    (
        Xid { partition, epoch: 0, sequence: 0, nonce: 0 },
        Xid { partition, epoch: u32::MAX, sequence: Xid::SEQUENCE_MAX, nonce: u32::MAX },
    )
}
