//! What the recorded rows say about a batch or a read. A batch may be the next one, be applied already, come from a replaced
//! owner, or contradict the records.

use std::collections::BTreeMap;

use handfast_proto::planted::Bug;

use super::{Appended, Batch, Damage, Error, Guard, Known, Ownership, Write};
use crate::transaction::State;

/// The recorded state of a transaction that a batch changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Row {
    pub(in crate::store) state: State,
    /// `None`: the number of branches is not known.
    pub(in crate::store) branches: Option<usize>,
}

impl Write {
    /// Why this write contradicts the recorded row. `None`: it does not.
    pub(in crate::store) fn misfit(&self, recorded: Option<Row>) -> Option<String> {
        let Self { global, before, new_branches, .. } = self;
        let here = match before {
            None => "new".to_owned(),
            Some(state) => format!("{} with {new_branches} branches", word(*state)),
        };
        let there = match (before, recorded) {
            (None, None) => return None,
            (Some(_), None) => "not recorded".to_owned(),
            (before, Some(Row { state, branches })) => {
                let fits = branches.is_none_or(|branches| branches == *new_branches);
                if *before == Some(state) && fits {
                    return None;
                }
                let branches =
                    branches.map_or_else(String::new, |count| format!(" with {count} branches"));
                format!("recorded as {}{branches}", word(state))
            }
        };
        Some(format!("transaction {} is {here} in memory, and {there} in the store", global.xid))
    }
}

/// The name of a state, for messages.
fn word(state: State) -> &'static str {
    match state {
        State::Trying => "trying",
        State::Confirming => "confirming",
        State::Cancelling => "cancelling",
        State::Confirmed => "confirmed",
        State::Cancelled => "cancelled",
    }
}

/// The owner of a partition and its latest batch, as the partition's row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::store) struct PartitionRow {
    pub(in crate::store) epoch: u32,
    pub(in crate::store) nonce: u32,
    /// The number of the epoch's latest batch.
    pub(in crate::store) position: u64,
}

impl Known {
    /// Whether a read that shows `recorded` is new enough.
    pub(in crate::store) fn check(&self, recorded: PartitionRow) -> Result<(), Error> {
        let Self { ownership: Ownership { partition, epoch, nonce, .. }, position } = *self;
        if Bug::BelieveOldRead.is_planted() {
            return Ok(());
        }
        if recorded.epoch > epoch {
            return Err(Error::Replaced(format!(
                "partition {partition} has epoch {} there, and {epoch} here",
                recorded.epoch
            )));
        }
        if (recorded.epoch, recorded.nonce) == (epoch, nonce) && recorded.position >= position {
            return Ok(());
        }
        Err(Error::Old(format!(
            "partition {partition} is at epoch {}, nonce {:08x}, batch {} there; known is epoch {epoch}, nonce {nonce:08x}, batch {position}",
            recorded.epoch, recorded.nonce, recorded.position
        )))
    }
}

/// An epoch of a partition, as the store has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Epoch {
    pub(in crate::store) epoch: u32,
    pub(in crate::store) nonce: u32,
    /// How many of its batches are recorded.
    pub(in crate::store) batches: u64,
    /// Whether it is marked as an epoch with lost batches.
    pub(in crate::store) lost: bool,
}

/// What the store has lost of a batch's owner and does not know yet: the epoch to mark, and the number of batches. `epochs` are
/// those up to the owner's epoch, the newest first. The owner's own takeover counts as a batch. If it is gone, batches of the
/// owner before it may be gone too, so that epoch is marked.
pub(in crate::store) fn loss(guard: Guard, epochs: &[Epoch]) -> Option<(u32, u64)> {
    let Guard { epoch, nonce, position, .. } = guard;
    let acknowledged = position - 1;
    let own = epochs.iter().find(|found| (found.epoch, found.nonce) == (epoch, nonce));
    let (marked, lost) = match own {
        Some(own) => (own, acknowledged.saturating_sub(own.batches)),
        None => (epochs.iter().find(|found| found.epoch < epoch)?, acknowledged + 1),
    };
    (lost > 0 && !marked.lost).then_some((marked.epoch, lost))
}

/// What the rows of a batch's partitions say about the batch. `None`: it is the next batch of all of them and may be applied
/// now. Otherwise, the result of appending it.
pub(in crate::store) fn judge(
    batch: &Batch,
    recorded: impl Fn(u16) -> Option<PartitionRow>,
) -> Option<Appended> {
    let (mut next, mut landed, mut fenced, mut damaged) = (0_u32, 0_u32, Vec::new(), Vec::new());
    for guard in &batch.guards {
        match recorded(guard.partition) {
            Some(PartitionRow { epoch, .. }) if epoch > guard.epoch => {
                if Bug::SkipEpochCheck.is_planted() {
                    next += 1;
                } else {
                    fenced.push(guard.partition);
                }
            }
            Some(PartitionRow { epoch, nonce, position })
                if epoch == guard.epoch
                    && nonce == guard.nonce
                    && (guard.position == position || guard.position == position + 1) =>
            {
                if guard.position == position {
                    landed += 1;
                } else {
                    next += 1;
                }
            }
            other => damaged.push(Damage::of(*guard, other)),
        }
    }
    if !damaged.is_empty() {
        return Some(Appended::Damaged(damaged));
    }
    match (next, landed, fenced.is_empty()) {
        (_, 0, true) => None,
        // Batches are atomic. If the batch was applied in one partition, it was applied in all, before any of them was taken
        // over.
        (0, 1.., true) => Some(Appended::Durable),
        (_, _, false) => Some(Appended::Fenced(fenced)),
        (1.., 1.., true) => Some(Damage::of_batch(batch, "half of the batch is recorded")),
    }
}

impl Damage {
    /// The damage of each partition whose rows contradict a batch, with its first few rows.
    pub(in crate::store) fn of_rows(misfits: impl IntoIterator<Item = (u16, String)>) -> Vec<Self> {
        /// Further rows would tell nothing new.
        const TOLD_MAX: usize = 3;
        let mut by_partition = BTreeMap::<u16, Vec<String>>::new();
        for (partition, misfit) in misfits {
            by_partition.entry(partition).or_default().push(misfit);
        }
        let damage = |(partition, misfits): (u16, Vec<String>)| {
            let more = misfits.len().saturating_sub(TOLD_MAX);
            let mut what = misfits.into_iter().take(TOLD_MAX).collect::<Vec<_>>().join("; ");
            if more > 0 {
                what.push_str(&format!("; and {more} more"));
            }
            what.push_str(
                ". Nothing was changed. Has somebody else written to the store's tables?",
            );
            Self { partition, what, lost: 0 }
        };
        by_partition.into_iter().map(damage).collect()
    }

    /// The same for a batch as a whole, where nobody can say which partition is wrong.
    pub(in crate::store) fn of_batch(batch: &Batch, what: &str) -> Appended {
        let all = batch.guards.iter().map(|guard| (guard.partition, what.to_owned()));
        Appended::Damaged(Self::of_rows(all))
    }

    /// Why the batch with this guard can never be applied to these records.
    pub(in crate::store) fn of(guard: Guard, recorded: Option<PartitionRow>) -> Self {
        let Guard { partition, epoch, nonce, position } = guard;
        let acknowledged = position - 1;
        let (lost, what) = match recorded {
            None => (0, "the store has no row for it".to_owned()),
            Some(found) if found.epoch == epoch && found.nonce != nonce => (
                0,
                format!(
                    "the store has another history: epoch {epoch} has nonce {:08x} there and {nonce:08x} here. It is another server, or \
                     a restored backup, on which somebody else has taken over",
                    found.nonce
                ),
            ),
            Some(found) if found.epoch < epoch => (
                acknowledged + 1,
                format!(
                    "the store has lost a takeover that it had acknowledged: it is at epoch {}, and this coordinator has recorded \
                     {acknowledged} batches in epoch {epoch}. {WHY_LOST}",
                    found.epoch
                ),
            ),
            Some(found) if found.position < acknowledged => {
                let lost = acknowledged - found.position;
                (
                    lost,
                    format!(
                        "the store has lost {lost} batches that it had acknowledged: it is at batch {} of epoch {epoch}, and this \
                         coordinator has recorded {acknowledged}. {WHY_LOST}",
                        found.position
                    ),
                )
            }
            Some(found) => (
                0,
                format!(
                    "the store is at batch {} of epoch {epoch}, and this coordinator has recorded {acknowledged}: somebody else writes \
                     in its name",
                    found.position
                ),
            ),
        };
        Self { partition, what, lost }
    }
}

const WHY_LOST: &str = "This happens when a replica is promoted without its primary's last writes (asynchronous replication, or \
                        semi-synchronous replication that fell back to it), when a backup is restored, or when a server loses its \
                        last writes in a crash. What is missing is answered LOST from now on";
