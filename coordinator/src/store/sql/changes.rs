//! How a batch is converted to changes of a few tables. Each database writes them in its own SQL.

use super::{
    Cell,
    branches::{self, BranchRow},
    record::{TransactionRow, state_number},
};
use crate::{
    store::{Head, Write},
    transaction::{BranchState, Decision, GlobalTransaction, Resolution, State},
};

/// New or changed rows of one table, all with the same columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct TableChange {
    pub(in crate::store) table: &'static str,
    pub(in crate::store) columns: &'static [&'static str],
    /// The number of leading columns that identify the row to change. 0: the rows are new.
    pub(in crate::store) keys: usize,
    /// The number of columns after the keys whose present value is checked. A row that differs is not written. NULL also
    /// matches.
    pub(in crate::store) expected: usize,
    /// New rows only: the number of last columns that are written to a row that exists already. Its other columns stay. 0: the
    /// row must not exist.
    pub(in crate::store) overwrites: usize,
    /// The cells, row after row.
    pub(in crate::store) cells: Vec<Cell>,
}

/// Builds the [`TableChange`] of new rows from these columns of these records. After the semicolon: the columns that are written to a
/// row that exists already.
macro_rules! columns {
    ($table:literal, $records:expr => $($column:ident)* $(; $($overwritten:ident)*)?) => {
        TableChange {
            table: $table,
            columns: &[$(stringify!($column)),* $($(, stringify!($overwritten))*)?],
            keys: 0,
            expected: 0,
            overwrites: <[&str]>::len(&[$($(stringify!($overwritten)),*)?]),
            cells: $records.flat_map(|record| [
                $(Cell::from(record.$column)),* $($(, Cell::from(record.$overwritten))*)?
            ]).collect(),
        }
    };
}

/// The same for transactions that have a row. They change only if state and number of branches are as expected.
macro_rules! changed_columns {
    ($records:expr => $($column:ident)*) => {
        TableChange {
            table: "global_transaction",
            columns: &["xid", "state", "branch_count", $(stringify!($column)),*],
            keys: 1,
            expected: 2,
            overwrites: 0,
            cells: $records.flat_map(|HeadChange { row, was_state, was_branches }| [
                Cell::from(row.xid), Cell::from(was_state), Cell::from(was_branches), $(Cell::from(row.$column)),*
            ]).collect(),
        }
    };
}

/// The changes of `writes` to each table, in the order in which they must be made.
pub(in crate::store) fn by_table(writes: &[Write]) -> [TableChange; 9] {
    let of = |head: Head| writes.iter().filter(move |write| write.head == head);
    let keys = of(Head::Insert)
        .filter(|write| write.global.key.is_some())
        .map(|write| TransactionRow::of(&write.global));
    // The registration of a branch is in its transaction's row. A row of its own has what is more than that.
    let new_branches = writes.iter().flat_map(|write| {
        let positions = write.new_branches..write.global.branches.len();
        let more = positions.filter(|position| has_more(&write.global, *position));
        more.map(|position| BranchRow::of(&write.global, position))
    });
    // Whether they have a row already does not matter: their transaction's row has been checked, and this batch has locked it.
    let changed_branches = writes.iter().flat_map(|write| {
        let known = write.changed_branches.iter().filter(|position| *position < write.new_branches);
        known.map(|position| BranchRow::of(&write.global, position))
    });
    let resolutions = writes.iter().flat_map(|write| {
        let changed = write.changed_branches.iter();
        let resolution = write.global.resolution.as_deref();
        let resolution = resolution.filter(|_| write.before == Some(State::Trying));
        let resolution = resolution.and_then(|by| ResolutionRow::of_all(&write.global, by));
        changed.filter_map(|position| ResolutionRow::of(&write.global, position)).chain(resolution)
    });
    // A new transaction is nearly always undecided. Then half of the columns are NULL, and are left out.
    let decided = |write: &Write| write.head == Head::Insert && write.global.decided_at.is_some();
    let has_result = |write: &Write| write.new_result().is_some();
    let new = of(Head::Insert).map(|write| TransactionRow::with_branches(&write.global));
    let grown = writes.iter().filter(|write| {
        let has_new = write.new_branches < write.global.branches.len();
        write.head == Head::Keep || write.head != Head::Insert && has_new
    });
    let (with_result, updated): (Vec<_>, Vec<_>) =
        of(Head::Update).partition(|write| has_result(write));
    [
        if of(Head::Insert).any(has_result) {
            columns!("global_transaction", new => xid name drive state labels begun_at expires_at due_at key_hash branch_count branches
                decided_at finished_at cancel_cause cancel_branch_id cancel_reason refusal result result_type)
        } else if writes.iter().any(decided) {
            columns!("global_transaction", new => xid name drive state labels begun_at expires_at due_at key_hash branch_count branches
                decided_at finished_at cancel_cause cancel_branch_id cancel_reason refusal)
        } else {
            columns!("global_transaction", new => xid name drive state labels begun_at expires_at due_at key_hash branch_count branches)
        },
        columns!("idempotency", keys => key_hash xid key_digest),
        // First, since the others expect the new number of branches.
        changed_columns!(grown.map(HeadChange::grown) => branch_count branches),
        changed_columns!(alike(updated.into_iter()) => state decided_at finished_at due_at cancel_cause cancel_branch_id
            cancel_reason refusal),
        // A confirmed transaction has no cause of a Cancel.
        changed_columns!(alike(with_result.into_iter()) => state decided_at finished_at due_at result result_type),
        changed_columns!(alike(of(Head::Finish)) => state finished_at due_at),
        columns!("branch", new_branches => xid position branch_id action participant target payload payload_type state attempts
            needs_attention due_at error_code error_message error_at),
        columns!("branch", changed_branches => xid position branch_id action participant target;
            state attempts needs_attention due_at error_code error_message error_at),
        columns!("resolution", resolutions => xid branch_id decision name action operator reason at),
    ]
}

/// Whether there is more to record of a branch than its registration and the state of its transaction.
fn has_more(global: &GlobalTransaction, position: usize) -> bool {
    let branch = &global.branches[position];
    branches::carried_payload(branch).is_some()
        || branch.last_error.is_some()
        || match branch.state {
            BranchState::Registered | BranchState::Tried => false,
            BranchState::Acknowledged => !global.finished_smoothly(),
            BranchState::Resolved(_) => true,
        }
}

/// A change of a transaction's row.
struct HeadChange {
    row: TransactionRow,
    was_state: i64,
    was_branches: i64,
}

impl HeadChange {
    fn of(write: &Write) -> Self {
        let row = TransactionRow::of(&write.global);
        let was_branches = row.branch_count.unwrap_or_default();
        Self { row, was_state: Self::was_state(write), was_branches }
    }

    /// New branches have joined.
    fn grown(write: &Write) -> Self {
        Self {
            row: TransactionRow::with_branches(&write.global),
            was_state: Self::was_state(write),
            was_branches: i64::try_from(write.new_branches).unwrap_or(i64::MAX),
        }
    }

    fn was_state(write: &Write) -> i64 {
        write.before.map_or(0, state_number) // 0: it has no row, so none will fit
    }
}

/// Sorts changes so that equal kinds are adjacent: most stores can write those together.
fn alike<'a>(writes: impl Iterator<Item = &'a Write>) -> impl Iterator<Item = HeadChange> {
    let mut changes: Vec<_> = writes.map(HeadChange::of).collect();
    changes.sort_by_cached_key(|HeadChange { row, was_state, was_branches }| {
        let how = (row.state, row.cancel_cause, row.cancel_reason.clone());
        (how, *was_state, *was_branches)
    });
    changes.into_iter()
}

/// A row of `resolution`: an operator's resolution of a branch. If its `branch_id` is empty, the operator has decided the whole
/// transaction.
struct ResolutionRow {
    xid: Vec<u8>,
    branch_id: String,
    decision: i64,
    name: String,
    action: String,
    operator: String,
    reason: String,
    at: i64,
}

impl ResolutionRow {
    fn of_all(global: &GlobalTransaction, by: &Resolution) -> Option<Self> {
        Some(Self {
            xid: global.xid.to_bytes().to_vec(),
            branch_id: String::new(),
            decision: decision_number(global.state.decision()?),
            name: global.name.clone(),
            action: String::new(),
            operator: by.operator.clone(),
            reason: by.reason.clone(),
            at: by.at.0,
        })
    }

    fn of(global: &GlobalTransaction, position: usize) -> Option<Self> {
        let branch = &global.branches[position];
        let BranchState::Resolved(resolution) = &branch.state else { return None };
        Some(Self {
            xid: global.xid.to_bytes().to_vec(),
            branch_id: branch.spec.branch_id.to_string(),
            decision: decision_number(
                global.state.decision().expect("only what is decided is resolved"),
            ),
            name: global.name.clone(),
            action: branch.spec.action.clone(),
            operator: resolution.operator.clone(),
            reason: resolution.reason.clone(),
            at: resolution.at.0,
        })
    }
}

fn decision_number(decision: Decision) -> i64 {
    match decision {
        Decision::Confirm => 1,
        Decision::Cancel => 2,
    }
}
