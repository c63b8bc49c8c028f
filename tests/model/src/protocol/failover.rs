//! A failover to a server without the last changes of the first one.
//!
//! If it lacks a takeover, the next takeover gives the same epoch number again. Then two histories have the same epoch number, and only
//! the nonce tells them apart. If it lacks acknowledged batches, no rule can bring them back. The rules ensure that their owner
//! notices the loss, and that nothing is said or decided afterwards about transactions that may be affected.
//!
//! The model leaves out a loss that no owner can notice: a failover loses acknowledged changes while their owner dies or is replaced.
//! The documentation must name that risk.

use super::{
    Protocol,
    guard::Guard,
    state::{Batch, Progress, State, Store},
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
        let shorter = store.nonce() == nonce && store.position < known;
        self.scope.failovers > 0 && (store.epoch < epoch || other_history || shorter)
    }

    /// A heartbeat is an empty batch, and finds out what any batch would find out.
    pub(super) fn beat(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &state.coordinators[who];
        when(process.owns() && process.batch.is_none())?;
        when(self.is_behind(process.epoch, process.nonce, process.position, &state.store))?;
        self.stop_at_loss(state, who)
    }

    /// The owner records that changes up to its own epoch are lost, and stops. If another history has taken over already, it only stops:
    /// the transactions of that history are not lost.
    pub(super) fn stop_at_loss(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        let (store, own) = (&state.store, &*process);
        let has_other_owner =
            store.epoch > own.epoch || store.epoch == own.epoch && store.nonce() != own.nonce;
        if self.keeps(Guard::LossIsRecorded) && !has_other_owner {
            state.store.lost_through = state.store.lost_through.max(process.epoch);
        }
        state.history.loss_unnoticed = false;
        self.end(process);
        Some(())
    }
}
