//! Recorded with the decision: Begin and RegisterBranch are answered from memory, and the first record of a transaction may be its
//! decision. If its owner ends before that, the transaction is lost as a whole. It was not confirmed and never will be, so each
//! participant that asks about its reservation gives it back.
//!
//! Participants ask from the end of phase one on. No rule needs that, so here they ask at any moment.

use super::{
    Protocol, Scope,
    guard::Guard,
    state::{
        BRANCHES, Branches, Coordinator, Decision, Fence, Messages, Participant, Read, Record,
        State, Status,
    },
    when,
};

/// The branch whose participant does not ask, in variants that have one.
const SILENT_BRANCH: usize = 1;

/// How transactions are recorded in a variant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recording {
    /// Before the first registration is answered.
    #[default]
    AtBegin,
    /// With the decision, or earlier.
    AtDecision,
    /// Each transaction has its own way.
    Mixed,
}

impl Scope {
    pub(super) fn begins(self, at_decision: bool) -> bool {
        match self.recording {
            Recording::AtBegin => !at_decision,
            Recording::AtDecision => at_decision,
            Recording::Mixed => true,
        }
    }

    pub(super) fn records_at_decision(self) -> bool {
        self.begins(true)
    }
}

impl Protocol {
    /// Whether the owner answers a registration from memory.
    pub(super) fn answers_from_memory(&self, at_decision: bool, process: &Coordinator) -> bool {
        let unrecorded = process.is_unrecorded() || !self.keeps(Guard::HandedOverIsOrdinary);
        let all_ask = !self.scope.silent_participant
            || !process.memory.branches.has(SILENT_BRANCH)
            || !self.keeps(Guard::OnlyWhereAllAsk);
        let alive = !process.is_store_silent() || !self.keeps(Guard::OnlyWhileStoreAnswers);
        at_decision && unrecorded && all_ask && alive
    }

    /// Whether a transaction may stay as it is, without a record.
    pub(super) fn may_stay_unrecorded(state: &State, process: &Coordinator) -> bool {
        state.at_decision && process.is_unrecorded() && process.memory.status == Status::Trying
    }

    /// What an owner answers to participants that ask for their branch, from a row or from memory.
    pub(super) fn answer_inquiries(&self, messages: &mut Messages, known: Record) {
        match known.status.decision() {
            Some(Decision::Cancel) => messages.give_back = Branches::ALL,
            // Branches are fixed with the decision.
            Some(Decision::Confirm) if self.keeps(Guard::AnswerIsAboutBranch) => {
                for branch in (0..BRANCHES).filter(|branch| !known.branches.has(*branch)) {
                    messages.give_back.add(branch);
                }
            }
            Some(Decision::Confirm) | None => {}
        }
    }

    /// The same after a read that has found no row. "Never recorded" is answered elsewhere.
    pub(super) fn answer_forgotten(&self, state: &mut State, read: &Read, newer: bool) {
        let lost = state.xid_epoch <= read.lost_through || !read.knows_epoch;
        let may_be_finished = read.purged || lost;
        if state.at_decision
            && may_be_finished
            && !newer
            && self.keeps(Guard::ForgottenGivesBack)
            && !(lost && self.keeps(Guard::LostIsNotForgotten))
        {
            state.messages.give_back = Branches::ALL;
        }
    }

    /// Whether a read of the store would tell a participant that asks something new.
    pub(super) fn inquiry_needs_read(&self, state: &State, who: usize) -> bool {
        let asks = |branch: usize| {
            state.participants[branch].fence == Fence::Tried
                && self.asks(state, branch)
                && !state.messages.give_back.has(branch)
        };
        state.coordinators[who].memory == Record::ABSENT
            && state.store.record == Record::ABSENT
            && !state.is_lost()
            && (!state.store.purged || self.keeps(Guard::ForgottenGivesBack))
            && (0..BRANCHES).any(asks)
    }

    /// Whether the participant asks about its reservation until it is answered.
    fn asks(&self, state: &State, branch: usize) -> bool {
        let asks = !self.scope.silent_participant || branch != SILENT_BRANCH;
        state.at_decision && asks && self.keeps(Guard::ReservationsAsk)
    }

    /// A participant gives back its reservation, because an answer allows that.
    pub(super) fn give_back(&self, state: &mut State, branch: usize) -> Option<()> {
        when(state.participants[branch].fence == Fence::Tried && self.asks(state, branch))?;
        let deleted = state.store.record == Record::ABSENT;
        let is_told = !deleted || self.keeps(Guard::ResolutionsAreKept);
        if state.store.resolved.has(branch) && is_told {
            // An operator has done its work. What became of the branch is noted, and nothing runs.
            state.participants[branch].fence = match state.history.decided? {
                Decision::Confirm => Fence::Confirmed,
                Decision::Cancel => Fence::Cancelled,
            };
            return Some(());
        }
        when(state.messages.give_back.has(branch))?;
        self.run_cancel(state, branch);
        Some(())
    }

    /// An initiator tells a participant to ask now. Anybody may do that at any moment, so it proves nothing. Without `NudgeIsAQuestion`
    /// only: the participant takes it for an answer.
    pub(super) fn nudge(&self, state: &mut State, branch: usize) -> Option<()> {
        when(!self.keeps(Guard::NudgeIsAQuestion) && state.at_decision)?;
        when(state.participants[branch].fence == Fence::Tried)?;
        self.run_cancel(state, branch);
        Some(())
    }

    /// Without `InitiatorOnlyNudges` only: the initiator was told that the transaction is cancelled, and releases what it has tried.
    pub(super) fn release(&self, state: &mut State, branch: usize) -> Option<()> {
        when(!self.keeps(Guard::InitiatorOnlyNudges) && state.at_decision && state.told.cancel)?;
        let participant = &mut state.participants[branch];
        when(participant.reserved > 0 && participant.released == 0)?;
        participant.released += 1;
        Some(())
    }

    /// An operator does the work of a branch by hand, and its record says so for ever. The operator has made sure that no call is
    /// under way. (In the model this takes one step, which is durable at once.)
    pub(super) fn resolve(&self, state: &mut State, who: usize, branch: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(self.scope.operators && process.owns() && process.batch.is_none())?;
        when(process.memory == process.durable && process.memory.branches.has(branch))?;
        when(!process.acknowledged.has(branch) && !state.store.resolved.has(branch))?;
        let Participant { fence, confirmed, released, .. } = &mut state.participants[branch];
        when(*fence == Fence::Tried)?;
        match process.memory.status {
            Status::Confirming => *confirmed += 1,
            Status::Cancelling => *released += 1,
            Status::Absent | Status::Trying | Status::Confirmed | Status::Cancelled => return None,
        }
        state.store.resolved.add(branch);
        for calls in [&mut state.messages.confirm, &mut state.messages.cancel] {
            calls.remove(branch);
        }
        Some(())
    }
}
