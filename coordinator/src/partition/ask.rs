//! The messages between a partition and its callers: what a caller can ask, and what the partition answers.

use std::{sync::Arc, time::Duration};

use handfast_proto::{BranchId, Xid};
use tokio::sync::oneshot;
use tracing::error;

use crate::{
    journal::Ended,
    store,
    transaction::{
        BranchSpec, Decision, DecisionRequest, GlobalTransaction, Key, NewTransaction, Rejection,
        StuckAfter, retry::RetryPolicy,
    },
};

/// Commands that may wait in a partition's queue. When it is full, Begin and Register are refused, and
/// other commands wait for a place.
pub const COMMANDS_MAX: usize = 4096;

/// Callers of one partition that may wait at a time for reads, and as many again for durability. Above this, calls are refused
/// that would have to wait for the same: a call whose answer needs no batch is answered even if many decisions wait for one.
/// Decide is never refused, since reservations wait for it. While the store does not answer, only this limit bounds the waiting
/// callers.
pub const WAITING_MAX: usize = 2048;

/// The part of the configuration that a partition needs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Pauses between attempts.
    pub retry: RetryPolicy,
    /// Deadline of the first call to a participant. It doubles after each call that reached it.
    pub call_timeout: Duration,
    /// Longest deadline of a call.
    pub call_timeout_max: Duration,
    /// Transactions that all partitions together may hold in memory. Above that, no new one begins.
    pub open_max: usize,
    /// Bytes that those transactions may take in memory. Above that, no new transaction begins and no branch is added.
    pub open_bytes_max: usize,
    /// When a decided transaction counts as stuck.
    pub stuck_after: StuckAfter,
    /// The keys of the labels that log lines show.
    pub log_labels: Arc<[String]>,
    /// A transaction that is to be recorded with its decision is recorded when it has been open for this long.
    pub record_after: Duration,
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
    /// The transaction that the command names, if it names one.
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
    /// Read its state for the participant of this branch, which still has a reservation.
    Inquire(BranchId),
    /// Add branches.
    Register(Vec<BranchSpec>),
    /// Decide, or repeat a decision.
    Decide(DecisionRequest),
    /// Call the participants again now, without waiting for the backoff.
    Retry,
    /// Mark a branch as done in place of the participant, because an operator did its work by hand.
    Resolve { branch_id: BranchId, operator: String, reason: String },
    /// Decide in place of a decision that may be lost, because an operator has found out what is right.
    ResolveTransaction { decision: Decision, operator: String, reason: String },
    /// Read its state, because the key with this hash leads to it.
    GetByKey([u8; 32]),
    /// The keyed Begin that began this transaction has come again.
    BeginAgain { key: Key, new: Box<NewTransaction> },
}

/// The channel for one answer. A caller that gave up has dropped the receiving end.
pub type Reply = oneshot::Sender<Result<Answer, Error>>;

/// Sends an answer that waits for nothing.
pub(super) fn answer_now(reply: Reply, answer: Result<Answer, Error>) {
    drop(reply.send(answer)); // the caller may have gone
}

/// The answer about a transaction. Every state in it that callers may rely on is durable.
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
    /// No transaction was ever recorded with this xid. It was not confirmed and never will be. No participant was called for it either,
    /// unless it was to be recorded with its decision.
    #[error("{0} was never recorded, so it was not confirmed and never will be")]
    NeverRecorded(Xid),
    /// No transaction has this xid. One may have existed and been deleted after its retention.
    #[error("{0} is not known any more: it may have finished and been deleted after its retention")]
    Forgotten(Xid),
    /// No transaction has this xid any more, and an operator had resolved this branch of it by hand.
    #[error("{} is not known any more; an operator resolved the branch ({})", .0, .1.as_str())]
    ForgottenAfterResolving(Xid, Decision),
    /// The store has lost records of this epoch. The transaction may have been among them.
    #[error(
        "{0} may have been lost: the store has lost records of that time; its outcome is unknown"
    )]
    Lost(Xid),
    /// No transaction has this key.
    #[error("no transaction has this idempotency key")]
    KeyUnknown,
    /// The key belongs to a transaction with a different name or different branches.
    #[error(
        "this idempotency key belongs to {0}, which was begun with another name or other branches"
    )]
    KeyTaken(Xid),
    /// The transaction's state does not allow the request.
    #[error("{rejection}")]
    #[allow(missing_docs, reason = "the fields' names say what they are")]
    Rejected { rejection: Rejection, global: Arc<GlobalTransaction> },
    /// Transactions cannot be recorded with their decision here. The text says why.
    #[error("this coordinator does not record transactions with their decision: {0}")]
    NotAtDecision(String),
    /// Too many transactions are open.
    #[error("{open_max} transactions are open, which is all that limits.open allows")]
    #[allow(missing_docs, reason = "the field's name says what it is")]
    TooManyOpen { open_max: usize },
    /// The open transactions take as much memory as is allowed.
    #[error(
        "the open transactions use all memory that limits.open_megabytes allows ({open_bytes_max} bytes)"
    )]
    #[allow(missing_docs, reason = "the field's name says what it is")]
    TooManyBytes { open_bytes_max: usize },
    /// The partition's queue is full, or too many callers wait for its store.
    #[error("too many calls are waiting for this coordinator")]
    TooManyCalls,
    /// The store does not answer. The command may or may not take effect.
    #[error("the store does not answer; what was asked may or may not take effect")]
    StoreSilent,
    /// This coordinator does not own the partition, or not in that epoch. It has changed nothing, so the caller can safely send
    /// the command to the owner. The xid is given if the command names one.
    #[error("this coordinator does not own the partition of {}; nothing was done", match .0 {
        Some(xid) => xid.to_string(),
        None => "this key".to_owned(),
    })]
    NotHere(Option<Xid>),
    /// Another coordinator took the partition over after this one had accepted the command. The command may or may not take
    /// effect.
    #[error("another coordinator has taken over; ask again, and that one will answer")]
    Fenced,
    /// This coordinator is stopping.
    #[error("this coordinator is stopping")]
    Stopping,
    /// The transaction's record is damaged. The log gives the details.
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
