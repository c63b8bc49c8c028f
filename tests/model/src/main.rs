//! Runs the variants of the model and prints their results.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "results go to stdout, progress to stderr"
)]

use std::{process::ExitCode, thread};

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use handfast_model::{Outcome, Size, Summary, Variant, Verdict, run_all};

/// Visits every state of Handfast's protocol: with all rules, and again without each guard.
///
/// Exits with 0 if every variant with all rules is clean, and every variant without a guard is broken as expected.
#[derive(Debug, Parser)]
#[command(max_term_width = 120)]
struct Cli {
    /// Print JSON, with every story.
    #[arg(long)]
    json: bool,

    /// Also print the story of each broken variant.
    #[arg(long)]
    stories: bool,

    /// Run only the variants that take seconds and less than a gigabyte. These are the ones that the tests run.
    #[arg(long)]
    small: bool,

    /// Run only the variants whose name or model contains TEXT.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// How many variants run at a time [default: one per processor]. A large one takes up to 4 GB.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let mut variants = handfast_model::all();
    variants.retain(|variant| {
        let wanted = |text: &String| variant.name.contains(text) || variant.model.contains(text);
        (!cli.small || variant.size == Size::Small) && cli.only.as_ref().is_none_or(wanted)
    });
    let jobs = match cli.jobs {
        Some(jobs) => jobs.max(1),
        None => thread::available_parallelism()?.get(),
    };
    let outcomes = run_all(&variants, jobs, |variant, outcome| {
        let took = outcome.found.took.as_secs_f32();
        eprintln!("{took:6.1} s  {}: {}", variant.model, variant.name);
    });
    let summary = Summary::of(&variants, &outcomes);
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&summary.json(&variants, &outcomes))?);
    } else {
        println!("{}", table(&variants, &outcomes).trim_fmt());
        if cli.stories {
            print_stories(&variants, &outcomes);
        }
        println!("\n{summary}");
    }
    Ok(if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(variants: &[Variant], outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["MODEL", "RULE", "VARIANT", "STATES", "SECONDS", "RESULT"]);
    for (variant, outcome) in variants.iter().zip(outcomes) {
        table.add_row([
            variant.model.to_owned(),
            variant.rule.map(|rule| rule.to_string()).unwrap_or_default(),
            variant.name.clone(),
            outcome.found.states.to_string(),
            format!("{:.1}", outcome.found.took.as_secs_f32()),
            result(variant, outcome),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for numbers in [1, 3, 4] {
        if let Some(column) = table.column_mut(numbers) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn result(variant: &Variant, outcome: &Outcome) -> String {
    match (outcome.verdict, outcome.violation(variant)) {
        (Verdict::Clean, _) => "clean".to_owned(),
        (Verdict::Broken, Some(violation)) => {
            format!("broken in {} steps: {}", violation.story.len(), violation.property)
        }
        (Verdict::Broken | Verdict::Wrong, _) => {
            let broken: Vec<_> = outcome.found.violations.iter().map(|it| it.property).collect();
            format!("WRONG: broken {broken:?}, never reached {:?}", outcome.found.unreached)
        }
    }
}

fn print_stories(variants: &[Variant], outcomes: &[Outcome]) {
    for (variant, outcome) in variants.iter().zip(outcomes) {
        // An unexpected violation is printed too.
        let told = outcome.violation(variant).or_else(|| outcome.found.violations.first());
        if let Some(violation) = told {
            println!("\n{} ({}): {}", variant.name, variant.model, violation.property);
            for (n, step) in (1..).zip(&violation.story) {
                println!("  {n:2}. {step}");
            }
        }
    }
}
