//! Injects faults into hosts, links, clocks and the store, and ends them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use turmoil::Sim;

use crate::{
    mix::Fault,
    world::{World, coordinator, initiator, participant},
};

/// How far coordinators' clocks may be wrong.
const COORDINATOR_WRONG_MAX: i64 = 20_000;
/// Forward by more than it takes until a reservation is overdue, and later back, by as much as is harmless.
const OVERDUE_JUMP: [i64; 2] = [61 * 60 * 1000, -60 * 60 * 1000];

/// A heartbeat every 2 s finds a loss. Failures of the store, which go on, may hold it up.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);

pub(crate) struct Nemesis {
    world: Arc<World>,
    rng: fastrand::Rng,
    next_at: Duration,
    /// The faults that are active, by the time when they end.
    heals: BTreeMap<(Duration, u64), Heal>,
    serial: u64,
    /// Changes were lost, and their owner is to notice it by then: until it does there are no other faults.
    unnoticed_until: Option<Duration>,
    /// Links with a fault. A link has one fault at a time.
    ill: BTreeSet<(String, String)>,
}

enum Heal {
    Start(String),
    Release(String, String),
    Repair(String, String),
    Store(usize),
    StoreSpeed,
    NetworkSpeed,
    CoordinatorClock(usize),
    ParticipantClock(usize, i64),
}

impl Nemesis {
    pub(crate) fn new(world: Arc<World>) -> Self {
        let rng = fastrand::Rng::with_seed(world.seed ^ 0x6e65_6d65);
        Self {
            next_at: Duration::from_millis(500),
            heals: BTreeMap::new(),
            serial: 0,
            unnoticed_until: None,
            ill: BTreeSet::new(),
            world,
            rng,
        }
    }

    /// Ends and begins the faults that are due.
    pub(crate) fn step(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        self.bury(sim);
        while let Some(first) = self.heals.first_entry().filter(|first| first.key().0 <= now) {
            let heal = first.remove();
            self.heal(sim, heal);
        }
        if self.is_unnoticed(now) {
            return;
        }
        if now >= self.next_at && !self.world.mix.faults.is_empty() {
            let mean = u64::try_from(self.world.mix.between_faults.as_millis()).unwrap_or(1000);
            self.next_at = now + Duration::from_millis(self.rng.u64(mean / 4..mean * 2));
            let fault = *self.rng.choice(&self.world.mix.faults).expect("it is not empty");
            if self.strike(sim, fault) {
                self.world.chronicle.count(fault.name());
            }
        }
    }

    /// Whether the owners have not yet noticed that changes are lost. They end when they do.
    fn is_unnoticed(&mut self, now: Duration) -> bool {
        let unnoticed = self.unnoticed_until.is_some_and(|until| now < until);
        if !unnoticed || !self.world.database.has_living_owners() {
            self.unnoticed_until = None;
        }
        self.unnoticed_until.is_some()
    }

    /// Ends all faults.
    pub(crate) fn heal_all(&mut self, sim: &mut Sim<'_>) {
        self.bury(sim);
        while let Some((_, heal)) = self.heals.pop_first() {
            self.heal(sim, heal);
        }
        self.world.database.behave();
        self.next_at = Duration::MAX;
    }

    /// Restarts the coordinators that ended by themselves, after a pause.
    fn bury(&mut self, sim: &mut Sim<'_>) {
        for number in self.world.take_exits() {
            sim.crash(coordinator(number));
            self.start_later(sim, coordinator(number));
        }
    }

    fn start_later(&mut self, sim: &Sim<'_>, host: String) {
        let pause = self.rng.u64(20..3000);
        self.later(sim, pause, Heal::Start(host));
    }

    fn later(&mut self, sim: &Sim<'_>, millis: u64, heal: Heal) {
        self.serial += 1;
        self.heals.insert((sim.elapsed() + Duration::from_millis(millis), self.serial), heal);
    }

    fn strike(&mut self, sim: &mut Sim<'_>, fault: Fault) -> bool {
        let world = self.world.clone();
        let mix = &world.mix;
        let (a_coordinator, a_participant, an_initiator) = (
            self.rng.usize(..mix.coordinators),
            self.rng.usize(..mix.participants),
            self.rng.usize(..mix.initiators),
        );
        match fault {
            Fault::CrashCoordinator => self.crash(sim, coordinator(a_coordinator)),
            Fault::CrashParticipant => self.crash(sim, participant(a_participant)),
            Fault::CrashInitiator => self.crash(sim, initiator(an_initiator)),
            Fault::StopCoordinator => {
                world.coordinators[a_coordinator].stop.notify_waiters();
                true
            }
            Fault::TakeOver => {
                let host = coordinator(a_coordinator);
                if !sim.is_host_running(host.as_str()) {
                    return false;
                }
                world.coordinators[a_coordinator].take_over.store(true, Ordering::Relaxed);
                sim.crash(host.as_str());
                sim.bounce(host.as_str());
                true
            }
            Fault::Hold | Fault::Partition | Fault::PartitionOneWay => self.part(sim, fault),
            Fault::CutFromStore => {
                world.database.cut(a_coordinator);
                let lasts = self.rng.u64(200..15_000);
                self.later(sim, lasts, Heal::Store(a_coordinator));
                true
            }
            Fault::CrashStore => {
                let down = self.rng.u64(50..5000);
                world.database.crash(Duration::from_millis(down));
                true
            }
            Fault::SlowStore => {
                world.database.slow_down(self.rng.u64(3..60));
                let lasts = self.rng.u64(200..6000);
                self.later(sim, lasts, Heal::StoreSpeed);
                true
            }
            Fault::FailOver => match world.database.fail_over() {
                None => false,
                Some(lossy) => {
                    if lossy {
                        world.chronicle.count("store: batches lost");
                        self.unnoticed_until = Some(sim.elapsed() + NOTICED_WITHIN);
                    }
                    true
                }
            },
            Fault::JumpCoordinatorClock => {
                let far = [100, 2000, COORDINATOR_WRONG_MAX][self.rng.usize(..3)];
                let wall = &world.coordinators[a_coordinator].wall;
                if wall.wrong_by() > COORDINATOR_WRONG_MAX {
                    return false;
                }
                let jump = self.rng.i64(-far..=far);
                let bounded = (wall.wrong_by() + jump)
                    .clamp(-COORDINATOR_WRONG_MAX, COORDINATOR_WRONG_MAX)
                    - wall.wrong_by();
                wall.jump(bounded);
                true
            }
            Fault::FarAheadClock => {
                let wall = &world.coordinators[a_coordinator].wall;
                if wall.wrong_by() > COORDINATOR_WRONG_MAX {
                    return false;
                }
                let millis = |length: Duration| i64::try_from(length.as_millis()).unwrap_or(0);
                let max = millis(mix.ahead_max().unwrap_or_default());
                let ahead = self.rng.i64(millis(mix.retention) + 1000..max);
                wall.jump(ahead - wall.wrong_by());
                let lasts = self.rng.u64(6000..10_000); // more than the pause between two purges
                self.later(sim, lasts, Heal::CoordinatorClock(a_coordinator));
                true
            }
            Fault::JumpParticipantClock => {
                let wall = &world.participant_walls[a_participant];
                if wall.wrong_by() > 10_000 {
                    return false;
                }
                if sim.elapsed() > mix.active.mul_f64(0.7) && self.rng.bool() {
                    wall.jump(OVERDUE_JUMP[0]);
                    let lasts = self.rng.u64(3000..8000);
                    self.later(sim, lasts, Heal::ParticipantClock(a_participant, OVERDUE_JUMP[1]));
                } else {
                    let back = self.rng.i64(-3000..3000) - wall.wrong_by();
                    wall.jump(back);
                }
                true
            }
            Fault::Slow => {
                sim.set_max_message_latency(mix.latency_max * 8);
                let lasts = self.rng.u64(500..5000);
                self.later(sim, lasts, Heal::NetworkSpeed);
                true
            }
        }
    }

    fn crash(&mut self, sim: &mut Sim<'_>, host: String) -> bool {
        if !sim.is_host_running(host.as_str()) {
            return false;
        }
        sim.crash(host.as_str());
        self.start_later(sim, host);
        true
    }

    /// Injects a fault into one link.
    fn part(&mut self, sim: &mut Sim<'_>, fault: Fault) -> bool {
        let mix = &self.world.mix;
        let c = coordinator(self.rng.usize(..mix.coordinators));
        let p = participant(self.rng.usize(..mix.participants));
        let i = initiator(self.rng.usize(..mix.initiators));
        let (a, b) = match self.rng.u32(..3) {
            0 => (c, p),
            1 => (i, c),
            _ => (i, p),
        };
        if !self.ill.insert((a.clone(), b.clone())) {
            return false;
        }
        let (one, other) = (a.as_str(), b.as_str());
        let heal = if fault == Fault::Hold {
            sim.hold(one, other);
            Heal::Release(a, b)
        } else if fault == Fault::Partition {
            sim.partition(one, other);
            Heal::Repair(a, b)
        } else {
            let (from, to) = if self.rng.bool() { (one, other) } else { (other, one) };
            sim.partition_oneway(from, to);
            Heal::Repair(a, b)
        };
        let lasts = self.rng.u64(100..8000);
        self.later(sim, lasts, heal);
        true
    }

    fn heal(&mut self, sim: &mut Sim<'_>, heal: Heal) {
        match heal {
            Heal::Start(host) => {
                if !sim.is_host_running(host.as_str()) {
                    sim.bounce(host);
                }
            }
            Heal::Release(a, b) => {
                sim.release(a.as_str(), b.as_str());
                self.ill.remove(&(a, b));
            }
            Heal::Repair(a, b) => {
                sim.repair(a.as_str(), b.as_str());
                self.world.network.reset(sim.lookup(a.as_str()), sim.lookup(b.as_str()));
                self.ill.remove(&(a, b));
            }
            Heal::Store(coordinator) => self.world.database.heal(coordinator),
            Heal::StoreSpeed => self.world.database.slow_down(1),
            Heal::NetworkSpeed => sim.set_max_message_latency(self.world.mix.latency_max),
            Heal::CoordinatorClock(coordinator) => {
                let wall = &self.world.coordinators[coordinator].wall;
                wall.jump(-wall.wrong_by());
            }
            Heal::ParticipantClock(participant, millis) => {
                self.world.participant_walls[participant].jump(millis);
            }
        }
    }
}
