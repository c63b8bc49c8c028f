//! How a batch is converted to changes of a few tables. Each database writes them in its own SQL.

use super::{
    Cell,
    record::{BranchRow, TransactionRow, state_number},
};
use crate::{
    store::{Head, Write},
    transaction::{Branch, BranchState, Decision, GlobalTransaction, Resolution, State},
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
    /// The cells, row after row.
    pub(in crate::store) cells: Vec<Cell>,
}

/// Builds the [`TableChange`] of a table from these columns of these records.
macro_rules! columns {
    ($table:literal, $keys:literal, $records:expr => $($column:ident)*) => {
        TableChange {
            table: $table,
            columns: &[$(stringify!($column)),*],
            keys: $keys,
            expected: 0,
            cells: $records.flat_map(|record| [$(Cell::from(record.$column)),*]).collect(),
        }
    };
}

/// The same for transactions that have a row. They change only if state and number of branches are as expected.
macro_rules! changed_columns {
    ($records:expr => $($column:ident)*) => {
        TableChange {
            table: "global_transaction",
            columns: &["xid", "state", "branches", $(stringify!($column)),*],
            keys: 1,
            expected: 2,
            cells: $records.flat_map(|HeadChange { row, was_state, was_branches }| [
                Cell::from(row.xid), Cell::from(was_state), Cell::from(was_branches), $(Cell::from(row.$column)),*
            ]).collect(),
        }
    };
}

fn new_of(write: &Write) -> &[Branch] {
    write.global.branches.get(write.new_branches..).unwrap_or_default()
}

/// The changes of `writes` to each table, in the order in which they must be made.
pub(in crate::store) fn by_table(writes: &[Write]) -> [TableChange; 9] {
    let of = |head: Head| writes.iter().filter(move |write| write.head == head);
    let keys = of(Head::Insert)
        .map(|write| TransactionRow::of(&write.global))
        .filter(|row| row.key_hash.is_some());
    let new_branches = writes.iter().flat_map(|write| {
        let positions = write.new_branches..write.global.branches.len();
        positions.map(|position| BranchRow::of(&write.global, position))
    });
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
    // A new transaction is nearly always undecided, and its branches have no failures and no payload. Then half of the columns
    // are NULL, and are left out.
    let decided = |write: &Write| write.head == Head::Insert && write.global.decided_at.is_some();
    let has_result = |write: &Write| write.new_result().is_some();
    let has_more = |branch: &Branch| branch.spec.carry_payload || branch.last_error.is_some();
    let new = of(Head::Insert).map(|write| TransactionRow::of(&write.global));
    let (with_result, updated): (Vec<_>, Vec<_>) =
        of(Head::Update).partition(|write| has_result(write));
    [
        if of(Head::Insert).any(has_result) {
            columns!("global_transaction", 0, new => xid name drive state labels begun_at expires_at due_at key_hash branches decided_at
                finished_at cancel_cause cancel_branch_id cancel_reason refusal result result_type)
        } else if writes.iter().any(decided) {
            columns!("global_transaction", 0, new => xid name drive state labels begun_at expires_at due_at key_hash branches decided_at
                finished_at cancel_cause cancel_branch_id cancel_reason refusal)
        } else {
            columns!("global_transaction", 0, new => xid name drive state labels begun_at expires_at due_at key_hash branches)
        },
        columns!("idempotency", 0, keys => key_hash xid key_digest),
        changed_columns!(alike(updated.into_iter()) => state branches decided_at finished_at due_at cancel_cause
            cancel_branch_id cancel_reason refusal),
        // A confirmed transaction has no cause of a Cancel.
        changed_columns!(alike(with_result.into_iter()) => state branches decided_at finished_at due_at result result_type),
        changed_columns!(alike(of(Head::Finish)) => state finished_at due_at),
        changed_columns!(alike(of(Head::Keep)) => branches),
        if writes.iter().flat_map(new_of).any(has_more) {
            columns!("branch", 0, new_branches => xid position branch_id action participant target state attempts
                needs_attention payload payload_type due_at error_code error_message error_at)
        } else {
            columns!("branch", 0, new_branches => xid position branch_id action participant target state attempts needs_attention)
        },
        columns!("branch", 2, changed_branches => xid position state attempts needs_attention due_at error_code
            error_message error_at),
        columns!("resolution", 0, resolutions => xid branch_id decision name action operator reason at),
    ]
}

/// A change of a transaction's row.
struct HeadChange {
    row: TransactionRow,
    was_state: i64,
    was_branches: i64,
}

impl HeadChange {
    fn of(write: &Write) -> Self {
        Self {
            row: TransactionRow::of(&write.global),
            was_state: write.before.map_or(0, state_number), // 0: it has no row, so none will fit
            was_branches: i64::try_from(write.new_branches).unwrap_or(i64::MAX),
        }
    }
}

/// Sorts changes so that equal kinds are adjacent: most stores can write those together.
fn alike<'a>(writes: impl Iterator<Item = &'a Write>) -> impl Iterator<Item = HeadChange> {
    let mut changes: Vec<_> = writes.map(HeadChange::of).collect();
    changes.sort_by_cached_key(|HeadChange { row, was_state, was_branches }| {
        let how = (row.state, row.cancel_cause, row.cancel_reason.clone());
        (how, *was_state, *was_branches, row.branches)
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
