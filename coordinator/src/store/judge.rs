//! What the rows of a store say about a batch or a read: whether it is the next one, was applied already, comes from an owner that was
//! replaced, or does not fit what is recorded.

use std::collections::BTreeMap;

use handfast_proto::planted::Bug;

use super::{Appended, Batch, Damage, Error, Guard, Known, Ownership, Write};
use crate::transaction::State;

/// What is recorded of a transaction that is to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Row {
    pub(in crate::store) state: State,
    /// `None`: it is not known.
    pub(in crate::store) branches: Option<usize>,
}

impl Write {
    /// Why this cannot be written over what is recorded; `None`: it can.
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

/// A state, for people.
fn word(state: State) -> &'static str {
    match state {
        State::Trying => "trying",
        State::Confirming => "confirming",
        State::Cancelling => "cancelling",
        State::Confirmed => "confirmed",
        State::Cancelled => "cancelled",
    }
}

/// What the row of a partition says about its owner and that owner's batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::store) struct Recorded {
    pub(in crate::store) epoch: u32,
    pub(in crate::store) nonce: u32,
    /// Number of the epoch's latest batch.
    pub(in crate::store) position: u64,
}

impl Known {
    /// Whether a read that shows `recorded` is new enough.
    pub(in crate::store) fn check(&self, recorded: Recorded) -> Result<(), Error> {
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

/// What the rows of a batch's partitions say about it: `None`, it is the next one of them all and may be applied now; else what
/// became of it.
///
/// # Errors
///
/// [`Error::Corrupt`] when half of it is recorded.
pub(in crate::store) fn judge(
    batch: &Batch,
    recorded: impl Fn(u16) -> Option<Recorded>,
) -> Result<Option<Appended>, Error> {
    let (mut next, mut landed, mut fenced, mut damaged) = (0_u32, 0_u32, Vec::new(), Vec::new());
    for guard in &batch.guards {
        match recorded(guard.partition) {
            Some(Recorded { epoch, .. }) if epoch > guard.epoch => {
                if Bug::SkipEpochCheck.is_planted() {
                    next += 1;
                } else {
                    fenced.push(guard.partition);
                }
            }
            Some(Recorded { epoch, nonce, position })
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
        return Ok(Some(Appended::Damaged(damaged)));
    }
    match (next, landed, fenced.is_empty()) {
        (_, 0, true) => Ok(None),
        // Batches are atomic: what landed in one partition landed in all of them, before any of them was taken over.
        (0, 1.., true) => Ok(Some(Appended::Durable)),
        (_, _, false) => Ok(Some(Appended::Fenced(fenced))),
        (1.., 1.., true) => {
            Err(Error::Corrupt(format!("half of a batch is recorded: {:?}", batch.guards)))
        }
    }
}

impl Damage {
    /// That rows do not fit what a batch says of them: their partitions, each with the first few of them.
    pub(in crate::store) fn of_rows(misfits: impl IntoIterator<Item = (u16, String)>) -> Vec<Self> {
        /// More of them tell nothing more.
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

    /// Why the batch with this guard can never be applied to what is recorded.
    pub(in crate::store) fn of(guard: Guard, recorded: Option<Recorded>) -> Self {
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
                acknowledged,
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
