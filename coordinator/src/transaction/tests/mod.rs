//! Tests of one transaction: every reachable state (`explorer`), and scripts that people can read (`stories`).

mod explorer;
mod stories;

use std::{collections::BTreeMap, time::Duration};

use handfast_proto::Xid;

use super::*;

/// A branch `inventory.deduct` with this id.
fn spec(branch_id: &str) -> BranchSpec {
    BranchSpec {
        branch_id: branch_id.parse().unwrap(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        target: String::new(),
        payload: None,
        carry_payload: false,
        try_timeout: None,
        inquires: false,
        damage: None,
    }
}

fn new_transaction(drive: Drive, timeout: Duration, branches: Vec<BranchSpec>) -> NewTransaction {
    NewTransaction {
        at_decision: false,
        name: "checkout".to_owned(),
        drive,
        timeout,
        labels: BTreeMap::new(),
        key: None,
        branches,
    }
}

fn refusal() -> Refusal {
    Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: String::new(),
        metadata: BTreeMap::new(),
    }
}

fn unknown(timed_out: bool, hopeless: bool, at: Timestamp) -> Outcome {
    let error = AttemptError {
        code: "UNAVAILABLE".to_owned(),
        message: "connection refused".to_owned(),
        at,
    };
    Outcome::Unknown { error, timed_out, hopeless }
}

const XID: Xid = Xid { partition: 0, epoch: 1, sequence: 1, nonce: 0x9f3c_01d2 };
