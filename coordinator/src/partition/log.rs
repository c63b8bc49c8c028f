//! What a partition logs about its transactions, and how often.

use handfast_proto::Xid;
use tracing::{debug, info, warn};

use super::{Partition, entry::Entry};
use crate::transaction::{Decision, Outcome, Phase};

impl Partition {
    /// Logs a branch's 1st, 2nd, 4th, 8th, … failed call, so that one dead participant does not fill the log.
    pub(super) fn log_failure(
        &self,
        entry: &Entry,
        branch: usize,
        phase: Phase,
        outcome: &Outcome,
    ) {
        let (xid, branch) = (entry.global.xid, &entry.global.branches[branch]);
        let Outcome::Unknown { error, hopeless, .. } = outcome else { return };
        if branch.attempts.is_power_of_two() {
            let stuck = *hopeless || branch.attempts >= self.parts.settings.stuck_after.attempts;
            warn!(
                %xid, branch_id = %branch.spec.branch_id, action = branch.spec.action, participant = branch.spec.participant,
                phase = phase.as_str(), attempt = branch.attempts, code = error.code, error = error.message, stuck,
                "call failed; will retry"
            );
        }
    }

    /// Logs a decision. Only Cancel is logged here: a confirmed transaction gets its single line when it completes.
    pub(super) fn log_decision(&self, xid: Xid) {
        let Some(entry) = self.entries.get(&xid) else { return };
        let global = &entry.global;
        match (global.state.decision(), &global.cancel) {
            (Some(decision @ Decision::Confirm), _) => {
                debug!(%xid, name = global.name, decision = decision.as_str(), "decided");
            }
            (_, Some(cause)) => {
                info!(%xid, name = global.name, decision = Decision::Cancel.as_str(), %cause, "decided");
            }
            (_, None) => {}
        }
    }
}
