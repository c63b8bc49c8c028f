//! One transaction in memory, and what the partition has to know about it beside its state.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Answer, Error, Until};
use crate::{
    store::{Head, Write},
    transaction::{BranchSet, Change, GlobalTransaction, Timestamp, Weight},
};

/// Somebody waits until the transaction has come so far.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) until: Until,
    pub(super) existed: bool,
    pub(super) reply: oneshot::Sender<Result<Answer, Error>>,
}

/// See the module's comment.
#[derive(Debug)]
pub(super) struct Entry {
    /// Shared with the journal and with answers that wait; changed by copying it only while they hold it.
    pub(super) global: Arc<GlobalTransaction>,
    /// Whether it has a row, or one is on its way.
    has_row: bool,
    /// Whether that row tells the decision.
    has_decision: bool,
    /// So many of its branches have a row, or one is on its way.
    branch_rows: usize,
    /// Branches whose change has not been handed to the journal.
    unsaved: BranchSet,
    /// Number of its latest change that answers and calls wait for; 0: none.
    pub(super) awaits: u64,
    /// Number of its latest change; 0: none.
    pub(super) latest: u64,
    /// It was brought back because it was due.
    pub(super) was_due: bool,
    /// When its timer goes off.
    pub(super) timer: Option<Timestamp>,
    pub(super) watchers: Vec<Watcher>,
}

impl Entry {
    /// One that was never recorded.
    pub(super) fn begun(global: GlobalTransaction) -> Self {
        Self {
            global: Arc::new(global),
            has_row: false,
            has_decision: false,
            branch_rows: 0,
            unsaved: BranchSet::EMPTY,
            awaits: 0,
            latest: 0,
            was_due: false,
            timer: None,
            watchers: Vec::new(),
        }
    }

    /// One as it is recorded.
    pub(super) fn loaded(global: GlobalTransaction) -> Self {
        let branch_rows = global.branches.len();
        let has_decision = global.state.decision().is_some();
        Self { has_row: true, has_decision, branch_rows, ..Self::begun(global) }
    }

    /// The same, because it was due.
    pub(super) fn due(global: GlobalTransaction) -> Self {
        Self { was_due: true, ..Self::loaded(global) }
    }

    /// What the journal has to write after `change`, if anything.
    pub(super) fn write(&mut self, change: Change) -> Option<Write> {
        self.unsaved = self.unsaved.union(change.branches);
        match change.weight {
            Weight::Nothing | Weight::Later => None,
            Weight::Lazy | Weight::Durable => Some(self.unsaved_write(change.head)),
        }
    }

    /// What the journal has to write before the partition lets go of it for good; `None`: nothing.
    pub(super) fn last_write(&mut self) -> Option<Write> {
        (!self.unsaved.is_empty()).then(|| self.unsaved_write(true))
    }

    fn unsaved_write(&mut self, head: bool) -> Write {
        let new_branches = std::mem::replace(&mut self.branch_rows, self.global.branches.len());
        let unsaved = std::mem::take(&mut self.unsaved);
        let has_row = std::mem::replace(&mut self.has_row, true);
        let head = match (has_row, head) {
            (false, _) => Head::Insert,
            (true, true) if self.has_decision && self.global.state.is_final() => Head::Finish,
            (true, true) => Head::Update,
            (true, false) => Head::Keep,
        };
        self.has_decision |= head >= Head::Update && self.global.state.decision().is_some();
        Write {
            global: self.global.clone(),
            head,
            new_branches,
            changed_branches: if self.global.finished_smoothly() {
                BranchSet::EMPTY
            } else {
                unsaved
            },
        }
    }

    /// Whether its record, once durable, tells everything that is known of it.
    pub(super) fn is_saved(&self) -> bool {
        self.has_row && self.unsaved.is_empty()
    }
}
