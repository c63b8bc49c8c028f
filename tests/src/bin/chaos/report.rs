//! The result of a run, as text and as JSON.

use std::{collections::BTreeMap, io::Write as _, sync::atomic::Ordering, time::Duration};

use serde_json::json;

use crate::{Flags, load::Progress, tally::Counts, verdict::Verdict, world::World};

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Report {
    store: String,
    seconds: u64,
    seed: u64,
    counts: Counts,
    /// Kinds of faults that did not occur.
    missing: Vec<&'static str>,
    orders: u64,
    transactions: usize,
    /// What customers were told during the run: confirmed, refused, cancelled.
    told: [u64; 3],
    /// What became of orders without an answer, asked by key afterwards: confirmed, cancelled.
    resolved: [u64; 2],
    longest: Duration,
    lost: Vec<i64>,
    violations: Vec<String>,
}

impl Report {
    pub(crate) fn new(
        flags: &Flags,
        seed: u64,
        progress: &Progress,
        world: &World,
        resolved: [u64; 2],
        longest: Duration,
        verdict: Verdict,
    ) -> Self {
        let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        let told = [&progress.placed, &progress.refused, &progress.cancelled].map(count);
        let counts = world.tally.counts().clone();
        let mut violations = counts.violations.clone();
        violations.extend(verdict.violations);
        Self {
            store: flags.store.clone(),
            seconds: flags.seconds,
            seed,
            missing: world.tally.missing(&world.databases),
            counts,
            orders: told.iter().sum::<u64>() + count(&progress.unknown),
            transactions: verdict.transactions,
            told,
            resolved,
            longest,
            lost: verdict.lost,
            violations,
        }
    }

    /// Whether every promise was kept.
    pub(crate) fn is_fine(&self) -> bool {
        self.lost.is_empty() && self.violations.is_empty()
    }

    pub(crate) fn print(&self, json: bool) {
        if json {
            let _nobody_reads = writeln!(std::io::stdout(), "{}", self.to_json());
        }
        self.print_text();
    }

    fn to_json(&self) -> serde_json::Value {
        let [confirmed, refused, cancelled] = self.told;
        let [unknown_confirmed, unknown_cancelled] = self.resolved;
        json!({
            "store": self.store,
            "seconds": self.seconds,
            "seed": self.seed,
            "faults": self.counts.faults,
            "faults_missing": self.missing,
            "crash_points": self.counts.crash_points,
            "process_kills": self.counts.process_kills,
            "database_kills": self.counts.database_kills,
            "orders": self.orders,
            "transactions": self.transactions,
            "acknowledged": {"confirmed": confirmed, "refused": refused, "cancelled": cancelled},
            "unknown_resolved": {"confirmed": unknown_confirmed, "cancelled": unknown_cancelled},
            "standby_longest_seconds": seconds(self.counts.standby_longest),
            "resolved_after_heal_seconds": seconds(self.longest),
            "lost": self.lost.len(),
            "violations": self.violations,
        })
    }

    fn print_text(&self) {
        let [confirmed, refused, cancelled] = self.told;
        let [unknown_confirmed, unknown_cancelled] = self.resolved;
        let list = |counts: &BTreeMap<String, u64>| {
            for (what, n) in counts {
                tell(&format!("  {n:>6}  {what}"));
            }
        };
        tell(&format!("{} for {} s, seed {}", self.store, self.seconds, self.seed));
        tell("faults");
        list(&self.counts.faults);
        for kind in &self.missing {
            tell(&format!("       0  {kind}"));
        }
        tell("died at crash points");
        list(&self.counts.crash_points);
        tell(&format!(
            "{} kills of processes, {} of the database",
            self.counts.process_kills, self.counts.database_kills
        ));
        tell(&format!("{} orders, {} transactions recorded", self.orders, self.transactions));
        tell(&format!(
            "acknowledged: {confirmed} confirmed, {refused} refused, {cancelled} cancelled"
        ));
        tell(&format!(
            "unknown, and resolved by key: {unknown_confirmed} confirmed, {unknown_cancelled} cancelled"
        ));
        tell(&format!(
            "longest: {:.1} s until a standby served, {:.1} s until the last was resolved after everything was healed",
            seconds(self.counts.standby_longest),
            seconds(self.longest)
        ));
        for order in &self.lost {
            tell(&format!("LOST: order {order}"));
        }
        for violation in &self.violations {
            tell(&format!("VIOLATION: {violation}"));
        }
        tell(&format!("lost {}, violations {}", self.lost.len(), self.violations.len()));
    }
}

/// With one decimal.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10.0).round() / 10.0
}

/// A line for people. On stderr: stdout is for programs.
pub(crate) fn tell(line: &str) {
    let _nobody_reads = writeln!(std::io::stderr(), "{line}");
}
