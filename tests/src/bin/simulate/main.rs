//! The real coordinators, participants and initiators in one thread, over a simulated network, clock and store, while everything fails
//! that can fail. The same seed gives the same run, to the last message.
//!
//! `simulate --seeds 200` runs seeds 0 to 199. The checks are in `audit.rs`, `participant.rs`, `store/mod.rs` and `world.rs`. They name the
//! invariants I1 to I14:
//!
//! | | |
//! |---|---|
//! | I1, I2 | no branch, and no transaction, is both confirmed and cancelled |
//! | I3 | each effect at most once; one key, one transaction |
//! | I4 | an outcome that a caller was told stays true for ever |
//! | I5 | every reservation is confirmed or released |
//! | I6 | at rest every branch has the decided state |
//! | I7 | a durable decision never changes |
//! | I8 | no Confirm before the decision is durable |
//! | I9 | no effect of a Try after its Cancel |
//! | I10 | the participants' sums add up |
//! | I11 | acknowledged changes are there |
//! | I13, I14 | everything is resolved in time after the last fault |
//!
//! (I12, the bounds of memory and queues, is not checked here.)

mod run;
mod world;

mod coordinator;
mod initiator;
mod participant;

mod account;
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

/// A planted bug must be found within this many seeds.
const BUG_SEEDS: u64 = 200;

/// Runs all of Handfast in a simulation and checks its promises.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Plant this bug and run until it is found (needs `--features planted-bugs`).
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
    /// Plant one bug after another and print how many seeds it took to find each.
    #[arg(long, conflicts_with = "bug")]
    bugs: bool,
    /// How many seeds to run at a time, each in its own process.
    #[arg(long, default_value_t = 2)]
    jobs: u64,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Run one seed and print everything that happens in it.
    #[arg(long)]
    trace: bool,
    /// Run every STEPth seed in this process and print one line of JSON for each.
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
    plant(args.bug.as_deref())?; // fails if there is no such bug
    let outcomes = workers::run(args.seed, args.seeds, args.jobs, args.bug.as_deref())?;
    let report = Report::of(outcomes);
    report.print(&args)?;
    // A planted bug must be found; without one there must be no violation.
    let found = report.violating().next().is_some();
    Ok(if found == args.bug.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Plants each bug, one after another.
#[expect(clippy::print_stdout, reason = "this is its answer")]
fn bugs(args: &Args) -> Result<ExitCode> {
    let mut took = BTreeMap::new();
    for (name, _) in Bug::ALL {
        let outcomes = workers::run(args.seed, BUG_SEEDS.max(args.seeds), args.jobs, Some(name))?;
        let report = Report::of(outcomes);
        let found = report.violating().next();
        if let Some(Outcome { seed, .. }) = found.filter(|found| found.has_died()) {
            bail!("{name}: seed {seed} did not finish, which is not a broken promise");
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
        bail!("there is no such bug; the bugs are {}", known.join(", "));
    };
    #[cfg(feature = "planted-bugs")]
    bug.plant();
    if !bug.is_planted() {
        bail!("this program was built without bugs: build it with `--features planted-bugs`");
    }
    Ok(())
}
