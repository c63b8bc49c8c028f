//! A participant: the table of the SDK's fence (`fence/verdict.rs`), its clean-up and its inquiry. Each step is one local transaction
//! together with the participant's own work.

use super::{
    Protocol,
    guard::Guard,
    state::{Fence, State, Status},
    when,
};

/// Effects are counted up to here. Twice is wrong already.
const COUNTED: u8 = 2;

impl Protocol {
    pub(super) fn try_branch(&self, state: &mut State, branch: usize) -> Option<()> {
        when(state.messages.try_.has(branch))?;
        let repeats_run = !self.keeps(Guard::RepeatRunsNothing);
        let participant = &mut state.participants[branch];
        match participant.fence {
            Fence::Nothing => {
                when(!participant.phase_one_over || !self.keeps(Guard::TryHasDeadline))?;
                state.history.late_try_ran |= state.messages.cancelled.has(branch);
                participant.reserved += 1;
                participant.fence = Fence::Tried;
            }
            Fence::Tried if repeats_run => {
                participant.reserved = COUNTED.min(participant.reserved + 1);
            }
            Fence::Tried | Fence::Confirmed => {}
            Fence::Cancelled | Fence::Suspended => {
                when(!self.keeps(Guard::LateTryRefused) && participant.reserved < COUNTED)?;
                state.history.late_try_ran = true;
                participant.reserved += 1;
                participant.fence = Fence::Tried;
            }
        }
        when(participant.reserved <= COUNTED)?;
        state.messages.tried.add(branch);
        Some(())
    }

    /// The participant refuses. It records nothing, so another delivery of the same Try may succeed.
    pub(super) fn refuse(&self, state: &mut State, branch: usize) -> Option<()> {
        when(self.scope.refusals && state.messages.try_.has(branch))?;
        when(state.participants[branch].fence == Fence::Nothing)?;
        state.messages.refused.add(branch);
        Some(())
    }

    pub(super) fn confirm(&self, state: &mut State, branch: usize) -> Option<()> {
        when(state.messages.confirm.has(branch))?;
        let participant = &mut state.participants[branch];
        match participant.fence {
            Fence::Tried => {
                participant.fence = Fence::Confirmed;
                participant.confirmed = COUNTED.min(participant.confirmed + 1);
            }
            Fence::Confirmed => {
                if !self.keeps(Guard::RepeatRunsNothing) {
                    participant.confirmed = COUNTED.min(participant.confirmed + 1);
                }
            }
            Fence::Nothing
                if participant.retention_over && self.keeps(Guard::LateConfirmIsDone) => {}
            Fence::Nothing if participant.cleaned => return None, // an error; the call is repeated
            Fence::Nothing | Fence::Cancelled | Fence::Suspended => {
                state.history.refused_loudly = true;
                return Some(());
            }
        }
        state.messages.confirmed.add(branch);
        Some(())
    }

    pub(super) fn cancel(&self, state: &mut State, branch: usize) -> Option<()> {
        when(state.messages.cancel.has(branch))?;
        self.run_cancel(state, branch);
        Some(())
    }

    pub(super) fn run_cancel(&self, state: &mut State, branch: usize) {
        let participant = &mut state.participants[branch];
        match participant.fence {
            Fence::Tried => {
                participant.fence = Fence::Cancelled;
                participant.released = COUNTED.min(participant.released + 1);
            }
            Fence::Nothing => {
                if self.keeps(Guard::EmptyRollbackRecorded) {
                    participant.fence = Fence::Suspended;
                }
            }
            Fence::Cancelled => {
                if !self.keeps(Guard::RepeatRunsNothing) {
                    participant.released = COUNTED.min(participant.released + 1);
                }
            }
            Fence::Suspended => {}
            Fence::Confirmed => {
                state.history.refused_loudly = true;
                return;
            }
        }
        state.messages.cancelled.add(branch);
    }

    pub(super) fn phase_one_over(&self, state: &mut State, branch: usize) -> Option<()> {
        let participant = &mut state.participants[branch];
        when(self.scope.cleanup && !participant.phase_one_over)?;
        participant.phase_one_over = true;
        Some(())
    }

    pub(super) fn retention_over(&self, state: &mut State, branch: usize) -> Option<()> {
        let participant = &mut state.participants[branch];
        when(participant.phase_one_over && !participant.retention_over)?;
        participant.retention_over = true;
        Some(())
    }

    /// Deletes a fence row in a final state whose phase one is over. (The retention counts from the last change, and may be over before
    /// the retention that counts from phase one. So it is no condition here.)
    pub(super) fn clean_fence(&self, state: &mut State, branch: usize) -> Option<()> {
        let participant = &mut state.participants[branch];
        when(self.scope.cleanup && !participant.cleaned && participant.fence != Fence::Nothing)?;
        when(participant.phase_one_over || !self.keeps(Guard::RowOutlivesPhaseOne))?;
        when(participant.fence != Fence::Tried || !self.keeps(Guard::TriedRowStays))?;
        participant.fence = Fence::Nothing;
        participant.cleaned = true;
        Some(())
    }

    /// The participant asks about a reservation long after phase one, and cancels it on the reply "cancelled" or "never recorded".
    pub(super) fn inquire(&self, state: &mut State, branch: usize) -> Option<()> {
        let participant = &state.participants[branch];
        when(participant.phase_one_over && participant.fence == Fence::Tried)?;
        when(!state.at_decision)?;
        let undecided = state
            .coordinators
            .iter()
            .any(|process| process.owns() && process.memory.status == Status::Trying);
        when(state.told.cancel || undecided && !self.keeps(Guard::UndecidedIsNoPromise))?;
        self.run_cancel(state, branch);
        Some(())
    }
}
