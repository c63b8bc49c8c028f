//! What happened in one simulation: a trace that is the same whenever the seed runs, counts for people, and every broken promise.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// How many violations of a seed are kept. The first ones are enough.
const VIOLATIONS_MAX: usize = 20;

/// Stands in place of an invariant: the process of the seed died, or took too long.
pub(crate) const DIED: &str = "process";

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Violation {
    /// I1 to I14, or [`DIED`].
    pub(crate) invariant: String,
    /// Simulated milliseconds since the start.
    pub(crate) at: u64,
    pub(crate) what: String,
}

#[derive(Default)]
pub(crate) struct Chronicle {
    inner: Mutex<Inner>,
    /// Whether the trace is printed.
    loud: bool,
}

#[derive(Default)]
struct Inner {
    now: Duration,
    /// It has no random key, so it is the same in every process.
    hash: DefaultHasher,
    counts: BTreeMap<String, u64>,
    violations: Vec<Violation>,
}

impl Chronicle {
    pub(crate) fn new(loud: bool) -> Self {
        Self { inner: Mutex::default(), loud }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it is locked")
    }

    /// Sets the simulated time.
    pub(crate) fn now(&self, now: Duration) {
        self.inner().now = now;
    }

    /// Adds a line to the trace.
    #[expect(clippy::print_stdout, reason = "a person who replays a seed reads it")]
    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let mut inner = self.inner();
        let line = format!("{:>9.3} {what}", inner.now.as_secs_f64());
        line.hash(&mut inner.hash);
        drop(inner);
        if self.loud {
            println!("{line}");
        }
    }

    pub(crate) fn count(&self, what: &str) {
        self.note(format_args!("count {what}"));
        *self.inner().counts.entry(what.to_owned()).or_default() += 1;
    }

    pub(crate) fn violation(&self, invariant: &str, what: String) {
        self.note(format_args!("VIOLATION {invariant} {what}"));
        let mut inner = self.inner();
        let at = u64::try_from(inner.now.as_millis()).unwrap_or(u64::MAX);
        if inner.violations.len() < VIOLATIONS_MAX {
            inner.violations.push(Violation { invariant: invariant.to_owned(), at, what });
        }
    }

    pub(crate) fn is_violated(&self) -> bool {
        !self.inner().violations.is_empty()
    }

    /// Returns the counts, the violations, and the hash of the trace.
    pub(crate) fn close(&self) -> (BTreeMap<String, u64>, Vec<Violation>, String) {
        let inner = self.inner();
        let hash = format!("{:016x}", inner.hash.finish());
        (inner.counts.clone(), inner.violations.clone(), hash)
    }
}
