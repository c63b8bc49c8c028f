//! How a global transaction is converted to columns and back, for every database.
//!
//! A row that was read may be damaged. It is converted as far as the transaction can still be carried out, and hurts no other.

use std::collections::BTreeMap;

use bytes::Bytes;
use handfast_proto::{BranchId, Xid, limits};
use serde::{Deserialize, Serialize};
use sqlx::{ColumnIndex, Decode, FromRow, Row, Type};
use tracing::error;

use super::branches::{self, BranchRow, ResolutionOfBranch};
use crate::{
    store::{Error, XidBytes},
    transaction::{
        CancelCause, Decision, Drive, GlobalTransaction, Key, Payload, Refusal, State, Timestamp,
    },
};

/// The value of the column `state`.
pub(super) fn state_number(state: State) -> i64 {
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
    pub(in crate::store) branch_count: Option<i64>,
    pub(in crate::store) branches: Option<String>,
    pub(in crate::store) result: Option<Vec<u8>>,
    pub(in crate::store) result_type: Option<String>,
}

/// A row that may hold values that its columns cannot have (SQLite takes any). It does not keep others from being read.
#[derive(Debug)]
pub(in crate::store) struct Found<T> {
    pub(in crate::store) xid: XidBytes,
    due_at: Option<i64>,
    pub(in crate::store) row: Result<T, String>,
}

impl<T> Found<T> {
    /// Where a page that ends with this row goes on.
    pub(in crate::store) fn place(&self) -> Option<(Timestamp, XidBytes)> {
        Some((Timestamp(self.due_at?), self.xid.clone()))
    }
}

impl<'r, R: Row, T: FromRow<'r, R>> FromRow<'r, R> for Found<T>
where
    &'static str: ColumnIndex<R>,
    Vec<u8>: Decode<'r, R::Database> + Type<R::Database>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
    f64: Decode<'r, R::Database> + Type<R::Database>,
{
    fn from_row(row: &'r R) -> Result<Self, sqlx::Error> {
        let row_or_damage = T::from_row(row).map_err(|error| error.to_string());
        let xid = row.try_get("xid").unwrap_or_default();
        let (due_at, xid) =
            match (row.try_get::<Option<i64>, _>("due_at"), row.try_get::<f64, _>("due_at")) {
                (Ok(due_at), _) => (due_at, xid),
                // All rows between this fraction and the next whole number are as damaged, and are passed over.
                (Err(_), Ok(fraction)) => (Some(whole_above(fraction)), XidBytes::new()),
                (Err(_), Err(_)) => (None, xid),
            };
        Ok(Self { xid, due_at, row: row_or_damage })
    }
}

/// The first whole number that is not below this one.
#[allow(clippy::cast_possible_truncation, reason = "a number outside i64 becomes the nearest one")]
fn whole_above(fraction: f64) -> i64 {
    fraction.ceil() as i64
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
    /// The whole row.
    pub(in crate::store) fn with_branches(global: &GlobalTransaction) -> Self {
        Self { branches: Some(branches::column(&global.branches)), ..Self::of(global) }
    }

    /// The row without `branches`, which seldom change.
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
            branch_count: Some(i64::try_from(global.branches.len()).unwrap_or(i64::MAX)),
            branches: None,
            result: global.result.as_ref().map(|result| result.data.to_vec()),
            result_type: global.result.as_ref().map(|result| result.content_type.clone()),
        }
    }

    /// Rebuilds a transaction. `rows` are its rows of `branch`, in order of position.
    pub(in crate::store) fn into_transaction(
        self,
        rows: Vec<BranchRow>,
        resolutions: Vec<ResolutionOfBranch>,
    ) -> Result<GlobalTransaction, Error> {
        let xid = xid(&self.xid)?;
        let damaged = |column: &str| {
            Error::Corrupt(format!("transaction {xid} has an impossible `{column}`"))
        };
        let state = state(self.state).ok_or_else(|| damaged("state"))?;
        let mut branches = match &self.branches {
            Some(column) => branches::with_rows(&self.xid, column, rows).map_err(damaged)?,
            None => rows, // an earlier version has recorded it, and all branches have a row
        };
        branches::resolve(&mut branches, resolutions);
        let count = i64::try_from(branches.len()).unwrap_or(i64::MAX);
        let too_many = branches.len() > limits::BRANCHES_MAX; // more than a `BranchSet` can hold
        if too_many || self.branch_count.is_some_and(|recorded| recorded != count) {
            return Err(damaged("branches"));
        }
        let begun_at = Timestamp(self.begun_at);
        // What is not needed to carry the transaction out is left out if it is damaged.
        let mut left_out = Vec::new();
        let mut leave_out = |column: &'static str| left_out.push(column);
        let cancel = self.cancel().unwrap_or_else(|column| {
            leave_out(column);
            let reason = format!("its record is damaged ({column})");
            let is_cancelled = state.decision() == Some(Decision::Cancel);
            is_cancelled.then_some(CancelCause::Requested { reason })
        });
        let key = self.key().unwrap_or_else(|column| {
            leave_out(column);
            None
        });
        let global = GlobalTransaction {
            xid,
            drive: match self.drive {
                1 => Drive::Initiator,
                2 => Drive::Coordinator { in_order: false },
                3 => Drive::Coordinator { in_order: true },
                _ => {
                    leave_out("drive");
                    Drive::Initiator // no Try is made after a restart anyway
                }
            },
            state,
            labels: serde_json::from_str(&self.labels).unwrap_or_else(|_| {
                leave_out("labels");
                BTreeMap::new()
            }),
            begun_at,
            expires_at: Timestamp(self.expires_at),
            decided_at: self.decided_at.map(Timestamp),
            finished_at: self.finished_at.map(Timestamp),
            cancel,
            result: match (self.result, self.result_type) {
                (Some(data), Some(content_type)) => {
                    Some(Box::new(Payload { data: Bytes::from(data), content_type }))
                }
                (None, None) => None,
                (Some(_), None) | (None, Some(_)) => {
                    leave_out("result");
                    None
                }
            },
            key,
            branches: (branches.into_iter())
                .map(|row| row.into_branch(state, begun_at, &mut leave_out).map_err(damaged))
                .collect::<Result<_, _>>()?,
            name: self.name,
            at_decision: false,
            resolution: None,
        };
        let decided = global.state.decision().is_some();
        if global.decided_at.is_some() != decided
            || global.finished_at.is_some() != global.state.is_final()
        {
            return Err(damaged("decided_at"));
        }
        if !left_out.is_empty() {
            let columns = left_out.join(", ");
            error!(%xid, columns, "a record is damaged; the transaction is carried out without these columns");
        }
        Ok(global)
    }

    fn key(&self) -> Result<Option<Key>, &'static str> {
        match (&self.key_hash, &self.key_digest) {
            (None, None) => Ok(None),
            (Some(hash), Some(digest)) => Ok(Some(Key {
                hash: hash.as_slice().try_into().map_err(|_| "key_hash")?,
                digest: digest.as_slice().try_into().map_err(|_| "key_digest")?,
            })),
            (None, Some(_)) | (Some(_), None) => Err("key_hash"),
        }
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

pub(in crate::store) fn xid(column: &[u8]) -> Result<Xid, Error> {
    let bytes = column
        .try_into()
        .map_err(|_| Error::Corrupt(format!("an xid of {} bytes", column.len())))?;
    Ok(Xid::from_bytes(bytes))
}

/// How a label is written in the column `labels`. The text may also be the end of a longer label: the key `a"x` is written as
/// `"a\"x"`. So a search for it finds too much rather than too little.
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
    let old = TransactionRow { branch_count: None, ..TransactionRow::of(&global) };
    assert!(matches!(old.into_transaction(branches, Vec::new()), Err(Error::Corrupt(_))));
    let row = TransactionRow { branch_count: None, ..TransactionRow::with_branches(&global) };
    assert!(matches!(row.into_transaction(Vec::new(), Vec::new()), Err(Error::Corrupt(_))));
}
