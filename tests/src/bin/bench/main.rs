//! What does the coordinator do in a second, what do initiators wait for, and what does it cost? `bench --help` says what can be
//! asked; docs/benchmarks.md how it is measured and what the figures are worth.
//!
//! Read `run.rs` for what a run is, `world.rs` for what is started, `initiator.rs` for what is timed.

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

mod latency;
mod meter;
mod plot;
mod report;

use std::process::ExitCode;

use clap::Parser as _;
use handfast_coordinator::server;

use self::{
    options::{Load, Options, PhaseTwo, Subject},
    report::Outcome,
};

/// As in the coordinator. Initiators and participants that have it too leave more of the machine to what is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let options = Options::parse();
    // As the coordinator, for the same reason.
    let runtime = server::runtime().map_err(anyhow::Error::from);
    let measured = runtime.and_then(|runtime| runtime.block_on(measure(&options)));
    match measured {
        Ok(outcomes) => {
            tell(&options, &outcomes);
            if let Some(path) = &options.plot
                && let Err(error) = std::fs::write(path, plot::svg(&outcomes))
            {
                eprintln!("bench: cannot write {}: {error}", path.display());
                return ExitCode::FAILURE;
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

/// All columns once, then all of them again: what changes on the machine meanwhile meets them all.
async fn measure(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes: Vec<_> = options.columns().into_iter().map(Outcome::new).collect();
    for n in 1..=options.runs {
        let mut before = None;
        for outcome in &mut outcomes {
            eprintln!("{n} of {}: {}", options.runs, outcome.title().replace('\n', ", "));
            let mut sample = run::run(options, &outcome.column).await?;
            for violation in &sample.violations {
                eprintln!("VIOLATION: {violation}");
            }
            let rate = sample.figures.get("completed_per_second").copied();
            let is_second = match (&outcome.column.subject, outcome.column.load) {
                (_, Load::Beside { hangs, .. }) => hangs,
                _ if options.phase_two.len() > 1 => {
                    outcome.column.phase_two == Some(PhaseTwo::Batches)
                }
                (subject, _) => options.versus.is_some() && matches!(subject, Subject::Handfast(_)),
            };
            if let (true, Some(before), Some(rate)) = (is_second, before, rate) {
                sample.figures.insert("ratio".to_owned(), rate / before);
            }
            before = rate;
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
