//! What the test does to the services: it kills them, lets them die at a named place, pauses them, and starts them again, sometimes later.

use std::{os::unix::process::ExitStatusExt as _, time::Duration};

use anyhow::ensure;
use handfast_shop::store::Service;
use handfast_tests::process::Signal;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::{Instant, sleep};

use crate::{
    life::{Awaited, Life},
    tally::{SERVICE_CRASHED, SERVICE_KILLED, SERVICE_PAUSED, SERVICE_STOPPED},
    world::World,
};

/// How long a service may take to start. The database may be down for part of that time.
const START_PATIENCE: Duration = Duration::from_secs(90);
const START_PAUSE: Duration = Duration::from_millis(200);
/// How long a service runs at most until it passes its crash point.
const CRASH_WITHIN_MS: std::ops::Range<u64> = 500..2500;
/// How long a service is down or paused.
const AWAY_MS: std::ops::Range<u64> = 0..2000;
/// Pause between two acts.
const PAUSE_MS: std::ops::Range<u64> = 300..3000;
/// How long an orderly end may take.
const STOPPED_WITHIN: Duration = Duration::from_secs(2);

/// Crash points of services, and after how many passes it is worth dying there.
pub(crate) const CRASH_POINTS: [(&str, &[u32]); 6] = [
    ("fence.entered", &[1, 2, 6]),
    ("fence.before_commit", &[1, 2, 6]),
    ("fence.after_commit", &[1, 2, 6]),
    ("initiator.registered", &[1, 4]),
    ("initiator.before_decide", &[1, 4]),
    ("initiator.after_decide", &[1, 4]),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Kill,
    Crash,
    Pause,
    Stop,
}

impl Act {
    /// The kind of fault that it is for.
    fn fault(self) -> &'static str {
        match self {
            Self::Kill => SERVICE_KILLED,
            Self::Crash => SERVICE_CRASHED,
            Self::Pause => SERVICE_PAUSED,
            Self::Stop => SERVICE_STOPPED,
        }
    }
}

/// One service, and what is done to it.
pub(crate) struct Troubled<'w> {
    world: &'w World,
    service: Service,
    rng: StdRng,
    /// The process. `None`: it has ended, and must be started again.
    life: Option<Life>,
    acts: Vec<Act>,
    crash_points: Vec<(&'static str, &'static [u32])>,
}

impl<'w> Troubled<'w> {
    /// Starts the service.
    pub(crate) async fn start(
        world: &'w World,
        service: Service,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let (rng, life) = (StdRng::seed_from_u64(seed), serving(world, service, None).await?);
        let (acts, crash_points) = (Vec::new(), Vec::new());
        Ok(Self { world, service, rng, life: Some(life), acts, crash_points })
    }

    /// Breaks the service until the run is over.
    pub(crate) async fn trouble(&mut self) -> anyhow::Result<()> {
        while !self.world.tally.is_over() {
            let Some(life) = self.life.take() else {
                self.life = Some(serving(self.world, self.service, None).await?);
                continue;
            };
            self.pass_time(PAUSE_MS).await;
            self.life = match self.next_act() {
                Act::Kill => {
                    self.kill(life).await?;
                    if self.rng.random_bool(0.3) {
                        self.pass_time(AWAY_MS).await;
                    }
                    None
                }
                Act::Crash => {
                    self.crash(life).await?;
                    None
                }
                Act::Pause => {
                    life.signal(Signal::STOP);
                    self.pass_time(AWAY_MS).await;
                    life.signal(Signal::CONT);
                    self.world.tally.fault(SERVICE_PAUSED);
                    Some(life)
                }
                Act::Stop => {
                    self.stop(life).await?;
                    None
                }
            };
        }
        Ok(())
    }

    /// Restarts the service, so that it serves and has nothing in memory.
    pub(crate) async fn heal(&mut self) -> anyhow::Result<()> {
        if let Some(life) = self.life.take() {
            life.kill().await?;
        }
        self.life = Some(serving(self.world, self.service, None).await?);
        Ok(())
    }

    async fn kill(&mut self, life: Life) -> anyhow::Result<()> {
        life.kill().await?;
        self.world.tally.kill(SERVICE_KILLED);
        Ok(())
    }

    /// Lets the service die at a crash point. A process learns its crash point at its start, so it is killed and restarted first.
    async fn crash(&mut self, life: Life) -> anyhow::Result<()> {
        self.kill(life).await?;
        let (name, times) = self.next_crash_point();
        let crash = format!("{name}:{}", times[self.rng.random_range(0..times.len())]);
        let mut life = serving(self.world, self.service, Some(&crash)).await?;
        let within = Duration::from_millis(self.rng.random_range(CRASH_WITHIN_MS));
        match life.ended(within).await? {
            None => self.kill(life).await,
            Some(status) if status.signal() == Some(Signal::KILL.as_raw()) => {
                self.world.tally.crash(SERVICE_CRASHED, name);
                Ok(())
            }
            Some(status) => {
                let (service, log) = (self.service, life.log().display());
                let what = format!("{service} has ended by itself ({status}): {log}");
                self.world.tally.violation(what);
                Ok(())
            }
        }
    }

    async fn stop(&mut self, mut life: Life) -> anyhow::Result<()> {
        life.signal(Signal::TERM);
        match life.ended(STOPPED_WITHIN).await? {
            Some(_) => {
                self.world.tally.fault(SERVICE_STOPPED);
                Ok(())
            }
            None => self.kill(life).await, // it waits for its callers, and they may be paused
        }
    }

    async fn pass_time(&mut self, millis: std::ops::Range<u64>) {
        sleep(Duration::from_millis(self.rng.random_range(millis))).await;
    }

    fn next_act(&mut self) -> Act {
        if self.acts.is_empty() {
            // As long as a kind is missing, only missing kinds are dealt, so that a short run has them all.
            let each = [Act::Kill, Act::Crash, Act::Pause, Act::Stop];
            let is_missing = |act: &Act| self.world.tally.is_missing(act.fault());
            self.acts = each.into_iter().filter(is_missing).collect();
            if self.acts.is_empty() {
                self.acts.extend(each);
                self.acts.extend([Act::Crash, Act::Kill, Act::Kill]);
            }
            self.acts.shuffle(&mut self.rng);
        }
        self.acts.pop().expect("just filled")
    }

    fn next_crash_point(&mut self) -> (&'static str, &'static [u32]) {
        if self.crash_points.is_empty() {
            // Only the order service is an initiator.
            let here =
                |name: &str| self.service == Service::Order || !name.starts_with("initiator");
            self.crash_points = CRASH_POINTS.into_iter().filter(|(name, _)| here(name)).collect();
            self.crash_points.shuffle(&mut self.rng);
        }
        self.crash_points.pop().expect("just filled")
    }
}

/// Starts a service, and returns when it serves.
async fn serving(world: &World, service: Service, crash: Option<&str>) -> anyhow::Result<Life> {
    let limit = Instant::now() + START_PATIENCE;
    loop {
        let mut life = world.service(service, crash)?;
        if let Awaited::Seen(_) = life.serves(START_PATIENCE).await? {
            return Ok(life);
        }
        ensure!(Instant::now() < limit, "{service} does not serve within {START_PATIENCE:?}");
        sleep(START_PAUSE).await; // the database is away
    }
}
