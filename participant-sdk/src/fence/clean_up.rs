//! Deletes fence rows that no call can need any more.
//!
//! A row is deleted when three conditions hold, by the clock of its own database:
//!
//! 1. It is in a final state. A `tried` row stays; without it, its reservation would stay for ever.
//! 2. It has not changed for the retention time.
//! 3. Phase one ended at least the margin ago. A Try that arrives after the deletion is therefore rejected as expired. The same
//!    clock decides both, so they cannot contradict each other.

use std::{fmt, io::ErrorKind, sync::Arc, time::Duration};

use handfast_proto::{BranchId, Xid};
use sqlx::Error;
use tokio::{task::JoinHandle, time};

use super::{
    Fence,
    db::{FenceDb, Key, Old, Overdue, OverdueKey, OverdueRow},
    millis,
    tx::Tx,
};

/// How long a row stays after its last change, unless [`Fence::retention`] sets another time.
pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a row stays at least after the end of phase one. The database's clock may be set back by this much without harm.
pub const EXPIRY_MARGIN: Duration = Duration::from_secs(3600);

/// Rows per local transaction: few, so that other work does not wait for the locks.
const BATCH: u32 = 500;
/// Pause between two local transactions, so that other writers get their turn (SQLite has one writer at a time).
const PAUSE: Duration = Duration::from_millis(20);
/// How long one local transaction may take. The next pass retries, so giving up costs nothing.
const BATCH_TIMEOUT: Duration = Duration::from_secs(30);

impl<DB: FenceDb> Fence<DB> {
    /// Deletes all rows that are old enough, in small batches, and returns how many were deleted.
    ///
    /// # Errors
    ///
    /// When the database fails or does not respond. Rows that were deleted stay deleted; the next pass deletes the rest.
    ///
    /// # Cancel safety
    ///
    /// The same as after an error.
    pub async fn clean_up(&self) -> Result<u64, Error> {
        let mut deleted = 0;
        loop {
            let batch = in_time(self.delete_batch()).await?;
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
                tx.rollback_after(&error).await;
                Err(error)
            }
        }
    }

    /// The branches of this action among the next ones, after `after`, that are still tried although phase one ended [`EXPIRY_MARGIN`]
    /// ago.
    pub(crate) async fn overdue(
        &self,
        action: &str,
        after: &OverdueKey,
    ) -> Result<OverduePage, Error> {
        // The action is not a condition of the query. Otherwise one page could read the rows of all other actions.
        let (rows, next) = in_time(self.read_overdue(EXPIRY_MARGIN, after)).await?;
        let of_action = rows.iter().filter(|row| row.action == action);
        let branches = of_action.filter_map(|row| Key::read(&row.key.xid, &row.key.branch_id));
        Ok(OverduePage { branches: branches.collect(), next })
    }

    /// The branches of all actions among the next ones, after `after`, that ask and are still tried although phase one has ended.
    pub(crate) async fn expired(&self, after: &OverdueKey) -> Result<ExpiredPage, Error> {
        let (rows, next) = in_time(self.read_overdue(Duration::ZERO, after)).await?;
        let asking = rows.into_iter().filter(|row| row.asks == Some(1));
        let branches = asking.filter_map(|OverdueRow { key, action, .. }| {
            let (xid, branch_id) = Key::read(&key.xid, &key.branch_id)?;
            Some((xid, branch_id, action))
        });
        Ok(ExpiredPage { branches: branches.collect(), next })
    }

    /// The branches of a transaction that are tried and ask, each with its action, whether phase one has ended or not.
    pub(crate) async fn asking(&self, xid: Xid) -> Result<Vec<(BranchId, String)>, Error> {
        let asking = async {
            let mut tx = Tx::begin_reading(&self.pool).await?;
            let rows = DB::asking(&mut tx, &xid.to_bytes()).await;
            drop(tx.rollback().await); // nothing was changed
            rows
        };
        let rows = in_time(asking).await?.into_iter();
        let branch = |(branch_id, action): (Vec<u8>, String)| {
            Some((Key::read(&xid.to_bytes(), &branch_id)?.1, action))
        };
        Ok(rows.filter_map(branch).collect())
    }

    /// The next rows after `after`, and the place after which the next page begins.
    async fn read_overdue(
        &self,
        margin: Duration,
        after: &OverdueKey,
    ) -> Result<(Vec<OverdueRow>, Option<OverdueKey>), Error> {
        let overdue = Overdue { margin_millis: millis(margin), after, limit: i64::from(BATCH) };
        let mut tx = Tx::begin_reading(&self.pool).await?;
        let rows = DB::overdue(&mut tx, &overdue).await;
        drop(tx.rollback().await); // nothing was changed
        let rows: Vec<_> = rows?.into_iter().map(OverdueRow::of).collect();
        let is_last = rows.len() < BATCH as usize;
        let last = rows.last().filter(|_| !is_last);
        let next = last.map(|row| row.key.clone());
        Ok((rows, next))
    }

    /// Whether both fences share one table, because one is a clone of the other.
    pub(crate) fn id(&self) -> usize {
        Arc::as_ptr(&self.failed_batches).addr()
    }

    /// Cleans up in the background: one pass per `interval` (an hour is a good value), until the guard is dropped. Several
    /// processes may do this at the same time.
    pub fn clean_up_every(&self, interval: Duration) -> CleanUp {
        let fence = self.clone();
        let task = tokio::spawn(async move {
            loop {
                time::sleep(interval).await;
                log_clean_up(&fence.clean_up().await);
            }
        });
        CleanUp { task }
    }
}

async fn in_time<T>(batch: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let in_time = time::timeout(BATCH_TIMEOUT, batch).await;
    in_time.unwrap_or_else(|_| Err(Error::Io(ErrorKind::TimedOut.into())))
}

/// Some overdue branches.
pub(crate) struct OverduePage {
    pub(crate) branches: Vec<(Xid, BranchId)>,
    /// The place after which the next page begins. `None`: there are no more.
    pub(crate) next: Option<OverdueKey>,
}

/// Some branches that ask, each with its action.
pub(crate) struct ExpiredPage {
    pub(crate) branches: Vec<(Xid, BranchId, String)>,
    /// The place after which the next page begins. `None`: there are no more.
    pub(crate) next: Option<OverdueKey>,
}

pub(crate) fn log_clean_up(deleted: &Result<u64, Error>) {
    match deleted {
        Ok(0) => {}
        Ok(rows) => tracing::debug!(rows, "fence cleaned up"),
        Err(error) => tracing::warn!(
            error = %crate::error::chain(error),
            "fence not cleaned up; trying again after the interval"
        ),
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
