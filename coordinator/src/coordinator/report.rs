//! Says once a minute how things are.

use std::time::Duration;

use tracing::{info, warn};

use super::Coordinator;
use crate::{journal::Counts, store::Summary};

/// How often the status is logged.
const INTERVAL: Duration = Duration::from_secs(60);

impl Coordinator {
    /// Logs the status in intervals, for ever.
    pub(super) async fn report(&self) {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.tick().await;
        let mut before = Counts::default();
        loop {
            interval.tick().await;
            let now = self.clock.now();
            match self.store.summary(now, self.stuck_after).await {
                Ok(Summary { open, stuck, oldest }) => {
                    let counts = self.journals.counts();
                    let batches = counts.batches - before.batches;
                    let transactions = counts.transactions - before.transactions;
                    before = counts;
                    info!(
                        open,
                        stuck,
                        oldest_seconds = oldest.map_or(0, |oldest| (now - oldest).as_secs()),
                        batches,
                        transactions_per_batch = transactions.checked_div(batches).unwrap_or(0),
                        "status"
                    );
                }
                Err(error) => warn!(%error, "cannot count open transactions"),
            }
        }
    }
}
