//! One seed: a world with its hosts, load and faults; then it comes to rest and is audited.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use turmoil::Sim;

use crate::{
    audit,
    chronicle::{DIED, Violation},
    coordinator, initiator,
    mix::Mix,
    nemesis::Nemesis,
    participant,
    world::{self, World},
};

/// After the last fault everything must be resolved within this time. The longest wait is the sum of a takeover (10 s), a dead
/// connection (15 s), a patient initiator (40 s), a clock that was 20 s ahead, and the pauses of retries and breakers (15 s and 10 s).
/// Some of these come one after another.
const RESOLVED_WITHIN: Duration = Duration::from_secs(240);
/// Then everything must stay resolved for this time, which is longer than any call that is still in flight.
const REST: Duration = Duration::from_secs(10);
/// The pause between two checks whether everything is resolved.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// turmoil counts segments, not bytes. This is more than a link can hold back while it delivers nothing.
const TCP_CAPACITY: usize = 65_536;

/// The result of a seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) simulated_millis: u64,
    /// From the last fault until everything was resolved.
    pub(crate) resolved_millis: u64,
    /// Orders that initiators placed.
    pub(crate) orders: u64,
    pub(crate) confirmed: u64,
    pub(crate) cancelled: u64,
    /// Faults, replies and other events, by kind.
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) violations: Vec<Violation>,
    /// The hash of everything that happened, in order.
    pub(crate) trace: String,
}

impl Outcome {
    /// Whether the process died before the seed was finished.
    pub(crate) fn has_died(&self) -> bool {
        self.violations.iter().any(|violation| violation.invariant == DIED)
    }
}

pub(crate) fn run(seed: u64, loud: bool) -> Outcome {
    align_task_ids();
    fastrand::seed(seed);
    let world = Arc::new(World::new(seed, Mix::of(seed), loud));
    world.chronicle.note(format_args!("{:?}", world.mix));
    let mut sim = build(&world);
    let mut nemesis = Nemesis::new(world.clone());
    while sim.elapsed() < world.mix.active && !world.chronicle.is_violated() {
        nemesis.step(&mut sim);
        step(&mut sim, &world);
    }
    world.drain();
    nemesis.heal_all(&mut sim);
    let healed_at = sim.elapsed();
    let resolved = settle(&mut sim, &world, &mut nemesis);
    let resolved_at = sim.elapsed();
    if resolved {
        while sim.elapsed() < resolved_at + REST {
            nemesis.step(&mut sim);
            step(&mut sim, &world);
        }
        audit::audit(&world);
    }
    let simulated = sim.elapsed();
    drop(sim);
    outcome(&world, simulated, resolved_at - healed_at)
}

fn build<'a>(world: &Arc<World>) -> Sim<'a> {
    let mix = &world.mix;
    let mut sim = turmoil::Builder::new()
        .rng_seed(world.seed)
        .enable_random_order()
        .simulation_duration(Duration::from_secs(24 * 3600))
        .tick_duration(mix.tick)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(mix.latency_max)
        .tcp_capacity(TCP_CAPACITY)
        .build();
    for number in 0..mix.coordinators {
        let world = world.clone();
        sim.host(world::coordinator(number), move || coordinator::run(number, world.clone()));
    }
    for account in &world.accounts {
        let (account, world) = (account.clone(), world.clone());
        sim.host(account.name.clone(), move || participant::run(account.clone(), world.clone()));
    }
    for number in 0..mix.initiators {
        let world = world.clone();
        sim.host(world::initiator(number), move || initiator::run(world.clone()));
    }
    sim
}

fn step(sim: &mut Sim<'_>, world: &World) {
    world.chronicle.now(sim.elapsed());
    world.database.advance(sim.elapsed());
    if let Err(error) = sim.step() {
        world.chronicle.violation("host", error.to_string());
    }
}

/// Waits until everything is resolved. Returns whether it was, in time and without a violation.
fn settle(sim: &mut Sim<'_>, world: &World, nemesis: &mut Nemesis) -> bool {
    // A coordinator whose clock was far ahead has recorded times that its successor waits for.
    let ahead = world.mix.ahead_max().unwrap_or_default();
    let deadline = sim.elapsed() + RESOLVED_WITHIN + ahead;
    let mut look_at = sim.elapsed();
    loop {
        if world.chronicle.is_violated() {
            return false;
        }
        if sim.elapsed() >= look_at {
            look_at = sim.elapsed() + LOOK_EVERY;
            let left = audit::unresolved(world);
            if left.is_empty() {
                return true;
            }
            if sim.elapsed() >= deadline {
                for left in left {
                    world.chronicle.violation("I13", format!("not resolved in time: {left}"));
                }
                return false;
            }
        }
        nemesis.step(sim);
        step(sim, world);
    }
}

fn outcome(world: &World, simulated: Duration, resolved: Duration) -> Outcome {
    let millis = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    let (confirmed, cancelled) = world.database.decided();
    let (counts, violations, trace) = world.chronicle.close();
    Outcome {
        seed: world.seed,
        simulated_millis: millis(simulated),
        resolved_millis: millis(resolved),
        orders: world.orders(),
        confirmed,
        cancelled,
        counts,
        violations,
        trace,
    }
}

/// tokio keeps the tasks of a runtime in several lists, by task number, and counts the numbers through the whole process. When a host is
/// killed, the order in which its tasks are dropped would depend on how many tasks ran before. So each seed begins at a round number.
fn align_task_ids() {
    const LISTS_MAX: u64 = 1024;
    let runtime =
        tokio::runtime::Builder::new_current_thread().build().expect("no resources are needed");
    runtime.block_on(async {
        loop {
            let task = tokio::spawn(async {});
            let number: u64 = task.id().to_string().parse().expect("a task's number");
            if task.await.is_err() || number.is_multiple_of(LISTS_MAX) {
                return;
            }
        }
    });
}
