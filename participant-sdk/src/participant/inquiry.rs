//! Overdue reservations. A branch that is still tried long after the end of phase one should have been confirmed or cancelled.
//! If the coordinator's store was restored from an older copy, no coordinator knows the branch any more. So the participant asks
//! for the transaction's outcome, and no reservation stays for ever.

use std::{fmt, time::Duration};

use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::Participant;
use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    error::BoxError,
    fence::db::KeyRow,
    initiator::outcome::{Outcome, Unanswered},
    rpc::Handfast,
};

/// The result of asking about overdue branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Inquiry {
    /// Branches that were cancelled, because their transaction was cancelled or never recorded.
    pub cancelled: usize,
    /// Branches that an operator has resolved by hand. They were closed in the fence without running the action's code.
    pub closed: usize,
    /// Branches that were left alone, because their transaction is confirmed, undecided or forgotten. A person should check
    /// them: each is logged.
    pub reported: usize,
}

/// What the inquiry did about one branch.
enum Handled {
    Cancelled,
    Closed,
    Reported,
}

impl Participant {
    /// Asks the coordinator about branches that are still tried an hour after the end of phase one. Cancels those whose
    /// transaction was cancelled or never recorded. Closes those that an operator has resolved by hand (`handfast resolve`):
    /// records the decision, and runs no code. Never confirms otherwise: only the coordinator does.
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
        for (action, served) in self.actions.iter() {
            let mut after = Some(KeyRow::default());
            while let Some(key) = after {
                let page = served.overdue(&key).await?;
                for (xid, branch_id) in page.branches {
                    let branch = Branch::new(xid, branch_id, *action, Phase::Cancel);
                    // Without an answer for this branch, go on with the others.
                    match self.ask_about(branch, handfast).await {
                        Ok(Handled::Cancelled) => inquiry.cancelled += 1,
                        Ok(Handled::Closed) => inquiry.closed += 1,
                        Ok(Handled::Reported) => inquiry.reported += 1,
                        Err(error) => unanswered = Some(error),
                    }
                }
                after = page.next;
            }
        }
        match unanswered {
            None => Ok(inquiry),
            Some(error) => Err(error.into()),
        }
    }

    async fn ask_about(&self, branch: Branch, handfast: &Handfast) -> Result<Handled, Unanswered> {
        let Branch { xid, branch_id, .. } = &branch;
        match handfast.outcome_of_branch(*xid, branch_id).await {
            Ok((outcome, true)) => Ok(self.close(branch, &outcome).await),
            Ok((outcome, false)) if self.cancel_if_allowed(&branch, &outcome).await => {
                Ok(Handled::Cancelled)
            }
            Ok(_) => Ok(Handled::Reported),
            Err(error) => {
                warn!(%xid, %branch_id, %error, "no answer about an overdue reservation");
                Err(error)
            }
        }
    }

    /// Records what became of a branch that an operator has resolved. The operator has done the action's work, so its code must not
    /// run.
    async fn close(&self, mut branch: Branch, outcome: &Outcome) -> Handled {
        if let Outcome::Confirmed { .. } = outcome {
            branch.phase = Phase::Confirm;
        }
        let Branch { xid, branch_id, action, .. } = &branch;
        let Some(served) = self.actions.get(action.as_str()) else { return Handled::Reported };
        let answer = served.close(&branch).await;
        if let Answer::Done(_) = answer {
            info!(%xid, %branch_id, action, ?outcome, "reservation closed: an operator has resolved it");
            return Handled::Closed;
        }
        warn!(%xid, %branch_id, action, ?answer, "a reservation that an operator has resolved cannot be closed yet");
        Handled::Reported
    }

    /// Cancels the branch if its outcome allows that. Returns whether it was cancelled.
    async fn cancel_if_allowed(&self, branch: &Branch, outcome: &Outcome) -> bool {
        let Branch { xid, branch_id, action, .. } = branch;
        match outcome {
            Outcome::Cancelled { .. } | Outcome::NeverRecorded => {
                let answer = self.handle(branch, &[]).await;
                let done = matches!(answer, Answer::Done(_));
                if done {
                    info!(%xid, %branch_id, action, %outcome, "overdue reservation cancelled");
                } else {
                    warn!(%xid, %branch_id, action, %answer, "overdue reservation cannot be cancelled yet");
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
                warn!(%xid, %branch_id, action, %outcome, "overdue reservation; the coordinator has not finished it yet");
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
                participant.inquire_and_log(&handfast).await;
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
