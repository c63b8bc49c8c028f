//! The fence: a participant's own record of what it did for each branch, so that a call may arrive twice, late, or in the wrong
//! order, and still has the right effect.
//!
//! There is one row for each branch, in the participant's own database. One local transaction holds the row and the
//! participant's work, in this order:
//!
//! 1. The row comes first: Try and Cancel insert it (or find it), Confirm finds it. From here on its lock is held, so of two
//!    calls for one branch the second waits, and then sees what the first has done.
//! 2. [`verdict`] says what to do, from what was recorded and what is asked. The author's code runs only if it must.
//! 3. The row is written again: what was done, and Try's reply. COMMIT. If anything fails, all of it is rolled back, the row
//!    included.
//!
//! Every call counts itself in the row (`seen`). From the count a call learns whether it has inserted the row or found it. Before
//! COMMIT it learns from it whether the local transaction that it began has ended meanwhile.
//!
//! | recorded ↓ asked → | Try | Confirm | Cancel |
//! |---|---|---|---|
//! | nothing | run | refuse: never tried | empty rollback: record it, run nothing, done |
//! | tried | same reply; another payload: refuse | run | run |
//! | confirmed | same reply; another payload: refuse | done | refuse: opposite done |
//! | cancelled | too late | refuse: opposite done | done |
//! | suspended | too late (suspension) | refuse: opposite done | done |
//!
//! Three levels, each usable alone: [`Fence::enter`] if you have a local transaction of your own (level 0), [`Fence::run`] if you
//! have a handler of your own (level 1), and [`Action`](crate::Action) if you want to be served (level 2).

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
mod tests;

pub use clean_up::{CleanUp, EXPIRY_MARGIN, RETENTION};
pub use db::{FenceDb, LOCK_WAIT};
pub use table::{SCHEMA_MYSQL, SCHEMA_POSTGRES, SCHEMA_SQLITE, TableError};
pub use tx::Tx;
pub use verdict::Verdict;

use db::{Key, Settle};
use verdict::State;

/// The fence of one database. Cheap to clone.
///
/// All programs that serve the same actions on the same database share one fence, because a repeat may reach another of them.
pub struct Fence<DB: FenceDb> {
    pool: Pool<DB>,
    retention: Duration,
    forgotten_confirms: Arc<AtomicU64>,
    failed_batches: Arc<AtomicU64>,
}

/// What [`Fence::enter`] says.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entered {
    /// Do the work now, on the same connection, and commit. If it fails or you refuse, roll back.
    #[non_exhaustive]
    Run {
        /// What Try got, whatever the request of a Confirm or Cancel carries.
        payload: Bytes,
    },
    /// Do not do the work. Commit, and give this answer.
    #[non_exhaustive]
    Answer {
        /// Why.
        verdict: Verdict,
        /// What to answer.
        answer: Answer,
    },
}

impl<DB: FenceDb> Fence<DB> {
    /// A fence whose table is in the database of this pool. Nothing is asked of it yet: see [`Fence::verify`].
    #[must_use]
    pub fn new(pool: Pool<DB>) -> Self {
        Self {
            pool,
            retention: RETENTION,
            forgotten_confirms: Arc::default(),
            failed_batches: Arc::default(),
        }
    }

    /// Sets how long rows are kept after their last change, in the place of [`RETENTION`]. Every program that shares the fence must
    /// use the same: a Confirm that finds no row is refused as never tried, unless the row may have been cleaned up.
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        Self { retention, ..self }
    }

    /// Level 1: runs `work` for this call, if it must run, in one local transaction with the fence.
    ///
    /// `payload` is what came with a Try; Confirm and Cancel find it in [`Tx::payload`]. The error of `work` becomes the answer:
    /// [`TryError`](crate::TryError) and [`Failed`](crate::Failed) do, and so does any type of yours that is `Into<Answer>`.
    ///
    /// Once this returns [`Answer::Done`], the work is durable, done now or before; a repeat gives the same answer and does not
    /// run `work`. With any other answer this call has done nothing, with one exception: after a failed COMMIT (`Unknown`,
    /// `Retry`) it is not known whether the work is done. The repeat finds out.
    ///
    /// Do only in `work` what can be rolled back. It uses one connection of the pool from beginning to end, so it should not wait
    /// for other services.
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
    /// If the future is dropped, all is rolled back, or, once COMMIT was sent, all or nothing is done. The connection goes back
    /// to the pool or is closed; it is not lost.
    pub async fn run<F, E>(&self, branch: &Branch, payload: &[u8], work: F) -> Answer
    where
        F: for<'t> AsyncFunc<&'t mut Tx<DB>, Result<(), E>, Future: Send>,
        E: Into<Answer>,
    {
        let began = Instant::now();
        let span = tracing::info_span!("branch", xid = %branch.xid, branch_id = %branch.branch_id, phase = %branch.phase);
        let attempt = self.attempt(branch, payload, work).instrument(span);
        let (verdict, answer) = attempt
            .await
            .unwrap_or_else(|error| (None, Answer::failed(branch.phase, chain(&error))));
        log::log(branch, verdict, &answer, began.elapsed());
        answer
    }

    /// Closes a branch that was settled by hand: records the `phase` of `branch`, Confirm or Cancel, and runs no code of the author.
    /// For an operator's tool, after `handfast resolve` and after the data was mended. Without this the branch stays tried, is
    /// reported as overdue for ever, and a late Cancel would run its code.
    ///
    /// [`Answer::Done`]: it is recorded, now or before. A repeat gives the same answer.
    pub async fn close(&self, branch: &Branch) -> Answer {
        if branch.phase == Phase::Try {
            let message = "is a Try; a branch is closed as confirmed or as cancelled".to_owned();
            return Answer::Invalid { field: "phase", message };
        }
        self.run(branch, &[], async |_| Ok::<_, crate::Failed>(())).await
    }

    /// One local transaction, from BEGIN to COMMIT or ROLLBACK. Work that is answered done is committed; all other work is rolled
    /// back.
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
        let result = self.within(&mut tx, branch, payload, work).await;
        if let Ok((_, Answer::Done(_))) = result {
            crash_point!("fence.before_commit");
            tx.commit().await?;
            crash_point!("fence.after_commit");
        } else {
            tx.rollback().await;
        }
        result.map(|(verdict, answer)| (Some(verdict), answer))
    }

    /// The three steps inside the local transaction.
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
                // A conversion of the author's own says "done". Only a commit below may say that.
                answer = Answer::failed(
                    branch.phase,
                    "the work failed with an error that means done".to_owned(),
                );
            }
            return Ok((look.verdict, answer));
        }
        let reply = if branch.phase == Phase::Try { tx.take_reply() } else { Bytes::new() };
        if let Some(message) = look::too_long(&reply) {
            return Ok((look.verdict, Answer::Unknown(format!("the reply {message}"))));
        }
        look.settle::<DB>(tx, branch.phase, &reply).await?;
        Ok((look.verdict, Answer::Done(reply)))
    }

    /// Level 0: enters the fence in a local transaction that you began and that you end.
    ///
    /// Call it before any other statement. On SQLite, begin with `BEGIN IMMEDIATE`. How long it waits for a lock is up to you too;
    /// see [`LOCK_WAIT`] for what the other levels do.
    ///
    /// Once you have committed, the call counts as done. A repeat waits for that and then gets [`Entered::Answer`]. Only those
    /// answers are logged: the fence does not learn what becomes of [`Entered::Run`].
    ///
    /// # Errors
    ///
    /// When the database fails: roll back. On PostgreSQL mind that COMMIT after a failed statement rolls back and does not say so.
    ///
    /// # Cancel safety
    ///
    /// Roll back. (Mind that `sqlx::Transaction` loses a connection to MySQL, and its place in the pool, for ever if it is dropped in
    /// the middle of a statement. The other levels do not use it.)
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
                // This Try has inserted a row, which the caller commits. It must not look like a reservation.
                look.suspend::<DB>(connection).await?;
            }
            log::log(branch, Some(look.verdict), &answer, began.elapsed());
            return Ok(Entered::Answer { verdict: look.verdict, answer });
        }
        if branch.phase != Phase::Try {
            // Written now, because the caller does not come back here when the work is done.
            look.settle::<DB>(connection, branch.phase, &[]).await?;
        }
        Ok(Entered::Run { payload: look.take_payload(branch.phase, payload) })
    }

    /// Level 0: keeps the reply of a Try that has just been run, for its repeats. Call it before you commit.
    ///
    /// # Errors
    ///
    /// When this is not the local transaction in which [`Fence::enter`] said [`Entered::Run`] to this Try; when the reply is
    /// longer than 64 KiB; when the database fails. Roll back.
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
        // Only the Try that made the row has seen it as the first and holds its lock.
        look::write::<DB>(connection, &Settle { key, state, reply, seen: 1 }).await
    }

    /// How many Confirms were answered done because their row may have been cleaned up long ago. The log has a line for each.
    #[must_use]
    pub fn forgotten_confirms(&self) -> u64 {
        self.forgotten_confirms.load(Ordering::Relaxed)
    }

    /// How many batches (see [`ActionInBatches`](crate::ActionInBatches)) were rolled back, so that their branches were run alone. The log
    /// has a line with the error for each. Many of them mean that batches block each other, or other calls.
    #[must_use]
    pub fn failed_batches(&self) -> u64 {
        self.failed_batches.load(Ordering::Relaxed)
    }
}

/// A length of time as the database counts it.
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
