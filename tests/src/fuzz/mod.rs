//! Feeds bad input to all code that reads from outside: requests, metadata, damaged rows, configuration, names and addresses.
//! Each input starts valid and is then mutated; the code under test is the real one. Three things are findings: a panic,
//! a call without an answer, and an answer that blames us (INTERNAL, UNKNOWN, DATA_LOSS) for the caller's mistake.
//!
//! Inputs come in rounds. A round starts with fresh state and a seed, and the same seed gives the same inputs.
//! A finding names its target, seed and input. `--target T --seed S` runs that round first.

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

/// Inputs per round. The state built up by a round is discarded at its end.
const ROUND: u64 = 5_000;
/// An input that takes longer than this counts as hung. The limit is generous because test machines are busy.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Findings kept per target. More would not help.
const FINDINGS_MAX: usize = 20;

/// Code under test that reads input from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Calls by initiators and operators, including calls on streams.
    Requests,
    /// Calls to a participant, with metadata.
    Participants,
    /// Damaged rows in a coordinator's store.
    Records,
    /// Damaged rows in a participant's fence.
    FenceRows,
    /// Configuration from flags, environment and file.
    Configuration,
    /// Xids and branch ids.
    Names,
    /// Addresses of participants.
    Addresses,
}

impl Target {
    /// All targets.
    pub const ALL: [Self; 7] = [
        Self::Requests,
        Self::Participants,
        Self::Records,
        Self::FenceRows,
        Self::Configuration,
        Self::Names,
        Self::Addresses,
    ];

    /// The target's name on the command line.
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
    /// Stop after this many inputs.
    Inputs(u64),
    /// Stop at this moment.
    Time(Instant),
}

/// The result of fuzzing one target.
#[derive(Debug, Clone)]
pub struct Report {
    /// The target that was fuzzed.
    pub target: Target,
    /// Number of inputs tried.
    pub inputs: u64,
    /// Number of inputs accepted. If it is zero or all of them, the inputs are badly chosen.
    pub accepted: u64,
    /// The faults found.
    pub findings: Vec<Finding>,
}

/// A fault, and the input that shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Seed of the round.
    pub seed: u64,
    /// Number of the input in its round.
    pub input: u64,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--seed {} (input {}): {}", self.seed, self.input, self.what)
    }
}

/// One round: the source of its inputs, and its findings.
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
    /// Moves on to the next input. Returns false when the round is over.
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

    /// Waits for `work`, but not longer than [`ANSWER_WITHIN`].
    async fn answered<T>(&mut self, what: &str, work: impl Future<Output = T>) -> Option<T> {
        let answered = tokio::time::timeout(ANSWER_WITHIN, work).await.ok();
        if answered.is_none() {
            self.found(format!("no answer: {what}"));
        }
        answered
    }
}

/// Fuzzes `target` round by round. `seed` is the seed of the first round.
///
/// # Panics
///
/// If no tokio runtime can be built.
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
        // A single thread, so that a panic can be traced to its input.
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

/// Fuzzes all of these targets at the same time.
///
/// # Panics
///
/// If the harness of a target panics, rather than the code under test.
#[must_use]
pub fn run_all(targets: &[Target], seed: u64, until: Until) -> Vec<Report> {
    thread::scope(|scope| {
        let running: Vec<_> =
            targets.iter().map(|target| scope.spawn(move || run(*target, seed, until))).collect();
        running.into_iter().map(|run| run.join().expect("panics are caught below")).collect()
    })
}

thread_local! {
    /// The target, seed and input number that this thread is running.
    static CURRENT: Cell<Option<(Target, u64, u64)>> = const { Cell::new(None) };
}

static PANICS: Mutex<Vec<(Target, Finding)>> = Mutex::new(Vec::new());

/// Records each panic with its input. If the panic ends the process, only the line on stderr remains.
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
