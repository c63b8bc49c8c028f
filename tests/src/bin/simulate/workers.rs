//! Runs many seeds on several cores. Each worker is a process: a seed depends on what else happens in its process (see `run.rs`), and a
//! seed that kills its process does not end the others.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    chronicle::{DIED, Violation},
    run::{self, Outcome},
};

/// How long a seed may take in real time. Most take a quarter of a second, or up to a minute without optimization on a busy machine. A
/// seed that takes longer hangs: a task never yields, and simulated time stands still.
const SEED_TAKES_MAX: Duration = Duration::from_secs(300);

/// Runs every `step`th seed in this process.
pub(crate) fn work(first: u64, seeds: u64, step: u64) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let (done, watched) = mpsc::channel();
    std::thread::spawn(move || watch(&watched));
    for seed in (first..first + seeds).step_by(usize::try_from(step)?) {
        writeln!(out, "{}", serde_json::to_string(&run::run(seed, false))?)?;
        out.flush()?;
        done.send(())?;
    }
    Ok(())
}

/// Ends this process when a seed takes too long.
#[expect(clippy::print_stderr, reason = "no other process can say why this one ends")]
fn watch(seeds: &mpsc::Receiver<()>) {
    loop {
        match seeds.recv_timeout(SEED_TAKES_MAX) {
            Ok(()) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                eprintln!("a seed has not finished within {SEED_TAKES_MAX:?}");
                std::process::exit(1);
            }
        }
    }
}

/// Runs these seeds, `jobs` at a time. With a planted bug: until the first one finds it.
pub(crate) fn run(first: u64, seeds: u64, jobs: u64, bug: Option<&str>) -> Result<Vec<Outcome>> {
    let jobs = jobs.clamp(1, seeds.max(1));
    let (sender, outcomes) = mpsc::channel();
    let mut workers = Vec::new();
    for job in 0..jobs {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--worker".to_owned(), jobs.to_string()]);
        command.args(["--seed".to_owned(), (first + job).to_string()]);
        command.args(["--seeds".to_owned(), (seeds - job).to_string()]);
        command.args(bug.map(|bug| format!("--bug={bug}")));
        let mut worker =
            command.stdout(Stdio::piped()).spawn().context("a worker cannot be started")?;
        let lines = BufReader::new(worker.stdout.take().expect("it was asked for")).lines();
        workers.push(worker);
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut next = first + job;
            for line in lines.map_while(Result::ok) {
                if let Ok(outcome) = serde_json::from_str::<Outcome>(&line) {
                    next = outcome.seed + jobs;
                    drop(sender.send(outcome)); // the receiver may be gone
                }
            }
            if next < first + seeds {
                drop(sender.send(died(next)));
            }
        });
    }
    drop(sender);
    let outcomes = collect(first, jobs, bug.is_some(), &outcomes);
    workers.iter_mut().for_each(end);
    Ok(outcomes)
}

/// Collects the outcomes. A bug is found when one seed has found it and all earlier seeds are finished.
fn collect(
    first: u64,
    jobs: u64,
    until_found: bool,
    from: &mpsc::Receiver<Outcome>,
) -> Vec<Outcome> {
    let mut outcomes = BTreeMap::new();
    for outcome in from {
        outcomes.insert(outcome.seed, outcome);
        let found = outcomes.values().find(|outcome| !outcome.violations.is_empty());
        if let Some(found) = found.filter(|_| until_found) {
            let seed = found.seed;
            if (first..seed).all(|before| outcomes.contains_key(&before)) || jobs == 1 {
                outcomes.retain(|of, _| *of <= seed);
                break;
            }
        }
    }
    outcomes.into_values().collect()
}

fn end(worker: &mut Child) {
    drop(worker.kill()); // it may have ended already
    drop(worker.wait());
}

/// The outcome of a seed whose worker died.
fn died(seed: u64) -> Outcome {
    let what = "its process died; its output is above".to_owned();
    Outcome {
        seed,
        simulated_millis: 0,
        resolved_millis: 0,
        orders: 0,
        confirmed: 0,
        cancelled: 0,
        counts: BTreeMap::new(),
        violations: vec![Violation { invariant: DIED.to_owned(), at: 0, what }],
        trace: String::new(),
    }
}
