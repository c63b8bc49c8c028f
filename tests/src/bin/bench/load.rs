//! Decides when transactions begin. A closed load keeps a fixed number of transactions in flight, from Begin to the last Confirm.
//! It begins a new one when one completes, and so shows the maximum throughput. An open load begins transactions at a fixed rate,
//! however many are still in flight. It counts latency from the scheduled beginning, and so shows what users wait for.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::TaskTracker;

use super::{
    initiator::{Hold, Initiator},
    latency::Latencies,
};

/// Limit of transactions in flight in an open load. If the limit delays a transaction, the delay counts as latency.
const UNDER_WAY_MAX: usize = 20_000;
/// Transactions per second that need the participant that may hang. They run beside the transactions that do not.
pub(crate) const HINDERED_RATE: u32 = 100;

/// Counts and latencies of a load.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) latencies: Latencies,
    /// Whether transactions that begin now are measured.
    measured: AtomicBool,
    /// Set when no further transaction may begin.
    stopped: AtomicBool,
    begun: AtomicU64,
    /// Completed transactions among those that were measured.
    completed: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

impl Tally {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            latencies: Latencies::new(),
            measured: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            begun: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            first_failure: Mutex::default(),
        })
    }

    pub(crate) fn measure(&self, measured: bool) {
        self.measured.store(measured, Ordering::Relaxed);
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// The number of failed transactions, and the first error.
    pub(crate) fn failed(&self) -> (u64, Option<String>) {
        let first = self.first_failure.lock().expect("nothing panics while it is locked").clone();
        (self.failed.load(Ordering::Relaxed), first)
    }

    /// Adds the begun and failed transactions of another load. Measured figures do not change.
    pub(crate) fn take_in(&self, other: &Self) {
        self.begun.fetch_add(other.begun(), Ordering::Relaxed);
        if let (failed @ 1.., Some(first)) = other.failed() {
            self.failure(&anyhow::anyhow!(first));
            self.failed.fetch_add(failed - 1, Ordering::Relaxed);
        }
    }

    fn failure(&self, error: &anyhow::Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first_failure.lock().expect("nothing panics while it is locked");
        first.get_or_insert_with(|| format!("{error:#}"));
    }

    /// Runs a transaction to its last Confirm.
    async fn complete(&self, initiator: &Initiator, meant: Instant, hold: Option<&Hold>) {
        let measured = self.measured.load(Ordering::Relaxed);
        self.begun.fetch_add(1, Ordering::Relaxed);
        let steps = async { initiator.decide(meant, hold).await?.completed().await };
        match steps.await {
            Ok(steps) => {
                self.completed.fetch_add(1, Ordering::Relaxed);
                if measured {
                    self.latencies.record(&steps);
                }
            }
            Err(error) => self.failure(&error),
        }
    }

    /// Runs a transaction up to its decision.
    async fn decide(&self, initiator: &Initiator, meant: Instant) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = initiator.decide(meant, None).await {
            self.failure(&error);
        }
    }
}

/// Keeps `concurrency` transactions in flight: begins the next one when one completes.
pub(crate) fn closed(
    tally: &Arc<Tally>,
    initiators: &[Initiator],
    concurrency: u32,
) -> TaskTracker {
    let tasks = TaskTracker::new();
    for initiator in initiators.iter().cycle().take(concurrency as usize) {
        let (tally, initiator) = (tally.clone(), initiator.clone());
        tasks.spawn(async move {
            while !tally.is_stopped() {
                tally.complete(&initiator, Instant::now(), None).await;
            }
        });
    }
    tasks.close();
    tasks
}

/// Begins `rate` transactions per second.
pub(crate) fn open(tally: &Arc<Tally>, initiators: &[Initiator], rate: u32) -> TaskTracker {
    let initiators = initiators.to_vec();
    at_rate(tally, rate, move |tally, n, meant| {
        let initiator = initiators[n % initiators.len()].clone();
        async move { tally.complete(&initiator, meant, None).await }
    })
}

/// Begins [`HINDERED_RATE`] transactions per second that need the participant that may hang. Does not wait for their Confirms.
pub(crate) fn hindered(tally: &Arc<Tally>, initiator: &Initiator) -> TaskTracker {
    let initiator = initiator.clone();
    at_rate(tally, HINDERED_RATE, move |tally, _, meant| {
        let initiator = initiator.clone();
        async move { tally.decide(&initiator, meant).await }
    })
}

fn at_rate<F>(
    tally: &Arc<Tally>,
    rate: u32,
    each: impl Fn(Arc<Tally>, usize, Instant) -> F + Send + 'static,
) -> TaskTracker
where
    F: Future<Output = ()> + Send + 'static,
{
    let tasks = TaskTracker::new();
    let mut moments = moments(tally, rate);
    let (begun, tally) = (tasks.clone(), tally.clone());
    tasks.spawn(async move {
        let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
        let mut n = 0;
        while let Some(meant) = moments.recv().await {
            let place = places.clone().acquire_owned().await.expect("it is never closed");
            let one = each(tally.clone(), n, meant);
            begun.spawn(async move {
                one.await;
                drop(place);
            });
            n += 1;
        }
        begun.close();
    });
    tasks
}

/// Sends the scheduled moment of each beginning. Uses a thread of its own, because tokio's timers are up to a millisecond late.
fn moments(tally: &Arc<Tally>, rate: u32) -> mpsc::UnboundedReceiver<Instant> {
    let (tell, moments) = mpsc::unbounded_channel();
    let tally = tally.clone();
    std::thread::spawn(move || {
        let began = Instant::now();
        for n in 0_u32.. {
            let meant = began + Duration::from_secs_f64(f64::from(n) / f64::from(rate));
            std::thread::sleep(meant.saturating_duration_since(Instant::now()));
            if tally.is_stopped() || tell.send(meant).is_err() {
                return;
            }
        }
    });
    moments
}

/// Begins `held` transactions, of which `at_a_time` may be in phase one at once. Each waits for `hold` before it is decided.
pub(crate) fn held(
    tally: &Arc<Tally>,
    initiators: &[Initiator],
    held: u32,
    at_a_time: usize,
    hold: &Arc<Hold>,
) -> TaskTracker {
    let tasks = TaskTracker::new();
    let (begun, tally, initiators, hold) =
        (tasks.clone(), tally.clone(), initiators.to_vec(), hold.clone());
    tasks.spawn(async move {
        for n in 0..held as usize {
            while n as u64 >= hold.held.load(Ordering::Relaxed) + at_a_time as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let (tally, initiator, hold) =
                (tally.clone(), initiators[n % initiators.len()].clone(), hold.clone());
            begun.spawn(async move {
                tally.complete(&initiator, Instant::now(), Some(&hold)).await;
                hold.let_go.add_permits(1); // the next one
            });
        }
        begun.close();
    });
    tasks
}
