//! What is told about a transaction that the store does not have any more: it is forgotten, but what operators did by hand is not.

use handfast_proto::{BranchId, Xid};

use super::{Error, Partition, What};
use crate::{
    store::{self, Known, Lookup, Store},
    transaction::Decision,
};

/// Branches that operators have resolved by hand, each with the decision that it was resolved for.
pub(super) type Resolved = Vec<(BranchId, Decision)>;

/// Looks a transaction up. If it may have been deleted, also looks for its resolved branches.
pub(super) async fn look_up(
    store: &dyn Store,
    xid: Xid,
    known: Known,
) -> (Result<Lookup, store::Error>, Resolved) {
    let found = store.load(xid, known).await;
    match &found {
        Ok(Lookup::Absent { purged_through: Some(through), .. }) if xid <= *through => {
            match store.resolved(xid, known).await {
                Ok(resolved) => (found, resolved),
                Err(error) => (Err(error), Resolved::new()),
            }
        }
        Ok(_) | Err(_) => (found, Resolved::new()),
    }
}

/// The answer to a caller whose transaction is missing.
pub(super) fn told(missing: &Error, what: &What, resolved: &Resolved) -> Error {
    match (missing, what) {
        (Error::Forgotten(xid), What::Inquire(branch_id)) => {
            let of_branch = resolved.iter().find(|(id, _)| id == branch_id);
            of_branch.map_or(missing.clone(), |(_, decision)| {
                Error::ForgottenAfterResolving(*xid, *decision)
            })
        }
        _ => missing.clone(),
    }
}

impl Partition {
    /// Whether a transaction with this xid may be one that the store has lost.
    pub(super) fn is_since_a_loss(&self, xid: Xid) -> bool {
        self.ownership.lost_from.is_some_and(|epoch| xid.epoch >= epoch)
    }
}
