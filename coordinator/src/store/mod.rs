//! Where global transactions are recorded. A store saves what it is handed, in one local transaction. It decides nothing. Every
//! implementation passes the same tests, `conformance/`.
//!
//! What makes it safe: a batch is applied exactly once, and only by the owner of its partitions.
//!
//! - A partition has a row `(partition, epoch, nonce, position)`. A takeover makes the epoch one larger and draws a new nonce.
//!   A batch moves the position of every partition that it carries from n - 1 to n, inside its own local transaction, and only if
//!   epoch and nonce are still its owner's. A batch of an owner that was replaced changes nothing, however late it arrives.
//!   The nonce tells histories apart: after a failover that lost a takeover, or on a restored backup, the same epoch can be
//!   given out twice.
//! - If the answer to a COMMIT is lost, the same batch is appended again with the same n. Either the first attempt was applied
//!   (the position is n), or this one is.
//! - A read counts only if it shows the partition's row at least as new as its owner knows it to be ([`Known`]).
//! - A write names the state that its transaction must have ([`Write::before`]).

#[cfg(test)]
mod conformance;
mod judge;
pub mod memory;
pub mod mysql;
#[cfg(test)]
pub(crate) mod scripted;
mod sql;
pub mod sqlite;

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use handfast_proto::Xid;

use self::judge::{Recorded, Row, judge};
use crate::transaction::{BranchSet, GlobalTransaction, State, StuckAfter, Timestamp};

/// Partitions of a store. Fixed when the store is made: an xid names its partition for ever.
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

/// The right to write a partition, until somebody takes it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    /// Which partition.
    pub partition: u16,
    /// Grows by one with each takeover.
    pub epoch: u32,
    /// Random, and part of every xid of this epoch.
    pub nonce: u32,
    /// The store has lost batches of epochs up to this one; `None`: no loss is known. A transaction of these epochs that is recorded
    /// without a decision may have had one, and callers may have been told. So its owner does not decide it.
    pub lost_through: Option<u32>,
}

/// Who owns a partition, as recorded. An owner that is alive changes the position every few seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Which partition.
    pub partition: u16,
    /// Of the owner.
    pub epoch: u32,
    /// Of the same epoch.
    pub nonce: u32,
    /// Number of its latest batch.
    pub position: u64,
    /// The owner's name, for people. `None`: the partition was handed back.
    pub owner: Option<String>,
}

/// Changes that become durable together, or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// One for each partition that has changes in it, each once.
    pub guards: Vec<Guard>,
    /// Each transaction once. All belong to partitions that have a guard.
    pub writes: Vec<Write>,
}

/// That a batch is the `position`th of this epoch of this partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// Which partition.
    pub partition: u16,
    /// Whose batch it is.
    pub epoch: u32,
    /// Of the same epoch.
    pub nonce: u32,
    /// 1, 2, 3, … within the epoch. A number never gets other content.
    pub position: u64,
}

/// One transaction as it is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// What it is like now.
    pub global: Arc<GlobalTransaction>,
    /// What to do with its own row.
    pub head: Head,
    /// The state that its row must have, or nothing is written. `None`: it must have no row. If several changes are written as one,
    /// this is the state before the first of them. So no mistake of the writer can turn one decision into the other.
    pub before: Option<State>,
    /// Branches from this index on have no row yet. All branches before it must have a row, or nothing is written.
    pub new_branches: usize,
    /// Branches before that index whose rows change.
    pub changed_branches: BranchSet,
}

/// What to do with a transaction's own row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Head {
    /// Leave it as it is, but for the number of branches.
    Keep,
    /// Only note that the transaction is finished: its decision is recorded already.
    Finish,
    /// Update it.
    Update,
    /// Insert it.
    Insert,
}

/// What a reader knows of the partition that it reads. A read that does not show at least this comes from a server that is behind, or
/// from another history of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Whose transactions are read, and under which ownership.
    pub ownership: Ownership,
    /// Number of the latest batch of this ownership that is known to be durable.
    pub position: u64,
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// It is durable: now, or since an earlier attempt.
    Durable,
    /// Nothing of it was applied, and nothing ever will be for these partitions: they have another owner.
    Fenced(Vec<u16>),
    /// Nothing of it was applied. What the store holds of these partitions does not fit their owner's batch, and a person must look.
    /// The same batch without them may be appended.
    Damaged(Vec<Damage>),
}

/// What is wrong with a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which partition.
    pub partition: u16,
    /// In words, for the log.
    pub what: String,
    /// Batches that the store has acknowledged and does not have any more; 0: it is something else.
    pub lost: u64,
}

/// What a look for one transaction found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It is recorded, like this.
    Found(Box<GlobalTransaction>),
    /// It is not recorded. What is known of where it would be:
    Absent {
        /// The largest xid of its partition that was ever deleted after its retention.
        purged_through: Option<Xid>,
        /// The nonce of its partition's epoch, if there was such an epoch.
        nonce: Option<u32>,
        /// The store has lost batches of that epoch: what is missing may have been recorded, and told.
        lost: bool,
    },
}

/// One page of transactions that are due and may be in nobody's memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DuePage {
    /// The transactions that are due at the moment asked for, in order of `(due_at, xid)`.
    pub transactions: Vec<GlobalTransaction>,
    /// Where the next page starts; `None`: this was the last one.
    pub next: Option<(Timestamp, Xid)>,
    /// When the next transaction becomes due. Given with the last page.
    pub next_due_at: Option<Timestamp>,
}

/// Which transactions to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListFilter {
    /// In what state.
    pub show: Show,
    /// Only those of this name.
    pub name: Option<String>,
    /// Only those that come after this one in the list: older, or of the same moment with a smaller xid.
    pub after: Option<Listed>,
}

/// The place of a transaction in a list: when it began, and its xid.
pub type Listed = (Timestamp, Xid);

/// In what state the listed transactions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// In any.
    All,
    /// Not final.
    Open,
    /// Stuck at this moment.
    Stuck(Timestamp, StuckAfter),
}

/// How many transactions are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Not final.
    pub open: u64,
    /// Of those, stuck.
    pub stuck: u64,
    /// When the oldest open one began.
    pub oldest: Option<Timestamp>,
}

/// What batches have cost since the store was opened, without the purge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Other than BEGIN and COMMIT.
    pub statements: u64,
    /// Of transactions, branches, keys and resolutions, new or changed. A batch changes one more for each partition in it.
    pub rows: u64,
}

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store did not answer, or could not do it now. What was asked may or may not have happened: retry it.
    #[error("the store does not answer: {0}")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// What was read is older than what is known, and was dropped. Retry, and append a batch: only that can tell whether the partition
    /// is still ours and whether something was lost.
    #[error("the store's server is behind, or another one: {0}")]
    Old(String),
    /// What was read shows a later owner of the partition. A read proves nothing: append a batch to know.
    #[error("the store shows another owner: {0}")]
    Replaced(String),
    /// A record is damaged, or the database refuses for good. A retry does not help; a person must look.
    #[error("the store holds what cannot be: {0}")]
    Corrupt(String),
}

impl Error {
    /// The store did not answer, and this is why.
    pub fn unavailable(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable(cause.into())
    }
}

/// Keeps global transactions. All methods may be called at any time and from any task. Every call ends, even if the database does not
/// answer.
#[async_trait::async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// How often an owner with nothing to write must append an empty batch, to show that it is there and to learn that it was
    /// replaced; `None`: nobody can replace it while it lives.
    fn heartbeat(&self) -> Option<Duration> {
        None
    }

    /// How many batches it can take at the same time, n. Batch k (0 to n - 1) carries only partitions whose number modulo n is k.
    fn batches_at_a_time(&self) -> u16 {
        1
    }

    /// What batches have cost so far, for benchmarks. Zeros in a store that does not count.
    fn written(&self) -> Written {
        Written::default()
    }

    /// Who owns the partitions. Empty in a store that only one process can open: nobody has to wait before [`Store::acquire`].
    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        Ok(Vec::new())
    }

    /// The time by the store's own clock; `None`: it has no other clock than this machine's.
    async fn clock(&self) -> Result<Option<Timestamp>, Error> {
        Ok(None)
    }

    /// How often a partition was taken over in that time, by the clocks of its owners: the largest number of all partitions. Zero in a
    /// store that only one process can open.
    async fn takeovers(&self, _from: Timestamp, _until: Timestamp) -> Result<u64, Error> {
        Ok(0)
    }

    /// Takes over `partitions`, all or none of them, each with an epoch that is one larger and a new nonce. Returns their
    /// ownerships in the order in which the partitions were named; the other partitions stay as they are. When it returns,
    /// batches of earlier owners of these partitions change nothing any more. `owner` names this process for people. A repeat is
    /// another takeover.
    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        now: Timestamp,
    ) -> Result<Vec<Ownership>, Error>;

    /// Makes `batch` durable, exactly once. A crash before it returns leaves all of it or nothing. After
    /// [`Error::Unavailable`] nobody knows which: the same batch must be appended again, before any other of its partitions.
    async fn append(&self, batch: &Batch) -> Result<Appended, Error>;

    /// Looks for one transaction of the partition that is `known`. Sees everything that is known to be durable, or fails with
    /// [`Error::Old`] or [`Error::Replaced`]: what is read proves by itself that it is new enough, since connections may lead to servers
    /// that are behind.
    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error>;

    /// Looks for idempotency keys of the partition that is `known`, by their hashes; gives for each, in order, the transaction it
    /// belongs to. Sees what [`Store::load`] sees.
    async fn find_keys(&self, hashes: &[[u8; 32]], known: Known)
    -> Result<Vec<Option<Xid>>, Error>;

    /// Of the partition that is `known`, up to `limit` transactions that were due by `until`, after the place where an earlier page
    /// ended. Sees what [`Store::load`] sees. A damaged record is logged and left out.
    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, Xid)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error>;

    /// For operators: the newest transactions that fit, newest first, at most `limit`.
    async fn list(
        &self,
        filter: &ListFilter,
        limit: usize,
    ) -> Result<Vec<GlobalTransaction>, Error>;

    /// For operators: how many are open, and how many of those are stuck at `now`.
    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error>;

    /// Deletes transactions that finished before that moment, with their branches and keys: looks at up to `limit` of one
    /// partition after `after`, in order of their xids, and says how many it deleted and where it stopped (`None`: at the end
    /// of the partition, or where all that follow are younger). A transaction that began after `now` tells nothing about those
    /// that follow: the clock was ahead when it began. Remembers the largest xid that it deleted. What operators resolved stays
    /// for ever. Only the owner deletes: for one that was replaced, nothing is deleted and nothing more is to do.
    async fn purge(
        &self,
        ownership: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<Xid>,
        limit: usize,
    ) -> Result<(u64, Option<Xid>), Error>;

    /// Hands these partitions back: each one only if epoch and nonce are still those that are named. Changes nothing that safety rests
    /// on.
    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error>;
}

/// The xids of a partition: from the first to the last that it could ever have.
#[must_use]
pub fn xids_of(partition: u16) -> (Xid, Xid) {
    (
        Xid { partition, epoch: 0, sequence: 0, nonce: 0 },
        Xid { partition, epoch: u32::MAX, sequence: Xid::SEQUENCE_MAX, nonce: u32::MAX },
    )
}
