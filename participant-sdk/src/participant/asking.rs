//! Reservations that ask. Their transactions are recorded with the decision, so one may be lost without a Cancel. So the participant asks
//! about each branch from the end of phase one on, every few seconds until it is answered. An initiator that knows of the loss may make
//! it ask earlier.
//!
//! The participant acts on the coordinator's answer alone. Who nudges it proves nothing.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use handfast_proto::{BranchId, Xid, limits, planted::Bug, v1 as pb};
use tokio::{
    sync::Semaphore,
    time::{self, Instant},
};
use tracing::{debug, warn};

use super::{Participant, inquiry::Handled};
use crate::{
    branch::{Branch, Phase},
    error::BoxError,
    fence::db::OverdueKey,
    rpc::Handfast,
    status::status_error,
};

/// The pause between two rounds. Reservations of a lost transaction are given back about this long after the end of phase one.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(3);
/// How long one question to the coordinator is repeated. The next round asks again.
const ASK_PATIENCE: Duration = Duration::from_secs(5);
/// Branches that are given back at a time. Each holds a connection of the pool.
const AT_A_TIME: usize = 4;
/// Nudges that are followed at a time. Others are dropped: the participant asks later anyway.
const NUDGES_MAX: usize = 16;

/// Limits the nudges of a participant.
#[derive(Clone)]
pub(super) struct Nudges(Arc<Semaphore>);

impl Default for Nudges {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(NUDGES_MAX)))
    }
}

impl Participant {
    /// Asks about all branches that ask and whose phase one is over. Gives back those that were not confirmed and never will be, and
    /// closes those that an operator has resolved. Returns how many were given back.
    ///
    /// A served participant that knows its coordinator does this every few seconds; see
    /// [`ParticipantBuilder::coordinator`](crate::ParticipantBuilder::coordinator).
    ///
    /// # Errors
    ///
    /// When the database of an action, or the coordinator, does not respond. A later call handles the rest.
    ///
    /// # Cancel safety
    ///
    /// The same as after an error.
    pub async fn ask(&self, handfast: &Handfast) -> Result<usize, BoxError> {
        let (mut given_back, mut failed) = (0, None);
        if Bug::NeverAsk.is_planted() {
            return Ok(0);
        }
        let mut asked = BTreeSet::new();
        for served in self.actions.values().filter(|served| asked.insert(served.fence_id())) {
            let mut after = Some(OverdueKey::default());
            while let Some(place) = after {
                let page = match served.expired(&place).await {
                    Ok(page) => page,
                    Err(error) => {
                        failed = Some(error.into());
                        break;
                    }
                };
                // Another program may serve the other actions of this fence. It asks for them.
                let branches = page.branches.into_iter();
                let branches: Vec<_> = branches
                    .filter(|(.., action)| self.actions.contains_key(action.as_str()))
                    .map(|(xid, id, action)| Branch::new(xid, id, action, Phase::Cancel))
                    .collect();
                for branches in branches.chunks(limits::INQUIRED_MAX) {
                    given_back += self.ask_about_all(branches, handfast).await?;
                }
                after = page.next;
            }
        }
        failed.map_or(Ok(given_back), Err)
    }

    /// Asks about the branches of a transaction now, whether phase one is over or not.
    pub(super) async fn ask_now(&self, xid: Xid, branch_id: &BranchId) {
        let Some(upkeep) = &self.upkeep else { return };
        let Ok(_permit) = upkeep.nudges.0.try_acquire() else { return };
        for served in self.actions.values() {
            let branches = match served.asking(xid).await {
                Ok(branches) => branches,
                Err(error) => {
                    debug!(%xid, %branch_id, %error, "cannot follow a nudge");
                    continue;
                }
            };
            let named = branches.into_iter().find(|(id, _)| id == branch_id);
            // Several actions may share a fence. Each asks for its own.
            let Some((id, action)) =
                named.filter(|(_, action)| self.actions.contains_key(action.as_str()))
            else {
                continue;
            };
            let branch = [Branch::new(xid, id, action, Phase::Cancel)];
            if Bug::BelieveNudge.is_planted() {
                self.follow(&branch[0], pb::Inquiry::Cancel).await;
            } else if let Err(error) = self.ask_about_all(&branch, &upkeep.handfast).await {
                debug!(%xid, %branch_id, %error, "no answer after a nudge");
            }
            return;
        }
    }

    async fn ask_about_all(
        &self,
        branches: &[Branch],
        handfast: &Handfast,
    ) -> Result<usize, BoxError> {
        let inquired = |branch: &Branch| pb::InquiredBranch {
            xid: branch.xid.to_string(),
            branch_id: branch.branch_id.to_string(),
        };
        let inquired = branches.iter().map(inquired).collect();
        let answers = handfast.inquire(inquired, Instant::now() + ASK_PATIENCE).await;
        let answers = answers.map_err(|status| status_error(&status))?;
        let told: Vec<_> = branches.iter().cloned().zip(answers).collect();
        let follow = |(branch, told)| async move { self.follow(&branch, told).await };
        let given_back = stream::iter(told).map(follow).buffer_unordered(AT_A_TIME);
        Ok(given_back.filter(|given_back| std::future::ready(*given_back)).count().await)
    }

    /// Does what the answer allows. Returns whether the reservation was given back.
    async fn follow(&self, branch: &Branch, told: pb::Inquiry) -> bool {
        let Branch { xid, branch_id, action, .. } = branch;
        match told {
            // A reservation that asks and is still there was confirmed by nobody: a confirmed transaction is not deleted before.
            pb::Inquiry::Cancel => self.give_back(branch, &"it was not confirmed").await,
            pb::Inquiry::Forgotten => self.give_back(branch, &"it is forgotten").await,
            pb::Inquiry::ResolvedConfirmed | pb::Inquiry::ResolvedCancelled => {
                let confirmed = told == pb::Inquiry::ResolvedConfirmed;
                let phase = if confirmed { Phase::Confirm } else { Phase::Cancel };
                let branch = Branch { phase, ..branch.clone() };
                let (Handled::Cancelled | Handled::Closed | Handled::Reported) =
                    self.close_as(branch).await;
                false
            }
            pb::Inquiry::Lost => {
                debug!(%xid, %branch_id, action, "the record of this reservation's transaction may be lost");
                false
            }
            pb::Inquiry::Unspecified | pb::Inquiry::Undecided | pb::Inquiry::Confirmed => false,
        }
    }

    /// Asks in rounds, for ever.
    pub(super) async fn ask_for_ever(&self, handfast: &Handfast) {
        let mut failures = 0_u32;
        loop {
            time::sleep(ASK_EVERY).await;
            match self.ask(handfast).await {
                Ok(_) => failures = 0,
                Err(error) => {
                    failures = failures.saturating_add(1);
                    if failures.is_power_of_two() {
                        warn!(failures, %error, "cannot ask about reservations; will retry");
                    }
                }
            }
        }
    }
}
