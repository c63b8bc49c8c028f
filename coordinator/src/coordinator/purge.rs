//! Deletes transactions when their retention is over.

use std::time::Duration;

use tracing::warn;

use super::Coordinator;
use crate::transaction::Timestamp;

/// Transactions that one step looks at: few, so that a step holds nobody up.
const STEP: usize = 256;
/// Pause between steps.
const STEP_PAUSE: Duration = Duration::from_millis(20);
/// Pause between rounds through all partitions.
const ROUND_PAUSE: Duration = Duration::from_secs(5);

impl Coordinator {
    /// Deletes transactions that finished longer than `retention` ago, a few at a time, for ever.
    pub(super) async fn purge(&self, retention: Duration) {
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        loop {
            for ownership in self.doors.ownerships() {
                let mut after = None;
                loop {
                    let before = Timestamp(self.clock.now().0 - retention);
                    match self.store.purge(ownership, before, after, STEP).await {
                        Ok((_, None)) => break,
                        Ok((_, next)) => after = next,
                        Err(error) => {
                            warn!(%error, "cannot delete old transactions; will retry");
                            break;
                        }
                    }
                    tokio::time::sleep(STEP_PAUSE).await;
                }
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }
}
