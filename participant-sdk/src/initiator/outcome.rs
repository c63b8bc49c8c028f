//! What becomes of a global transaction, in the words of its initiator.

use std::{fmt, time::Duration};

use handfast_proto::{
    BranchId, Xid,
    v1::{self as pb, get_transaction_request::By},
};
use tokio::time::Instant;

use crate::{
    error::{BoxError, Refusal},
    rpc::Handfast,
    status::{Reason, concerns_one_transaction, status_error},
};

/// How long a question about an outcome is repeated.
const ASK_PATIENCE: Duration = Duration::from_secs(10);

/// It is confirmed, for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Confirmed<T> {
    /// The transaction.
    pub xid: Xid,
    /// What the closure returned. If another run with this key has confirmed the transaction: the value of that run. `None`: that
    /// run has kept no value, or the value cannot be read. See
    /// [`TransactionBuilder::run_and_remember`](crate::TransactionBuilder::run_and_remember).
    pub value: Option<T>,
    /// Every participant has acknowledged. If not, the coordinator is still asking, and will until they have.
    pub completed: bool,
    /// A value was kept and cannot be read as this type, and why: a later version of the program may have another type. The
    /// transaction is confirmed all the same.
    pub unreadable: Option<String>,
}

/// What is known of a transaction that is confirmed.
pub(super) struct Confirmation {
    pub(super) xid: Xid,
    /// Every participant has acknowledged.
    pub(super) completed: bool,
    /// This run has asked for it. False: an earlier run has, or another one at the same time.
    pub(super) by_this_run: bool,
    /// The value that the coordinator keeps with it.
    pub(super) result: Option<pb::Payload>,
}

/// The transaction is not confirmed, or it is not known whether it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// A participant said no. It is cancelled; show the refusal to the user.
    #[error("{xid} was cancelled: {refusal}")]
    #[non_exhaustive]
    Refused {
        /// The transaction.
        xid: Xid,
        /// The branch that was refused, if that is known.
        branch_id: Option<BranchId>,
        /// The reason, as the participant wrote it.
        refusal: Refusal,
    },
    /// Something failed in phase one. It is cancelled.
    #[error("{xid} was cancelled: {cause}")]
    #[non_exhaustive]
    Cancelled {
        /// The transaction.
        xid: Xid,
        /// The failure.
        #[source]
        cause: BoxError,
    },
    /// Phase one took too long. It is cancelled.
    #[error("{xid} was cancelled: phase one took longer than its timeout")]
    #[non_exhaustive]
    TimedOut {
        /// The transaction.
        xid: Xid,
    },
    /// It may be confirmed: the answer to the decision was lost, or there is a key and the coordinator did not say what was
    /// decided under it before. Ask [`Handfast::outcome`](crate::Handfast::outcome),
    /// or [`Handfast::outcome_of_key`](crate::Handfast::outcome_of_key); never guess.
    #[error("it is not known yet whether {} is confirmed; ask for its outcome: {cause}", match (xid, idempotency_key) {
        (Some(xid), _) => xid.to_string(),
        (None, Some(key)) => format!("the transaction of key {key}"),
        (None, None) => "the transaction".to_owned(),
    })]
    #[non_exhaustive]
    Unknown {
        /// The transaction. `None`: Begin was not answered either, but the key is known.
        xid: Option<Xid>,
        /// Its idempotency key, if it has one.
        idempotency_key: Option<String>,
        /// Why there is no answer.
        #[source]
        cause: BoxError,
    },
    /// It was not begun, so nothing was tried. With an idempotency key: the coordinator knew no earlier run with that key when this
    /// one began. If the coordinator could not be asked, the error is [`TransactionError::Unknown`] instead.
    #[error("the transaction was not begun, so nothing was tried: {cause}")]
    #[non_exhaustive]
    NotBegun {
        /// The reason.
        #[source]
        cause: BoxError,
    },
}

impl TransactionError {
    /// The transaction's xid, if it is known.
    #[must_use]
    pub fn xid(&self) -> Option<Xid> {
        match self {
            Self::Refused { xid, .. } | Self::Cancelled { xid, .. } | Self::TimedOut { xid } => {
                Some(*xid)
            }
            Self::Unknown { xid, .. } => *xid,
            Self::NotBegun { .. } => None,
        }
    }
}

/// What the coordinator knows of a global transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// No decision yet. This carries no promise: the next moment it may be confirmed, or cancelled.
    Undecided,
    /// Confirmed, for ever.
    Confirmed {
        /// Every participant has acknowledged.
        completed: bool,
    },
    /// Cancelled, for ever.
    Cancelled {
        /// Every participant has acknowledged.
        completed: bool,
        /// Why, in words.
        reason: String,
    },
    /// Nothing was ever recorded under this xid, so nothing was tried, and it will never be confirmed.
    NeverRecorded,
    /// It may have finished and been deleted after its retention. This cannot be found out any more.
    Forgotten,
    /// No transaction has this idempotency key: none was ever begun with it, or the one that was begun has been deleted after its
    /// retention. If the key is younger than the coordinator's retention, run the operation again with the same key.
    KeyUnknown,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = |completed: &bool| if *completed { "" } else { ", not complete yet" };
        match self {
            Self::Undecided => f.write_str("undecided"),
            Self::Confirmed { completed } => write!(f, "confirmed{}", open(completed)),
            Self::Cancelled { completed, reason } if reason.is_empty() => {
                write!(f, "cancelled{}", open(completed))
            }
            Self::Cancelled { completed, reason } => {
                write!(f, "cancelled{}: {reason}", open(completed))
            }
            Self::NeverRecorded => f.write_str("never recorded"),
            Self::Forgotten => f.write_str("forgotten"),
            Self::KeyUnknown => f.write_str("key unknown"),
        }
    }
}

impl Outcome {
    pub(crate) fn of(transaction: &pb::Transaction) -> Self {
        let completed = matches!(
            transaction.state(),
            pb::TransactionState::Confirmed | pb::TransactionState::Cancelled
        );
        match transaction.decision() {
            pb::Decision::Unspecified => Self::Undecided,
            pb::Decision::Confirm => Self::Confirmed { completed },
            pb::Decision::Cancel => {
                Self::Cancelled { completed, reason: transaction.cancel_reason.clone() }
            }
        }
    }
}

/// There is no answer to a question about a transaction. Ask again.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator does not say what became of {asked}: {cause}")]
pub struct Unanswered {
    /// The xid or the key that was asked about.
    asked: String,
    #[source]
    cause: BoxError,
    concerns_it_alone: bool,
}

/// What became of a branch.
pub(crate) enum BranchOutcome {
    /// An operator has resolved it by hand. This became of its transaction.
    Resolved(Outcome),
    /// Its transaction is confirmed without it. Branches are fixed with the decision, so it never will be.
    LeftOut(Outcome),
    /// This became of its transaction.
    Open(Outcome),
}

impl Unanswered {
    /// A coordinator responded, and could not say anything about this transaction. It may well know others.
    pub(crate) const fn concerns_it_alone(&self) -> bool {
        self.concerns_it_alone
    }
}

impl Handfast {
    /// What became of a global transaction. For callers that were told [`Unknown`](crate::TransactionError::Unknown).
    ///
    /// A decision that is told is the truth for ever; [`Outcome::Undecided`] carries no promise: ask again.
    ///
    /// # Errors
    ///
    /// When there was no answer within ten seconds.
    pub async fn outcome(&self, xid: Xid) -> Result<Outcome, Unanswered> {
        self.ask(By::Xid(xid.to_string()), xid.to_string()).await
    }

    /// The same for the transaction of an idempotency key. If no transaction has it, the outcome is [`Outcome::KeyUnknown`].
    ///
    /// # Errors
    ///
    /// When there was no answer within ten seconds.
    pub async fn outcome_of_key(&self, key: &str) -> Result<Outcome, Unanswered> {
        self.ask(By::IdempotencyKey(key.to_owned()), format!("key {key}")).await
    }

    /// As [`Handfast::outcome`], for one branch of the transaction.
    pub(crate) async fn outcome_of_branch(
        &self,
        xid: Xid,
        branch_id: &BranchId,
    ) -> Result<BranchOutcome, Unanswered> {
        let (outcome, branches) = self.look(By::Xid(xid.to_string()), xid.to_string()).await?;
        let branch = branches.iter().find(|branch| *branch.branch_id == *branch_id.as_str());
        Ok(match branch.map(pb::Branch::state) {
            Some(pb::BranchState::Resolved) => BranchOutcome::Resolved(outcome),
            None if matches!(outcome, Outcome::Confirmed { .. }) => BranchOutcome::LeftOut(outcome),
            Some(_) | None => BranchOutcome::Open(outcome),
        })
    }

    async fn ask(&self, by: By, asked: String) -> Result<Outcome, Unanswered> {
        self.look(by, asked).await.map(|(outcome, _)| outcome)
    }

    async fn look(&self, by: By, asked: String) -> Result<(Outcome, Vec<pb::Branch>), Unanswered> {
        let nothing = |outcome| Ok((outcome, Vec::new()));
        match self.get(by, Instant::now() + ASK_PATIENCE).await {
            Ok(transaction) => Ok((Outcome::of(&transaction), transaction.branches)),
            Err(status) => match Reason::of(&status) {
                Reason::NeverRecorded => nothing(Outcome::NeverRecorded),
                Reason::Forgotten => nothing(Outcome::Forgotten),
                Reason::KeyUnknown => nothing(Outcome::KeyUnknown),
                Reason::KeyTaken
                | Reason::AlreadyDecided
                | Reason::BranchesDiffer
                | Reason::Other => Err(Unanswered {
                    asked,
                    cause: status_error(&status),
                    concerns_it_alone: concerns_one_transaction(&status),
                }),
            },
        }
    }
}

/// What the coordinator's record of a transaction means for the program that runs it.
pub(super) enum Recorded {
    Undecided,
    Confirmed(Confirmation),
    /// It is cancelled, and this says why.
    Cancelled(TransactionError),
}

impl Recorded {
    pub(super) fn of(xid: Xid, transaction: &pb::Transaction) -> Self {
        match transaction.decision() {
            pb::Decision::Unspecified => Self::Undecided,
            pb::Decision::Confirm => {
                let completed = transaction.state() == pb::TransactionState::Confirmed;
                let result = transaction.result.clone();
                Self::Confirmed(Confirmation { xid, completed, by_this_run: false, result })
            }
            pb::Decision::Cancel => Self::Cancelled(why_cancelled(xid, transaction)),
        }
    }
}

fn why_cancelled(xid: Xid, transaction: &pb::Transaction) -> TransactionError {
    match transaction.cancel_cause() {
        pb::CancelCause::Refused => TransactionError::Refused {
            xid,
            branch_id: transaction.refused_branch_id.parse().ok(),
            refusal: transaction.refusal.clone().unwrap_or_default().into(),
        },
        pb::CancelCause::TimedOut => TransactionError::TimedOut { xid },
        pb::CancelCause::Unspecified
        | pb::CancelCause::Requested
        | pb::CancelCause::TryUnknown
        | pb::CancelCause::CoordinatorRestarted => {
            TransactionError::Cancelled { xid, cause: transaction.cancel_reason.clone().into() }
        }
    }
}
