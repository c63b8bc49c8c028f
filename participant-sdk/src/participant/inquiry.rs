//! Overdue reservations. A branch that is still tried long after the end of phase one should have been confirmed or cancelled.
//! If the coordinator's store was restored from an older copy, no coordinator knows the branch any more. So the participant asks
//! for the transaction's outcome, and no reservation stays for ever.

use std::{fmt, time::Duration};

use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::Participant;
use crate::{
    answer::Answer, branch::Branch, error::BoxError, initiator::outcome::Outcome, rpc::Handfast,
};

/// The result of asking about overdue branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Inquiry {
    /// Branches that were cancelled, because their transaction was cancelled or never recorded.
    pub cancelled: usize,
    /// Branches that were left alone, because their transaction is confirmed, undecided or forgotten. A person should check
    /// them: each is logged.
    pub reported: usize,
}

impl Participant {
    /// Asks the coordinator about branches that are still tried an hour after the end of phase one. Cancels those whose
    /// transaction was cancelled or never recorded. Never confirms: only the coordinator does.
    ///
    /// # Errors
    ///
    /// When the database does not respond, or the coordinator does not respond for some of the branches. Branches that were
    /// cancelled stay cancelled; a later call handles the rest.
    ///
    /// # Cancel safety
    ///
    /// The same as after an error.
    pub async fn inquire(&self, handfast: &Handfast) -> Result<Inquiry, BoxError> {
        let mut inquiry = Inquiry::default();
        let mut unanswered = None;
        for branch in self.overdue().await? {
            // Without an answer for this branch, go on with the others.
            let outcome = match handfast.outcome(branch.xid).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    warn!(xid = %branch.xid, branch_id = %branch.branch_id, %error, "no answer about an overdue reservation");
                    unanswered = Some(error);
                    continue;
                }
            };
            if self.settle(&branch, &outcome).await {
                inquiry.cancelled += 1;
            } else {
                inquiry.reported += 1;
            }
        }
        match unanswered {
            None => Ok(inquiry),
            Some(error) => Err(error.into()),
        }
    }

    /// Cancels the branch if its outcome allows that. Returns whether it was cancelled.
    async fn settle(&self, branch: &Branch, outcome: &Outcome) -> bool {
        let Branch { xid, branch_id, action, .. } = branch;
        match outcome {
            Outcome::Cancelled { .. } | Outcome::NeverRecorded => {
                let answer = self.handle(branch, &[]).await;
                let done = matches!(answer, Answer::Done(_));
                if done {
                    info!(%xid, %branch_id, action, ?outcome, "overdue reservation cancelled");
                } else {
                    warn!(%xid, %branch_id, action, ?answer, "overdue reservation cannot be cancelled yet");
                }
                done
            }
            Outcome::Confirmed { completed: true } => {
                error!(%xid, %branch_id, action, "a transaction is confirmed and complete, but this branch is still reserved");
                false
            }
            Outcome::Forgotten | Outcome::KeyUnknown => {
                error!(%xid, %branch_id, action, "the coordinator has forgotten the transaction of this reservation");
                false
            }
            Outcome::Undecided | Outcome::Confirmed { completed: false } => {
                warn!(%xid, %branch_id, action, ?outcome, "overdue reservation; the coordinator has not settled it yet");
                false
            }
        }
    }

    /// Inquires in the background once per `interval` (an hour is a good value), until the guard is dropped. Several processes
    /// may do this at the same time.
    pub fn inquire_every(&self, interval: Duration, handfast: &Handfast) -> InquiryTask {
        let (participant, handfast) = (self.clone(), handfast.clone());
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(interval).await;
                if let Err(error) = participant.inquire(&handfast).await {
                    warn!(%error, "cannot ask about overdue reservations; will retry");
                }
            }
        });
        InquiryTask { task }
    }
}

/// Stops the inquiries when it is dropped.
#[must_use = "the inquiries stop when this is dropped"]
pub struct InquiryTask {
    task: JoinHandle<()>,
}

impl Drop for InquiryTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for InquiryTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InquiryTask")
    }
}
