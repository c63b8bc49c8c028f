//! Decide: what is asked of the coordinator at the end of phase one, and what its answer means for the initiator.
//!
//! What must hold: an answer that is lost is never taken for a decision. It is [`TransactionError::Unknown`].

use std::{collections::BTreeSet, time::Duration};

use handfast_proto::{
    BranchId, Xid, crash_point, limits,
    planted::Bug,
    text::kept,
    time::wire_duration,
    v1::{self as pb, get_transaction_request::By},
};
use tonic::Status;

use super::{
    global::Global,
    ledger::{CallError, Calls},
    outcome::{Confirmation, Recorded, TransactionError},
};
use crate::{
    error::BoxError,
    rpc::{Handfast, from_now},
    status::{Reason, status_error},
};

/// The cause of an unknown outcome when the answer to Decide has no decision in it.
const NO_DECISION: &str = "the coordinator's answer has no decision in it";

/// Why a transaction has to be cancelled, beside what its calls tell.
pub(super) enum Failure {
    /// The closure has failed.
    Work(BoxError),
    TimedOut,
}

/// The decision that is asked for.
pub(super) enum Decide {
    Confirm { tried: BTreeSet<BranchId> },
    Cancel(Box<Cancel>),
}

pub(super) struct Cancel {
    request: pb::DecideRequest,
    /// What the caller is told once it is cancelled.
    error: TransactionError,
}

impl Decide {
    pub(super) fn of(xid: Xid, failure: Option<Failure>, calls: Calls) -> Self {
        match (failure, calls) {
            (None, Calls::Tried(tried)) => Self::Confirm { tried },
            // A refusal says more than the error that the closure made of it.
            (_, Calls::Failed(CallError::Refused { branch_id, refusal, .. })) => {
                let request = pb::DecideRequest {
                    refusal: Some(refusal.clone().into()),
                    refused_branch_id: branch_id.to_string(),
                    ..pb::DecideRequest::default()
                };
                let branch_id = Some(branch_id);
                let error = TransactionError::Refused { xid, branch_id, refusal };
                Self::Cancel(Box::new(Cancel { request, error }))
            }
            (Some(Failure::TimedOut), _) => {
                let reason = "the initiator's time for phase one ran out".to_owned();
                let request = pb::DecideRequest { reason, ..pb::DecideRequest::default() };
                let error = TransactionError::TimedOut { xid };
                Self::Cancel(Box::new(Cancel { request, error }))
            }
            (
                failure,
                Calls::Failed(CallError::Unknown { branch_id, participant, action, cause }),
            ) => {
                let called = [action.as_str(), participant.as_str()];
                let called = called.into_iter().filter(|word| !word.is_empty());
                let text = format!("{}: {cause}", called.collect::<Vec<_>>().join(" at "));
                let request = pb::DecideRequest {
                    reason: reason(&text),
                    unknown_branch_id: branch_id.to_string(),
                    ..pb::DecideRequest::default()
                };
                let cause = match failure {
                    Some(Failure::Work(error)) => error,
                    Some(Failure::TimedOut) | None => {
                        CallError::Unknown { branch_id, participant, action, cause }.into()
                    }
                };
                let error = TransactionError::Cancelled { xid, cause };
                Self::Cancel(Box::new(Cancel { request, error }))
            }
            (Some(Failure::Work(cause)), _) => Self::Cancel(Cancel::because(xid, cause)),
            (None, Calls::Failed(error)) => Self::Cancel(Cancel::because(xid, error.into())),
        }
    }
}

/// A text as the coordinator takes it for a reason: cut, and on one line.
fn reason(text: &str) -> String {
    kept(text, limits::REASON_BYTES_MAX)
}

impl Cancel {
    pub(super) fn because(xid: Xid, cause: BoxError) -> Box<Self> {
        let reason = reason(&cause.to_string());
        let request = pb::DecideRequest { reason, ..pb::DecideRequest::default() };
        Box::new(Self { request, error: TransactionError::Cancelled { xid, cause } })
    }
}

/// Asks the coordinator for the decision about one transaction.
#[derive(Debug, Clone)]
pub(super) struct Decider {
    pub(super) handfast: Handfast,
    /// What was called in it.
    pub(super) global: Global,
    /// The transaction's idempotency key.
    pub(super) key: Option<String>,
    pub(super) until: pb::Until,
    /// How long to wait for participants to acknowledge, once it is decided.
    pub(super) wait: Duration,
    /// How long Decide is repeated while it has no answer.
    pub(super) patience: Duration,
}

impl Decider {
    pub(super) async fn confirm(
        &self,
        xid: Xid,
        tried: &BTreeSet<BranchId>,
        result: Option<pb::Payload>,
    ) -> Result<Confirmation, TransactionError> {
        let request = pb::DecideRequest {
            decision: pb::Decision::Confirm.into(),
            tried_branch_ids: tried.iter().map(ToString::to_string).collect(),
            result,
            ..pb::DecideRequest::default()
        };
        match self.decide(xid, request).await {
            Ok(transaction) => {
                let confirmation = self.recorded(xid, &transaction)?;
                Ok(Confirmation { by_this_run: true, ..confirmation })
            }
            Err(status) => match Reason::of(&status) {
                Reason::AlreadyDecided => self.look(xid, status).await,
                Reason::BranchesDiffer => {
                    // A nested service has registered a branch, and it is not known here that it was tried.
                    self.cancel(xid, Cancel::because(xid, status_error(&status))).await
                }
                Reason::NeverRecorded => {
                    self.global.nudge(xid);
                    Err(TransactionError::Cancelled { xid, cause: status_error(&status) })
                }
                Reason::Other if Bug::UnknownIsRefused.is_planted() => {
                    Err(TransactionError::Cancelled { xid, cause: status_error(&status) })
                }
                Reason::Forgotten | Reason::KeyUnknown | Reason::KeyTaken | Reason::Other => {
                    Err(self.unknown(xid, status_error(&status)))
                }
            },
        }
    }

    /// Cancels, and returns the error of `cancel` if it is cancelled.
    pub(super) async fn cancel(
        &self,
        xid: Xid,
        cancel: Box<Cancel>,
    ) -> Result<Confirmation, TransactionError> {
        let Cancel { request, error } = *cancel;
        let request = pb::DecideRequest { decision: pb::Decision::Cancel.into(), ..request };
        match self.decide(xid, request).await {
            Ok(transaction) => match Recorded::of(xid, &transaction) {
                // Another run with this key has confirmed it.
                Recorded::Confirmed(confirmation) => Ok(confirmation),
                // `error` says more than the record.
                Recorded::Cancelled(_) => Err(error),
                Recorded::Undecided => Err(self.unknown(xid, NO_DECISION.into())),
            },
            Err(status) => match Reason::of(&status) {
                Reason::AlreadyDecided => self.look(xid, status).await,
                Reason::NeverRecorded => {
                    self.global.nudge(xid);
                    Err(error)
                }
                Reason::Forgotten
                | Reason::KeyUnknown
                | Reason::KeyTaken
                | Reason::BranchesDiffer
                | Reason::Other => match self.key {
                    // Only this run could have confirmed it, and it has not. It is cancelled when its time runs out.
                    None => Err(error),
                    Some(_) => Err(self.unknown(xid, status_error(&status))),
                },
            },
        }
    }

    /// The opposite decision had been made before. Reads it.
    async fn look(&self, xid: Xid, status: Status) -> Result<Confirmation, TransactionError> {
        let by = By::Xid(xid.to_string());
        let found = self.handfast.get(by, from_now(self.patience)).await;
        match found.map(|found| Recorded::of(xid, &found)) {
            Ok(Recorded::Confirmed(confirmation)) => Ok(confirmation),
            Ok(Recorded::Cancelled(error)) => Err(error),
            Ok(Recorded::Undecided) | Err(_) => Err(self.unknown(xid, status_error(&status))),
        }
    }

    /// What to return when this is recorded.
    pub(super) fn recorded(
        &self,
        xid: Xid,
        transaction: &pb::Transaction,
    ) -> Result<Confirmation, TransactionError> {
        match Recorded::of(xid, transaction) {
            Recorded::Confirmed(confirmation) => Ok(confirmation),
            Recorded::Cancelled(error) => Err(error),
            Recorded::Undecided => Err(self.unknown(xid, NO_DECISION.into())),
        }
    }

    fn unknown(&self, xid: Xid, cause: BoxError) -> TransactionError {
        TransactionError::Unknown { xid: Some(xid), idempotency_key: self.key.clone(), cause }
    }

    pub(super) fn not_begun(&self, unanswered: bool, cause: BoxError) -> TransactionError {
        match &self.key {
            // It may have been begun all the same, and then another run with this key may confirm it.
            Some(key) if unanswered => {
                TransactionError::Unknown { xid: None, idempotency_key: Some(key.clone()), cause }
            }
            Some(_) | None => TransactionError::NotBegun { cause },
        }
    }

    /// Decides. The answer to Decide and the wait for completion are two things: a coordinator that answers is never taken for one
    /// that does not, however little patience there is beside the wait.
    async fn decide(
        &self,
        xid: Xid,
        request: pb::DecideRequest,
    ) -> Result<pb::Transaction, Status> {
        let wait = self.wait.min(self.patience / 2);
        let request = pb::DecideRequest {
            xid: xid.to_string(),
            until: self.until.into(),
            wait: Some(wire_duration(wait)),
            ..request
        };
        crash_point!("initiator.before_decide");
        let decided = self.handfast.decide(request, wait, from_now(self.patience)).await;
        crash_point!("initiator.after_decide");
        let decided = decided?;
        let is_final = matches!(
            decided.state(),
            pb::TransactionState::Confirmed | pb::TransactionState::Cancelled
        );
        let left = self.wait - wait;
        if left.is_zero() || is_final || decided.decision() == pb::Decision::Unspecified {
            return Ok(decided);
        }
        // It is decided. If there is no answer any more, that is what is known.
        Ok(self.handfast.wait_completed(xid, left).await.unwrap_or(decided))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_without_a_clear_answer_is_recorded_with_its_branch() {
        let xid = "3-7-1042-9f3c01d2".parse().unwrap();
        let unknown = || CallError::Unknown {
            branch_id: "2".parse().unwrap(),
            participant: "points".to_owned(),
            action: "points.book".to_owned(),
            cause: "UNAVAILABLE: connection refused".to_owned(),
        };
        let debug = format!("{:?}", unknown()); // what a closure may make of it
        for failure in [None, Some(Failure::Work(debug.into()))] {
            let Decide::Cancel(cancel) = Decide::of(xid, failure, Calls::Failed(unknown())) else {
                panic!("it is confirmed")
            };
            assert_eq!(cancel.request.unknown_branch_id, "2");
            assert_eq!(
                cancel.request.reason,
                "points.book at points: UNAVAILABLE: connection refused"
            );
        }
    }
}
