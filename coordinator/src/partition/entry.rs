//! One transaction in memory, with the bookkeeping that the partition needs besides its state.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Answer, Error, Until, held::bytes_of};
use crate::{
    store::{Head, Write},
    transaction::{BranchSet, Change, GlobalTransaction, State, Timestamp, Weight},
};

/// A caller that waits until the transaction has reached a certain point.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) until: Until,
    pub(super) existed: bool,
    pub(super) reply: oneshot::Sender<Result<Answer, Error>>,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// Shared with the journal and with waiting answers. While they hold it, a change makes a copy.
    pub(super) global: Arc<GlobalTransaction>,
    /// The state in the transaction's row once the journal has written everything it was given. `None`: there is no row.
    row: Option<State>,
    /// How many branches have a row, or were given to the journal.
    branch_rows: usize,
    /// Branches with changes that the journal has not been given yet.
    unsaved: BranchSet,
    /// The number of the latest change that answers and calls wait for; 0 means none.
    pub(super) awaits: u64,
    /// The number of the latest change; 0 means none.
    pub(super) latest: u64,
    /// Whether it was read from the store because it was due.
    pub(super) was_due: bool,
    /// Its size in bytes when it was last counted.
    pub(super) bytes: usize,
    /// When its timer fires.
    pub(super) timer: Option<Timestamp>,
    pub(super) watchers: Vec<Watcher>,
}

impl Entry {
    /// A new transaction, which has no record yet.
    pub(super) fn begun(global: GlobalTransaction) -> Self {
        Self {
            bytes: bytes_of(&global),
            global: Arc::new(global),
            row: None,
            branch_rows: 0,
            unsaved: BranchSet::EMPTY,
            awaits: 0,
            latest: 0,
            was_due: false,
            timer: None,
            watchers: Vec::new(),
        }
    }

    /// A transaction that was read from the store for a caller.
    pub(super) fn loaded(global: GlobalTransaction) -> Self {
        let branch_rows = global.branches.len();
        Self { row: Some(global.state), branch_rows, ..Self::begun(global) }
    }

    /// A transaction that was read from the store because it was due.
    pub(super) fn due(global: GlobalTransaction) -> Self {
        Self { was_due: true, ..Self::loaded(global) }
    }

    /// What the journal must write after `change`.
    pub(super) fn write(&mut self, change: Change) -> Option<Write> {
        self.unsaved = self.unsaved.union(change.branches);
        match change.weight {
            Weight::Nothing | Weight::Later => None,
            Weight::Lazy | Weight::Durable => Some(self.unsaved_write(change.head)),
        }
    }

    /// What the journal must write before the partition stops.
    pub(super) fn last_write(&mut self) -> Option<Write> {
        (!self.is_saved()).then(|| self.unsaved_write(true))
    }

    /// Whether the transaction has a record, or the journal has been given one.
    pub(super) fn is_handed_over(&self) -> bool {
        self.row.is_some()
    }

    fn unsaved_write(&mut self, head: bool) -> Write {
        let new_branches = std::mem::replace(&mut self.branch_rows, self.global.branches.len());
        let unsaved = std::mem::take(&mut self.unsaved);
        let before = self.row;
        let is_decided = before.is_some_and(|state| state.decision().is_some());
        let head = match (before, head) {
            (None, _) => Head::Insert,
            (Some(_), true) if is_decided && self.global.state.is_final() => Head::Finish,
            (Some(_), true) => Head::Update,
            (Some(_), false) => Head::Keep,
        };
        if head != Head::Keep {
            self.row = Some(self.global.state);
        }
        Write {
            global: self.global.clone(),
            head,
            before,
            new_branches,
            changed_branches: if self.global.finished_smoothly() {
                BranchSet::EMPTY
            } else {
                unsaved
            },
        }
    }

    /// Whether the journal has been given the whole present state.
    pub(super) fn is_saved(&self) -> bool {
        self.row.is_some() && self.unsaved.is_empty()
    }
}
