//! Transactions to print, for the tests of what is printed.

use std::{collections::BTreeMap, time::Duration};

use handfast_coordinator::transaction::Timestamp;
use handfast_proto::{
    time::{timestamp, wire_duration},
    v1::{self as pb, BranchState, TransactionState as State},
};

/// 2026-11-21T09:14:03.123Z
pub(super) const BEGUN: i64 = 1_795_252_443_123;
pub(super) const NOW: Timestamp = Timestamp(BEGUN + 180_000);

fn at(after: i64) -> Option<prost_types::Timestamp> {
    Some(timestamp(BEGUN + after))
}

fn branch(branch_id: &str, action: &str, participant: &str, state: BranchState) -> pb::Branch {
    pb::Branch {
        branch_id: branch_id.to_owned(),
        action: action.to_owned(),
        participant: participant.to_owned(),
        state: state.into(),
        attempts: 1,
        ..pb::Branch::default()
    }
}

/// One that is stuck, one that was refused, one that is trying, one that is done.
pub(super) fn samples() -> [pb::Transaction; 4] {
    let stuck = pb::Transaction {
        xid: "3-7-1042-9f3c01d2".to_owned(),
        name: "checkout".to_owned(),
        state: State::Confirming.into(),
        decision: pb::Decision::Confirm.into(),
        drive: pb::Drive::Initiator.into(),
        labels: BTreeMap::from([("order".to_owned(), "A-1042".to_owned())]),
        begun_at: at(0),
        expires_at: at(30_000),
        decided_at: at(100),
        branches: vec![
            branch("1", "order.create", "orders", BranchState::Confirmed),
            pb::Branch {
                // Where it was registered, and where the configuration says that it is now.
                target: "http://127.0.0.1:7701".to_owned(),
                address: "http://127.0.0.1:7703".to_owned(),
                attempts: 9,
                next_attempt_at: at(192_000),
                last_error: Some(pb::AttemptError {
                    code: "UNAVAILABLE".to_owned(),
                    message: "connection refused".to_owned(),
                    at: at(178_000),
                }),
                ..branch("2", "points.spend", "points", BranchState::Registered)
            },
            pb::Branch {
                attempts: 4,
                resolution: Some(pb::Resolution {
                    operator: "ann".to_owned(),
                    reason: "mail is gone".to_owned(),
                    at: at(120_000),
                }),
                ..branch("3", "mail.send", "mail", BranchState::Resolved)
            },
        ],
        stuck: true,
        timeout: Some(wire_duration(Duration::from_secs(30))),
        ..pb::Transaction::default()
    };
    let cancelled = pb::Transaction {
        xid: "3-7-1041-9f3c01d2".to_owned(),
        state: State::Cancelled.into(),
        decision: pb::Decision::Cancel.into(),
        drive: pb::Drive::Coordinator.into(),
        finished_at: at(120),
        cancel_cause: pb::CancelCause::Refused.into(),
        cancel_reason: "branch 2 refused: OUT_OF_STOCK only 2 left".to_owned(),
        refused_branch_id: "2".to_owned(),
        refusal: Some(pb::Refusal {
            reason: "OUT_OF_STOCK".to_owned(),
            domain: "inventory".to_owned(),
            message: "only 2 left".to_owned(),
            metadata: BTreeMap::from([("sku".to_owned(), "1042".to_owned())]),
        }),
        branches: vec![
            branch("1", "order.create", "orders", BranchState::Cancelled),
            branch("2", "inventory.deduct", "inventory", BranchState::Cancelled),
        ],
        labels: BTreeMap::new(),
        stuck: false,
        ..stuck.clone()
    };
    let trying = pb::Transaction {
        xid: "3-7-1043-9f3c01d2".to_owned(),
        name: "transfer".to_owned(),
        state: State::Trying.into(),
        begun_at: at(179_500),
        expires_at: at(209_500),
        ..pb::Transaction::default()
    };
    let confirmed = pb::Transaction {
        xid: "3-7-1-9f3c01d2".to_owned(),
        state: State::Confirmed.into(),
        begun_at: at(-7_200_000),
        branches: stuck.branches[..1].to_vec(),
        stuck: false,
        ..stuck.clone()
    };
    [stuck, cancelled, trying, confirmed]
}
