//! The settings of one seed. Each seed has its own mix of faults: some often, some never, and a few seeds have none. If all faults came
//! all the time, most transactions would be cancelled early, and states that need a quiet moment would never be reached.

use std::time::Duration;

/// In seconds.
const DAY: u64 = 24 * 3600;
/// The retention in seeds with a clock that is far ahead. No order is repeated for so long: only a wrong clock can delete a
/// transaction too early.
const RETENTION_OF_FAR_AHEAD: Duration = Duration::from_secs(120);
/// A clock that is far ahead is ahead by the retention and up to this much.
const AHEAD_OF_RETENTION_MAX: Duration = Duration::from_secs(10);

/// The settings of one seed.
#[derive(Debug, Clone)]
pub(crate) struct Mix {
    pub(crate) coordinators: usize,
    pub(crate) participants: usize,
    pub(crate) initiators: usize,
    /// Workers on each initiator. Each places one order after another.
    pub(crate) workers: usize,
    /// How long load and faults last.
    pub(crate) active: Duration,
    /// The step of the simulation. No message crosses the network faster.
    pub(crate) tick: Duration,
    pub(crate) latency_max: Duration,
    /// Calls share streams; otherwise every call is unary.
    pub(crate) streams: bool,
    pub(crate) retry_initial: Duration,
    pub(crate) retry_max: Duration,
    pub(crate) call_timeout: Duration,
    /// How long the coordinators keep finished transactions.
    pub(crate) retention: Duration,
    /// How many of a hundred orders are recorded with their decision. None where the retention is too short for that.
    pub(crate) at_decision: u32,
    /// How long those may be open without a record.
    pub(crate) record_after: Duration,
    /// Shortest and longest pause of a worker between two orders.
    pub(crate) pauses: [u64; 2],
    /// How many of a hundred orders are refused, fail, are cancelled or given up without any fault.
    pub(crate) mishaps: u32,
    /// How many of a hundred calls of phase two fail at the participant.
    pub(crate) phase_two_failures: u32,
    /// Faults that the nemesis injects; empty in quiet seeds.
    pub(crate) faults: Vec<Fault>,
    /// The mean time between two faults.
    pub(crate) between_faults: Duration,
    pub(crate) store: StoreMix,
}

/// How the store behaves. Frequencies are per ten thousand calls.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StoreMix {
    /// About how many milliseconds a batch takes.
    pub(crate) millis: u64,
    /// MySQL's 1213: the batch was the victim of a deadlock, and nothing was done.
    pub(crate) deadlocks: u32,
    /// MySQL's 1205: the batch waited too long for a lock, and nothing was done.
    pub(crate) lock_waits: u32,
    /// The batch was done, and the reply is lost.
    pub(crate) answers_lost: u32,
    /// The connection breaks, and the batch is done some time later.
    pub(crate) lands_late: u32,
    /// Reads that fail.
    pub(crate) reads_fail: u32,
    /// Reads that a replica answers.
    pub(crate) reads_of_replica: u32,
    /// How many milliseconds the replica lags, at most; 0: there is none.
    pub(crate) replica_lag: u64,
    /// The server tells its time.
    pub(crate) has_clock: bool,
}

/// A fault that the nemesis injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    CrashCoordinator,
    StopCoordinator,
    TakeOver,
    CrashParticipant,
    CrashInitiator,
    /// A link delivers nothing for a while, and then everything that it held back.
    Hold,
    /// A link loses every message for a while, and its connections break.
    Partition,
    /// The same in one direction.
    PartitionOneWay,
    /// A coordinator cannot reach the store for a while.
    CutFromStore,
    CrashStore,
    SlowStore,
    /// A replica takes the place of the store's server, and lacks its last changes.
    FailOver,
    JumpCoordinatorClock,
    /// For a few seconds, a coordinator's clock is ahead by more than the retention.
    FarAheadClock,
    JumpParticipantClock,
    Slow,
}

impl Fault {
    /// All but `FailOver` and `FarAheadClock`, which `Mix::of` gives to some seeds.
    const ORDINARY: [Self; 14] = [
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
            Self::FailOver => "store failed over",
            Self::JumpCoordinatorClock => "coordinator's clock jumped",
            Self::FarAheadClock => "coordinator's clock far ahead",
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
        let faults = Fault::ORDINARY.into_iter().filter(|_| rng.u32(..4) < often);
        let mut faults: Vec<_> = if quiet { Vec::new() } else { faults.collect() };
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
        // These have numbers of their own, so that the seeds are otherwise what they were before.
        let replica = &mut fastrand::Rng::with_seed(seed ^ 0x7265_706c);
        let store = if quiet {
            store
        } else {
            StoreMix {
                reads_of_replica: pick(replica, &[0, 0, 1000, 5000]),
                replica_lag: pick(replica, &[200, 2000, 10_000]),
                ..store
            }
        };
        if !quiet && replica.u32(..4) == 0 {
            faults.push(Fault::FailOver);
        }
        let far_ahead = !quiet && fastrand::Rng::with_seed(seed ^ 0x6661_7261).u32(..5) == 0;
        if far_ahead {
            faults.push(Fault::FarAheadClock);
        }
        let store = StoreMix { has_clock: far_ahead, ..store };
        let mix = Self {
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
            retention: Duration::from_secs(pick(rng, &[5, DAY, DAY, DAY])),
            at_decision: 0,
            record_after: Duration::from_millis(500),
            pauses: pick(rng, &[[10, 100], [50, 400], [200, 1500]]),
            mishaps: pick(rng, &[0, 15, 40]),
            phase_two_failures: if quiet { 0 } else { pick(rng, &[0, 0, 10, 50]) },
            between_faults: Duration::from_millis(pick(rng, &[300, 1000, 2500])),
            faults,
            store,
        };
        let mix = if far_ahead { Self { retention: RETENTION_OF_FAR_AHEAD, ..mix } } else { mix };
        if mix.retention.as_secs() < DAY {
            return mix;
        }
        let recording = &mut fastrand::Rng::with_seed(seed ^ 0x7265_636f);
        let at_decision = pick(recording, &[0, 50, 50, 100]);
        let record_after = Duration::from_millis(pick(recording, &[50, 500, 5000]));
        Self { at_decision, record_after, ..mix }
    }

    /// How far a clock may be ahead in this seed.
    pub(crate) fn ahead_max(&self) -> Option<Duration> {
        let is_far = self.faults.contains(&Fault::FarAheadClock);
        is_far.then(|| self.retention + AHEAD_OF_RETENTION_MAX)
    }
}

fn pick<T: Copy>(rng: &mut fastrand::Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}
