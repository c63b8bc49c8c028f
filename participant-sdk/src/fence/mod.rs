//! The fence: a participant's record of what it did for each branch. It makes calls idempotent: a call may arrive twice, late,
//! or out of order, and still has the right effect.
//!
//! There is one row per branch, in the participant's own database. One local transaction contains the row and the participant's
//! work, in this order:
//!
//! 1. The row comes first: Try and Cancel insert it (or find it), Confirm finds it. From here on its lock is held, so of two
//!    calls for one branch the second waits, and then sees what the first has done.
//! 2. [`verdict`] says what to do, from what was recorded and what is asked. The author's code runs only if it must.
//! 3. The row is written again: what was done, and Try's reply. COMMIT. If anything fails, all of it is rolled back, the row
//!    included.
//!
//! Every call increments a counter in the row (`seen`). From the counter, a call learns whether it inserted the row or found it.
//! Before COMMIT, the call checks the counter again, to learn whether its local transaction has ended meanwhile.
//!
//! | recorded ↓ asked → | Try | Confirm | Cancel |
//! |---|---|---|---|
//! | nothing | run | refuse: never tried | empty rollback: record it, run nothing, done |
//! | tried | same reply; another payload: refuse | run | run |
//! | confirmed | same reply; another payload: refuse | done | refuse: opposite done |
//! | cancelled | too late | refuse: opposite done | done |
//! | suspended | too late (suspension) | refuse: opposite done | done |
//!
//! There are three levels, each usable alone. [`Fence::enter`] is for callers with their own local transaction (level 0).
//! [`Fence::run`] is for callers with their own handler (level 1). [`Action`](crate::Action) is served by the SDK (level 2).

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use handfast_proto::crash_point;
use sqlx::{Error, Pool};
use tracing::Instrument as _;

use crate::{
    answer::Answer,
    async_func::AsyncFunc,
    branch::{Branch, Phase},
    error::chain,
};

pub(crate) mod verdict;

pub(crate) mod look;
pub(crate) mod many;
mod tx;

#[cfg_attr(
    not(any(feature = "mysql", feature = "postgres", feature = "sqlite")),
    expect(dead_code, reason = "no database, nobody to ask")
)]
pub(crate) mod db;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;

mod clean_up;
pub(crate) mod log;
mod table;

#[cfg(test)]
#[cfg(feature = "sqlite")]
pub(crate) mod fixture;
#[cfg(test)]
#[cfg(feature = "sqlite")]
pub(crate) mod tests;

pub use clean_up::{CleanUp, EXPIRY_MARGIN, RETENTION};
pub(crate) use clean_up::{ExpiredPage, OverduePage, log_clean_up};
pub use db::{FenceDb, LOCK_WAIT};
pub use table::{SCHEMA_MYSQL, SCHEMA_POSTGRES, SCHEMA_SQLITE, TableError};
pub use tx::Tx;
pub use verdict::Verdict;

use db::{Key, Settle};
use verdict::State;

/// The fence of one database. Cheap to clone.
///
/// All programs that serve the same actions on the same database share one fence, because a retry may reach any of them.
pub struct Fence<DB: FenceDb> {
    pool: Pool<DB>,
    retention: Duration,
    forgotten_confirms: Arc<AtomicU64>,
    failed_batches: Arc<AtomicU64>,
    log_labels: Arc<[String]>,
}

/// The result of [`Fence::enter`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entered {
    /// Do the work now, on the same connection, and commit. If it fails or you refuse, roll back.
    #[non_exhaustive]
    Run {
        /// The payload of the branch's Try. The payload of a Confirm or Cancel request is ignored.
        payload: Bytes,
    },
    /// Do not do the work. Commit, and return this answer.
    #[non_exhaustive]
    Answer {
        /// The reason for the answer.
        verdict: Verdict,
        /// The answer to return.
        answer: Answer,
    },
}

impl<DB: FenceDb> Fence<DB> {
    /// A fence whose table is in the database of this pool. Does not access the database yet; see [`Fence::verify`].
    #[must_use]
    pub fn new(pool: Pool<DB>) -> Self {
        Self {
            pool,
            retention: RETENTION,
            forgotten_confirms: Arc::default(),
            failed_batches: Arc::default(),
            log_labels: Arc::default(),
        }
    }

    /// Sets how long rows are kept after their last change; the default is [`RETENTION`]. All programs that share the fence must
    /// use the same value. A Confirm that finds no row is refused as never tried, unless the row may already have been cleaned
    /// up.
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        Self { retention, ..self }
    }

    /// Sets which labels of a transaction the log lines of its calls show, by their keys: `["order"]`. By default none, because labels
    /// may hold personal data. The xid is always shown.
    #[must_use]
    pub fn log_labels<K: Into<String>>(self, keys: impl IntoIterator<Item = K>) -> Self {
        Self { log_labels: keys.into_iter().map(Into::into).collect(), ..self }
    }

    /// Level 1: runs `work` for this call, if it must run, in one local transaction together with the fence.
    ///
    /// `payload` is the payload of a Try; Confirm and Cancel read it from [`Tx::payload`]. An error of `work` becomes the
    /// answer: [`TryError`](crate::TryError), [`Failed`](crate::Failed), or any type of yours that is `Into<Answer>`.
    ///
    /// Once this returns [`Answer::Done`], the work is durable, whether this call or an earlier one did it. A repeat gets the
    /// same answer and does not run `work`. With any other answer this call has changed nothing, with one exception: after a
    /// failed COMMIT (`Unknown`, `Retry`), the outcome is unknown. A retry finds out.
    ///
    /// Do only what can be rolled back in `work`. It holds one connection of the pool from beginning to end, so it should not
    /// wait for other services.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")]
    /// # async fn example(fence: handfast::Fence<sqlx::Sqlite>, branch: handfast::Branch) {
    /// use handfast::TryError;
    ///
    /// let sku = 1042;
    /// let answer = fence
    ///     .run(&branch, b"1042", async |tx| {
    ///         sqlx::query("UPDATE stock SET available = available - 1 WHERE sku = ?")
    ///             .bind(sku)
    ///             .execute(&mut **tx)
    ///             .await?;
    ///         tx.reply("reserved");
    ///         Ok::<_, TryError>(())
    ///     })
    ///     .await;
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, everything is rolled back. Once COMMIT was sent, either everything or nothing is done. The
    /// connection returns to the pool or is closed; it does not leak.
    pub async fn run<F, E>(&self, branch: &Branch, payload: &[u8], work: F) -> Answer
    where
        F: for<'t> AsyncFunc<&'t mut Tx<DB>, Result<(), E>, Future: Send>,
        E: Into<Answer>,
    {
        let began = Instant::now();
        let span = tracing::info_span!("branch", xid = %branch.xid, branch_id = %branch.branch_id, phase = %branch.phase);
        let attempt = self.attempt(branch, payload, work).instrument(span);
        let (verdict, answer) =
            attempt.await.unwrap_or_else(|error| (None, failed::<DB>(branch.phase, &error)));
        log::log(branch, verdict, &answer, began.elapsed(), &self.log_labels);
        answer
    }

    /// Closes a branch that was settled by hand: records the `phase` of `branch`, Confirm or Cancel, without running the
    /// author's code. After `handfast resolve`, [`Participant::inquire`](crate::Participant::inquire) does it; this is for an
    /// operator's tool that does it at once. Until then, a late Cancel would run the author's code.
    ///
    /// Returns [`Answer::Done`] once it is recorded, by this call or an earlier one. A repeat gets the same answer.
    pub async fn close(&self, branch: &Branch) -> Answer {
        if branch.phase == Phase::Try {
            let message = "is a Try; a branch is closed as confirmed or as cancelled".to_owned();
            return Answer::Invalid { field: "phase", message };
        }
        self.run(branch, &[], async |_| Ok::<_, crate::Failed>(())).await
    }

    /// One local transaction, from BEGIN to COMMIT or ROLLBACK. It commits if the answer is done, and rolls back otherwise.
    async fn attempt<F, E>(
        &self,
        branch: &Branch,
        payload: &[u8],
        work: F,
    ) -> Result<(Option<Verdict>, Answer), Error>
    where
        F: for<'t> AsyncFunc<&'t mut Tx<DB>, Result<(), E>>,
        E: Into<Answer>,
    {
        if let (Phase::Try, Some(message)) = (branch.phase, look::too_long(payload)) {
            return Ok((None, Answer::Invalid { field: "payload.data", message }));
        }
        let mut tx = Tx::begin(&self.pool).await?;
        let (verdict, answer) = match self.within(&mut tx, branch, payload, work).await {
            Ok(done) => done,
            Err(error) => {
                tx.rollback_after(&error).await;
                return Err(error);
            }
        };
        if let Answer::Done(_) = answer {
            crash_point!("fence.before_commit");
            tx.commit().await?;
            crash_point!("fence.after_commit");
        } else if let (Err(error), Answer::Refused(_)) = (tx.rollback().await, &answer) {
            // A refusal says that nothing was done.
            return Err(error);
        }
        Ok((Some(verdict), answer))
    }

    /// The three steps inside the local transaction; see the module's comment.
    async fn within<F, E>(
        &self,
        tx: &mut Tx<DB>,
        branch: &Branch,
        payload: &[u8],
        work: F,
    ) -> Result<(Verdict, Answer), Error>
    where
        F: for<'t> AsyncFunc<&'t mut Tx<DB>, Result<(), E>>,
        E: Into<Answer>,
    {
        let mut look = self.look(tx, branch, payload).await?;
        if let Some(answer) = look.answer(branch) {
            return Ok((look.verdict, answer));
        }
        tx.set_payload(look.take_payload(branch.phase, payload));
        crash_point!("fence.entered");
        if let Err(error) = work(tx).await {
            let mut answer = error.into();
            if let Answer::Done(_) = answer {
                // The author's own `Into<Answer>` returned "done" for an error. Only a commit may result in "done".
                answer = Answer::failed(
                    branch.phase,
                    "the work returned Answer::Done as an error".to_owned(),
                );
            }
            return Ok((look.verdict, answer));
        }
        let reply = if branch.phase == Phase::Try { tx.take_reply() } else { Bytes::new() };
        if let Some(message) = look::too_long(&reply) {
            return Ok((look.verdict, Answer::Unknown(format!("the reply {message}"))));
        }
        tx.settle(&look.settled(branch.phase, &reply)).await?;
        Ok((look.verdict, Answer::Done(reply)))
    }

    /// Level 0: enters the fence within your own local transaction.
    ///
    /// Call it before any other statement. On SQLite, begin with `BEGIN IMMEDIATE`. You set the lock timeout yourself;
    /// [`LOCK_WAIT`] documents what the other levels use.
    ///
    /// Once you have committed, the call counts as done. A repeat waits for your commit and then gets [`Entered::Answer`]. Only
    /// those answers are logged, because the fence does not learn what becomes of [`Entered::Run`].
    ///
    /// # Errors
    ///
    /// When the database fails. Roll back. On PostgreSQL, COMMIT after a failed statement rolls back without reporting an error.
    ///
    /// # Cancel safety
    ///
    /// Roll back. (If a `sqlx::Transaction` on MySQL is dropped in the middle of a statement, its connection and its place in
    /// the pool are lost for ever. The other levels do not use it.)
    pub async fn enter(
        &self,
        connection: &mut DB::Connection,
        branch: &Branch,
        payload: &[u8],
    ) -> Result<Entered, Error> {
        if let (Phase::Try, Some(message)) = (branch.phase, look::too_long(payload)) {
            return Err(Error::InvalidArgument(format!("the payload {message}")));
        }
        let began = Instant::now();
        let mut look = self.look(connection, branch, payload).await?;
        if let Some(answer) = look.answer(branch) {
            if look.verdict == Verdict::Expired {
                // This Try has inserted a row, and the caller will commit it. The row must not look like a reservation.
                look.suspend::<DB>(connection).await?;
            }
            log::log(branch, Some(look.verdict), &answer, began.elapsed(), &self.log_labels);
            return Ok(Entered::Answer { verdict: look.verdict, answer });
        }
        if branch.phase != Phase::Try {
            // Written now, because the caller does not call the fence again after the work.
            look.settle::<DB>(connection, branch.phase, &[]).await?;
        }
        Ok(Entered::Run { payload: look.take_payload(branch.phase, payload) })
    }

    /// Level 0: stores the reply of a Try that has just run, so that repeats return it. Call it before you commit.
    ///
    /// # Errors
    ///
    /// When this is not the local transaction in which [`Fence::enter`] returned [`Entered::Run`] for this Try; when the reply
    /// is longer than 64 KiB; when the database fails. Roll back.
    ///
    /// # Cancel safety
    ///
    /// Roll back.
    pub async fn save_reply(
        &self,
        connection: &mut DB::Connection,
        branch: &Branch,
        reply: &[u8],
    ) -> Result<(), Error> {
        if let Some(message) = look::too_long(reply) {
            return Err(Error::InvalidArgument(format!("the reply {message}")));
        }
        let (key, state, reply) = (&Key::of(branch), State::Tried, Some(reply));
        // Only the Try that inserted the row has `seen` 1 and holds the row's lock.
        tx::write::<DB>(connection, &Settle { key, state, reply, seen: 1 }).await
    }

    /// How many Confirms without a row were answered "done", because the row may have been cleaned up long ago. Each is logged.
    #[must_use]
    pub fn forgotten_confirms(&self) -> u64 {
        self.forgotten_confirms.load(Ordering::Relaxed)
    }

    /// How many batches (see [`ActionInBatches`](crate::ActionInBatches)) were rolled back and had their branches run alone.
    /// Each is logged with its error. A high number means that batches block each other, or other calls.
    #[must_use]
    pub fn failed_batches(&self) -> u64 {
        self.failed_batches.load(Ordering::Relaxed)
    }
}

/// The answer to a call that failed with this error of the database.
fn failed<DB: FenceDb>(phase: Phase, error: &Error) -> Answer {
    if DB::cannot_write(error) {
        return Answer::Retry(chain(error)); // nothing was done, and the next call gets another connection
    }
    Answer::failed(phase, chain(error))
}

/// Converts a duration to milliseconds for the database.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl<DB: FenceDb> Clone for Fence<DB> {
    fn clone(&self) -> Self {
        Self {
            pool: self.pool.clone(),
            retention: self.retention,
            forgotten_confirms: self.forgotten_confirms.clone(),
            failed_batches: self.failed_batches.clone(),
            log_labels: self.log_labels.clone(),
        }
    }
}

impl<DB: FenceDb> fmt::Debug for Fence<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fence({})", DB::NAME)
    }
}

/// Never prints a payload.
impl fmt::Debug for Entered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run { payload } => write!(f, "Run({} bytes)", payload.len()),
            Self::Answer { verdict, answer } => write!(f, "Answer({verdict:?}, {answer:?})"),
        }
    }
}
