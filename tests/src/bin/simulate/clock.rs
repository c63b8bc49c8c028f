//! The clocks of simulated machines: simulated time plus an error.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use handfast_coordinator::{clock::Clock, transaction::Timestamp};

/// When every simulation begins.
const START: Timestamp = Timestamp(1_700_000_000_000);

/// The true time when the simulation has run for so long.
pub(crate) fn true_time(elapsed: Duration) -> Timestamp {
    START + elapsed
}

/// The wall clock of one machine. It goes back when it is set back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wall {
    /// How far the clock is ahead, in milliseconds.
    wrong_by: Arc<AtomicI64>,
}

impl Wall {
    /// Sets the clock forward or back.
    pub(crate) fn jump(&self, millis: i64) {
        self.wrong_by.fetch_add(millis, Ordering::Relaxed);
    }

    pub(crate) fn wrong_by(&self) -> i64 {
        self.wrong_by.load(Ordering::Relaxed)
    }
}

impl Clock for Wall {
    fn now(&self) -> Timestamp {
        // Outside of a host, at the end of a simulation, the time does not matter.
        let elapsed = turmoil::sim_elapsed().unwrap_or_default();
        Timestamp(true_time(elapsed).0 + self.wrong_by())
    }

    fn sleep_until(&self, at: Timestamp) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let wall = self.clone();
        Box::pin(async move {
            while wall.now() < at {
                tokio::time::sleep((at - wall.now()).min(Duration::from_secs(1))).await;
            }
        })
    }
}
