//! Rows of the fence do not stay for ever; and one that somebody may still ask for stays.
//!
//! A row goes when three things hold, by the clock of its own database: it is in a final state, never `tried`, or a reservation
//! would be left for ever; it has not changed for the retention time; and the end of phase one passed a margin ago, so that a
//! Try that would have found it is rejected for being late (by the same clock, so the two cannot contradict each other).

use std::{fmt, io::ErrorKind, time::Duration};

use handfast_proto::{BranchId, Xid};
use sqlx::Error;
use tokio::{task::JoinHandle, time};

use super::{
    Fence,
    db::{FenceDb, Key, Old, Overdue},
    millis,
    tx::Tx,
};

/// How long a row stays after its last change, unless [`Fence::retention`] says something else.
pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a row stays after the end of phase one at least. A database's clock may be set back by as much without harm.
pub const EXPIRY_MARGIN: Duration = Duration::from_secs(3600);

/// Rows of one local transaction: few enough that nobody waits for it.
const BATCH: u32 = 500;
/// Between two of them, so that others get their turn (SQLite has one writer at a time).
const PAUSE: Duration = Duration::from_millis(20);
/// How long one of them may take. It is repeated in the next round, so giving up costs nothing.
const BATCH_TIMEOUT: Duration = Duration::from_secs(30);

impl<DB: FenceDb> Fence<DB> {
    /// Deletes all rows that are old enough, in small batches, and tells how many they were.
    ///
    /// # Errors
    ///
    /// When the database fails or does not answer. What was deleted before stays deleted; the rest goes another time.
    ///
    /// # Cancel safety
    ///
    /// As after an error.
    pub async fn clean_up(&self) -> Result<u64, Error> {
        let mut deleted = 0;
        loop {
            let batch = time::timeout(BATCH_TIMEOUT, self.delete_batch());
            let batch =
                batch.await.unwrap_or_else(|_| Err(Error::Io(ErrorKind::TimedOut.into())))?;
            deleted += batch;
            if batch < u64::from(BATCH) {
                return Ok(deleted);
            }
            time::sleep(PAUSE).await;
        }
    }

    async fn delete_batch(&self) -> Result<u64, Error> {
        let old = Old {
            retention_millis: millis(self.retention),
            margin_millis: millis(EXPIRY_MARGIN),
            limit: i64::from(BATCH),
        };
        let mut tx = Tx::begin(&self.pool).await?;
        match DB::delete_old(&mut tx, &old).await {
            Ok(deleted) => tx.commit().await.map(|()| deleted),
            Err(error) => {
                tx.rollback().await;
                Err(error)
            }
        }
    }

    /// Some branches of this action that are still tried though phase one ended [`EXPIRY_MARGIN`] ago, the oldest first.
    pub(crate) async fn overdue(&self, action: &str) -> Result<Vec<(Xid, BranchId)>, Error> {
        let overdue =
            Overdue { action, margin_millis: millis(EXPIRY_MARGIN), limit: i64::from(BATCH) };
        let mut tx = Tx::begin(&self.pool).await?;
        let rows = DB::overdue(&mut tx, &overdue).await;
        tx.rollback().await; // nothing was changed
        Ok(rows?.iter().filter_map(|(xid, branch_id)| Key::read(xid, branch_id)).collect())
    }

    /// Cleans up in the background: one pass after each `interval` (an hour is a good one), until the guard is dropped. Several
    /// processes may do so at once.
    pub fn clean_up_every(&self, interval: Duration) -> CleanUp {
        let fence = self.clone();
        let task = tokio::spawn(async move {
            loop {
                time::sleep(interval).await;
                match fence.clean_up().await {
                    Ok(0) => {}
                    Ok(rows) => tracing::debug!(rows, "fence cleaned up"),
                    Err(error) => tracing::warn!(
                        error = %crate::error::chain(&error),
                        "fence not cleaned up; trying again after the interval"
                    ),
                }
            }
        });
        CleanUp { task }
    }
}

/// Stops the clean-up when it is dropped.
#[must_use = "the clean-up stops when this is dropped"]
pub struct CleanUp {
    task: JoinHandle<()>,
}

impl Drop for CleanUp {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for CleanUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CleanUp")
    }
}
