//! Measures the coordinator's throughput, the latencies that initiators see, and the cost. `bench --help` lists the options.
//! docs/benchmarks.md explains how it measures and how far to trust the figures.
//!
//! `run.rs` defines a run, `world.rs` starts the processes, and `initiator.rs` takes the times.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people, and its table"
)]
#![expect(clippy::cast_precision_loss, reason = "figures are told with a few digits")]

mod options;

mod run;

mod load;

mod dtm;
mod initiator;

mod goods;
mod hanging;
mod ledger;
mod participants;

mod coordinator;
mod world;

mod bars;
mod latency;
mod meter;
mod plot;
mod report;

use std::process::ExitCode;

use clap::Parser as _;
use handfast_coordinator::server;

use self::{
    options::{Load, Options, PhaseTwo, Record, Subject},
    report::Outcome,
};

/// The coordinator's allocator. Initiators and participants use it too, so that they leave more of the machine to the coordinator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let options = Options::parse();
    // The coordinator's runtime, for the same reason.
    let runtime = server::runtime().map_err(anyhow::Error::from);
    let measured = runtime.and_then(|runtime| runtime.block_on(measure(&options)));
    match measured {
        Ok(outcomes) => {
            tell(&options, &outcomes);
            let plot = options.plot.as_ref().map(|path| (path, plot::svg(&outcomes)));
            let bars = options.bars.as_ref().map(|path| (path, bars::svg(&outcomes)));
            for (path, svg) in plot.into_iter().chain(bars) {
                if let Err(error) = std::fs::write(path, svg) {
                    eprintln!("bench: cannot write {}: {error}", path.display());
                    return ExitCode::FAILURE;
                }
            }
            let violations = outcomes.iter().flat_map(Outcome::violations).count();
            ExitCode::from(u8::from(violations > 0))
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all columns once, then all of them again. A change in the machine's speed then affects every column.
async fn measure(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes: Vec<_> = options.columns().into_iter().map(Outcome::new).collect();
    for n in 1..=options.runs {
        let (mut before, mut ours) = (None, None);
        for outcome in &mut outcomes {
            eprintln!("{n} of {}: {}", options.runs, outcome.title().replace('\n', ", "));
            let mut sample = run::run(options, &outcome.column).await?;
            for violation in &sample.violations {
                eprintln!("VIOLATION: {violation}");
            }
            let rate = sample.figures.get("completed_per_second").copied();
            let is_second = match outcome.column.load {
                Load::Beside { hangs, .. } => hangs,
                Load::Closed(_) | Load::Open(_) | Load::Held(_) => {
                    let column = &outcome.column;
                    let is_decision = options.record.len() > 1 && column.record == Record::Decision;
                    let is_batches =
                        options.phase_two.len() > 1 && column.phase_two == Some(PhaseTwo::Batches);
                    is_decision || is_batches && options.record.len() == 1
                }
            };
            if let (true, Some(before), Some(rate)) = (is_second, before, rate) {
                sample.figures.insert("ratio".to_owned(), rate / before);
            }
            before = rate;
            match (&outcome.column.subject, ours, rate) {
                (Subject::Handfast(_), ..) => ours = rate,
                (Subject::Dtm { .. }, Some(ours), Some(rate)) => {
                    sample.figures.insert("ours_ratio".to_owned(), ours / rate);
                }
                (Subject::Dtm { .. }, ..) => {}
            }
            outcome.samples.push(sample);
        }
    }
    Ok(outcomes)
}

fn tell(options: &Options, outcomes: &[Outcome]) {
    if options.json {
        println!("{:#}", report::json(options, outcomes));
    } else {
        println!("{}\n", report::machine());
        print!("{}", report::table(outcomes, options.markdown));
    }
}
