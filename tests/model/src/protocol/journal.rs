//! The life of a batch: `journal/` and the store's `append` in the coordinator, and the database, which carries out a batch even if its
//! owner is gone. And takeovers.

use super::{
    Protocol,
    guard::Guard,
    state::{Batch, Branches, Coordinator, Decision, Progress, Record, Role, State},
    when,
};

impl Protocol {
    /// Sends a batch with the transaction as it is in memory now.
    pub(super) fn send(&self, state: &mut State, who: usize) -> Option<()> {
        let process = state.coordinators[who];
        when(process.owns() && process.memory != Record::ABSENT)?;
        if let Some(under_way) = process.batch {
            let changed = under_way.record != process.memory;
            when(!self.keeps(Guard::OneBatchAtATime) && changed && state.abandon(under_way))?;
        } else {
            when(process.memory != process.durable)?;
        }
        let process = &mut state.coordinators[who];
        process.position += 1;
        let first = std::mem::take(&mut process.first_change);
        let record = if self.keeps(Guard::LastContent) || first == Record::ABSENT {
            process.memory
        } else {
            first
        };
        process.batch = Some(Batch {
            progress: Progress::Sent,
            epoch: process.epoch,
            nonce: process.nonce,
            position: process.position,
            expects: if self.scope.old_reads { process.durable } else { Record::ABSENT },
            record,
            claims: process.memory,
            repeat: false,
        });
        Some(())
    }

    /// Sends a batch of other transactions, because there was no room for ours, or a heartbeat.
    pub(super) fn send_others(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(self.scope.others && process.owns() && process.batch.is_none())?;
        let waits = process.memory != process.durable;
        let (claims, position) = if !self.keeps(Guard::FirstPlace) {
            // Our transaction moved back in the queue, so this batch claims that its first change is durable.
            when(waits && process.first_change != Record::ABSENT)?;
            (std::mem::take(&mut process.first_change), process.position + 1)
        } else {
            when(process.position < 2)?; // without a limit there would be no end
            (process.durable, process.position + 1)
        };
        if self.keeps(Guard::PartsHaveOwnNumbers) {
            process.position = position;
        }
        process.batch = Some(Batch {
            progress: Progress::Sent,
            epoch: process.epoch,
            nonce: process.nonce,
            position,
            expects: Record::ABSENT,
            record: Record::ABSENT,
            claims,
            repeat: false,
        });
        Some(())
    }

    pub(super) fn guard(&self, state: &mut State, who: usize) -> Option<()> {
        let batch = state.coordinators[who].batch?;
        let progress = self.guarded(state, batch)?;
        state.coordinators[who].batch = Some(Batch { progress, ..batch });
        Some(())
    }

    /// The first statement of a batch: `UPDATE … SET position = n WHERE epoch = ? AND nonce = ? AND position = n - 1`.
    fn guarded(&self, state: &State, batch: Batch) -> Option<Progress> {
        when(batch.progress == Progress::Sent && !self.is_row_held(state))?;
        let epoch = batch.epoch == state.store.epoch || !self.keeps(Guard::EpochInGuard);
        let nonce = batch.nonce == state.store.nonce() || !self.keeps(Guard::NonceInGuard);
        let next = batch.position == state.store.position + 1;
        let position = next || !self.keeps(Guard::PositionInGuard);
        let unguarded = batch.repeat && !self.keeps(Guard::RepeatIsGuarded);
        let passes = epoch && nonce && position || unguarded || !self.keeps(Guard::GuardIsHeeded);
        let decides = passes && batch.record.status.decision().is_some();
        when(!decides || !self.is_beyond_help(state, batch.epoch, batch.record))?;
        Some(if passes { Progress::Guarded } else { Progress::Missed })
    }

    /// Whether a batch holds the partition's row. Other writers wait for it.
    pub(super) fn is_row_held(&self, state: &State) -> bool {
        let of_owners = state.coordinators.iter().filter_map(|process| process.batch.as_ref());
        self.keeps(Guard::GuardInsideTransaction)
            && of_owners
                .chain(state.abandoned.iter().flatten())
                .any(|batch| batch.progress == Progress::Guarded)
    }

    /// No row matched. The same local transaction reads epoch, nonce and position: `judge` in the store.
    pub(super) fn look(&self, state: &mut State, who: usize) -> Option<()> {
        let store = state.store;
        let batch = state.coordinators[who].batch?;
        when(batch.progress == Progress::Missed)?;
        let same_epoch = batch.epoch == store.epoch || !self.keeps(Guard::LookComparesEpoch);
        let same_nonce = batch.nonce == store.nonce() || !self.keeps(Guard::LookComparesNonce);
        let landed = batch.position == store.position && same_epoch && same_nonce;
        let known = state.coordinators[who].known_position();
        let lost_before = self.lost_before_takeover(&state.coordinators[who], &store).is_some();
        let batch = state.coordinators[who].batch.as_mut()?;
        batch.progress = if landed || !self.keeps(Guard::MissIsNoLanding) {
            Progress::Landed
        } else if lost_before {
            Progress::Lost
        } else if store.epoch > batch.epoch || !self.keeps(Guard::MissIsNoFence) {
            Progress::Fenced
        } else if self.is_behind(batch.epoch, batch.nonce, known, &store) {
            Progress::Lost
        } else {
            Progress::Corrupt
        };
        if !self.keeps(Guard::MissIsNoFence) {
            batch.progress = Progress::Fenced;
        }
        Some(())
    }

    pub(super) fn commit(&self, state: &mut State, who: usize) -> Option<()> {
        let batch = state.coordinators[who].batch?;
        when(batch.progress == Progress::Guarded)?;
        let fits = self.row_fits(state, batch);
        if fits {
            self.write(state, batch);
        }
        let progress = if fits { Progress::Landed } else { Progress::Corrupt };
        state.coordinators[who].batch = Some(Batch { progress, ..batch });
        Some(())
    }

    fn write(&self, state: &mut State, batch: Batch) {
        state.store.position = batch.position;
        if batch.record == Record::ABSENT {
            return;
        }
        let record = self.written(state, batch);
        let before = state.store.record.status.decision();
        let now = record.status.decision();
        let history = &mut state.history;
        history.joined_late |=
            before.is_some() && now.is_some() && record.branches != state.store.record.branches;
        history.decision_changed |= before.is_some() && now != before
            || history.decided.is_some() && now.is_some() && now != history.decided;
        if history.decided.is_none() && now.is_some() {
            history.decided = now;
            history.decided_branches = record.branches;
        }
        state.store.record = record;
    }

    /// The owner hears what became of its batch.
    pub(super) fn hear(&self, state: &mut State, who: usize) -> Option<()> {
        let current = state.store.epoch;
        let process = &mut state.coordinators[who];
        when(process.owns())?;
        let batch = process.batch?;
        match batch.progress {
            Progress::Lost => return self.stop_at_loss(state, who),
            Progress::Sent | Progress::Guarded | Progress::Missed => return None,
            Progress::Landed => {
                process.batch = None;
                // If the transaction has left memory meanwhile, nothing is known of it.
                if process.memory != Record::ABSENT {
                    process.durable = batch.claims;
                }
            }
            Progress::Fenced => {
                state.history.ended_for_nothing |= process.epoch == current;
                self.end(process);
            }
            Progress::Corrupt => {
                state.history.ended_for_nothing = true;
                self.end(process);
            }
        }
        Some(())
    }

    /// The process exits, and its memory is gone.
    pub(super) fn end(&self, process: &mut Coordinator) {
        let before = *process;
        *process = Coordinator::DOWN;
        if !self.keeps(Guard::MemoryIsReplaced) {
            let Coordinator { memory, durable, acknowledged, .. } = before;
            let role = Role::Standby;
            *process = Coordinator { role, memory, durable, acknowledged, ..Coordinator::DOWN };
        }
    }

    /// The database rolls the batch back and says so. The same batch is sent again.
    pub(super) fn roll_back(&self, state: &mut State, who: usize) -> Option<()> {
        let batch = state.coordinators[who].batch?;
        when(batch.progress == Progress::Guarded && state.spent.faults < self.scope.faults)?;
        state.spent.faults += 1;
        let (progress, repeat) = (Progress::Sent, true);
        state.coordinators[who].batch = Some(Batch { progress, repeat, ..batch });
        Some(())
    }

    /// The reply is lost. The database may still carry out the batch, and the same batch is sent again.
    pub(super) fn lose_connection(&self, state: &mut State, who: usize) -> Option<()> {
        let process = state.coordinators[who];
        let batch = process.batch?;
        when(process.owns() && state.spent.faults < self.scope.faults)?;
        state.spent.faults += 1;
        self.leave_to_database(state, batch)?;
        let process = &mut state.coordinators[who];
        process.batch = Some(Batch { progress: Progress::Sent, repeat: true, ..batch });
        if !self.keeps(Guard::SilenceIsNoFailure) {
            Self::undo(process);
        }
        if !self.keeps(Guard::SilenceIsNotAnswered)
            && batch.record.status.decision() == Some(Decision::Confirm)
        {
            state.told.cancel = true;
        }
        if !self.keeps(Guard::SameBatchAgain) {
            // The next batch gets the same number, with other content.
            process.batch = None;
            process.position -= 1;
        }
        Some(())
    }

    /// Without `AbsenceIsNoProof`: a read on another connection does not find the change, and the owner takes that for a failure.
    pub(super) fn read_beside_batch(&self, state: &mut State, who: usize) -> Option<()> {
        let store = state.store;
        let process = &mut state.coordinators[who];
        let batch = process.batch?;
        when(!self.keeps(Guard::AbsenceIsNoProof) && process.owns() && batch.repeat)?;
        when(batch.progress == Progress::Sent && batch.epoch == store.epoch)?;
        when(store.position + 1 == batch.position)?;
        Self::undo(process);
        Some(())
    }

    /// Undoes the change of the batch in flight. Its number is free again.
    fn undo(process: &mut Coordinator) {
        process.batch = None;
        process.position -= 1;
        process.memory = process.durable;
        process.acknowledged = Default::default();
    }

    /// A batch without an owner that waits: the database may still carry it out.
    fn leave_to_database(&self, state: &mut State, batch: Batch) -> Option<()> {
        match batch.progress {
            Progress::Sent | Progress::Guarded => when(state.abandon(batch)),
            Progress::Missed
            | Progress::Landed
            | Progress::Fenced
            | Progress::Lost
            | Progress::Corrupt => Some(()),
        }
    }

    pub(super) fn guard_abandoned(&self, state: &mut State, which: usize) -> Option<()> {
        let batch = state.abandoned[which]?;
        let progress = self.guarded(state, batch)?;
        let matched = progress == Progress::Guarded;
        state.abandoned[which] = matched.then_some(Batch { progress, ..batch });
        state.abandoned.sort();
        Some(())
    }

    pub(super) fn commit_abandoned(&self, state: &mut State, which: usize) -> Option<()> {
        let batch = state.abandoned[which]?;
        when(batch.progress == Progress::Guarded)?;
        if self.row_fits(state, batch) {
            self.write(state, batch);
        }
        self.end_abandoned(state, which)
    }

    pub(super) fn end_abandoned(&self, state: &mut State, which: usize) -> Option<()> {
        state.abandoned[which].take()?;
        state.abandoned.sort();
        Some(())
    }

    /// The purge deletes the row after the retention. The same local transaction records how far the purge has come.
    pub(super) fn purge(&self, state: &mut State) -> Option<()> {
        // It passes by a transaction that was never recorded. From then on the answer about that one is "forgotten".
        let never_recorded = state.at_decision
            && state.store.record == Record::ABSENT
            && state.xid_epoch < state.store.epoch;
        when(self.scope.purge && (state.store.record.status.is_final() || never_recorded))?;
        state.store.record = Record::ABSENT;
        state.store.purged = true;
        // Earlier answers need not arrive, and this is the present one.
        state.messages.give_back = Branches::NONE;
        Some(())
    }

    // ---- ownership ----

    pub(super) fn crash(&self, state: &mut State, who: usize) -> Option<()> {
        let process = state.coordinators[who];
        when(process.role != Role::Down && state.spent.crashes < self.scope.crashes)?;
        when(process.owns())?; // a standby has nothing to lose
        when(!state.history.loss_unnoticed)?;
        state.spent.crashes += 1;
        if let Some(batch) = process.batch {
            self.leave_to_database(state, batch)?;
        }
        state.coordinators[who] = Coordinator::DOWN;
        Some(())
    }

    pub(super) fn start(&self, state: &mut State, who: usize) -> Option<()> {
        when(who == 0 || self.scope.standby)?;
        when(state.coordinators[who].role == Role::Down)?;
        // After an alarm a person looks before the process is started again.
        when(!self.scope.old_reads || !state.history.ended_for_nothing)?;
        state.coordinators[who].role = Role::Standby;
        Some(())
    }

    pub(super) fn read_epoch(&self, state: &mut State, who: usize) -> Option<()> {
        let epoch = state.store.epoch;
        let process = &mut state.coordinators[who];
        when(!self.keeps(Guard::TakeoverIsOneStatement) && process.role == Role::Standby)?;
        process.seen_epoch = epoch;
        Some(())
    }

    /// `UPDATE … SET epoch = epoch + 1, nonce = ?, position = 0`, in its own local transaction, which waits for a batch that holds the row.
    /// If its answer is lost, the process must take over again.
    pub(super) fn take_over(&self, state: &mut State, who: usize, heard: bool) -> Option<()> {
        when(state.coordinators[who].role == Role::Standby)?;
        let as_before = !self.keeps(Guard::StartIsTakeover);
        when(as_before || !self.is_row_held(state))?;
        when(!state.history.loss_unnoticed || self.scope.late_notice)?;
        if state.has_live_owner() {
            when(state.spent.takeovers < self.scope.takeovers)?;
            state.spent.takeovers += 1;
        }
        let mut epoch = state.store.epoch.max(state.store.lost_through) + 1;
        let mut nonce = state.spent.nonce();
        if !self.keeps(Guard::TakeoverIsOneStatement) {
            when(state.coordinators[who].seen_epoch > 0)?;
            epoch = state.coordinators[who].seen_epoch + 1;
        }
        if !heard {
            when(state.spent.faults < self.scope.faults)?;
            state.spent.faults += 1;
            if self.keeps(Guard::LostTakeoverIsRepeated) {
                self.begin_epoch(state, epoch, nonce);
                return Some(());
            }
            // The takeover never reached the database, and the process goes on as if it had.
        } else if as_before {
            (epoch, nonce) = (state.store.epoch, state.store.nonce());
        } else {
            self.begin_epoch(state, epoch, nonce);
        }
        let process = &mut state.coordinators[who];
        process.role = Role::Owner;
        (process.epoch, process.nonce) = (epoch, nonce);
        process.position = if as_before { state.store.position } else { 0 };
        process.seen_epoch = 0;
        Some(())
    }

    pub(super) fn begin_epoch(&self, state: &mut State, epoch: u8, nonce: u8) {
        if self.scope.late_notice {
            state.store.ended[usize::from(state.store.epoch)] = state.store.position;
        }
        (state.store.epoch, state.store.position) = (epoch, 0);
        state.store.nonces[usize::from(epoch)] = nonce;
    }
}
