//! Everything that the model knows at one moment.

use stateright::Representative;

pub(super) const PARTITIONS: usize = 2;
pub(super) const COORDINATORS: usize = 2;
/// How many batches may outlive their owner or their connection.
pub(super) const ABANDONED: usize = 3;

/// One value for each partition.
pub(super) type Each<T> = [T; PARTITIONS];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Decision {
    Confirm,
    Cancel,
}

/// A partition as it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Row {
    pub(super) epoch: u8,
    pub(super) position: u8,
    pub(super) decision: Option<Decision>,
}

/// The part of a batch for one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Part {
    pub(super) epoch: u8,
    pub(super) position: u8,
    /// `None`: the part is only a guard.
    pub(super) decision: Option<Decision>,
    /// The guard was dropped and the row is still written. Used without `FencedRowsDropped` only.
    pub(super) unguarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Progress {
    Sent,
    /// All guards have matched. The rows of all its partitions are held until COMMIT.
    Guarded,
    /// Not all guards have matched. The rows of those that have are held until the batch has looked.
    Missed(Each<bool>),
    Landed,
    Fenced(Each<bool>),
    Corrupt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Batch {
    pub(super) progress: Progress,
    pub(super) parts: Each<Option<Part>>,
}

/// A coordinator's hold on one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Seat {
    pub(super) epoch: u8,
    pub(super) position: u8,
    pub(super) memory: Option<Decision>,
    pub(super) durable: Option<Decision>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Coordinator {
    /// `None`: the process does not own the partition, or was fenced.
    pub(super) seats: Each<Option<Seat>>,
    pub(super) batch: Option<Batch>,
}

/// Everything that the model knows at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    pub(super) store: Each<Row>,
    pub(super) coordinators: [Coordinator; COORDINATORS],
    pub(super) abandoned: [Option<Batch>; ABANDONED],
    /// Whether a caller was told that it is confirmed, and that it is cancelled.
    pub(super) told: Each<[bool; 2]>,
    pub(super) changed: bool,
    pub(super) written_by_stranger: bool,
    pub(super) alarmed: bool,
    pub(super) crashes: u8,
    pub(super) takeovers: u8,
    pub(super) faults: u8,
}
impl Representative for State {
    fn representative(&self) -> Self {
        let mut sorted = self.clone();
        sorted.coordinators.sort();
        sorted
    }
}
