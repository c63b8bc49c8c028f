//! The words between a partition and those who use it: what can be asked, and what is answered.

use std::{sync::Arc, time::Duration};

use handfast_proto::{BranchId, Xid};
use tokio::sync::oneshot;
use tracing::error;

use crate::{
    journal::Ended,
    store,
    transaction::{
        BranchSpec, DecisionRequest, GlobalTransaction, NewTransaction, Rejection, StuckAfter,
        retry::RetryPolicy,
    },
};

/// Commands that may wait in a partition's queue. Beyond that, Begin and Register are refused and other commands wait to be queued.
pub const COMMANDS_MAX: usize = 4096;

/// Callers of one partition that may wait at a time for a read, or for durability. Beyond that, Begin, Register and reads are refused;
/// Decide is not, since reservations wait for it. While the store is silent, nothing else bounds them.
pub const WAITING_MAX: usize = 2048;

/// The part of the configuration that a partition needs.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Pauses between attempts.
    pub retry: RetryPolicy,
    /// Deadline of the first call to a participant. It doubles after each call that reached it.
    pub call_timeout: Duration,
    /// Longest deadline of a call.
    pub call_timeout_max: Duration,
    /// Transactions that all partitions together may hold in memory. Above that, no new one begins.
    pub open_max: usize,
    /// Bytes that those transactions may have. Above that, no new one begins and no branch joins.
    pub open_bytes_max: usize,
    /// When a decided transaction counts as stuck.
    pub stuck_after: StuckAfter,
}

/// How far a transaction must have come before the answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Answer as soon as the present state is durable.
    Now,
    /// Answer when there is a decision.
    Decided,
    /// Answer when every branch has acknowledged the decision.
    Completed,
}

impl Until {
    pub(crate) fn is_reached(self, global: &GlobalTransaction) -> bool {
        match self {
            Self::Now => true,
            Self::Decided => global.state.decision().is_some(),
            Self::Completed => global.state.is_final(),
        }
    }
}

/// A message to a partition.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields' types say what they are")]
pub enum Command {
    /// Begin a transaction. If its key is known, find the transaction of that key instead.
    Begin { new: NewTransaction, until: Until, reply: Reply },
    /// Find the transaction of a key, given the key's SHA-256.
    FindKey { hash: [u8; 32], reply: Reply },
    /// Read or change one transaction.
    Ask(Ask),
}

impl Command {
    /// Whether it may be refused for load. A decision must not be: reservations wait for it.
    pub(super) fn may_be_refused(&self) -> bool {
        match self {
            Self::Begin { .. } | Self::FindKey { .. } => true,
            Self::Ask(Ask { what, .. }) => match what {
                What::Get | What::Register(_) | What::BeginAgain(_) => true,
                What::Decide(_) | What::Retry | What::Resolve { .. } => false,
            },
        }
    }

    /// The transaction that it is about, if it names one.
    pub fn xid(&self) -> Option<Xid> {
        match self {
            Self::Begin { .. } | Self::FindKey { .. } => None,
            Self::Ask(Ask { xid, .. }) => Some(*xid),
        }
    }

    /// The channel for the answer.
    pub fn into_reply(self) -> Reply {
        match self {
            Self::Begin { reply, .. }
            | Self::FindKey { reply, .. }
            | Self::Ask(Ask { reply, .. }) => reply,
        }
    }
}

/// A question or a request about one transaction.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields' types say what they are")]
pub struct Ask {
    pub xid: Xid,
    pub what: What,
    pub until: Until,
    pub reply: Reply,
}

/// What is asked about a transaction.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields' names say what they are")]
pub enum What {
    /// Read its state.
    Get,
    /// Add branches.
    Register(Vec<BranchSpec>),
    /// Decide, or repeat a decision.
    Decide(DecisionRequest),
    /// Make its next attempts now.
    Retry,
    /// Close a branch in the participant's place, as an operator did its work by hand.
    Resolve { branch_id: BranchId, operator: String, reason: String },
    /// A repeat of the keyed Begin that made it. Carries the digest of the repeated content.
    BeginAgain([u8; 32]),
}

/// The channel for one answer. A caller that gave up has dropped the receiving end.
pub type Reply = oneshot::Sender<Result<Answer, Error>>;

/// What is answered about a transaction. Whatever in it carries a promise is durable.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The transaction's state when the answer was made.
    pub global: Arc<GlobalTransaction>,
    /// For a keyed Begin: the key's transaction existed before this call.
    pub existed: bool,
}

/// Why a command has no [`Answer`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No record was ever made under this xid, so nothing was tried under it.
    #[error("{0} was never recorded, so nothing was tried under it")]
    NeverRecorded(Xid),
    /// There may have been such a transaction. It may have been deleted after its retention.
    #[error("{0} is not known any more: it may have finished and been deleted after its retention")]
    Forgotten(Xid),
    /// The store has lost records of this epoch, and there may have been such a transaction among them.
    #[error(
        "{0} may have been lost: the store has lost records of that time, and what became of it nobody here can say"
    )]
    Lost(Xid),
    /// No transaction has this key.
    #[error("no transaction has this idempotency key")]
    KeyUnknown,
    /// The key belongs to a transaction with other content.
    #[error(
        "this idempotency key belongs to {0}, which was begun with another name or other branches"
    )]
    KeyTaken(Xid),
    /// The transaction's state does not allow it.
    #[error("{rejection}")]
    #[allow(missing_docs, reason = "the fields' names say what they are")]
    Rejected { rejection: Rejection, global: Arc<GlobalTransaction> },
    /// Too many transactions are open.
    #[error(
        "{open_max} transactions are open, which is as many as this coordinator takes (limits.open)"
    )]
    #[allow(missing_docs, reason = "the field's name says what it is")]
    TooManyOpen { open_max: usize },
    /// The open transactions are too large.
    #[error(
        "the open transactions have as many bytes as this coordinator takes, {open_bytes_max} (limits.open_megabytes)"
    )]
    #[allow(missing_docs, reason = "the field's name says what it is")]
    TooManyBytes { open_bytes_max: usize },
    /// The partition's queue is full, or too many callers wait for its store.
    #[error("this coordinator has as many calls waiting as it takes")]
    TooManyCalls,
    /// The store does not answer. The command may or may not take effect.
    #[error("the store does not answer; what was asked may or may not take effect")]
    StoreSilent,
    /// The command was not taken in: this coordinator does not own the partition, or not in that epoch. It may be sent to the
    /// owner without a doubt about what it did here. A command about one transaction names it.
    #[error("this coordinator does not own the partition of {}; nothing was done", match .0 {
        Some(xid) => xid.to_string(),
        None => "this key".to_owned(),
    })]
    NotHere(Option<Xid>),
    /// Another coordinator took the partition over after the command was taken in. The command may or may not take effect.
    #[error("another coordinator has taken over; ask again, and that one will answer")]
    Fenced,
    /// This coordinator is stopping.
    #[error("this coordinator is stopping")]
    Stopping,
    /// A record is damaged. The log says which, and how.
    #[error("the transaction's record is damaged; the coordinator's log says more")]
    Corrupt,
}

impl From<Ended> for Error {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Fenced => Self::Fenced,
            Ended::Corrupt => Self::Corrupt,
        }
    }
}

impl From<&store::Error> for Error {
    fn from(error: &store::Error) -> Self {
        match error {
            store::Error::Unavailable(_) | store::Error::Old(_) | store::Error::Replaced(_) => {
                Self::StoreSilent
            }
            store::Error::Corrupt(what) => {
                error!(what, "a record is damaged");
                Self::Corrupt
            }
        }
    }
}
