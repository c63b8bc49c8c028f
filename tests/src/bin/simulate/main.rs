//! The whole in one thread: coordinators, participants and initiators, the real ones, over a simulated network, clock and store,
//! while everything fails that can. The same seed gives the same run, to the last message.
//!
//! `simulate --seeds 200` runs seeds 0 to 199. What is checked is in `audit.rs`, `participant.rs` and `store.rs`, by the names
//! I1 to I14:
//!
//! | | |
//! |---|---|
//! | I1, I2 | no branch, and no transaction, is both confirmed and cancelled |
//! | I3 | each effect at most once; one key, one transaction |
//! | I4 | what was told confirmed or cancelled is so, for ever, and never both were told |
//! | I5 | what was reserved is confirmed or released |
//! | I6 | at rest the branches are what was decided |
//! | I7 | a durable decision never changes |
//! | I8 | no Confirm before the decision is durable |
//! | I9 | no effect of a Try after its Cancel |
//! | I10 | the participants' sums come out |
//! | I11 | what was acknowledged is there |
//! | I13, I14 | everything is resolved in time once all is well again |
//!
//! (I12, bounds of memory and queues, is not looked at here.)

mod run;
mod world;

mod coordinator;
mod initiator;
mod participant;

mod chronicle;
mod clock;
mod network;
mod store;

mod mix;
mod nemesis;

mod audit;

mod report;
mod workers;

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Result, bail};
use clap::Parser;
use handfast_proto::planted::Bug;

use crate::{report::Report, run::Outcome};

/// Seeds until a planted bug must have been found.
const BUG_SEEDS: u64 = 200;

/// Runs the whole of Handfast in a simulation, and looks whether it keeps its promises.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Plants this bug, and runs until it is found (needs `--features planted-bugs`).
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
    /// Plants one bug after another, and says how many seeds each took.
    #[arg(long, conflicts_with = "bug")]
    bugs: bool,
    /// Seeds at a time, each in a process of its own.
    #[arg(long, default_value_t = 2)]
    jobs: u64,
    /// Prints figures as JSON.
    #[arg(long)]
    json: bool,
    /// Prints everything that happens, of one seed.
    #[arg(long)]
    trace: bool,
    /// Runs every so manieth seed, here, and prints one line of JSON for each.
    #[arg(long, hide = true, value_name = "STEP")]
    worker: Option<u64>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if let Some(step) = args.worker {
        plant(args.bug.as_deref())?;
        workers::work(args.seed, args.seeds, step)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.trace {
        plant(args.bug.as_deref())?;
        let outcome = run::run(args.seed, true);
        Report::of([outcome]).print(&args)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.bugs {
        return bugs(&args);
    }
    plant(args.bug.as_deref())?; // is there such a bug?
    let outcomes = workers::run(args.seed, args.seeds, args.jobs, args.bug.as_deref())?;
    let report = Report::of(outcomes);
    report.print(&args)?;
    // A planted bug is to be found, and no other.
    let found = report.violating().next().is_some();
    Ok(if found == args.bug.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Each planted bug, one after another.
#[expect(clippy::print_stdout, reason = "this is its answer")]
fn bugs(args: &Args) -> Result<ExitCode> {
    let mut took = BTreeMap::new();
    for (name, _) in Bug::ALL {
        let outcomes = workers::run(args.seed, BUG_SEEDS.max(args.seeds), args.jobs, Some(name))?;
        let report = Report::of(outcomes);
        let found = report.violating().next();
        if let Some(Outcome { seed, .. }) = found.filter(|found| found.has_died()) {
            bail!("{name}: seed {seed} did not come to its end, which is no promise broken");
        }
        let seeds = found.map(|found| found.seed - args.seed + 1);
        took.insert(name, seeds);
        if args.json {
            continue;
        }
        match (seeds, found.and_then(|found| found.violations.first())) {
            (Some(seeds), Some(violation)) => println!(
                "{name}: found after {seeds} seeds ({}: {})",
                violation.invariant, violation.what
            ),
            _ => println!("{name}: NOT FOUND"),
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&took)?);
    }
    let all = took.values().all(Option::is_some);
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plant(bug: Option<&str>) -> Result<()> {
    let Some(name) = bug else { return Ok(()) };
    let Some((_, bug)) = Bug::ALL.into_iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = Bug::ALL.iter().map(|(name, _)| *name).collect();
        bail!("there is no bug of this name; there are {}", known.join(", "));
    };
    #[cfg(feature = "planted-bugs")]
    bug.plant();
    if !bug.is_planted() {
        bail!("this program was built without bugs: build it with `--features planted-bugs`");
    }
    Ok(())
}
