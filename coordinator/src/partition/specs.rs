//! Shares equal branch specs between transactions. Unshared, they would take most of the memory of 100,000 open transactions.

use std::{collections::BTreeSet, sync::Arc};

use crate::transaction::{Branch, BranchSpec};

/// Different specs that are remembered: more than one business uses. If every branch is different, sharing gains nothing and
/// costs little.
const SPECS_MAX: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Specs(BTreeSet<Arc<BranchSpec>>);

impl Specs {
    /// Replaces the specs of these branches with shared ones. A spec with a payload is not shared, since payloads are hardly
    /// ever equal.
    pub(super) fn share(&mut self, branches: &mut [Branch]) {
        for branch in branches.iter_mut().filter(|branch| branch.spec.payload.is_none()) {
            if let Some(known) = self.0.get(&branch.spec) {
                branch.spec = known.clone();
                continue;
            }
            if self.0.len() >= SPECS_MAX {
                self.0.clear();
            }
            self.0.insert(branch.spec.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::transaction::{Payload, Timestamp};

    fn branch(target: &str, payload: Option<Payload>) -> Branch {
        let spec = BranchSpec {
            branch_id: "1".parse().unwrap(),
            action: "inventory.deduct".to_owned(),
            participant: "inventory".to_owned(),
            target: target.to_owned(),
            carry_payload: payload.is_some(),
            payload,
            try_timeout: None,
            inquires: false,
            damage: None,
        };
        Branch::registered(spec, Timestamp(0))
    }

    #[test]
    fn the_same_is_kept_once_and_no_payload_is_kept() {
        let payload = Payload { data: Bytes::from_static(b"7"), content_type: String::new() };
        let mut specs = Specs::default();
        let mut branches = [
            branch("http://here:1", None),
            branch("http://here:1", None),
            branch("http://there:1", None),
            branch("http://here:1", Some(payload.clone())),
            branch("http://here:1", Some(payload)),
        ];
        let before = branches.clone();
        specs.share(&mut branches);
        assert_eq!(branches, before);
        assert!(Arc::ptr_eq(&branches[0].spec, &branches[1].spec));
        assert!(!Arc::ptr_eq(&branches[3].spec, &branches[4].spec));
        assert_eq!(specs.0.len(), 2);
        for n in 0..2 * SPECS_MAX {
            specs.share(&mut [branch(&n.to_string(), None)]);
        }
        assert!(specs.0.len() <= SPECS_MAX);
    }
}
