//! What all partitions together hold in memory: how many transactions, and how many bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Error, Settings};
use crate::transaction::{Branch, BranchState, CancelCause, GlobalTransaction, Refusal};

/// Memory of a transaction without its texts, including its entries in the partition's maps. Measured, and rounded up.
const TRANSACTION_BYTES: usize = 768;
/// Memory of a branch without its texts.
const BRANCH_BYTES: usize = 256;

/// See the module's comment.
#[derive(Debug, Default)]
pub struct MemoryUse {
    transactions: AtomicUsize,
    bytes: AtomicUsize,
}

impl MemoryUse {
    /// How many transactions are in memory.
    pub fn transactions(&self) -> usize {
        self.transactions.load(Ordering::Relaxed)
    }

    /// How many bytes they take, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether a new transaction may begin.
    pub(super) fn room_for_one(&self, settings: &Settings) -> Result<(), Error> {
        let Settings { open_max, .. } = *settings;
        if self.transactions() >= open_max {
            return Err(Error::TooManyOpen { open_max });
        }
        self.room_for_bytes(settings)
    }

    /// Whether transactions may grow, for example by another branch.
    pub(super) fn room_for_bytes(&self, settings: &Settings) -> Result<(), Error> {
        let Settings { open_bytes_max, .. } = *settings;
        if self.bytes() >= open_bytes_max {
            return Err(Error::TooManyBytes { open_bytes_max });
        }
        Ok(())
    }

    /// Whether due transactions may be read into memory. The last third of the room is kept for new transactions.
    pub(super) fn has_room_for_due(&self, settings: &Settings) -> bool {
        let Settings { open_max, open_bytes_max, .. } = settings;
        self.transactions() < open_max - open_max / 3
            && self.bytes() < open_bytes_max - open_bytes_max / 3
    }

    /// Whether transactions that can wait in the store should leave memory.
    pub(super) fn is_half_full(&self, settings: &Settings) -> bool {
        let Settings { open_max, open_bytes_max, .. } = settings;
        self.transactions() >= open_max / 2 || self.bytes() >= open_bytes_max / 2
    }

    pub(super) fn enters(&self, bytes: usize) {
        self.transactions.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn leaves(&self, bytes: usize) {
        self.transactions.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn changes(&self, before: usize, after: usize) {
        if after >= before {
            self.bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}

/// Bytes of a transaction in memory, roughly.
pub(super) fn bytes_of(global: &GlobalTransaction) -> usize {
    let labels: usize = global.labels.iter().map(|(key, value)| key.len() + value.len() + 64).sum();
    let cancel = match &global.cancel {
        Some(CancelCause::Requested { reason }) => reason.len(),
        Some(CancelCause::Refused { refusal, .. }) => {
            let Refusal { reason, domain, message, metadata } = refusal;
            let metadata: usize =
                metadata.iter().map(|(key, value)| key.len() + value.len() + 64).sum();
            reason.len() + domain.len() + message.len() + metadata
        }
        Some(CancelCause::TryUnknown { error, .. }) => error.len(),
        Some(CancelCause::TimedOut | CancelCause::CoordinatorRestarted) | None => 0,
    };
    let resolution = global.resolution.as_ref().map_or(0, |by| by.operator.len() + by.reason.len());
    let result =
        global.result.as_ref().map_or(0, |result| result.data.len() + result.content_type.len());
    let branches: usize = global.branches.iter().map(bytes_of_branch).sum();
    TRANSACTION_BYTES + global.name.len() + labels + cancel + resolution + result + branches
}

fn bytes_of_branch(branch: &Branch) -> usize {
    let spec = &branch.spec;
    let payload = spec.payload.as_ref().map_or(0, |payload| payload.data.len());
    let reply = branch.reply.as_ref().map_or(0, |reply| reply.data.len());
    let error = branch.last_error.as_ref().map_or(0, |error| error.message.len());
    let resolution = match &branch.state {
        BranchState::Resolved(resolution) => resolution.operator.len() + resolution.reason.len(),
        BranchState::Registered | BranchState::Tried | BranchState::Acknowledged => 0,
    };
    let names = spec.action.len() + spec.participant.len() + spec.target.len();
    BRANCH_BYTES + names + payload + reply + error + resolution
}
