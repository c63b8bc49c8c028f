//! What one seed meets. Each seed has a mix of its own: some faults often, some never, in some seeds none at all. If all of them
//! came all the time, most transactions would be cancelled early, and what needs a quiet moment would never happen.

use std::time::Duration;

/// What a seed decides before it begins.
#[derive(Debug, Clone)]
pub(crate) struct Mix {
    pub(crate) coordinators: usize,
    pub(crate) participants: usize,
    pub(crate) initiators: usize,
    /// Workers on each initiator: each runs one order after another.
    pub(crate) workers: usize,
    /// How long load and faults last.
    pub(crate) active: Duration,
    /// The step of the simulation: nothing crosses the network faster.
    pub(crate) tick: Duration,
    pub(crate) latency_max: Duration,
    /// Calls share streams; else each is made by itself.
    pub(crate) streams: bool,
    pub(crate) retry_initial: Duration,
    pub(crate) retry_max: Duration,
    pub(crate) call_timeout: Duration,
    /// How long the coordinators keep what is finished.
    pub(crate) retention: Duration,
    /// Shortest and longest pause of a worker between two orders.
    pub(crate) pauses: [u64; 2],
    /// Of a hundred orders, how many end badly by themselves: refused, failed, cancelled, given up.
    pub(crate) mishaps: u32,
    /// Of a hundred calls of phase two, how many fail at the participant.
    pub(crate) phase_two_failures: u32,
    /// Faults from outside, with the mean time between two of them; empty in quiet seeds.
    pub(crate) faults: Vec<Fault>,
    pub(crate) between_faults: Duration,
    pub(crate) store: StoreMix,
}

/// How the store behaves. Numbers are parts of ten thousand of its calls.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StoreMix {
    /// Milliseconds of a batch, about.
    pub(crate) millis: u64,
    /// MySQL's 1213: chosen as the victim of a deadlock, nothing done.
    pub(crate) deadlocks: u32,
    /// 1205: waited too long for a lock, nothing done.
    pub(crate) lock_waits: u32,
    /// Done, and the answer is lost.
    pub(crate) answers_lost: u32,
    /// The answer is lost first, and it is done some time later.
    pub(crate) lands_late: u32,
    /// Reads that fail.
    pub(crate) reads_fail: u32,
}

/// What happens from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    CrashCoordinator,
    StopCoordinator,
    TakeOver,
    CrashParticipant,
    CrashInitiator,
    /// A link carries nothing for a while, then everything that was held up.
    Hold,
    /// A link loses everything for a while; connections over it break.
    Partition,
    /// The same in one direction.
    PartitionOneWay,
    /// A coordinator cannot reach the store, and goes on.
    CutFromStore,
    CrashStore,
    SlowStore,
    JumpCoordinatorClock,
    JumpParticipantClock,
    Slow,
}

impl Fault {
    pub(crate) const ALL: [Self; 14] = [
        Self::CrashCoordinator,
        Self::StopCoordinator,
        Self::TakeOver,
        Self::CrashParticipant,
        Self::CrashInitiator,
        Self::Hold,
        Self::Partition,
        Self::PartitionOneWay,
        Self::CutFromStore,
        Self::CrashStore,
        Self::SlowStore,
        Self::JumpCoordinatorClock,
        Self::JumpParticipantClock,
        Self::Slow,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::CrashCoordinator => "coordinator killed",
            Self::StopCoordinator => "coordinator stopped in order",
            Self::TakeOver => "taken over at once",
            Self::CrashParticipant => "participant killed",
            Self::CrashInitiator => "initiator killed",
            Self::Hold => "link held up",
            Self::Partition => "link cut",
            Self::PartitionOneWay => "link cut one way",
            Self::CutFromStore => "coordinator cut from store",
            Self::CrashStore => "store killed",
            Self::SlowStore => "store slow",
            Self::JumpCoordinatorClock => "coordinator's clock jumped",
            Self::JumpParticipantClock => "participant's clock jumped",
            Self::Slow => "network slow",
        }
    }
}

impl Mix {
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x006d_6978);
        let rng = &mut rng;
        let quiet = rng.u32(..10) == 0;
        let often = rng.u32(1..4);
        let faults = Fault::ALL.into_iter().filter(|_| rng.u32(..4) < often);
        let faults: Vec<_> = if quiet { Vec::new() } else { faults.collect() };
        let store = StoreMix { millis: pick(rng, &[0, 3, 10, 40, 150]), ..StoreMix::default() };
        let store = if quiet {
            store
        } else {
            StoreMix {
                deadlocks: pick(rng, &[0, 0, 50, 500]),
                lock_waits: pick(rng, &[0, 0, 50, 300]),
                answers_lost: pick(rng, &[0, 0, 100, 1000]),
                lands_late: pick(rng, &[0, 0, 100, 1000]),
                reads_fail: pick(rng, &[0, 0, 100, 2000]),
                ..store
            }
        };
        Self {
            coordinators: pick(rng, &[1, 2, 2]),
            participants: rng.usize(2..=3),
            initiators: rng.usize(1..=2),
            workers: pick(rng, &[1, 3, 6]),
            active: Duration::from_secs(rng.u64(10..=30)),
            tick: Duration::from_millis(pick(rng, &[2, 5, 5, 10])),
            latency_max: Duration::from_millis(pick(rng, &[2, 10, 50, 200])),
            streams: rng.u32(..4) > 0,
            retry_initial: Duration::from_millis(pick(rng, &[50, 200, 500])),
            retry_max: Duration::from_millis(pick(rng, &[1000, 4000, 15_000])),
            call_timeout: Duration::from_millis(pick(rng, &[500, 1500, 5000])),
            retention: Duration::from_secs(pick(rng, &[5, 3600, 3600, 3600])),
            pauses: pick(rng, &[[10, 100], [50, 400], [200, 1500]]),
            mishaps: pick(rng, &[0, 15, 40]),
            phase_two_failures: if quiet { 0 } else { pick(rng, &[0, 0, 10, 50]) },
            between_faults: Duration::from_millis(pick(rng, &[300, 1000, 2500])),
            faults,
            store,
        }
    }
}

fn pick<T: Copy>(rng: &mut fastrand::Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}
