//! A failover to a server without the last changes of the first one.
//!
//! If it lacks a takeover, the next takeover gives the same epoch number again. Then two histories have the same epoch number, and only
//! the nonce tells them apart. If it lacks acknowledged batches, no rule can bring them back. The rules ensure that their owner
//! notices the loss, and that nothing is said or decided afterwards about transactions that may be affected.
//!
//! A standby may take over before the owner notices the loss. Whoever records the loss then ends that ownership.
//!
//! The model leaves out what nobody can know: a loss whose owner dies before it notices, and what a standby decides and tells before the
//! loss is noticed. The documentation must name that risk.

use super::{
    Protocol,
    guard::Guard,
    state::{Batch, Coordinator, Progress, Record, State, Store},
    when,
};

impl Protocol {
    pub(super) fn fail_over(&self, state: &mut State, which: usize) -> Option<()> {
        when(state.spent.failovers < self.scope.failovers && !state.history.loss_unnoticed)?;
        let (first, second) = (state.store, *state.past.get(which)?);
        // If the takeover that replaced a zombie were lost, the zombie would be the owner again, and nobody could notice.
        when(state.coordinators.iter().all(|it| !it.owns() || state.is_live_owner(it)))?;
        if (first.record, first.purged) != (second.record, second.purged) {
            when(self.scope.losses && state.has_live_owner())?;
            state.history.loss_unnoticed = true;
        }
        state.spent.failovers += 1;
        state.store = second;
        // Sessions end with the first server. An owner without a reply sends the same batch again.
        state.abandoned = Default::default();
        for batch in state.coordinators.iter_mut().filter_map(|process| process.batch.as_mut()) {
            if matches!(batch.progress, Progress::Sent | Progress::Guarded | Progress::Missed) {
                *batch = Batch { progress: Progress::Sent, repeat: true, ..*batch };
            }
        }
        Some(())
    }

    /// Whether the store lacks changes that this owner knows to be durable, or has another history.
    pub(super) fn is_behind(&self, epoch: u8, nonce: u8, known: u8, store: &Store) -> bool {
        let other_history = store.epoch == epoch && store.nonce() != nonce;
        let own = store.epoch == epoch && store.nonce() == nonce;
        let shorter = own && store.position < known;
        self.scope.failovers > 0 && (store.epoch < epoch || other_history || shorter)
    }

    /// Through which epoch the store had lost changes of this owner before another one took over; `None`: through none, or somebody has
    /// recorded it. If the owner's own takeover is gone, the changes of earlier owners may be gone too.
    pub(super) fn lost_before_takeover(&self, process: &Coordinator, store: &Store) -> Option<u8> {
        when(self.scope.late_notice && store.epoch >= process.epoch)?;
        let epoch = usize::from(process.epoch);
        let lost_through = if store.nonces[epoch] != process.nonce {
            process.epoch - 1
        } else {
            when(store.epoch > process.epoch && store.ended[epoch] < process.known_position())?;
            process.epoch
        };
        when(store.lost_through < lost_through)?;
        Some(lost_through)
    }

    /// Whether an owner would now decide, or deny, a transaction of an earlier epoch while a loss is not noticed. Nobody can keep it from
    /// that.
    pub(super) fn is_beyond_help(&self, state: &State, epoch: u8, record: Record) -> bool {
        let settles = record == Record::ABSENT || record.status.decision().is_some();
        self.scope.late_notice
            && state.history.loss_unnoticed
            && epoch > state.xid_epoch
            && state.xid_epoch != 0
            && settles
    }

    /// A heartbeat is an empty batch, and finds out what any batch would find out.
    pub(super) fn beat(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &state.coordinators[who];
        when(process.owns() && process.batch.is_none())?;
        let behind = self.is_behind(process.epoch, process.nonce, process.position, &state.store);
        when(behind || self.lost_before_takeover(process, &state.store).is_some())?;
        self.stop_at_loss(state, who)
    }

    /// The owner records that changes up to its own epoch are lost, and stops. If another history has taken over already, it only stops:
    /// the transactions of that history are not lost. If a standby has taken over already, its ownership ends.
    pub(super) fn stop_at_loss(&self, state: &mut State, who: usize) -> Option<()> {
        let late = self.lost_before_takeover(&state.coordinators[who], &state.store);
        when(late.is_none() || !self.is_row_held(state))?;
        if late.is_some() && self.keeps(Guard::LossEndsOwnership) {
            let (epoch, nonce) = (state.store.epoch + 1, state.spent.nonce());
            self.begin_epoch(state, epoch, nonce);
        }
        let process = &mut state.coordinators[who];
        let (store, own) = (&state.store, &*process);
        let has_other_owner =
            store.epoch > own.epoch || store.epoch == own.epoch && store.nonce() != own.nonce;
        let lost_through = if has_other_owner { late } else { Some(process.epoch) };
        if let Some(lost_through) = lost_through.filter(|_| self.keeps(Guard::LossIsRecorded)) {
            state.store.lost_through = state.store.lost_through.max(lost_through);
        }
        state.history.loss_unnoticed = false;
        self.end(process);
        Some(())
    }
}
