//! What the test does to the coordinator: it kills it, lets it die at a named place, stops it with SIGTERM, starts a second coordinator that
//! takes over while the first one runs or is paused, and starts a standby. One coordinator serves at a time: `current`.

use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus, time::Duration};

use anyhow::ensure;
use handfast_tests::process::Signal;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::{Instant, sleep};

use crate::{
    life::{Awaited, Life},
    tally::{
        COORDINATOR_CRASHED, COORDINATOR_KILLED, COORDINATOR_STOPPED, PAUSED_AND_SECOND_REFUSED,
        PAUSED_AND_TAKEN_OVER, SECOND_REFUSED, STANDBY, TAKEN_OVER,
    },
    world::World,
};

/// How long a coordinator may take to start. The database may be down for part of that time, and the network lossy.
const START_PATIENCE: Duration = Duration::from_secs(90);
/// Pause before another attempt to start.
const START_PAUSE: Duration = Duration::from_millis(200);
/// How long a coordinator that lost its partitions may take to notice. The database may be down for part of that time.
const FENCED_WITHIN: Duration = Duration::from_secs(60);
/// How long a coordinator that must not start may take to refuse.
const REFUSED_WITHIN: Duration = Duration::from_secs(30);
/// How long an orderly end may take: longer than its grace period.
const STOPPED_WITHIN: Duration = Duration::from_secs(15);
/// How long a coordinator runs before the next act.
const LIFE_MS: std::ops::Range<u64> = 200..1800;

/// The exit code of a coordinator that lost its partitions, and the exit codes of one that cannot start.
const FENCED: i32 = 8;
const CANNOT_START: std::ops::RangeInclusive<i32> = 1..=7;

/// Crash points of the coordinator, and after how many passes it is worth dying there.
pub(crate) const CRASH_POINTS: [(&str, &[u32]); 17] = [
    ("takeover.before_commit", &[1]),
    ("takeover.after_commit", &[1]),
    ("recovery.page", &[1, 2, 5]),
    ("decision.before_durable", &[1, 3, 20]),
    ("batch.before_commit", &[1, 2, 7, 40]),
    ("batch.after_commit", &[1, 2, 7, 40]),
    ("batch.before_told", &[1, 2, 7, 40]),
    ("durable.before_reply", &[1, 4, 30]),
    ("durable.before_calls", &[1, 4, 30]),
    ("phase_one.before_call", &[1, 3, 10]),
    ("phase_one.after_call", &[1, 3, 10]),
    ("phase_two.before_call", &[1, 4, 30]),
    ("phase_two.after_call", &[1, 4, 30]),
    ("finished.before_record", &[1, 3, 20]),
    (HAND_BACK[0], &[1]),
    (HAND_BACK[1], &[1]),
    (STANDBY_TAKES_OVER, &[1]),
];
/// A coordinator passes these only when it is stopped with SIGTERM.
const HAND_BACK: [&str; 2] = ["hand_back.before_commit", "hand_back.after_commit"];
/// Only a standby passes this.
const STANDBY_TAKES_OVER: &str = "standby.takes_over";

/// What is done to the coordinator that serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Kill,
    Stop,
    /// A second coordinator is started on the same store. Meanwhile the current one may be paused.
    Second {
        paused: bool,
    },
    /// A standby is started, then the current coordinator is killed or paused.
    Standby,
}

/// See the module's comment.
pub(crate) struct Coordinators<'w> {
    world: &'w World,
    rng: StdRng,
    /// The coordinator that serves. `None`: it has ended, and the next one must be started.
    current: Option<Serving>,
    acts: Vec<Act>,
    decks: u32,
    crash_points: Vec<(&'static str, &'static [u32])>,
}

/// A coordinator process, and the crash point where it was told to die.
struct Serving {
    life: Life,
    crash: Option<String>,
}

impl<'w> Coordinators<'w> {
    /// Starts the first coordinator.
    pub(crate) async fn start(world: &'w World, seed: u64) -> anyhow::Result<Self> {
        let rng = StdRng::seed_from_u64(seed);
        let current = Some(serving(world, None).await?);
        Ok(Self { world, rng, current, acts: Vec::new(), decks: 0, crash_points: Vec::new() })
    }

    /// Breaks coordinators until the run is over.
    pub(crate) async fn trouble(&mut self) -> anyhow::Result<()> {
        while !self.world.tally.is_over() {
            let Some(mut current) = self.current.take() else {
                let crash = self.may_crash(0.7);
                self.current = Some(serving(self.world, crash).await?);
                continue;
            };
            let lives = Duration::from_millis(self.rng.random_range(LIFE_MS))
                + self.world.peace().mul_f64(self.rng.random_range(0.0..1.0));
            self.current = match current.life.ended(lives).await? {
                Some(status) => {
                    died(self.world, &current, status);
                    None
                }
                None => self.act(current).await?,
            };
        }
        Ok(())
    }

    /// Makes sure that a coordinator serves that was not told to die.
    pub(crate) async fn heal(&mut self) -> anyhow::Result<()> {
        match self.current.take() {
            Some(fine) if fine.crash.is_none() => self.current = Some(fine),
            told_to_die => {
                if let Some(Serving { life, .. }) = told_to_die {
                    life.kill().await?;
                }
                self.current = Some(serving(self.world, None).await?);
            }
        }
        Ok(())
    }

    /// Does the next act. Returns the coordinator that serves after it.
    async fn act(&mut self, current: Serving) -> anyhow::Result<Option<Serving>> {
        let hands_back = |crash: &String| HAND_BACK.iter().any(|name| crash.starts_with(name));
        let act = match &current.crash {
            Some(crash) if hands_back(crash) => Act::Stop,
            Some(_) | None => self.next_act(),
        };
        match act {
            Act::Kill => {
                current.life.kill().await?;
                self.world.tally.kill(COORDINATOR_KILLED);
                Ok(None)
            }
            Act::Stop => self.stop(current).await,
            Act::Second { paused } if self.world.databases.is_server() => {
                self.taken_over(current, paused).await
            }
            Act::Second { paused } => self.second_refused(current, paused).await,
            Act::Standby => {
                self.world.tally.calm(true);
                let next = self.standby(current).await;
                self.world.tally.calm(false);
                next
            }
        }
    }

    /// Sends SIGTERM. While the coordinator stops it may die at its crash point.
    async fn stop(&mut self, mut current: Serving) -> anyhow::Result<Option<Serving>> {
        current.life.signal(Signal::TERM);
        match current.life.ended(STOPPED_WITHIN).await? {
            Some(status) if status.success() => {
                self.world.tally.fault(COORDINATOR_STOPPED);
            }
            Some(status) => died(self.world, &current, status),
            None => {
                let log = current.life.log().display();
                self.world.tally.violation(format!("does not stop in {STOPPED_WITHIN:?}: {log}"));
            }
        }
        Ok(None)
    }

    /// A second coordinator on the same SQLite file must refuse to start.
    async fn second_refused(
        &mut self,
        current: Serving,
        paused: bool,
    ) -> anyhow::Result<Option<Serving>> {
        if paused {
            current.life.signal(Signal::STOP);
        }
        let mut second = self.world.coordinator(&["--take-over=always"], None)?;
        let refused = second.serves(REFUSED_WITHIN).await?;
        current.life.signal(Signal::CONT);
        match refused {
            Awaited::Ended(_) if paused => {
                self.world.tally.fault(PAUSED_AND_SECOND_REFUSED);
            }
            Awaited::Ended(_) => self.world.tally.fault(SECOND_REFUSED),
            Awaited::Seen(_) => {
                let log = second.log().display();
                self.world.tally.violation(format!("two coordinators have one file: {log}"));
            }
        }
        Ok(Some(current))
    }

    /// A second coordinator takes over while the current one runs or is paused. The current one must notice, and end.
    async fn taken_over(
        &mut self,
        current: Serving,
        paused: bool,
    ) -> anyhow::Result<Option<Serving>> {
        if paused {
            current.life.signal(Signal::STOP);
            if self.rng.random_bool(0.5) {
                self.world.links.coordinator.cut(); // else its callers wait, and it may answer them yet
            }
        }
        let crash = self.rng.random_bool(0.3).then(|| self.next_crash_point());
        let next = serving(self.world, crash).await?;
        if paused {
            sleep(Duration::from_millis(self.rng.random_range(0..1000))).await;
            current.life.signal(Signal::CONT);
        }
        let kind = if paused { PAUSED_AND_TAKEN_OVER } else { TAKEN_OVER };
        self.fenced(current, kind).await?;
        Ok(Some(next))
    }

    /// A coordinator that lost its partitions must end with its own exit code.
    async fn fenced(&self, mut old: Serving, kind: &str) -> anyhow::Result<()> {
        match old.life.ended(FENCED_WITHIN).await? {
            Some(status) if status.code() == Some(FENCED) => self.world.tally.fault(kind),
            Some(status) => died(self.world, &old, status),
            None => {
                let log = old.life.log().display();
                self.world.tally.violation(format!(
                    "was taken over from, and has not ended within {FENCED_WITHIN:?}: {log}"
                ));
            }
        }
        Ok(())
    }

    /// A standby takes over from a coordinator that is killed or paused.
    async fn standby(&mut self, current: Serving) -> anyhow::Result<Option<Serving>> {
        // Not the first one, so that even in a short run one serves in the end.
        let crash = (!self.world.tally.is_missing(STANDBY) && self.rng.random_bool(0.3))
            .then(|| format!("{STANDBY_TAKES_OVER}:1"));
        let mut standby = self.waiting(crash).await?;
        let zombie = self.rng.random_bool(0.5);
        let paused = if zombie {
            current.life.signal(Signal::STOP);
            Some(current)
        } else {
            current.life.kill().await?;
            self.world.tally.kill(COORDINATOR_KILLED);
            None
        };
        let began = Instant::now();
        let next = match standby.life.serves(START_PATIENCE).await? {
            Awaited::Seen(address) => {
                self.world.links.coordinator.lead_to(address);
                let mut counts = self.world.tally.counts();
                counts.standby_longest = counts.standby_longest.max(began.elapsed());
                drop(counts);
                self.world.tally.fault(STANDBY);
                Some(standby)
            }
            Awaited::Ended(status) => {
                did_not_start(self.world, &standby, status);
                None
            }
        };
        if let Some(paused) = paused {
            paused.life.signal(Signal::CONT);
            if next.is_none() {
                return Ok(Some(paused)); // nobody has taken over
            }
            self.fenced(paused, PAUSED_AND_TAKEN_OVER).await?;
        }
        Ok(next)
    }

    /// Starts a coordinator, and returns when it waits as a standby.
    async fn waiting(&self, crash: Option<String>) -> anyhow::Result<Serving> {
        let limit = Instant::now() + START_PATIENCE;
        loop {
            let mut life = self.world.coordinator(&[], crash.as_deref())?;
            let waits = "another coordinator has the store; waiting as its standby";
            match life.says(waits, START_PATIENCE).await? {
                Awaited::Seen(_) => return Ok(Serving { life, crash }),
                Awaited::Ended(_) => sleep(START_PAUSE).await, // the database is away
            }
            ensure!(Instant::now() < limit, "no standby waits within {START_PATIENCE:?}");
        }
    }

    fn next_act(&mut self) -> Act {
        if self.acts.is_empty() {
            let mut each = vec![Act::Kill, Act::Stop];
            each.extend([true, false].map(|paused| Act::Second { paused }));
            if self.world.databases.is_server() {
                each.push(Act::Standby);
            }
            // As long as a kind is missing, only missing kinds are dealt, so that a short run has them all.
            let is_missing = |act: &Act| self.world.tally.is_missing(self.fault(*act));
            self.acts = each.iter().copied().filter(is_missing).collect();
            if self.acts.is_empty() {
                let rarely = self.decks.is_multiple_of(3); // a standby takes long
                self.acts = each.into_iter().filter(|act| rarely || *act != Act::Standby).collect();
                self.acts.extend([Act::Kill; 6]);
            }
            self.acts.shuffle(&mut self.rng);
            self.decks += 1;
        }
        self.acts.pop().expect("just filled")
    }

    /// The kind of fault that an act is for.
    fn fault(&self, act: Act) -> &'static str {
        let is_server = self.world.databases.is_server();
        match act {
            Act::Kill => COORDINATOR_KILLED,
            Act::Stop => COORDINATOR_STOPPED,
            Act::Second { paused: false } if is_server => TAKEN_OVER,
            Act::Second { paused: true } if is_server => PAUSED_AND_TAKEN_OVER,
            Act::Second { paused: false } => SECOND_REFUSED,
            Act::Second { paused: true } => PAUSED_AND_SECOND_REFUSED,
            Act::Standby => STANDBY,
        }
    }

    /// The crash point of the next coordinator, or `None`. There is one with this probability, or if nothing has died at one yet.
    fn may_crash(&mut self, probability: f64) -> Option<String> {
        let crashes = self.rng.random_bool(probability);
        let crashes = crashes || self.world.tally.is_missing(COORDINATOR_CRASHED);
        crashes.then(|| self.next_crash_point())
    }

    fn next_crash_point(&mut self) -> String {
        if self.crash_points.is_empty() {
            self.crash_points =
                CRASH_POINTS.into_iter().filter(|(name, _)| *name != STANDBY_TAKES_OVER).collect();
            self.crash_points.shuffle(&mut self.rng);
        }
        let (name, times) = self.crash_points.pop().expect("just filled");
        format!("{name}:{}", times[self.rng.random_range(0..times.len())])
    }
}

/// Starts a coordinator, and returns when it serves. If it dies at its crash point first, another one is started without a crash point.
async fn serving(world: &World, mut crash: Option<String>) -> anyhow::Result<Serving> {
    let limit = Instant::now() + START_PATIENCE;
    loop {
        let life = world.coordinator(&["--take-over=always"], crash.as_deref())?;
        let mut one = Serving { life, crash };
        match one.life.serves(START_PATIENCE).await? {
            Awaited::Seen(address) => {
                world.links.coordinator.lead_to(address);
                return Ok(one);
            }
            Awaited::Ended(status) => did_not_start(world, &one, status),
        }
        sleep(START_PAUSE).await;
        ensure!(Instant::now() < limit, "no coordinator serves within {START_PATIENCE:?}");
        crash = None;
    }
}

/// Records that a coordinator ended before it served.
fn did_not_start(world: &World, one: &Serving, status: ExitStatus) {
    let refused = status.code().is_some_and(|code| CANNOT_START.contains(&code));
    if !refused {
        died(world, one, status); // else the database is away
    }
}

/// Records that a coordinator ended. That is a violation unless it was told to die there.
fn died(world: &World, one: &Serving, status: ExitStatus) {
    match &one.crash {
        Some(crash) if status.signal() == Some(Signal::KILL.as_raw()) => {
            world.tally.crash(COORDINATOR_CRASHED, crash.split(':').next().unwrap_or(crash));
        }
        Some(_) | None => {
            let log = one.life.log().display();
            world.tally.violation(format!("a coordinator has ended by itself ({status}): {log}"));
        }
    }
}
