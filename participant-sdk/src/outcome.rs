//! What becomes of a global transaction, in the words of its initiator.

use handfast_proto::{BranchId, Xid, v1 as pb};

use crate::error::{BoxError, Refusal};

/// It is confirmed, for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Confirmed<T> {
    /// Which.
    pub xid: Xid,
    /// What the closure returned; `None`: this key had been confirmed before, or was confirmed by somebody else meanwhile, and
    /// the closure's value is not the one that counts.
    pub value: Option<T>,
    /// Every participant has acknowledged. If not, the coordinator is still asking, and will until they have.
    pub completed: bool,
}

/// It is not confirmed, or nobody here knows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// A participant said no. It is cancelled; show the refusal to the user.
    #[error("{xid} was cancelled: {refusal}")]
    #[non_exhaustive]
    Refused {
        /// Which.
        xid: Xid,
        /// Whose branch refused, if that is known.
        branch_id: Option<BranchId>,
        /// Why, as the participant wrote it.
        refusal: Refusal,
    },
    /// Something failed in phase one. It is cancelled.
    #[error("{xid} was cancelled: {cause}")]
    #[non_exhaustive]
    Cancelled {
        /// Which.
        xid: Xid,
        /// What failed.
        #[source]
        cause: BoxError,
    },
    /// Phase one took too long. It is cancelled.
    #[error("{xid} was cancelled: phase one took longer than its timeout")]
    #[non_exhaustive]
    TimedOut {
        /// Which.
        xid: Xid,
    },
    /// It may be confirmed: a decision was asked for and its answer was lost, or there is a key and nobody could be asked what was
    /// decided under it before. Ask [`Handfast::outcome`](crate::Handfast::outcome),
    /// or [`Handfast::outcome_of_key`](crate::Handfast::outcome_of_key); never guess.
    #[error("nobody knows yet whether {} is confirmed; ask for its outcome: {cause}", match (xid, idempotency_key) {
        (Some(xid), _) => xid.to_string(),
        (None, Some(key)) => format!("the transaction of key {key}"),
        (None, None) => "the transaction".to_owned(),
    })]
    #[non_exhaustive]
    Unknown {
        /// Which; `None`: not even that was answered, but its key is known.
        xid: Option<Xid>,
        /// Its idempotency key, if it has one.
        idempotency_key: Option<String>,
        /// Why there is no answer.
        #[source]
        cause: BoxError,
    },
    /// It was not begun, so nothing was tried. If it has an idempotency key, then no other run of this operation with that key was
    /// known when this one began; where that could not be found out it is [`TransactionError::Unknown`].
    #[error("the transaction was not begun, so nothing was tried: {cause}")]
    #[non_exhaustive]
    NotBegun {
        /// Why not.
        #[source]
        cause: BoxError,
    },
}

impl TransactionError {
    /// Which transaction, if that is known.
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
    /// It may have finished and been deleted after its retention. Nobody can say any more.
    Forgotten,
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

/// What a decided transaction means for whoever runs it; `None`: it is not decided. A confirmed one has no value here.
pub(crate) fn standing<T>(
    xid: Xid,
    transaction: &pb::Transaction,
) -> Option<Result<Confirmed<T>, TransactionError>> {
    let cause = || transaction.cancel_reason.clone().into();
    match (transaction.decision(), transaction.cancel_cause()) {
        (pb::Decision::Unspecified, _) => None,
        (pb::Decision::Confirm, _) => {
            let completed = transaction.state() == pb::TransactionState::Confirmed;
            Some(Ok(Confirmed { xid, value: None, completed }))
        }
        (pb::Decision::Cancel, pb::CancelCause::Refused) => {
            let refusal = transaction.refusal.clone().unwrap_or_default().into();
            let branch_id = transaction.refused_branch_id.parse().ok();
            Some(Err(TransactionError::Refused { xid, branch_id, refusal }))
        }
        (pb::Decision::Cancel, pb::CancelCause::TimedOut) => {
            Some(Err(TransactionError::TimedOut { xid }))
        }
        (
            pb::Decision::Cancel,
            pb::CancelCause::Unspecified
            | pb::CancelCause::Requested
            | pb::CancelCause::TryUnknown
            | pb::CancelCause::CoordinatorRestarted,
        ) => Some(Err(TransactionError::Cancelled { xid, cause: cause() })),
    }
}
