//! What describes a global transaction before it is begun, whoever drives it.

use std::{collections::BTreeMap, fmt, time::Duration};

use handfast_proto::v1 as pb;

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
    /// How long to wait for participants to acknowledge, once it is decided. Zero: not at all.
    pub(super) wait: Duration,
}

impl Description {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            timeout: None,
            labels: BTreeMap::new(),
            key: String::new(),
            wait: COMPLETION_WAIT,
        }
    }

    pub(super) fn label(&mut self, key: impl Into<String>, value: impl fmt::Display) {
        self.labels.insert(key.into(), value.to_string());
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
