//! Calls to participants. The partitions hand over what is due and go on; what became of a call comes back on a channel.
//!
//! A participant that is slow or dead delays nobody else: each is a [`peer`] of its own, with a limit of calls at a time and a
//! breaker. An action that hangs delays no other: each has a [`lane`] of its own, with a bounded queue. A participant may have several
//! [`servers`]. Nothing is repeated here: the repeat is the partition's, after its backoff.

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

pub use answer::is_unprintable;
pub(crate) use answer::one_line;
pub use grpc::{GrpcDispatch, Targets, Unreachable};
pub use servers::{Destination, Dialler, Tcp};

use crate::transaction::{BranchSpec, Outcome, Phase, Timestamp};

/// One call to one participant.
#[derive(Debug, Clone)]
pub struct CallRequest {
    /// Which transaction.
    pub xid: Xid,
    /// Which of its branches, by index.
    pub branch: usize,
    /// That branch, as it was registered. The payload is that of a Try, or carried.
    pub spec: Arc<BranchSpec>,
    /// What to do.
    pub phase: Phase,
    /// From 1, within the phase.
    pub attempt: u32,
    /// End of phase one.
    pub expires_at: Timestamp,
    /// Of the transaction.
    pub labels: BTreeMap<String, String>,
    /// How long it may take, from the moment it leaves.
    pub deadline: Duration,
    /// An operator has asked for it: it goes out though its participant has not been answering.
    pub hurried: bool,
}

impl CallRequest {
    /// Whether it is not worth making any more: a Try after the end of phase one.
    fn is_too_late(&self, now: Timestamp) -> bool {
        self.phase == Phase::Try && now >= self.expires_at
    }
}

/// What became of a call.
#[derive(Debug)]
pub struct Returned {
    /// Which transaction.
    pub xid: Xid,
    /// Which of its branches, by index.
    pub branch: usize,
    /// What was asked for.
    pub phase: Phase,
    /// What became of it.
    pub outcome: Outcome,
}

/// A call cannot be taken now: ask again after this long. It was not made and does not count as an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Later(
    /// How long.
    pub Duration,
);

/// Makes calls.
pub trait Dispatch: fmt::Debug + Send + Sync + 'static {
    /// Takes a call, without waiting. What becomes of it is sent to `returned`, once, whatever happens short of the end of the
    /// process.
    ///
    /// # Errors
    ///
    /// When its participant has as much to do as it may have, or is not answering: nothing was sent.
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later>;
}
