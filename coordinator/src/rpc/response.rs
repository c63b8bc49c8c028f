//! Converts our types to responses.

use std::collections::BTreeMap;

use handfast_proto::{
    BranchId, limits,
    time::{timestamp, wire_duration},
    v1 as pb,
};
use prost::Message as _;

use crate::{
    coordinator::Fate,
    dispatch::Targets,
    store::Listed,
    transaction::{
        Branch, BranchState, Call, CancelCause, Decision, Drive, GlobalTransaction, Payload,
        Refusal, State, Timestamp,
    },
};

/// Most bytes of transactions in one page of a list: half of the largest response.
const PAGE_BYTES_MAX: usize = limits::RESPONSE_BYTES_MAX / 2;

/// The full state of a transaction.
pub(super) fn transaction(
    global: &GlobalTransaction,
    stuck: bool,
    targets: &Targets,
) -> pb::Transaction {
    pb::Transaction {
        labels: global.labels.clone(),
        branches: (0..global.branches.len())
            .map(|index| branch_message(global, index, targets))
            .collect(),
        ..head(global, stuck)
    }
}

/// The state without labels and branches, which the initiator knows.
pub(super) fn head(global: &GlobalTransaction, stuck: bool) -> pb::Transaction {
    let at = |at: Timestamp| timestamp(at.0);
    let (refusal, refused_branch_id) = match &global.cancel {
        Some(CancelCause::Refused { branch_id, refusal }) => (Some(refusal), branch_id.as_ref()),
        _ => (None, None),
    };
    pb::Transaction {
        xid: global.xid.to_string(),
        name: global.name.clone(),
        state: state(global.state).into(),
        decision: global.state.decision().map_or(pb::Decision::Unspecified, decision).into(),
        drive: match global.drive {
            Drive::Initiator => pb::Drive::Initiator,
            Drive::Coordinator { .. } => pb::Drive::Coordinator,
        }
        .into(),
        labels: BTreeMap::new(),
        begun_at: Some(at(global.begun_at)),
        expires_at: Some(at(global.expires_at)),
        decided_at: global.decided_at.map(at),
        finished_at: global.finished_at.map(at),
        cancel_cause: global
            .cancel
            .as_ref()
            .map_or(pb::CancelCause::Unspecified, cancel_cause)
            .into(),
        cancel_reason: global.cancel.as_ref().map(CancelCause::to_string).unwrap_or_default(),
        refusal: refusal.map(|Refusal { reason, domain, message, metadata }| pb::Refusal {
            reason: reason.clone(),
            domain: domain.clone(),
            message: message.clone(),
            metadata: metadata.clone(),
        }),
        refused_branch_id: refused_branch_id.map(BranchId::to_string).unwrap_or_default(),
        branches: Vec::new(),
        stuck,
        timeout: Some(wire_duration(global.expires_at - global.begun_at)),
        result: global.result.as_deref().map(payload),
        record: match global.at_decision {
            true => pb::Record::AtDecision,
            false => pb::Record::AtBegin,
        }
        .into(),
    }
}

fn branch_message(global: &GlobalTransaction, index: usize, targets: &Targets) -> pb::Branch {
    let branch = &global.branches[index];
    let addresses = targets.addresses(&branch.spec.participant, &branch.spec.target);
    let state = match (&branch.state, global.state.decision()) {
        (BranchState::Registered, _) => pb::BranchState::Registered,
        (BranchState::Tried, _) => pb::BranchState::Tried,
        (BranchState::Acknowledged, Some(Decision::Confirm)) => pb::BranchState::Confirmed,
        (BranchState::Acknowledged, Some(Decision::Cancel) | None) => pb::BranchState::Cancelled,
        (BranchState::Resolved(_), _) => pb::BranchState::Resolved,
    };
    let next_attempt_at = match branch.call {
        Call::Idle { due_at } if branch.is_open() && branch.last_error.is_some() => {
            Some(timestamp(due_at.0))
        }
        Call::Idle { .. } | Call::InFlight(_) => None,
    };
    pb::Branch {
        branch_id: branch.spec.branch_id.to_string(),
        action: branch.spec.action.clone(),
        participant: branch.spec.participant.clone(),
        target: branch.spec.target.clone(),
        state: state.into(),
        attempts: branch.attempts,
        next_attempt_at,
        last_error: branch.last_error.as_ref().map(|error| pb::AttemptError {
            code: error.code.clone(),
            message: error.message.clone(),
            at: Some(timestamp(error.at.0)),
        }),
        resolution: match &branch.state {
            BranchState::Resolved(resolution) => Some(pb::Resolution {
                operator: resolution.operator.clone(),
                reason: resolution.reason.clone(),
                at: Some(timestamp(resolution.at.0)),
            }),
            BranchState::Registered | BranchState::Tried | BranchState::Acknowledged => None,
        },
        address: addresses.map(|addresses| addresses.to_string()).unwrap_or_default(),
    }
}

/// The reply of every Try, for the call that drove the transaction to Confirm.
pub(super) fn replies(global: &GlobalTransaction) -> Vec<pb::TryReply> {
    if global.state.decision() != Some(Decision::Confirm) {
        return Vec::new();
    }
    let reply = |branch: &Branch| {
        let reply = branch.reply.as_ref()?;
        let branch_id = branch.spec.branch_id.to_string();
        Some(pb::TryReply { branch_id, reply: Some(payload(reply)) })
    };
    global.branches.iter().filter_map(reply).collect()
}

fn payload(payload: &Payload) -> pb::Payload {
    pb::Payload { data: payload.data.clone(), content_type: payload.content_type.clone() }
}

pub(super) fn inquiry(fate: Fate) -> pb::Inquiry {
    match fate {
        Fate::Unknown => pb::Inquiry::Unspecified,
        Fate::Undecided => pb::Inquiry::Undecided,
        Fate::Confirmed => pb::Inquiry::Confirmed,
        Fate::Cancel => pb::Inquiry::Cancel,
        Fate::Forgotten => pb::Inquiry::Forgotten,
        Fate::Lost => pb::Inquiry::Lost,
        Fate::Resolved(Decision::Confirm) => pb::Inquiry::ResolvedConfirmed,
        Fate::Resolved(Decision::Cancel) => pb::Inquiry::ResolvedCancelled,
    }
}

fn state(state: State) -> pb::TransactionState {
    match state {
        State::Trying => pb::TransactionState::Trying,
        State::Confirming => pb::TransactionState::Confirming,
        State::Cancelling => pb::TransactionState::Cancelling,
        State::Confirmed => pb::TransactionState::Confirmed,
        State::Cancelled => pb::TransactionState::Cancelled,
    }
}

fn decision(decision: Decision) -> pb::Decision {
    match decision {
        Decision::Confirm => pb::Decision::Confirm,
        Decision::Cancel => pb::Decision::Cancel,
    }
}

pub(super) fn cancel_cause(cause: &CancelCause) -> pb::CancelCause {
    match cause {
        CancelCause::Requested { .. } => pb::CancelCause::Requested,
        CancelCause::Refused { .. } => pb::CancelCause::Refused,
        CancelCause::TimedOut => pb::CancelCause::TimedOut,
        CancelCause::TryUnknown { .. } => pb::CancelCause::TryUnknown,
        CancelCause::CoordinatorRestarted => pb::CancelCause::CoordinatorRestarted,
    }
}

/// One page of a list: as many transactions as fit into a response, and where the next page starts.
pub(super) fn page(
    found: Vec<(Listed, pb::Transaction)>,
    next: Option<Listed>,
) -> pb::ListTransactionsResponse {
    let (mut transactions, mut bytes, mut last, mut next) = (Vec::new(), 0, None, next);
    for (cursor, transaction) in found {
        bytes += transaction.encoded_len();
        if bytes > PAGE_BYTES_MAX && !transactions.is_empty() {
            next = last;
            break;
        }
        last = Some(cursor);
        transactions.push(transaction);
    }
    let token = |Listed { begun_at, xid }: Listed| format!("{}/{xid}", begun_at.0);
    let next_page = next.map(token).unwrap_or_default();
    pb::ListTransactionsResponse { transactions, more: !next_page.is_empty(), next_page }
}
