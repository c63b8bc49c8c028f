//! Calls to participants. A partition submits a due call and goes on. The outcome comes back on a channel.
//!
//! A slow or dead participant delays no other: each has its own [`peer`] with a limit of calls in flight and a breaker. An
//! action that hangs delays no other action: each has its own [`lane`] with a bounded queue. A participant may have several
//! [`servers`]. Dispatch never retries a call. The partition does, after its backoff.

pub mod address;
mod answer;
mod breaker;
mod grpc;
mod lane;
mod peer;
mod servers;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use handfast_proto::Xid;
use tokio::sync::mpsc;

pub(crate) use answer::kept_refusal;
pub use grpc::{GrpcDispatch, Targets, Unreachable};
pub use servers::{Destination, Dialler, Tcp};

use crate::transaction::{BranchSpec, Outcome, Phase, Timestamp};

/// One call to one participant.
#[derive(Debug, Clone)]
pub struct CallRequest {
    /// The transaction of the branch.
    pub xid: Xid,
    /// The index of the branch in its transaction, from 0.
    pub branch: usize,
    /// The branch as it was registered. Its payload is the payload of the Try, or the one carried over to phase two.
    pub spec: Arc<BranchSpec>,
    /// Try, Confirm or Cancel.
    pub phase: Phase,
    /// The number of this attempt within the phase, from 1.
    pub attempt: u32,
    /// When phase one ends. A Try is not sent after that.
    pub expires_at: Timestamp,
    /// The transaction's labels, which the participant is told.
    pub labels: BTreeMap<String, String>,
    /// The deadline of the call, counted from when it is sent.
    pub deadline: Duration,
    /// Whether the call is made even if the breaker is open.
    pub hurry: Hurry,
}

/// Whether an operator asked for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the type's comment says what they are")]
pub enum Hurry {
    Yes,
    No,
}

impl CallRequest {
    /// Whether the call is pointless now: a Try after the end of phase one.
    fn is_too_late(&self, now: Timestamp) -> bool {
        self.phase == Phase::Try && now >= self.expires_at
    }
}

/// The outcome of a call.
#[derive(Debug)]
pub struct Returned {
    /// The transaction of the branch.
    pub xid: Xid,
    /// The index of the branch in its transaction, from 0.
    pub branch: usize,
    /// The phase of the call.
    pub phase: Phase,
    /// What the answer means. No answer is an unknown outcome.
    pub outcome: Outcome,
}

/// A call cannot be made now; submit it again after this pause. Nothing was sent, and it does not count as an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Later(
    /// How long to wait before the next submit, counted from now.
    pub Duration,
);

/// Makes calls.
pub trait Dispatch: fmt::Debug + Send + Sync + 'static {
    /// Accepts a call without waiting. Its outcome is sent to `returned` exactly once, unless the process ends before.
    ///
    /// # Errors
    ///
    /// When the participant's queue is full or its breaker is open. Nothing was sent.
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later>;
}
