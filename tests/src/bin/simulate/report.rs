//! The printed report.

#![expect(clippy::print_stdout, reason = "this is the program's answer")]

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use serde::Serialize;

use crate::{Args, run::Outcome};

/// The sums over all seeds.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    seeds: usize,
    simulated_seconds: u64,
    orders: u64,
    confirmed: u64,
    cancelled: u64,
    /// The longest time of any seed from the last fault until everything was resolved.
    longest_to_resolve_seconds: u64,
    counts: BTreeMap<String, u64>,
    violations: usize,
    outcomes: Vec<Outcome>,
}

impl Report {
    pub(crate) fn of(outcomes: impl IntoIterator<Item = Outcome>) -> Self {
        let outcomes: Vec<_> = outcomes.into_iter().collect();
        let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
        let mut counts = BTreeMap::new();
        for (what, count) in outcomes.iter().flat_map(|outcome| &outcome.counts) {
            *counts.entry(what.clone()).or_default() += count;
        }
        let longest = outcomes.iter().map(|outcome| outcome.resolved_millis).max();
        Self {
            seeds: outcomes.len(),
            simulated_seconds: sum(|outcome| outcome.simulated_millis) / 1000,
            orders: sum(|outcome| outcome.orders),
            confirmed: sum(|outcome| outcome.confirmed),
            cancelled: sum(|outcome| outcome.cancelled),
            longest_to_resolve_seconds: longest.unwrap_or_default() / 1000,
            counts,
            violations: outcomes.iter().filter(|outcome| !outcome.violations.is_empty()).count(),
            outcomes,
        }
    }

    /// Seeds with a violation.
    pub(crate) fn violating(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| !outcome.violations.is_empty())
    }

    pub(crate) fn print(&self, args: &Args) -> Result<()> {
        if args.json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        let seconds = |seconds| humantime(Duration::from_secs(seconds));
        println!("seeds            {:>10}", self.seeds);
        println!("simulated time   {:>10}", seconds(self.simulated_seconds));
        println!("orders           {:>10}", self.orders);
        println!("confirmed        {:>10}", self.confirmed);
        println!("cancelled        {:>10}", self.cancelled);
        println!("longest to resolve {:>8}", seconds(self.longest_to_resolve_seconds));
        for (what, count) in &self.counts {
            println!("  {count:>10}  {what}");
        }
        println!("violating seeds  {:>10}", self.violations);
        for outcome in self.violating() {
            let bug = args.bug.as_ref().map(|bug| format!(" --bug {bug}")).unwrap_or_default();
            let features = if bug.is_empty() { "" } else { " --features planted-bugs" };
            println!("\nseed {}: again with", outcome.seed);
            println!(
                "  cargo run --release -p handfast-tests{features} --bin simulate -- --seeds 1 --seed {}{bug} --trace",
                outcome.seed
            );
            for violation in &outcome.violations {
                let at = Duration::from_millis(violation.at).as_secs_f64();
                println!("  {} at {at:.3} s: {}", violation.invariant, violation.what);
            }
        }
        Ok(())
    }
}

fn humantime(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600.. => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}
