//! Which calls are due. This follows from the state alone.

use super::{BranchState, Call, Drive, GlobalTransaction, Phase, State, Timestamp};

/// A call to make now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DueCall {
    /// Index of the branch.
    pub branch: usize,
    /// Try, Confirm or Cancel.
    pub phase: Phase,
}

/// The calls to make now, and when to look again if no event comes first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The calls that are due now.
    pub calls: Vec<DueCall>,
    /// When the next call or the timeout is due; `None` if only an event can make something due.
    pub wake_at: Option<Timestamp>,
}

impl GlobalTransaction {
    /// Which calls are due at `now`, and when to look again. Changes nothing.
    #[must_use]
    pub fn plan(&self, now: Timestamp) -> Plan {
        match (self.state, self.drive) {
            (State::Trying, Drive::Initiator) => {
                Plan { calls: Vec::new(), wake_at: Some(self.expires_at) }
            }
            (State::Trying, Drive::Coordinator { in_order }) => {
                let untried = |state: &BranchState| *state == BranchState::Registered;
                // In order: only the first branch that has not been tried.
                let mut plan =
                    self.due(Phase::Try, untried, if in_order { 1 } else { usize::MAX }, now);
                plan.wake_at =
                    Some(plan.wake_at.map_or(self.expires_at, |at| at.min(self.expires_at)));
                plan
            }
            (State::Confirming, _) => {
                self.due(Phase::Confirm, Self::unacknowledged, usize::MAX, now)
            }
            (State::Cancelling, _) => {
                self.due(Phase::Cancel, Self::unacknowledged, usize::MAX, now)
            }
            (State::Confirmed | State::Cancelled, _) => Plan::default(),
        }
    }

    fn unacknowledged(state: &BranchState) -> bool {
        matches!(state, BranchState::Registered | BranchState::Tried)
    }

    /// Looks at the first `most` branches that are `wanted`. Plans calls to those that are due, and sets the time to
    /// wake up for the earliest of the others.
    fn due(
        &self,
        phase: Phase,
        wanted: impl Fn(&BranchState) -> bool,
        most: usize,
        now: Timestamp,
    ) -> Plan {
        let mut plan = Plan::default();
        let open = self.branches.iter().enumerate().filter(|(_, branch)| wanted(&branch.state));
        for (index, branch) in open.take(most) {
            match branch.call {
                Call::InFlight(_) => {} // its return will be an event
                Call::Idle { due_at } if due_at <= now => {
                    plan.calls.push(DueCall { branch: index, phase });
                }
                Call::Idle { due_at } => {
                    plan.wake_at = Some(plan.wake_at.map_or(due_at, |at| at.min(due_at)));
                }
            }
        }
        plan
    }
}
