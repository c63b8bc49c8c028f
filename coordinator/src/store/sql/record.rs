//! How a global transaction is converted to columns and back, for every database.
//!
//! A batch is converted to a [`TableChange`] for each of a few tables, and each database writes these in its own SQL. Rows that
//! were read are converted back to transactions.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use handfast_proto::{BranchId, Xid, limits};
use serde::{Deserialize, Serialize};

use super::Cell;
use crate::{
    store::{Error, Head, Write},
    transaction::{
        AttemptError, Branch, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
        GlobalTransaction, Key, Payload, Refusal, Resolution, State, Timestamp,
    },
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
pub(in crate::store) fn by_table(writes: &[Write]) -> [TableChange; 8] {
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
        changed.filter_map(|position| ResolutionRow::of(&write.global, position))
    });
    // A new transaction is nearly always undecided, and its branches have no failures and no payload. Then half of the columns
    // are NULL, and are left out.
    let decided = |write: &Write| write.head == Head::Insert && write.global.decided_at.is_some();
    let has_more = |branch: &Branch| branch.spec.carry_payload || branch.last_error.is_some();
    let new = of(Head::Insert).map(|write| TransactionRow::of(&write.global));
    [
        if writes.iter().any(decided) {
            columns!("global_transaction", 0, new => xid name drive state labels begun_at expires_at due_at key_hash branches decided_at
                finished_at cancel_cause cancel_branch_id cancel_reason refusal)
        } else {
            columns!("global_transaction", 0, new => xid name drive state labels begun_at expires_at due_at key_hash branches)
        },
        columns!("idempotency", 0, keys => key_hash xid key_digest),
        changed_columns!(alike(of(Head::Update)) => state branches decided_at finished_at due_at cancel_cause
            cancel_branch_id cancel_reason refusal),
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

/// The value of the column `state`.
fn state_number(state: State) -> i64 {
    match state {
        State::Trying => 1,
        State::Confirming => 2,
        State::Cancelling => 3,
        State::Confirmed => 4,
        State::Cancelled => 5,
    }
}

/// The meaning of the column `state`.
pub(in crate::store) fn state(column: i64) -> Option<State> {
    [State::Trying, State::Confirming, State::Cancelling, State::Confirmed, State::Cancelled]
        .into_iter()
        .find(|state| state_number(*state) == column)
}

/// A row of `resolution`: an operator's resolution of a branch.
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
    fn of(global: &GlobalTransaction, position: usize) -> Option<Self> {
        let branch = &global.branches[position];
        let BranchState::Resolved(resolution) = &branch.state else { return None };
        Some(Self {
            xid: global.xid.to_bytes().to_vec(),
            branch_id: branch.spec.branch_id.to_string(),
            decision: match global.state.decision().expect("only what is decided is resolved") {
                Decision::Confirm => 1,
                Decision::Cancel => 2,
            },
            name: global.name.clone(),
            action: branch.spec.action.clone(),
            operator: resolution.operator.clone(),
            reason: resolution.reason.clone(),
            at: resolution.at.0,
        })
    }
}

/// A row of `global_transaction`. The comments in the schema explain each column.
#[derive(Debug, sqlx::FromRow)]
pub(in crate::store) struct TransactionRow {
    pub(in crate::store) xid: Vec<u8>,
    pub(in crate::store) name: String,
    pub(in crate::store) drive: i64,
    pub(in crate::store) state: i64,
    pub(in crate::store) labels: String,
    pub(in crate::store) begun_at: i64,
    pub(in crate::store) expires_at: i64,
    pub(in crate::store) decided_at: Option<i64>,
    pub(in crate::store) finished_at: Option<i64>,
    pub(in crate::store) due_at: Option<i64>,
    pub(in crate::store) cancel_cause: Option<i64>,
    pub(in crate::store) cancel_branch_id: Option<String>,
    pub(in crate::store) cancel_reason: Option<String>,
    pub(in crate::store) refusal: Option<String>,
    pub(in crate::store) key_hash: Option<Vec<u8>>,
    pub(in crate::store) key_digest: Option<Vec<u8>>,
    pub(in crate::store) branches: Option<i64>,
}

/// A row of `branch`, with its row of `resolution` if there is one.
#[derive(Debug, sqlx::FromRow)]
pub(in crate::store) struct BranchRow {
    pub(in crate::store) xid: Vec<u8>,
    pub(in crate::store) position: i64,
    pub(in crate::store) branch_id: String,
    pub(in crate::store) action: String,
    pub(in crate::store) participant: String,
    pub(in crate::store) target: String,
    pub(in crate::store) payload: Option<Vec<u8>>,
    pub(in crate::store) payload_type: Option<String>,
    pub(in crate::store) state: i64,
    pub(in crate::store) attempts: i64,
    pub(in crate::store) needs_attention: bool,
    pub(in crate::store) due_at: Option<i64>,
    pub(in crate::store) error_code: Option<String>,
    pub(in crate::store) error_message: Option<String>,
    pub(in crate::store) error_at: Option<i64>,
    pub(in crate::store) resolved_by: Option<String>,
    pub(in crate::store) resolved_reason: Option<String>,
    pub(in crate::store) resolved_at: Option<i64>,
}

/// The column `refusal`, as JSON.
#[derive(Serialize, Deserialize)]
struct RefusalColumn {
    reason: String,
    domain: String,
    message: String,
    metadata: BTreeMap<String, String>,
}

impl TransactionRow {
    pub(in crate::store) fn of(global: &GlobalTransaction) -> Self {
        let (cancel_cause, cancel_branch_id, cancel_reason, refusal) =
            cancel_columns(global.cancel.as_ref());
        Self {
            xid: global.xid.to_bytes().to_vec(),
            name: global.name.clone(),
            drive: match global.drive {
                Drive::Initiator => 1,
                Drive::Coordinator { in_order: false } => 2,
                Drive::Coordinator { in_order: true } => 3,
            },
            state: state_number(global.state),
            labels: json(&global.labels),
            begun_at: global.begun_at.0,
            expires_at: global.expires_at.0,
            decided_at: global.decided_at.map(|at| at.0),
            finished_at: global.finished_at.map(|at| at.0),
            due_at: global.due_at().map(|at| at.0),
            cancel_cause,
            cancel_branch_id,
            cancel_reason,
            refusal,
            key_hash: global.key.map(|key| key.hash.to_vec()),
            key_digest: global.key.map(|key| key.digest.to_vec()),
            branches: Some(i64::try_from(global.branches.len()).unwrap_or(i64::MAX)),
        }
    }

    /// Rebuilds a transaction. `branches` are its rows of branches, in order of position.
    pub(in crate::store) fn into_transaction(
        self,
        branches: Vec<BranchRow>,
    ) -> Result<GlobalTransaction, Error> {
        let xid = xid(&self.xid)?;
        let damaged = |column: &str| {
            Error::Corrupt(format!("transaction {xid} has an impossible `{column}`"))
        };
        let state = state(self.state).ok_or_else(|| damaged("state"))?;
        let rows = i64::try_from(branches.len()).unwrap_or(i64::MAX);
        let too_many = branches.len() > limits::BRANCHES_MAX; // more than a `BranchSet` can hold
        if too_many || self.branches.is_some_and(|recorded| recorded != rows) {
            return Err(damaged("branches"));
        }
        let begun_at = Timestamp(self.begun_at);
        let global = GlobalTransaction {
            xid,
            drive: match self.drive {
                1 => Drive::Initiator,
                2 => Drive::Coordinator { in_order: false },
                3 => Drive::Coordinator { in_order: true },
                _ => return Err(damaged("drive")),
            },
            state,
            labels: serde_json::from_str(&self.labels).map_err(|_| damaged("labels"))?,
            begun_at,
            expires_at: Timestamp(self.expires_at),
            decided_at: self.decided_at.map(Timestamp),
            finished_at: self.finished_at.map(Timestamp),
            cancel: self.cancel().map_err(damaged)?,
            key: match (&self.key_hash, &self.key_digest) {
                (None, None) => None,
                (Some(hash), Some(digest)) => Some(Key {
                    hash: hash.as_slice().try_into().map_err(|_| damaged("key_hash"))?,
                    digest: digest.as_slice().try_into().map_err(|_| damaged("digest"))?,
                }),
                (None, Some(_)) | (Some(_), None) => return Err(damaged("key_hash")),
            },
            branches: (branches.into_iter())
                .map(|row| row.into_branch(state, begun_at).map_err(damaged))
                .collect::<Result<_, _>>()?,
            name: self.name,
        };
        let decided = global.state.decision().is_some();
        if global.decided_at.is_some() != decided
            || global.finished_at.is_some() != global.state.is_final()
        {
            return Err(damaged("decided_at"));
        }
        Ok(global)
    }

    fn cancel(&self) -> Result<Option<CancelCause>, &'static str> {
        let Some(cause) = self.cancel_cause else { return Ok(None) };
        let branch_id = match &self.cancel_branch_id {
            None => None,
            Some(id) => Some(id.parse::<BranchId>().map_err(|_| "cancel_branch_id")?),
        };
        let reason = self.cancel_reason.clone().unwrap_or_default();
        Ok(Some(match cause {
            1 => CancelCause::Requested { reason },
            2 => {
                let column = self.refusal.as_deref().ok_or("refusal")?;
                let column: RefusalColumn = serde_json::from_str(column).map_err(|_| "refusal")?;
                let RefusalColumn { reason, domain, message, metadata } = column;
                CancelCause::Refused {
                    branch_id,
                    refusal: Refusal { reason, domain, message, metadata },
                }
            }
            3 => CancelCause::TimedOut,
            4 => CancelCause::TryUnknown {
                branch_id: branch_id.ok_or("cancel_branch_id")?,
                error: reason,
            },
            5 => CancelCause::CoordinatorRestarted,
            _ => return Err("cancel_cause"),
        }))
    }
}

type CancelColumns = (Option<i64>, Option<String>, Option<String>, Option<String>);

fn cancel_columns(cancel: Option<&CancelCause>) -> CancelColumns {
    match cancel {
        None => (None, None, None, None),
        Some(CancelCause::Requested { reason }) => (Some(1), None, Some(reason.clone()), None),
        Some(CancelCause::Refused { branch_id, refusal }) => {
            let Refusal { reason, domain, message, metadata } = refusal.clone();
            let refusal = json(&RefusalColumn { reason, domain, message, metadata });
            (Some(2), branch_id.as_ref().map(BranchId::to_string), None, Some(refusal))
        }
        Some(CancelCause::TimedOut) => (Some(3), None, None, None),
        Some(CancelCause::TryUnknown { branch_id, error }) => {
            (Some(4), Some(branch_id.to_string()), Some(error.clone()), None)
        }
        Some(CancelCause::CoordinatorRestarted) => (Some(5), None, None, None),
    }
}

impl BranchRow {
    pub(in crate::store) fn of(global: &GlobalTransaction, position: usize) -> Self {
        let branch = &global.branches[position];
        let carried = branch.spec.payload.as_ref().filter(|_| branch.spec.carry_payload);
        let error = branch.last_error.as_ref();
        let resolution = match &branch.state {
            BranchState::Resolved(resolution) => Some(resolution),
            BranchState::Registered | BranchState::Tried | BranchState::Acknowledged => None,
        };
        Self {
            xid: global.xid.to_bytes().to_vec(),
            position: i64::try_from(position).expect("at most 64 branches"),
            branch_id: branch.spec.branch_id.to_string(),
            action: branch.spec.action.clone(),
            participant: branch.spec.participant.clone(),
            target: branch.spec.target.clone(),
            payload: carried.map(|payload| payload.data.to_vec()),
            payload_type: carried.map(|payload| payload.content_type.clone()),
            state: match branch.state {
                BranchState::Registered | BranchState::Tried => 1,
                BranchState::Acknowledged => 2,
                BranchState::Resolved(_) => 3,
            },
            attempts: branch.attempts.into(),
            needs_attention: branch.needs_attention,
            due_at: match branch.call {
                Call::Idle { due_at } if branch.is_open() && error.is_some() => Some(due_at.0),
                Call::Idle { .. } | Call::InFlight(_) => None,
            },
            error_code: error.map(|error| error.code.clone()),
            error_message: error.map(|error| error.message.clone()),
            error_at: error.map(|error| error.at.0),
            resolved_by: resolution.map(|resolution| resolution.operator.clone()),
            resolved_reason: resolution.map(|resolution| resolution.reason.clone()),
            resolved_at: resolution.map(|resolution| resolution.at.0),
        }
    }

    fn into_branch(self, state: State, begun_at: Timestamp) -> Result<Branch, &'static str> {
        let payload = match (self.payload, self.payload_type) {
            (Some(data), Some(content_type)) => {
                Some(Payload { data: Bytes::from(data), content_type })
            }
            (None, None) => None,
            (None, Some(_)) | (Some(_), None) => return Err("payload_type"),
        };
        let last_error = match (self.error_code, self.error_message, self.error_at) {
            (Some(code), Some(message), Some(at)) => {
                Some(Box::new(AttemptError { code, message, at: Timestamp(at) }))
            }
            (None, None, None) => None,
            _ => return Err("error_at"),
        };
        let branch_state =
            match (self.state, self.resolved_by, self.resolved_reason, self.resolved_at) {
                // If all went well, the rows of branches are not written again. The final state implies that they acknowledged.
                (1, None, None, None) if state.is_final() => BranchState::Acknowledged,
                (1, None, None, None) => BranchState::Registered,
                (2, None, None, None) => BranchState::Acknowledged,
                (3, Some(operator), Some(reason), Some(at)) => {
                    BranchState::Resolved(Box::new(Resolution {
                        operator,
                        reason,
                        at: Timestamp(at),
                    }))
                }
                _ => return Err("branch.state"),
            };
        Ok(Branch {
            spec: Arc::new(BranchSpec {
                branch_id: self.branch_id.parse().map_err(|_| "branch_id")?,
                action: self.action,
                participant: self.participant,
                target: self.target,
                carry_payload: payload.is_some(),
                payload,
                try_timeout: None,
            }),
            attempts: match branch_state {
                BranchState::Acknowledged if self.state == 1 => 1,
                BranchState::Acknowledged
                | BranchState::Registered
                | BranchState::Tried
                | BranchState::Resolved(_) => {
                    u32::try_from(self.attempts).map_err(|_| "attempts")?
                }
            },
            state: branch_state,
            timeouts: 0,
            needs_attention: self.needs_attention,
            call: Call::Idle { due_at: self.due_at.map_or(begun_at, Timestamp) },
            last_error,
            reply: None,
        })
    }
}

pub(in crate::store) fn xid(column: &[u8]) -> Result<Xid, Error> {
    let bytes = column
        .try_into()
        .map_err(|_| Error::Corrupt(format!("an xid of {} bytes", column.len())))?;
    Ok(Xid::from_bytes(bytes))
}

/// How a label is written in the column `labels`. This text cannot be a part of another label: a quotation mark in a key or a value
/// has a backslash before it.
pub(in crate::store) fn label(key: &str, value: &str) -> String {
    format!("{}:{}", json(&key), json(&value))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and maps of strings always become JSON")
}

#[cfg(test)]
#[test]
fn a_transaction_with_too_many_branch_rows_is_damaged() {
    use crate::store::{conformance::begun, xids_of};
    let mut global = begun(xids_of(0).0, &["1"]);
    global.branches = vec![global.branches[0].clone(); limits::BRANCHES_MAX + 1];
    let branches = (0..global.branches.len()).map(|n| BranchRow::of(&global, n)).collect();
    let row = TransactionRow { branches: None, ..TransactionRow::of(&global) };
    assert!(matches!(row.into_transaction(branches), Err(Error::Corrupt(_))));
}
