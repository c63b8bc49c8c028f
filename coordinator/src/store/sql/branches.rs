//! How branches are recorded. A transaction's row has them as they were registered, in the column `branches`. A branch of which there
//! is more to tell also has a row in `branch`.

use std::{borrow::Cow, ops::Not, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::transaction::{
    AttemptError, Branch, BranchDamage, BranchSpec, BranchState, Call, GlobalTransaction, Payload,
    Resolution, State, Timestamp,
};

/// A branch: a row of `branch`, with its row of `resolution` if there is one, or what the transaction's row says of it.
#[derive(Debug, Default, sqlx::FromRow)]
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
    #[sqlx(skip)]
    pub(super) resolution: Option<Resolution>,
    /// Why the branch cannot be called.
    #[sqlx(skip)]
    damage: Option<BranchDamage>,
    /// Whether the transaction's row says that it has a payload to carry.
    #[sqlx(skip)]
    carries: bool,
}

/// A row of `resolution`: an operator has resolved a branch, which may have no row of its own.
#[derive(Debug, sqlx::FromRow)]
pub(in crate::store) struct ResolutionOfBranch {
    branch_id: String,
    operator: String,
    reason: String,
    at: i64,
}

/// Adds the resolutions of a transaction to its branches.
pub(super) fn resolve(branches: &mut [BranchRow], resolutions: Vec<ResolutionOfBranch>) {
    for ResolutionOfBranch { branch_id, operator, reason, at, .. } in resolutions {
        let of = branches.iter_mut().find(|branch| branch.branch_id == branch_id);
        if let Some(branch) = of {
            branch.resolution = Some(Resolution { operator, reason, at: Timestamp(at) });
        }
    }
}

/// The column `branches`.
pub(super) fn column(branches: &[Branch]) -> String {
    let all: Vec<_> = branches.iter().map(Registered::of).collect();
    serde_json::to_string(&all).expect("texts always become JSON")
}

/// All branches of the column, in order. `rows` are those of `branch`.
pub(super) fn with_rows(
    xid: &[u8],
    column: &str,
    rows: Vec<BranchRow>,
) -> Result<Vec<BranchRow>, &'static str> {
    let all: Vec<Registered<'_>> = serde_json::from_str(column).map_err(|_| "branches")?;
    let mut rows = rows.into_iter().peekable();
    let all = (0..).zip(all).map(|(position, registered)| {
        let own = rows.next_if(|row| row.position == position);
        registered.with_row(xid, position, own)
    });
    let all = all.collect::<Result<Vec<_>, _>>()?;
    if rows.next().is_some() { Err("branches") } else { Ok(all) }
}

/// A branch in the column. The columns of `branch` have the same meaning.
#[derive(Serialize, Deserialize)]
struct Registered<'a> {
    id: Cow<'a, str>,
    /// Which calls the branch gets. `None`: TCC, the only kind so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    action: Cow<'a, str>,
    participant: Cow<'a, str>,
    target: Cow<'a, str>,
    /// Whether it has a payload to carry, in its row of `branch`.
    #[serde(default, skip_serializing_if = "Not::not")]
    payload: bool,
}

impl<'a> Registered<'a> {
    fn of(branch: &'a Branch) -> Self {
        let spec = &*branch.spec;
        Self {
            id: Cow::from(spec.branch_id.as_str()),
            kind: match &spec.damage {
                Some(BranchDamage::UnknownKind(kind)) => Some(kind.clone()),
                Some(BranchDamage::NoPayload | BranchDamage::NoPayloadType) | None => None,
            },
            action: Cow::from(&spec.action),
            participant: Cow::from(&spec.participant),
            target: Cow::from(&spec.target),
            payload: spec.carry_payload,
        }
    }

    /// The branch at this position. `own`: its row of `branch`.
    fn with_row(
        self,
        xid: &[u8],
        position: i64,
        own: Option<BranchRow>,
    ) -> Result<BranchRow, &'static str> {
        if own.as_ref().is_some_and(|own| own.branch_id != self.id) {
            return Err("branch_id");
        }
        // A later version has other kinds, and this one does not know which calls such a branch gets.
        // A row that was written without the payload does not make up for it.
        let has_payload = own.as_ref().is_some_and(|own| own.payload.is_some());
        let damage = match self.kind {
            Some(kind) if kind != "tcc" => Some(BranchDamage::UnknownKind(kind)),
            Some(_) | None if self.payload && !has_payload => Some(BranchDamage::NoPayload),
            Some(_) | None => None,
        };
        let own = own.unwrap_or_else(|| BranchRow {
            xid: xid.to_vec(),
            position,
            branch_id: self.id.into_owned(),
            action: self.action.into_owned(),
            participant: self.participant.into_owned(),
            target: self.target.into_owned(),
            state: 1,
            ..BranchRow::default()
        });
        Ok(BranchRow { damage, carries: self.payload, ..own })
    }
}

/// The payload that the store keeps for phase two.
pub(super) fn carried_payload(branch: &Branch) -> Option<&Payload> {
    branch.spec.payload.as_ref().filter(|_| branch.spec.carry_payload)
}

impl BranchRow {
    pub(in crate::store) fn of(global: &GlobalTransaction, position: usize) -> Self {
        let branch = &global.branches[position];
        let carried = carried_payload(branch);
        let error = branch.last_error.as_ref();
        let resolution = match &branch.state {
            BranchState::Resolved(resolution) => Some(&**resolution),
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
            resolution: resolution.cloned(),
            damage: None,
            carries: carried.is_some(),
        }
    }

    pub(super) fn into_branch(
        self,
        state: State,
        begun_at: Timestamp,
        leave_out: &mut impl FnMut(&'static str),
    ) -> Result<Branch, &'static str> {
        let (payload, of_payload) = match (self.payload, self.payload_type) {
            (Some(data), Some(content_type)) => {
                (Some(Payload { data: Bytes::from(data), content_type }), None)
            }
            (None, None) => (None, None),
            (None, Some(_)) => (None, Some(BranchDamage::NoPayload)),
            (Some(_), None) => (None, Some(BranchDamage::NoPayloadType)),
        };
        let last_error = match (self.error_code, self.error_message, self.error_at) {
            (Some(code), Some(message), Some(at)) => {
                Some(Box::new(AttemptError { code, message, at: Timestamp(at) }))
            }
            (None, None, None) => None,
            _ => {
                leave_out("error_at");
                None
            }
        };
        let branch_state = match (self.state, self.resolution) {
            // If all went well, the rows of branches are not written again. The final state implies that they acknowledged.
            (1, None) if state.is_final() => BranchState::Acknowledged,
            (1, None) => BranchState::Registered,
            (2, None) => BranchState::Acknowledged,
            (3, Some(resolution)) => BranchState::Resolved(Box::new(resolution)),
            // An operator's resolution is kept for ever, and is there.
            (_, Some(resolution)) => {
                leave_out("branch.state");
                BranchState::Resolved(Box::new(resolution))
            }
            // Whether it has acknowledged is not known. A repeat of its call does no harm.
            (_, None) => {
                leave_out("branch.state");
                if state.is_final() { BranchState::Acknowledged } else { BranchState::Registered }
            }
        };
        Ok(Branch {
            spec: Arc::new(BranchSpec {
                branch_id: self.branch_id.parse().map_err(|_| "branch_id")?,
                action: self.action,
                participant: self.participant,
                target: self.target,
                carry_payload: self.carries || payload.is_some() || of_payload.is_some(),
                payload,
                try_timeout: None,
                inquires: false,
                damage: self.damage.or(of_payload),
            }),
            attempts: match branch_state {
                BranchState::Acknowledged if self.state == 1 => 1,
                BranchState::Acknowledged
                | BranchState::Registered
                | BranchState::Tried
                | BranchState::Resolved(_) => u32::try_from(self.attempts).unwrap_or_else(|_| {
                    leave_out("attempts");
                    0
                }),
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
