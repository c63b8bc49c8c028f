//! What describes a global transaction before it is begun, whoever drives it.

use std::{collections::BTreeMap, fmt, time::Duration};

use handfast_proto::v1 as pb;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// How long phase one may take by default.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait by default for participants to acknowledge, once it is decided.
const COMPLETION_WAIT: Duration = Duration::from_secs(2);
/// How long by default a call is repeated whose answer is lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What the initiator says of a global transaction when it begins.
#[derive(Debug, Clone)]
pub(super) struct Description {
    pub(super) name: String,
    /// `None`: the coordinator's default.
    pub(super) timeout: Option<Duration>,
    pub(super) labels: BTreeMap<String, String>,
    /// The idempotency key; empty: there is none.
    pub(super) key: String,
    /// A hash of the name and of the arguments that the caller named; empty: there is none.
    pub(super) fingerprint: Vec<u8>,
    /// Why the arguments cannot be hashed.
    pub(super) unreadable: Option<String>,
    /// How long to wait for participants to acknowledge, once it is decided. Zero: not at all.
    pub(super) wait: Duration,
    /// It is recorded with its decision.
    pub(super) at_decision: bool,
}

impl Description {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            timeout: None,
            labels: BTreeMap::new(),
            key: String::new(),
            fingerprint: Vec::new(),
            unreadable: None,
            wait: COMPLETION_WAIT,
            at_decision: false,
        }
    }

    pub(super) fn label(&mut self, key: impl Into<String>, value: impl fmt::Display) {
        self.labels.insert(key.into(), value.to_string());
    }

    /// Computes the fingerprint. The arguments are hashed as JSON with sorted keys, so that equal maps have equal fingerprints.
    pub(super) fn fingerprint(&mut self, arguments: &impl Serialize) {
        match serde_json::to_value(arguments) {
            Ok(value) => {
                let hash = Sha256::new_with_prefix(&self.name).chain_update([0]);
                let hash = hash.chain_update(value.to_string());
                self.fingerprint = hash.finalize().to_vec();
            }
            Err(error) => self.unreadable = Some(format!("the fingerprint: {error}")),
        }
    }

    pub(super) fn key(&self) -> Option<String> {
        Some(self.key.clone()).filter(|key| !key.is_empty())
    }

    pub(super) fn until(&self) -> pb::Until {
        if self.wait.is_zero() { pb::Until::Decided } else { pb::Until::Completed }
    }

    /// Whether `found`, a transaction with the same key, is the same operation. Then its outcome is the answer to this one too,
    /// whoever drives it.
    pub(super) fn is_same_operation(&self, found: &pb::Transaction) -> bool {
        found.name == self.name
    }
}
