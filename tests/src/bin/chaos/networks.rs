//! Faults of the network and of the database server. Connections are cut, stalled, or lose bytes; those to the database also exactly
//! around COMMIT. The database server is killed, or new connections are led to another server while old ones live on.

use std::{sync::atomic::Ordering, time::Duration};

use handfast_tests::database::Kind;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::{Instant, sleep};

use crate::{
    proxy::{Proxy, Trap, Weather},
    tally::DATABASE_SWITCHED,
    world::World,
};

/// How long a fault of a connection lasts.
const BAD_MS: std::ops::Range<u64> = 50..1500;
/// Pause between two faults.
const FAIR_MS: std::ops::Range<u64> = 100..2000;
/// How long a trap waits for a COMMIT.
const TRAP_WITHIN: Duration = Duration::from_secs(2);
/// How long an answer to COMMIT is held before the connection is cut.
const HELD_MS: std::ops::Range<u64> = 200..4000;
/// How often the database server is killed in a run, if the run is long enough.
const DATABASE_KILLS: u32 = 16;
/// Shortest and longest time from one to the next.
const DATABASE_KILL_EVERY: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(40)];
/// How often the clock is checked.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a killed database server stays down before it is started again.
const DATABASE_AWAY_MS: std::ops::Range<u64> = 0..2000;
/// How long a server of a group falls behind the others.
const BEHIND_MS: std::ops::Range<u64> = 200..2000;

/// A fault of a link.
#[derive(Debug, Clone, Copy)]
enum Act {
    Cut,
    Weather(Weather),
    Trap(Trap),
}

const WEATHERS: [Act; 4] = [
    Act::Cut,
    Act::Weather(Weather::Stall),
    Act::Weather(Weather::LoseReplies),
    Act::Weather(Weather::BlackHole),
];
const TRAPS: [Act; 3] =
    [Act::Trap(Trap::LoseCommit), Act::Trap(Trap::LoseOk), Act::Trap(Trap::HoldOk)];

/// Breaks the links between initiators, coordinator and services, one after the other, until the run is over.
pub(crate) async fn trouble_services(world: &World, seed: u64) -> anyhow::Result<()> {
    let links = &world.links;
    let links: Vec<_> = links.services.values().chain([&links.coordinator]).collect();
    trouble(world, seed, &links, "network", &WEATHERS, Duration::ZERO, || false).await;
    Ok(())
}

/// The same with the links to the database server.
pub(crate) async fn trouble_databases(world: &World, seed: u64) -> anyhow::Result<()> {
    let Some(links) = &world.links.databases else { return Ok(()) };
    let acts: Vec<_> = TRAPS.into_iter().chain(WEATHERS).collect();
    let links: Vec<_> = links.iter().collect();
    let calm = || world.tally.is_calm();
    trouble(world, seed, &links, "database link", &acts, world.peace(), calm).await;
    Ok(())
}

async fn trouble(
    world: &World,
    seed: u64,
    links: &[&Proxy],
    name: &str,
    acts: &[Act],
    peace: Duration,
    left_alone: impl Fn() -> bool,
) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut deck = Vec::new();
    while !world.tally.is_over() {
        if left_alone() {
            sleep(LOOK_EVERY).await;
            continue;
        }
        if deck.is_empty() {
            // As long as a kind is missing, only missing kinds are dealt, so that a short run has them all. Then each kind on each link.
            let missing: Vec<_> = acts
                .iter()
                .filter(|act| world.tally.is_missing(&fault(name, **act)))
                .map(|act| match act {
                    Act::Trap(_) => (links, *act), // one link may be idle
                    Act::Cut | Act::Weather(_) => {
                        (one(links, rng.random_range(0..links.len())), *act)
                    }
                })
                .collect();
            deck = if missing.is_empty() {
                (0..links.len())
                    .flat_map(|n| acts.iter().map(move |act| (one(links, n), *act)))
                    .collect()
            } else {
                missing
            };
            deck.shuffle(&mut rng);
        }
        let (on, act) = deck.pop().expect("just filled");
        if !perform(on, act, &mut rng).await {
            continue; // the trap has waited long enough
        }
        world.tally.fault(fault(name, act));
        let fair = Duration::from_millis(rng.random_range(FAIR_MS));
        sleep(fair + peace.mul_f64(rng.random_range(0.0..1.0))).await;
    }
}

fn one<'l>(links: &'l [&'l Proxy], n: usize) -> &'l [&'l Proxy] {
    &links[n..=n]
}

/// The kind of fault, as it is counted.
fn fault(name: &str, act: Act) -> String {
    let what = match act {
        Act::Cut => "cut",
        Act::Weather(Weather::Fair | Weather::Stall) => "stalled",
        Act::Weather(Weather::LoseReplies) => "replies lost",
        Act::Weather(Weather::BlackHole) => "black hole",
        Act::Trap(Trap::LoseCommit) => "COMMIT lost",
        Act::Trap(Trap::LoseOk) => "OK of COMMIT lost",
        Act::Trap(Trap::HoldOk) => "OK of COMMIT held back",
    };
    format!("{name}: {what}")
}

/// Injects the fault on these links, and ends it. Returns whether it occurred.
async fn perform(links: &[&Proxy], act: Act, rng: &mut StdRng) -> bool {
    match act {
        Act::Cut => {
            links.iter().for_each(|link| link.cut());
            true
        }
        Act::Weather(weather) => {
            links.iter().for_each(|link| link.set(weather));
            sleep(Duration::from_millis(rng.random_range(BAD_MS))).await;
            links.iter().for_each(|link| link.set(Weather::Fair));
            true
        }
        Act::Trap(trap) => {
            let armed: Vec<_> = links.iter().map(|link| (link, link.sprung())).collect();
            let sprung = || armed.iter().filter(|(link, before)| link.sprung() > *before);
            links.iter().for_each(|link| link.trap(Some(trap)));
            let limit = Instant::now() + TRAP_WITHIN;
            while sprung().count() == 0 && Instant::now() < limit {
                sleep(Duration::from_millis(5)).await;
            }
            links.iter().for_each(|link| link.trap(None));
            let sprung: Vec<_> = sprung().collect();
            if trap == Trap::HoldOk && !sprung.is_empty() {
                sleep(Duration::from_millis(rng.random_range(HELD_MS))).await;
                sprung.iter().for_each(|(link, _)| link.cut());
            }
            !sprung.is_empty()
        }
    }
}

/// Kills the database server and starts it again, until the run is over. Does nothing if the server is not ours.
pub(crate) async fn kill_databases(
    world: &World,
    length: Duration,
    seed: u64,
) -> anyhow::Result<()> {
    let Some(server) = world.databases.own_server() else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(seed);
    let [shortest, longest] = DATABASE_KILL_EVERY;
    let every = (length / DATABASE_KILLS).clamp(shortest, longest);
    let mut at = Instant::now() + every / 2;
    while !world.tally.is_over() {
        if Instant::now() < at || world.tally.is_calm() {
            sleep(LOOK_EVERY).await;
            continue;
        }
        at = Instant::now() + every.mul_f64(rng.random_range(0.6..1.2));
        server.kill();
        world.tally.database_kill();
        sleep(Duration::from_millis(rng.random_range(DATABASE_AWAY_MS))).await;
        server.start_again().await;
    }
    Ok(())
}

/// Switches from one server of the group to another, until the run is over. All connections to the old server live on, or half of them.
/// What they read there may be old. Does nothing if there is no group.
pub(crate) async fn switch_databases(world: &World, seed: u64) -> anyhow::Result<()> {
    let Some((group, current)) = world.databases.group() else { return Ok(()) };
    let (Some(links), Some(every)) = (&world.links.databases, world.switch_every) else {
        return Ok(());
    };
    let mut rng = StdRng::seed_from_u64(seed);
    let mut stands_still = None;
    let mut at = Instant::now() + every / 2;
    while !world.tally.is_over() {
        if Instant::now() < at || world.tally.is_calm() {
            sleep(LOOK_EVERY).await;
            continue;
        }
        at = Instant::now() + every.mul_f64(rng.random_range(0.6..1.4));
        let old = current.load(Ordering::Relaxed);
        let new = (old + rng.random_range(1..group.members())) % group.members();
        if let Some(member) = stands_still.take() {
            group.follow(member, old).await?;
        }
        group.switch(old, new).await?;
        current.store(new, Ordering::Relaxed);
        let [coordinator, services] = links;
        coordinator.lead_to(group.address(new));
        if group.kind() != Kind::Galera {
            services.lead_to(group.address(new)); // only one member can be written to
        }
        if rng.random_bool(0.7) {
            coordinator.cut_some();
        }
        world.tally.fault(DATABASE_SWITCHED);
        match group.kind() {
            Kind::Replication if rng.random_bool(0.5) => group.follow(old, new).await?,
            Kind::Replication => stands_still = Some(old),
            Kind::Galera | Kind::GroupReplication => {
                // A primary that stands still would only stop all work.
                let has_primary = group.kind() == Kind::GroupReplication;
                let behind = if has_primary || rng.random_bool(0.5) { old } else { new };
                let time = Duration::from_millis(rng.random_range(BEHIND_MS));
                group.fall_behind(behind, time).await?;
            }
        }
    }
    Ok(())
}

/// Ends all faults, and cuts all connections, so that nobody waits for bytes that were lost.
pub(crate) fn heal(world: &World) {
    let links = &world.links;
    for link in
        links.services.values().chain([&links.coordinator]).chain(links.databases.iter().flatten())
    {
        link.trap(None);
        link.set(Weather::Fair);
        link.cut();
    }
}
