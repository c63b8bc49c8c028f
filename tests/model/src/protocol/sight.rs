//! Rules 20 and 21. A read may be old, so it must prove that it is new enough. And a batch names the state of the row that it changes.

use super::{
    Protocol,
    guard::Guard,
    state::{Batch, Coordinator, Record, State, Status, Store},
};

impl Protocol {
    /// Rule 20. One statement reads the row, and the epoch, nonce and position of its partition. A read that passes shows every change
    /// that the reader knows to be durable.
    pub(super) fn is_in_sight(&self, process: &Coordinator, shown: &Store) -> bool {
        if !self.has_past() {
            return true;
        }
        let epoch = shown.epoch == process.epoch || !self.keeps(Guard::SightEpoch);
        let nonce = shown.nonce() == process.nonce || !self.keeps(Guard::SightNonce);
        let position =
            shown.position >= process.known_position() || !self.keeps(Guard::SightPosition);
        epoch && nonce && position
    }

    /// A read on a replica that shows an earlier state of the store.
    pub(super) fn read_old(&self, state: &mut State, who: usize, which: usize) -> Option<()> {
        let shown = *state.past.get(which)?;
        self.read_from(state, who, shown)
    }

    /// Whether the variant needs earlier states of the store.
    fn has_past(&self) -> bool {
        self.scope.old_reads || self.scope.failovers > 0
    }

    pub(super) fn remember_past(&self, before: &State, state: &mut State) {
        let was = before.store;
        if self.has_past()
            && was != state.store
            && let Err(place) = state.past.binary_search(&was)
        {
            state.past.insert(place, was);
        }
    }

    /// Rule 21. `UPDATE … WHERE xid = ? AND state = ? AND branch_count = ?`, and the matched rows are counted.
    pub(super) fn row_fits(&self, state: &State, batch: Batch) -> bool {
        if !self.scope.old_reads || batch.record == Record::ABSENT {
            return true;
        }
        let row = state.store.record;
        let names_state = if is_registration(batch) {
            self.keeps(Guard::RegistrationNamesState)
        } else {
            self.keeps(Guard::RowNamesState)
        };
        (row.status == batch.expects.status || !names_state)
            && (row.branches == batch.expects.branches || !self.keeps(Guard::RowNamesBranches))
    }

    /// The row after the batch. Without `RegistrationNamesState` a registration inserts branches and does not touch the state.
    pub(super) fn written(&self, state: &State, batch: Batch) -> Record {
        if !is_registration(batch) || self.keeps(Guard::RegistrationNamesState) {
            return batch.record;
        }
        let mut record = state.store.record;
        record.branches.add_all(batch.record.branches);
        record
    }
}

/// Whether a batch changes nothing but the branches of a transaction that has a row.
fn is_registration(batch: Batch) -> bool {
    batch.record.status == Status::Trying && batch.expects.status == Status::Trying
}
