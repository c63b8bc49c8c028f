//! Gives bad input to everything that reads input from outside.

#![expect(clippy::print_stdout, reason = "the results are for whoever called")]

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, builder::PossibleValuesParser};
use handfast_tests::fuzz::{self, Report, Target, Until};
use serde_json::json;

/// Changes valid input at random, and gives it to the coordinator's calls, the SDK's calls, stored rows, configuration and names.
///
/// Exits with 0 if nothing panicked, hung, or reported an internal error for what the caller sent.
#[derive(Debug, Parser)]
#[command(max_term_width = 120)]
struct Cli {
    /// Length of the run
    #[arg(long, default_value_t = 60)]
    seconds: u64,

    /// Seed of the first round; each further round adds one [default: random]
    #[arg(long)]
    seed: Option<u64>,

    /// Run only this target
    #[arg(long, value_parser = PossibleValuesParser::new(Target::ALL.map(Target::name)))]
    target: Option<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let seed = cli.seed.unwrap_or_else(rand::random);
    let mut targets = Target::ALL.to_vec();
    targets.retain(|target| cli.target.as_ref().is_none_or(|wanted| target.name() == wanted));
    if !cli.json {
        println!("seed {seed}");
    }
    let until = Until::Time(Instant::now() + Duration::from_secs(cli.seconds));
    let reports = fuzz::run_all(&targets, seed, until);
    if cli.json {
        let rows = reports.iter().map(|it| {
            let findings: Vec<_> = it.findings.iter().map(ToString::to_string).collect();
            json!({ "target": it.target.name(), "inputs": it.inputs, "accepted": it.accepted, "findings": findings })
        });
        let rows: Vec<_> = rows.collect();
        println!("{:#}", json!({ "seed": seed, "seconds": cli.seconds, "targets": rows }));
    } else {
        reports.iter().for_each(print);
    }
    let clean = reports.iter().all(|report| report.findings.is_empty());
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(Report { target, inputs, accepted, findings }: &Report) {
    let name = target.name();
    println!("{name:14} {inputs:9} inputs, {accepted:9} accepted, {} found", findings.len());
    for finding in findings {
        println!("    --target {name} {finding}");
    }
}
