//! The partition's task in an owner: `partition/` and `transaction/apply.rs` of the coordinator. A zombie does exactly the same.

use super::{
    Protocol,
    guard::Guard,
    state::{
        BRANCHES, Branches, Coordinator, Decision, Fence, Read, Record, Role, State, Status, Store,
    },
    when,
};

impl Protocol {
    /// Begin. The record is written lazily, and no reply waits for it: if it is lost, nothing was tried.
    pub(super) fn begin(&self, state: &mut State, who: usize, at_decision: bool) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(state.xid_epoch == 0 && process.owns())?;
        (state.xid_epoch, state.xid_nonce) = (process.epoch, process.nonce);
        state.at_decision = at_decision;
        let branches = if self.scope.execute { Branches::ALL } else { Branches::NONE };
        process.memory = Record { status: Status::Trying, branches };
        self.changed(process);
        Some(())
    }

    pub(super) fn register(&self, state: &mut State, who: usize, branch: usize) -> Option<()> {
        let recorded = state.store.record;
        let process = &mut state.coordinators[who];
        when(!self.scope.execute && state.xid_epoch != 0 && process.owns())?;
        when(!process.memory.branches.has(branch))?; // a repeated call
        match process.memory.status {
            Status::Trying => {}
            Status::Absent => {
                // The store has no record either.
                when(!self.keeps(Guard::UnknownRegisterRefused) && recorded == Record::ABSENT)?;
                process.memory.status = Status::Trying;
            }
            Status::Confirming | Status::Cancelling | Status::Confirmed | Status::Cancelled => {
                when(!self.keeps(Guard::JoinBeforeDecision))?;
            }
        }
        process.memory.branches.add(branch);
        self.changed(process);
        Some(())
    }

    /// The initiator asks to confirm, and names the branches whose Try has answered.
    pub(super) fn ask_confirm(&self, state: &mut State, who: usize) -> Option<()> {
        when(!self.scope.execute && state.coordinators[who].owns())?;
        let tried = state.messages.tried;
        // It may not know the branch of a nested service.
        when(tried == Branches::ALL || self.scope.nested && tried.has(0))?;
        let memory = state.coordinators[who].memory;
        if memory.status == Status::Trying && self.keeps(Guard::ConfirmNamesBranches) {
            when(memory.branches == tried)?;
        }
        self.decide(state, who, Decision::Confirm)
    }

    pub(super) fn ask_cancel(&self, state: &mut State, who: usize) -> Option<()> {
        when(state.xid_epoch != 0 && state.coordinators[who].owns())?;
        self.decide(state, who, Decision::Cancel)
    }

    /// The one place where a decision is made: in memory, by the first call.
    fn decide(&self, state: &mut State, who: usize, decision: Decision) -> Option<()> {
        let recorded = state.store.record;
        let process = &mut state.coordinators[who];
        let decided = match decision {
            Decision::Confirm => Status::Confirming,
            Decision::Cancel => Status::Cancelling,
        };
        let at_once = match decision {
            Decision::Confirm => Status::Confirmed,
            Decision::Cancel => Status::Cancelled,
        };
        match process.memory.status {
            Status::Trying if process.memory.branches == Branches::NONE => {
                process.memory.status = at_once;
            }
            Status::Trying => process.memory.status = decided,
            Status::Absent => {
                let unknown = recorded == Record::ABSENT;
                when(
                    unknown && !self.keeps(Guard::UnknownDecideRefused)
                        || !self.keeps(Guard::MemoryIsNotLastWord),
                )?;
                process.memory.status = at_once;
            }
            Status::Confirming | Status::Cancelling => {
                let opposite = process.memory.status != decided;
                let may_flip = process.durable.status.decision().is_none();
                when(!self.keeps(Guard::FirstDecisionWins) && opposite && may_flip)?;
                process.memory.status = decided;
            }
            Status::Confirmed | Status::Cancelled => return None, // a repeated call, or a refused one
        }
        process.acknowledged = Branches::NONE;
        self.changed(process);
        Some(())
    }

    /// The reply to a Try that the coordinator made itself. The last reply decides.
    pub(super) fn take_tried(&self, state: &mut State, who: usize, branch: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(self.scope.execute && process.owns() && process.memory.status == Status::Trying)?;
        when(state.messages.tried.has(branch) && !process.acknowledged.has(branch))?;
        process.acknowledged.add(branch);
        if process.acknowledged == Branches::ALL {
            return self.decide(state, who, Decision::Confirm);
        }
        Some(())
    }

    /// A participant has acknowledged Confirm or Cancel. The last one finishes the transaction.
    pub(super) fn take_acknowledged(
        &self,
        state: &mut State,
        who: usize,
        branch: usize,
    ) -> Option<()> {
        let process = &state.coordinators[who];
        let memory = process.memory;
        when(process.owns() && memory.branches.has(branch) && !process.acknowledged.has(branch))?;
        let sent = &state.messages;
        let (called, answered, finished) = match memory.status {
            Status::Confirming => (sent.confirm, sent.confirmed, Status::Confirmed),
            Status::Cancelling => (sent.cancel, sent.cancelled, Status::Cancelled),
            Status::Absent | Status::Trying | Status::Confirmed | Status::Cancelled => return None,
        };
        let spared = !self.keeps(Guard::CancelAlsoToRefused)
            && memory.status == Status::Cancelling
            && sent.refused.has(branch);
        let unawaited = !self.keeps(Guard::AcknowledgementsAwaited) && called.has(branch);
        let resolved = state.store.resolved.has(branch);
        let answers = answered.has(branch) && self.answers_now(state, branch);
        when(spared || unawaited || resolved || answers)?;
        let process = &mut state.coordinators[who];
        process.acknowledged.add(branch);
        if process.acknowledged == memory.branches {
            process.memory.status = finished;
            process.acknowledged = Branches::NONE;
            self.changed(process);
        }
        Some(())
    }

    /// A reply reaches only the process that made the call, so what counts is what the participant would answer now. After its fence
    /// row was deleted, it answers a Confirm with an error until the retention is over.
    fn answers_now(&self, state: &State, branch: usize) -> bool {
        let participant = &state.participants[branch];
        !(participant.cleaned && participant.fence == Fence::Nothing)
            || self.keeps(Guard::LateConfirmIsDone) && participant.retention_over
    }

    /// A transaction that waits for its next attempt, or is finished, leaves memory.
    pub(super) fn leave_memory(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(self.scope.forgets && process.owns() && process.memory != Record::ABSENT)?;
        if self.keeps(Guard::CleanBeforeLeaving) {
            when(process.memory.status.decision().is_some())?;
            when(process.memory == process.durable && process.batch.is_none())?;
        }
        Self::forget(process);
        Some(())
    }

    fn forget(process: &mut Coordinator) {
        process.memory = Record::ABSENT;
        process.durable = Record::ABSENT;
        process.acknowledged = Branches::NONE;
        process.reads.iter_mut().flatten().for_each(|read| read.stale = true);
    }

    /// A read begins: a caller asks for the transaction, or it is due. (A read sees what is durable at some moment between its begin and
    /// its end. To see it at the begin and to arrive late is the worst case.)
    pub(super) fn read(&self, state: &mut State, who: usize) -> Option<()> {
        self.read_from(state, who, state.store)
    }

    /// A read of `store`, which is the present one or what a replica still shows. A read that is too old is repeated, so it is left out
    /// here.
    pub(super) fn read_from(&self, state: &mut State, who: usize, store: Store) -> Option<()> {
        when(self.is_in_sight(&state.coordinators[who], &store))?;
        let epoch = state.coordinators[who].epoch;
        let absent = store.record == Record::ABSENT;
        when(!absent || !self.is_beyond_help(state, epoch, store.record))?;
        let process = &mut state.coordinators[who];
        let early = process.role == Role::Standby && !self.keeps(Guard::LoadAfterTakeover);
        when(process.owns() || early)?;
        when(process.memory == Record::ABSENT && state.xid_epoch != 0)?;
        let knows_epoch = store.nonces[usize::from(state.xid_epoch)] == state.xid_nonce;
        // If nothing leaves memory, a second read finds the transaction there.
        let at_once = if self.scope.forgets { 2 } else { 1 };
        let free = process.reads[..at_once].iter_mut().find(|read| read.is_none())?;
        let Store { record: row, purged, lost_through, .. } = store;
        *free = Some(Read { row, purged, lost_through, knows_epoch, stale: false });
        process.reads.sort_by_key(|read| (read.is_none(), *read));
        Some(())
    }

    /// The row that was read reaches the partition's task.
    pub(super) fn take_row(&self, state: &mut State, who: usize, which: usize) -> Option<()> {
        let xid_epoch = state.xid_epoch;
        let is_replaced = !state.is_live_owner(&state.coordinators[who]);
        let process = &mut state.coordinators[who];
        when(process.owns())?;
        let read = process.reads[which].take()?;
        process.reads.sort_by_key(|read| (read.is_none(), *read));
        if process.memory != Record::ABSENT || read.stale && self.keeps(Guard::StaleRowDropped) {
            return Some(());
        }
        let lost = xid_epoch <= read.lost_through;
        if read.row.status == Status::Trying && lost && self.keeps(Guard::LostIsNotDecided) {
            // It stays as it is, and operators see it.
        } else if read.row.status.is_open() {
            process.memory = read.row;
            process.durable = read.row;
            if self.scope.execute && read.row.status == Status::Trying {
                // The payloads are gone, and it is not known what was tried.
                process.memory.status = Status::Cancelling;
            }
        } else if read.row == Record::ABSENT {
            let forgotten = read.purged && self.keeps(Guard::PurgeIsRemembered);
            let newer = xid_epoch > process.epoch && self.keeps(Guard::NewerEpochsAreNotOurs);
            let stranger = !read.knows_epoch && self.keeps(Guard::OtherHistoriesAreNotOurs);
            if self.scope.lost_before && newer {
                // A batch of an owner that was replaced never lands.
                state.told.lost |= !(is_replaced && self.keeps(Guard::LostToldAfterBatch));
            }
            if !forgotten && !newer && !stranger && !lost {
                state.told.cancel = true; // "never recorded": the caller may take it for cancelled
                if state.at_decision {
                    state.messages.give_back = Branches::ALL;
                }
            } else {
                self.answer_forgotten(state, &read, newer);
            }
        }
        Some(())
    }

    /// Adds every reply and call that an owner may send now. To send them early only adds stories, because none need arrive.
    pub(super) fn speak(&self, state: &mut State) {
        // Any process may read a decision in the store and tell it.
        state.told.tell(state.store.record.status.decision());
        if state.at_decision {
            self.answer_inquiries(&mut state.messages, state.store.record);
        }
        for process in state.coordinators.iter().filter(|process| process.owns()) {
            let choose = |waits: Guard| {
                if self.keeps(waits) { process.durable } else { process.memory }
            };
            let registered = if self.scope.execute {
                choose(Guard::TryWhenDurable)
            } else if self.answers_from_memory(state.at_decision, process) {
                let news = (0..BRANCHES).any(|branch| {
                    process.memory.branches.has(branch) && !state.messages.try_.has(branch)
                });
                state.history.answered_in_silence |= news && process.is_store_silent();
                process.memory
            } else {
                choose(Guard::RegisteredToldWhenDurable)
            };
            if !self.scope.execute || process.memory.status == Status::Trying {
                state.messages.try_.add_all(registered.branches);
            }
            state.told.tell(choose(Guard::DecisionToldWhenDurable).status.decision());
            if state.at_decision {
                self.answer_inquiries(&mut state.messages, process.durable);
            }
            if process.memory == Record::ABSENT
                && !self.keeps(Guard::AnswerAfterLook)
                && (1..process.epoch).contains(&state.xid_epoch)
            {
                state.told.cancel = true;
            }
            let decided = choose(Guard::PhaseTwoWhenDurable);
            let calls = match decided.status {
                Status::Confirming => &mut state.messages.confirm,
                Status::Cancelling => &mut state.messages.cancel,
                Status::Absent | Status::Trying | Status::Confirmed | Status::Cancelled => continue,
            };
            for branch in (0..BRANCHES).filter(|branch| decided.branches.has(*branch)) {
                let spared = decided.status == Status::Cancelling
                    && state.messages.refused.has(branch)
                    && !self.keeps(Guard::CancelAlsoToRefused);
                if !spared && !state.store.resolved.has(branch) {
                    calls.add(branch);
                }
            }
            state.history.phase_two_early |= state.history.decided != decided.status.decision();
        }
    }

    /// Keeps the transaction as the first waiting change left it, if a guard is missing that needs it.
    fn changed(&self, process: &mut Coordinator) {
        let needed = !self.keeps(Guard::LastContent) || !self.keeps(Guard::FirstPlace);
        if needed && process.first_change == Record::ABSENT {
            process.first_change = process.memory;
        }
    }
}
