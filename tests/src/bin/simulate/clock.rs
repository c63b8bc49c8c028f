//! Clocks of simulated machines: simulated time, and however far it was set wrong.

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

/// The clock on one machine's wall. It goes back when it is set back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wall {
    /// Milliseconds.
    wrong_by: Arc<AtomicI64>,
}

impl Wall {
    /// Sets it forward, or back.
    pub(crate) fn jump(&self, millis: i64) {
        self.wrong_by.fetch_add(millis, Ordering::Relaxed);
    }

    pub(crate) fn wrong_by(&self) -> i64 {
        self.wrong_by.load(Ordering::Relaxed)
    }
}

impl Clock for Wall {
    fn now(&self) -> Timestamp {
        // Outside of a host, when all is torn down, nobody looks.
        let elapsed = turmoil::sim_elapsed().unwrap_or_default();
        Timestamp((START + elapsed).0 + self.wrong_by())
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
