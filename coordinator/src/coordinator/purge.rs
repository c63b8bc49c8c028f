//! Deletes transactions when their retention is over. After that their outcome is unknown (FORGOTTEN), and their key begins another
//! transaction. So nothing is deleted if the clock may be ahead.

use std::time::Duration;

use handfast_proto::planted::Bug;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Coordinator;
use crate::transaction::Timestamp;

/// Transactions that the first step looks at, and each step of a store that is slow.
const STEP_MIN: usize = 256;
/// Transactions that one step looks at, at most. A replica carries out a step in one go, and the batches after it wait there.
const STEP_MAX: usize = 4096;
/// A step that took less time is followed by one of double the size, and one that took more by one of half the size. A loaded server
/// needs 40 ms for a step of any size, and then 10 to 20 µs for each transaction. Nobody waits for a step: what it locks is over.
const STEP_TIME: Duration = Duration::from_millis(200);
/// The pause between two steps is a quarter of the time of the step before, within these limits. So when the purge is behind, it works
/// four fifths of the time, on one connection. With long pauses the store would grow for as long as the load lasts.
const STEP_PAUSE_SHARE: u32 = 4;
const STEP_PAUSE_MIN: Duration = Duration::from_millis(5);
const STEP_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Pause between rounds through all partitions.
const ROUND_PAUSE: Duration = Duration::from_secs(5);
/// After so many steps without a failure, a size is tried that has failed.
const STEPS_AFTER_FAILURE: u32 = 8;
/// The store's clock and ours agree if they are no further apart than this.
const APART_MAX: Duration = Duration::from_secs(2);
/// Where the store has no clock of its own, ours must have run evenly for this long, or for the retention if that is shorter. A clock
/// that was set wrong is usually set right within minutes.
const EVEN_FOR: Duration = Duration::from_secs(600);
/// How far the clock may be from the time that has passed, from one look to the next, and still run evenly.
const UNEVEN_MIN: Duration = Duration::from_millis(50);
/// The same as a share of the time that has passed: one part in so many.
const UNEVEN_SHARE: u32 = 33;

impl Coordinator {
    /// Deletes transactions that finished longer than `retention` ago, a few at a time, for ever.
    pub(super) async fn purge(&self, retention: Duration) {
        let mut clock = ClockWatch::new(retention.min(EVEN_FOR));
        let mut pace = Pace::new();
        loop {
            if let Some(now) = self.believed_time(&mut clock).await {
                self.purge_round(retention, now, &mut pace).await;
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    async fn purge_round(&self, retention: Duration, now: Timestamp, pace: &mut Pace) {
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        let before = Timestamp(now.0.saturating_sub(retention));
        for ownership in self.doors.ownerships() {
            let mut after = None;
            loop {
                let began = Instant::now();
                match self.store.purge(ownership, before, now, after, pace.step).await {
                    Ok((_, None)) => break,
                    Ok((_, next)) => after = next,
                    Err(error) => {
                        warn!(%error, "cannot delete old transactions; will retry");
                        pace.failed();
                        break;
                    }
                }
                tokio::time::sleep(pace.after(began.elapsed())).await;
            }
        }
    }

    /// The present time. `None`: the clock is not trusted.
    async fn believed_time(&self, watch: &mut ClockWatch) -> Option<Timestamp> {
        let asked_at = self.clock.now();
        match self.store.clock().await {
            Ok(Some(theirs)) => {
                let now = self.clock.now();
                let agrees = theirs + APART_MAX >= asked_at && now + APART_MAX >= theirs;
                watch.tell(agrees, || {
                    let apart_ms = theirs.0 - now.0;
                    warn!(apart_ms, "the store's clock and this machine's differ; old transactions are kept until they agree");
                });
                (agrees || Bug::BelieveClock.is_planted()).then_some(now)
            }
            Ok(None) => {
                let now = self.clock.now();
                let even = watch.runs_evenly(Instant::now(), now);
                let (off, wait_seconds) = (watch.uneven_by, watch.even_for.as_secs());
                watch.tell(off.is_zero(), || {
                    let off_ms = u64::try_from(off.as_millis()).unwrap_or(u64::MAX);
                    warn!(off_ms, wait_seconds, "the clock jumped; old transactions are kept until it has run evenly for a while");
                });
                even.then_some(now)
            }
            Err(error) => {
                warn!(%error, "cannot ask the store for its time; old transactions are kept");
                None
            }
        }
    }
}

/// How fast the purge goes.
#[derive(Debug)]
struct Pace {
    /// Transactions that the next step looks at.
    step: usize,
    /// A larger step may be too large for the store.
    most: usize,
    /// Steps since the latest failure, or since `most` has grown.
    since_failure: u32,
}

impl Pace {
    fn new() -> Self {
        Self { step: STEP_MIN, most: STEP_MAX, since_failure: 0 }
    }

    /// The step may have been too large for the store, so that none of that size will ever succeed.
    fn failed(&mut self) {
        self.most = (self.step / 2).max(1);
        self.step = self.most;
        self.since_failure = 0;
    }

    /// The pause after a step that took this long. There is more to delete.
    fn after(&mut self, took: Duration) -> Duration {
        self.since_failure += 1;
        if self.since_failure >= STEPS_AFTER_FAILURE {
            self.most = (self.most * 2).min(STEP_MAX);
            self.since_failure = 0;
        }
        let step = if took < STEP_TIME { self.step * 2 } else { self.step / 2 };
        self.step = step.clamp(STEP_MIN, STEP_MAX).min(self.most);
        (took / STEP_PAUSE_SHARE).clamp(STEP_PAUSE_MIN, STEP_PAUSE_MAX)
    }
}

#[cfg(test)]
#[test]
fn a_step_that_the_store_refuses_is_followed_by_smaller_ones() {
    // Group Replication refuses local transactions with many bytes. Even few transactions can have too many.
    for fits in [1, 100, 3_000] {
        let mut pace = Pace::new();
        let (mut deleted, mut refused) = (0, 0);
        for _ in 0..100 {
            if pace.step <= fits {
                deleted += pace.step;
                pace.after(Duration::from_millis(40));
            } else {
                pace.failed();
                refused += 1;
            }
        }
        assert!(deleted >= 40 * fits / 2, "{deleted} of {fits} at a time");
        assert!(refused <= 50, "{refused} steps were refused with {fits} at a time");
        for _ in 0..20 * STEPS_AFTER_FAILURE {
            pace.after(Duration::from_millis(40));
        }
        assert_eq!(pace.step, STEP_MAX, "it stays slow when the cause is gone");
    }
}

/// Watches whether the clock goes as fast as time passes, and notes what has been logged.
#[derive(Debug)]
struct ClockWatch {
    even_for: Duration,
    /// The latest look: when it was, and what the clock said.
    looked: Option<(Instant, Timestamp)>,
    even_since: Option<Instant>,
    /// By how much the clock was off when it last was not even.
    uneven_by: Duration,
    told: bool,
}

impl ClockWatch {
    fn new(even_for: Duration) -> Self {
        Self { even_for, looked: None, even_since: None, uneven_by: Duration::ZERO, told: false }
    }

    /// Whether the clock, which says `at` now, has run evenly for long enough.
    fn runs_evenly(&mut self, now: Instant, at: Timestamp) -> bool {
        if let Some((looked, then)) = self.looked.replace((now, at)) {
            let (passed, told) = (now - looked, at - then);
            let off = passed.abs_diff(told);
            if off > UNEVEN_MIN + passed / UNEVEN_SHARE {
                (self.even_since, self.uneven_by) = (None, off);
            }
        }
        let even_for = now - *self.even_since.get_or_insert(now);
        let even = even_for >= self.even_for;
        if even {
            self.uneven_by = Duration::ZERO;
        }
        even
    }

    /// Logs once that the clock is not believed, and once that it is again.
    fn tell(&mut self, believed: bool, warning: impl FnOnce()) {
        match (believed, self.told) {
            (false, false) => warning(),
            (true, true) => info!("the clock is believed again; old transactions are deleted"),
            (false, true) | (true, false) => {}
        }
        self.told = !believed;
    }
}
