//! Overdue reservations. A branch that is still tried long after the end of phase one should have been confirmed or cancelled.
//! If the coordinator's store was restored from an older copy, no coordinator knows the branch any more. So the participant asks
//! for the transaction's outcome, and no reservation stays for ever.

use std::{fmt, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;
use tokio::{task::JoinHandle, time};
use tracing::{error, info, warn};

use super::Participant;
use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    error::BoxError,
    fence::db::OverdueKey,
    initiator::outcome::{BranchOutcome, Outcome, Unanswered},
    rpc::Handfast,
};

/// How long the author's code may take for one branch. The next inquiry tries again.
const BRANCH_TIMEOUT: Duration = Duration::from_secs(30);
/// After this many questions in a row without an answer the coordinator is taken to be down, and the inquiry ends. Each question
/// waits for ten seconds.
const UNANSWERED_MAX: usize = 3;

/// The result of asking about overdue branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Inquiry {
    /// Branches that were cancelled, because their transaction was cancelled or never recorded.
    pub cancelled: usize,
    /// Branches that an operator has resolved by hand. They were closed in the fence without running the action's code.
    pub closed: usize,
    /// Branches that were left alone: their transaction is confirmed, undecided or forgotten, or the action's code failed,
    /// panicked or took too long. A person should check them: each is logged.
    pub reported: usize,
}

/// What the inquiry did about one branch.
pub(super) enum Handled {
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
    /// When the database of an action does not respond, or the coordinator does not respond for some of the branches. The other
    /// actions and branches are handled all the same, unless the coordinator does not respond three times in a row. Branches
    /// that were cancelled stay cancelled; a later call handles the rest.
    ///
    /// # Cancel safety
    ///
    /// The same as after an error.
    pub async fn inquire(&self, handfast: &Handfast) -> Result<Inquiry, BoxError> {
        let mut inquiry = Inquiry::default();
        let mut failed: Option<BoxError> = None;
        let mut unanswered = 0;
        for (action, served) in self.actions.iter() {
            let mut after = Some(OverdueKey::default());
            while let Some(place) = after {
                let page = match served.overdue(&place).await {
                    Ok(page) => page,
                    Err(error) => {
                        warn!(action, %error, "cannot read the overdue reservations of this action");
                        failed = Some(error.into());
                        break;
                    }
                };
                for (xid, branch_id) in page.branches {
                    let branch = Branch::new(xid, branch_id, *action, Phase::Cancel);
                    let result = self.ask_about(branch, handfast).await;
                    unanswered = match &result {
                        Ok(_) => 0,
                        Err(error) if error.concerns_it_alone() => 0,
                        Err(_) => unanswered + 1,
                    };
                    match result {
                        Ok(Handled::Cancelled) => inquiry.cancelled += 1,
                        Ok(Handled::Closed) => inquiry.closed += 1,
                        Ok(Handled::Reported) => inquiry.reported += 1,
                        Err(error) if unanswered == UNANSWERED_MAX => return Err(error.into()),
                        Err(error) => failed = Some(error.into()),
                    }
                }
                after = page.next;
            }
        }
        match failed {
            None => Ok(inquiry),
            Some(error) => Err(error),
        }
    }

    async fn ask_about(&self, branch: Branch, handfast: &Handfast) -> Result<Handled, Unanswered> {
        let Branch { xid, branch_id, .. } = &branch;
        match handfast.outcome_of_branch(*xid, branch_id).await {
            Ok(BranchOutcome::Resolved(outcome)) => Ok(self.close(branch, &outcome).await),
            Ok(BranchOutcome::LeftOut(outcome)) => {
                let cancelled = self.give_back(&branch, &outcome).await;
                Ok(if cancelled { Handled::Cancelled } else { Handled::Reported })
            }
            Ok(BranchOutcome::Open(outcome)) => {
                let cancelled = self.cancel_if_allowed(&branch, &outcome).await;
                Ok(if cancelled { Handled::Cancelled } else { Handled::Reported })
            }
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
        self.close_as(branch).await
    }

    /// The same for the decision that the branch names.
    pub(super) async fn close_as(&self, branch: Branch) -> Handled {
        let Branch { xid, branch_id, action, phase, .. } = &branch;
        let Some(served) = self.actions.get(action.as_str()) else { return Handled::Reported };
        let answer = in_time(served.close(&branch)).await;
        if let Answer::Done(_) = answer {
            info!(%xid, %branch_id, action, %phase, "reservation closed: an operator has resolved it");
            return Handled::Closed;
        }
        warn!(%xid, %branch_id, action, %answer, "a reservation that an operator has resolved cannot be closed yet");
        Handled::Reported
    }

    /// Cancels the branch if its outcome allows that. Returns whether it was cancelled.
    async fn cancel_if_allowed(&self, branch: &Branch, outcome: &Outcome) -> bool {
        let Branch { xid, branch_id, action, .. } = branch;
        match outcome {
            Outcome::Cancelled { .. } | Outcome::NeverRecorded => {
                self.give_back(branch, outcome).await
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

    /// Cancels the branch, for this reason. Returns whether it was cancelled. A panic of the author's code concerns its branch alone.
    pub(super) async fn give_back(
        &self,
        branch: &Branch,
        why: &(impl fmt::Display + Sync),
    ) -> bool {
        let Branch { xid, branch_id, action, .. } = branch;
        let handling = AssertUnwindSafe(in_time(self.handle(branch, &[]))).catch_unwind();
        let Ok(answer) = handling.await else {
            error!(%xid, %branch_id, action, "the action panicked; its reservation stays");
            return false;
        };
        let done = matches!(answer, Answer::Done(_));
        if done {
            info!(%xid, %branch_id, action, %why, "overdue reservation cancelled");
        } else {
            warn!(%xid, %branch_id, action, %answer, "overdue reservation cannot be cancelled yet");
        }
        done
    }

    /// Inquires in the background once per `interval` (an hour is a good value), until the guard is dropped. Several processes
    /// may do this at the same time.
    pub fn inquire_every(&self, interval: Duration, handfast: &Handfast) -> InquiryTask {
        let (participant, handfast) = (self.clone(), handfast.clone());
        let task = tokio::spawn(async move {
            loop {
                time::sleep(interval).await;
                participant.inquire_and_log(&handfast).await;
            }
        });
        InquiryTask { task }
    }
}

/// Gives up a local transaction that takes too long. It is rolled back, or has been committed; a repeat finds out.
async fn in_time(answer: impl Future<Output = Answer>) -> Answer {
    time::timeout(BRANCH_TIMEOUT, answer).await.unwrap_or_else(|_| {
        Answer::Retry(format!("took longer than {} s", BRANCH_TIMEOUT.as_secs()))
    })
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
