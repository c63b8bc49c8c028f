//! A failover to a server that lacks what the first one did last.
//!
//! It may lack a takeover. Then the next takeover gives its epoch number a second time, and two histories go on from there: only the
//! nonce tells them apart. Or it lacks batches that were acknowledged. No rule can bring them back; what the rules keep is that the
//! loss is noticed by the owner that lives, and that from then on nobody is told anything about what may be lost.
//!
//! What nobody can notice is left out, and stays a risk that the documentation must name: a failover that loses acknowledged changes
//! while their owner dies or is replaced.

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
        // A zombie could become the owner again when the takeover that replaced it is lost: nobody could notice.
        when(state.coordinators.iter().all(|it| !it.owns() || state.is_live_owner(it)))?;
        if first.record != second.record {
            when(self.scope.losses && state.has_live_owner())?;
            state.history.loss_unnoticed = true;
        }
        state.spent.failovers += 1;
        state.store = second;
        // Sessions end with the first server. Whoever waits for an answer sends the same batch again.
        state.abandoned = Default::default();
        for batch in state.coordinators.iter_mut().filter_map(|process| process.batch.as_mut()) {
            if matches!(batch.progress, Progress::Sent | Progress::Guarded | Progress::Missed) {
                *batch = Batch { progress: Progress::Sent, repeat: true, ..*batch };
            }
        }
        Some(())
    }

    /// Whether the store lacks something that this owner knows to be durable, or goes on with another history.
    pub(super) fn is_behind(&self, epoch: u8, nonce: u8, known: u8, store: &Store) -> bool {
        let other_history = store.epoch == epoch && store.nonce() != nonce;
        let shorter = store.nonce() == nonce && store.position < known;
        self.scope.failovers > 0 && (store.epoch < epoch || other_history || shorter)
    }

    /// A heartbeat is a batch without content: it finds out what any batch would.
    pub(super) fn beat(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &state.coordinators[who];
        when(process.owns() && process.batch.is_none())?;
        when(self.is_behind(process.epoch, process.nonce, process.position, &state.store))?;
        self.stop_at_loss(state, who)
    }

    /// The owner records that changes of its epoch and of earlier ones are lost, and stops. In a history that has an owner of its own
    /// it records nothing: what began there is not lost.
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
