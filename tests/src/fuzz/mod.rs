//! Whatever comes from outside is bad input first: requests, metadata, rows that somebody has damaged, configuration, names, addresses. Here
//! it comes by the thousand, valid and then bent, and the code that reads it is the real one. Three things count as found: a
//! panic, a call without an answer, and an answer that blames us (INTERNAL, UNKNOWN, DATA_LOSS) for what the caller sent.
//!
//! The inputs come in rounds. A round starts with nothing and a seed, and the same seed gives the same inputs: what is found names
//! the target, the seed and the input, and `--target T --seed S` runs that round first.

mod addresses;
mod configuration;
mod names;
mod participants;
mod random;
mod records;
mod requests;
mod wire;

use std::{
    cell::Cell,
    fmt,
    panic::{self, PanicHookInfo},
    sync::{Mutex, Once, PoisonError},
    thread,
    time::{Duration, Instant},
};

use self::random::Random;

/// Inputs of one round: then all that has piled up is thrown away.
const ROUND: u64 = 5_000;
/// Whoever needs longer for one input hangs. Generous: these machines are busy.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Findings that are kept. With so many there is no need for more.
const FINDINGS_MAX: usize = 20;

/// Something that reads what comes from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Calls of initiators and operators, also on streams.
    Requests,
    /// Calls to a participant, with metadata.
    Participants,
    /// The rows of a store.
    Records,
    /// The rows of a fence.
    FenceRows,
    /// Flags, environment, file.
    Configuration,
    /// Xids and branch ids.
    Names,
    /// Addresses of participants.
    Addresses,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Requests,
        Self::Participants,
        Self::Records,
        Self::FenceRows,
        Self::Configuration,
        Self::Names,
        Self::Addresses,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Participants => "participants",
            Self::Records => "records",
            Self::FenceRows => "fence-rows",
            Self::Configuration => "configuration",
            Self::Names => "names",
            Self::Addresses => "addresses",
        }
    }
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many inputs.
    Inputs(u64),
    /// Then.
    Time(Instant),
}

/// What came of one target.
#[derive(Debug, Clone)]
pub struct Report {
    /// Which.
    pub target: Target,
    /// How many inputs it was given.
    pub inputs: u64,
    /// How many of them were taken. None, or all, would mean that they are not what they should be.
    pub accepted: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Something is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Of the round.
    pub seed: u64,
    /// Which input of it.
    pub input: u64,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--seed {} (input {}): {}", self.seed, self.input, self.what)
    }
}

/// One round: where its inputs come from, and what was found.
struct Round {
    random: Random,
    target: Target,
    seed: u64,
    input: u64,
    last: u64,
    until: Until,
    accepted: u64,
    findings: Vec<Finding>,
}

impl Round {
    /// Goes on to the next input, if there is one.
    fn next(&mut self) -> bool {
        let over = matches!(self.until, Until::Time(at) if Instant::now() >= at);
        if over || self.input >= self.last || self.findings.len() >= FINDINGS_MAX {
            return false;
        }
        self.input += 1;
        CURRENT.set(Some((self.target, self.seed, self.input)));
        true
    }

    fn accepted(&mut self, accepted: bool) {
        self.accepted += u64::from(accepted);
    }

    fn found(&mut self, what: String) {
        self.findings.push(Finding { seed: self.seed, input: self.input, what });
    }

    /// Waits for `work`, but not for ever.
    async fn answered<T>(&mut self, what: &str, work: impl Future<Output = T>) -> Option<T> {
        let answered = tokio::time::timeout(ANSWER_WITHIN, work).await.ok();
        if answered.is_none() {
            self.found(format!("no answer: {what}"));
        }
        answered
    }
}

/// Gives `target` inputs, round by round, the first with this seed.
///
/// # Panics
///
/// When there is no room for a runtime.
#[must_use]
pub fn run(target: Target, seed: u64, until: Until) -> Report {
    watch_panics();
    let mut report = Report { target, inputs: 0, accepted: 0, findings: Vec::new() };
    let mut seed = seed;
    loop {
        let last = match until {
            Until::Inputs(inputs) => ROUND.min(inputs.saturating_sub(report.inputs)),
            Until::Time(at) if Instant::now() >= at => 0,
            Until::Time(_) => ROUND,
        };
        if last == 0 || report.findings.len() >= FINDINGS_MAX {
            return report;
        }
        let random = Random::new(seed);
        let (input, accepted, findings) = (0, 0, Vec::new());
        let mut round = Round { random, target, seed, input, last, until, accepted, findings };
        // One thread, so that a panic knows which input it comes from.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(play(&mut round));
        CURRENT.set(None);
        report.inputs += round.input;
        report.accepted += round.accepted;
        report.findings.append(&mut round.findings);
        let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = panics.extract_if(.., |(whose, _)| *whose == target);
        report.findings.extend(ours.map(|(_, finding)| finding));
        seed = seed.wrapping_add(1);
    }
}

async fn play(round: &mut Round) {
    match round.target {
        Target::Requests => requests::play(round).await,
        Target::Participants => participants::play(round).await,
        Target::Records => records::of_store(round).await,
        Target::FenceRows => records::of_fence(round).await,
        Target::Configuration => configuration::play(round),
        Target::Names => names::play(round),
        Target::Addresses => addresses::play(round),
    }
}

/// Gives all of these targets inputs at the same time.
///
/// # Panics
///
/// When a target itself does, outside of the code that is tested.
#[must_use]
pub fn run_all(targets: &[Target], seed: u64, until: Until) -> Vec<Report> {
    thread::scope(|scope| {
        let running: Vec<_> =
            targets.iter().map(|target| scope.spawn(move || run(*target, seed, until))).collect();
        running.into_iter().map(|run| run.join().expect("panics are caught below")).collect()
    })
}

thread_local! {
    /// The input that this thread is at.
    static CURRENT: Cell<Option<(Target, u64, u64)>> = const { Cell::new(None) };
}

static PANICS: Mutex<Vec<(Target, Finding)>> = Mutex::new(Vec::new());

/// Notes panics with the input that caused them. Where a panic ends the process, the note on stderr is all that is left of it.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if let Some((target, seed, input)) = CURRENT.get() {
                let finding = Finding { seed, input, what: format!("panic: {info}") };
                note(target, &finding);
                PANICS.lock().unwrap_or_else(PoisonError::into_inner).push((target, finding));
            }
            before(info);
        }));
    });
}

#[expect(clippy::print_stderr, reason = "the process may end before anybody else could say it")]
fn note(target: Target, finding: &Finding) {
    eprintln!("--target {} {finding}", target.name());
}
