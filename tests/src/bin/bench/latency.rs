//! Latencies of transactions, step by step.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use tokio::sync::oneshot;

/// Deadline for the last Confirm of a decided transaction.
const COMPLETION_PATIENCE: Duration = Duration::from_secs(60);
/// Longer latencies are counted as this one.
const LONGEST: Duration = Duration::from_secs(600);
/// Significant digits kept of each latency.
const DIGITS: u8 = 3;

/// When a transaction completed each step. `None`: its protocol does not have that step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    /// When the transaction was scheduled to begin. At a fixed rate, the load may have begun it later.
    pub(crate) meant: Instant,
    /// When Begin, with all its branches, was answered.
    pub(crate) begun: Option<Instant>,
    /// When the last Try was answered.
    pub(crate) tried: Option<Instant>,
    /// When the decision was answered.
    pub(crate) decided: Instant,
    /// When the participant served the last Confirm.
    pub(crate) completed: Instant,
}

/// A transaction whose decision is confirm. Some of its branches may not be confirmed yet.
#[derive(Debug)]
pub(crate) struct Decided {
    /// When the transaction was scheduled to begin.
    pub(crate) meant: Instant,
    /// When Begin was answered, and when the last Try was. `None` if the initiator cannot see that step.
    pub(crate) begun: Option<Instant>,
    pub(crate) tried: Option<Instant>,
    /// When the decision was answered.
    pub(crate) decided: Instant,
    /// Fires at the last Confirm.
    pub(crate) completion: oneshot::Receiver<()>,
}

impl Decided {
    /// Waits for the last Confirm.
    pub(crate) async fn completed(self) -> anyhow::Result<Steps> {
        let Self { meant, begun, tried, decided, completion } = self;
        let waited = tokio::time::timeout(COMPLETION_PATIENCE, completion).await;
        waited.context("confirmed, and a participant was not told")??;
        Ok(Steps { meant, begun, tried, decided, completed: Instant::now() })
    }
}

/// The latencies of many transactions.
#[derive(Debug)]
pub(crate) struct Latencies {
    by_step: Mutex<BTreeMap<&'static str, Histogram<u64>>>,
}

/// The percentiles reported for each step.
const PERCENTILES: [(&str, f64); 4] =
    [("p50", 50.0), ("p99", 99.0), ("p999", 99.9), ("max", 100.0)];

impl Latencies {
    pub(crate) fn new() -> Self {
        Self { by_step: Mutex::default() }
    }

    pub(crate) fn record(&self, steps: &Steps) {
        let Steps { meant, begun, tried, decided, completed } = *steps;
        self.record_one("whole", decided - meant);
        self.record_one("completed", completed - meant);
        if let (Some(begun), Some(tried)) = (begun, tried) {
            self.record_one("begin", begun - meant);
            self.record_one("trys", tried.saturating_duration_since(begun));
            self.record_one("decide", decided - tried);
        }
    }

    fn record_one(&self, step: &'static str, wait: Duration) {
        let micros = u64::try_from(wait.min(LONGEST).as_micros()).expect("ten minutes");
        self.steps().entry(step).or_insert_with(empty).saturating_record(micros);
    }

    /// Milliseconds by step and percentile, such as `begin_p50`.
    pub(crate) fn figures(&self) -> BTreeMap<String, f64> {
        let mut figures = BTreeMap::new();
        for (step, histogram) in &*self.steps() {
            for (name, percentile) in PERCENTILES {
                let micros = u32::try_from(histogram.value_at_percentile(percentile));
                let millis = f64::from(micros.expect("ten minutes")) / 1000.0;
                figures.insert(format!("{step}_{name}"), millis);
            }
        }
        figures
    }

    fn steps(&self) -> MutexGuard<'_, BTreeMap<&'static str, Histogram<u64>>> {
        self.by_step.lock().expect("nothing panics while it is locked")
    }
}

fn empty() -> Histogram<u64> {
    let longest = u64::try_from(LONGEST.as_micros()).expect("ten minutes");
    Histogram::new_with_max(longest, DIGITS).expect("both are sound")
}
