//! What a partition logs about its transactions, and how often.

use handfast_proto::{Xid, text};
use tracing::{debug, info, warn};

use super::{Partition, entry::Entry};
use crate::transaction::{Decision, GlobalTransaction, Outcome, Phase};

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
        let labels = self.labels_of(&entry.global);
        if branch.attempts.is_power_of_two() {
            let stuck = *hopeless || branch.attempts >= self.parts.settings.stuck_after.attempts;
            warn!(
                %xid, branch_id = %branch.spec.branch_id, action = branch.spec.action, participant = branch.spec.participant,
                labels, phase = phase.as_str(), attempt = branch.attempts, code = error.code, error = error.message, stuck,
                "call failed; will retry"
            );
        }
    }

    /// Logs a decision. Only Cancel is logged here: a confirmed transaction gets its single line when it completes.
    pub(super) fn log_decision(&self, xid: Xid) {
        let Some(entry) = self.entries.get(&xid) else { return };
        let global = &entry.global;
        let labels = self.labels_of(global);
        match (global.state.decision(), &global.cancel) {
            (Some(decision @ Decision::Confirm), _) => {
                debug!(%xid, name = global.name, labels, decision = decision.as_str(), "decided");
            }
            (_, Some(cause)) => {
                info!(%xid, name = global.name, labels, decision = Decision::Cancel.as_str(), %cause, "decided");
            }
            (_, None) => {}
        }
    }

    /// The labels that the configuration asks for.
    pub(super) fn labels_of(&self, global: &GlobalTransaction) -> Option<String> {
        text::labels(&global.labels, &self.parts.settings.log_labels)
    }
}
