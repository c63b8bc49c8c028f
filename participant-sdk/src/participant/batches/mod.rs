//! Batches. Confirms (or Cancels) that wait at the same time run in one local transaction with one COMMIT. The author may then
//! write one statement instead of many.
//!
//! Invariant: each call of a batch gets the answer that it would have got alone, whatever happens to the batch. A batch that
//! fails for any reason is rolled back, and each of its calls runs alone ([`Fence::run`]). Every waiting call is woken, even
//! when the batch panics: by its answer, or by a dropped sender if there is no answer.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use handfast_proto::{BranchId, Xid};
use tokio::{runtime::Handle, sync::oneshot};

use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    contract::{Contract, Payload as _},
    error::Failed,
    fence::{
        ExpiredPage, Fence, OverduePage, Tx,
        db::{OverdueKey, Statements as _},
        many::ToRun,
    },
};

use super::{
    ParticipantBuilder,
    action::{Action, ContentTypes, Fenced, Served, unreadable_stored},
};

mod queue;

use queue::{Arrival, Queue, Waiting};

/// After this many attempts, a call runs alone. Otherwise, a call that always fails would keep failing whole batches.
const ATTEMPTS_IN_BATCHES_MAX: u32 = 3;

/// If a call has waited this long for a worker, it starts another one. This is many times the duration of a batch, and less than
/// the lock timeout of its statements.
const WAIT_MAX: Duration = Duration::from_millis(250);

/// An [`Action`] whose Confirms, and whose Cancels, can be run several at a time. Served with
/// [`ParticipantBuilder::action_in_batches`].
///
/// Under load, calls wait: for a connection, for a hot row, for the disk. Calls that wait at the same time run in one local
/// transaction: up to 64 branches, one COMMIT, and in your code one `UPDATE` of a hot row instead of 64. A call that arrives
/// while no other is running goes to `on_confirm` or `on_cancel` at once, alone.
///
/// All guarantees of [`Action`] hold for each branch. If a batch fails, it is rolled back, and each of its branches runs alone.
/// So a branch that needs attention does not block the others.
///
/// A batch holds its locks until it ends, so follow two rules:
///
/// - Always update shared rows in the same order, such as the order of their keys. Two local transactions that change the same
///   two rows in opposite order deadlock.
/// - Be quick. Long work is better run concurrently, by a plain [`Action`].
///
/// The default implementations call `on_confirm` or `on_cancel` for each branch in sequence: one COMMIT, but no fewer
/// statements.
///
/// ```
/// # #[cfg(feature = "sqlite")]
/// # mod example {
/// use handfast::{Action, ActionInBatches, Failed, Json, Tried, Tx};
/// use sqlx::Sqlite;
/// # use handfast::{Branch, Contract, TryError};
/// # pub struct DeductStock;
/// # impl Contract for DeductStock {
/// #     const NAME: &'static str = "inventory.deduct";
/// #     type Args = Json<i64>;
/// #     type Reply = ();
/// # }
/// # pub struct Inventory;
/// # impl Action for Inventory {
/// #     type Contract = DeductStock;
/// #     type Db = Sqlite;
/// #     async fn on_try(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &Json<i64>) -> Result<(), TryError> { Ok(()) }
/// #     async fn on_confirm(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &Json<i64>) -> Result<(), Failed> { Ok(()) }
/// #     async fn on_cancel(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &Json<i64>) -> Result<(), Failed> { Ok(()) }
/// # }
///
/// impl ActionInBatches for Inventory {
///     async fn on_confirm_many(&self, tx: &mut Tx<Sqlite>, tried: &[Tried<Json<i64>>]) -> Result<(), Failed> {
///         let pieces: i64 = tried.iter().map(|branch| branch.args.0).sum();
///         sqlx::query("UPDATE stock SET held = held - ?1, sold = sold + ?1").bind(pieces).execute(&mut **tx).await?;
///         Ok(())
///     }
/// }
/// # }
/// ```
pub trait ActionInBatches: Action {
    /// Uses what was reserved for these branches: what `on_confirm` does, for each of them.
    ///
    /// # Errors
    ///
    /// An error rolls back the whole batch. Then each branch runs alone, through `on_confirm`.
    fn on_confirm_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        in_sequence(self, tx, tried)
    }

    /// Releases what was reserved for these branches: what `on_cancel` does, for each of them.
    ///
    /// # Errors
    ///
    /// An error rolls back the whole batch. Then each branch runs alone, through `on_cancel`.
    fn on_cancel_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        in_sequence(self, tx, tried)
    }
}

/// Runs the branches in sequence. After each branch, it checks that the original local transaction is still open. If the
/// author's code had ended it, the work of the later branches would be committed, and then repeated when they run alone.
pub(crate) async fn in_sequence<A: Action + ?Sized>(
    action: &A,
    tx: &mut Tx<A::Db>,
    tried: &[Tried<<A::Contract as Contract>::Args>],
) -> Result<(), Failed> {
    tx.mark().await?;
    for Tried { branch, args, payload } in tried {
        tx.set_payload(payload.clone());
        match branch.phase {
            Phase::Cancel => action.on_cancel(tx, branch, args).await?,
            Phase::Try | Phase::Confirm => action.on_confirm(tx, branch, args).await?,
        }
        tx.mark().await?;
    }
    Ok(())
}

/// A tried branch that is now being confirmed or cancelled.
#[derive(Clone)]
#[non_exhaustive]
pub struct Tried<Args> {
    /// The branch, with the phase of this call.
    pub branch: Branch,
    /// The arguments of its Try.
    pub args: Args,
    /// The same arguments, encoded.
    pub payload: Bytes,
}

impl ParticipantBuilder {
    /// Adds an action whose waiting Confirms and Cancels run in batches. Other programs may serve the same action without
    /// batches.
    ///
    /// # Panics
    ///
    /// As [`ParticipantBuilder::action`].
    pub fn action_in_batches<A: ActionInBatches>(self, fence: &Fence<A::Db>, action: A) -> Self {
        let queue = || Queue::new(A::Db::BATCHES_AT_A_TIME);
        let alone = Fenced { fence: fence.clone(), action };
        let served = Queues { alone, confirms: queue(), cancels: queue() };
        self.serve(<A::Contract as Contract>::NAME, Box::new(InBatches(Arc::new(served))))
    }
}

struct InBatches<A: Action>(Arc<Queues<A>>);

struct Queues<A: Action> {
    /// Runs one call alone.
    alone: Fenced<A>,
    confirms: Queue,
    cancels: Queue,
}

/// A worker of a queue. It runs a call or a batch, and then the calls that have arrived meanwhile.
struct Worker<A: ActionInBatches> {
    served: Arc<Queues<A>>,
    phase: Phase,
}

impl<A: ActionInBatches> InBatches<A> {
    async fn phase_two(&self, branch: &Branch) -> Answer {
        let served = &self.0;
        if branch.attempt > ATTEMPTS_IN_BATCHES_MAX {
            return served.alone.phase_two(branch).await;
        }
        match served.queue(branch.phase).arrive(branch) {
            Arrival::Work => {
                let _worker = Worker { served: served.clone(), phase: branch.phase };
                served.alone.phase_two(branch).await
            }
            Arrival::Wait(answer) => match self.wait(branch.phase, answer).await {
                Some(answer) => answer,
                None => served.alone.phase_two(branch).await,
            },
            Arrival::Alone => served.alone.phase_two(branch).await,
        }
    }

    /// Waits for the answer from a batch. `None`: the batch gave no answer, and the call must run alone.
    async fn wait(&self, phase: Phase, mut answer: oneshot::Receiver<Answer>) -> Option<Answer> {
        loop {
            if let Ok(answer) = tokio::time::timeout(WAIT_MAX, &mut answer).await {
                return answer.ok();
            }
            // All workers are stuck or wait for a lock. One extra worker takes the calls that are still queued.
            if let Some(batch) = self.0.queue(phase).one_more() {
                Worker { served: self.0.clone(), phase }.run(batch);
            }
        }
    }
}

impl<A: ActionInBatches> Queues<A> {
    fn queue(&self, phase: Phase) -> &Queue {
        if phase == Phase::Cancel { &self.cancels } else { &self.confirms }
    }

    /// Serves a batch of calls of one phase. A call that gets no answer here is run alone by its caller.
    async fn serve(&self, phase: Phase, batch: Vec<Waiting>) {
        let (branches, callers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|call| (call.branch, call.answer)).unzip();
        let answers = match &branches[..] {
            [branch] => vec![Some(self.alone.phase_two(branch).await)],
            branches => self.together(phase, branches).await,
        };
        for (caller, answer) in callers.into_iter().zip(answers) {
            if let Some(answer) = answer {
                drop(caller.send(answer)); // the caller may have been dropped
            }
        }
    }

    async fn together(&self, phase: Phase, branches: &[Branch]) -> Vec<Option<Answer>> {
        let work = async |(tx, to_run): (&mut Tx<A::Db>, ToRun)| {
            let tried = to_run.into_iter().map(|(n, payload)| tried::<A>(&branches[n], payload));
            let tried = tried.collect::<Result<Vec<_>, _>>()?;
            let action = &self.alone.action;
            match phase {
                Phase::Cancel => action.on_cancel_many(tx, &tried).await,
                Phase::Try | Phase::Confirm => action.on_confirm_many(tx, &tried).await,
            }
        };
        self.alone.fence.run_many(phase, branches, work).await
    }
}

fn tried<A: Action>(
    branch: &Branch,
    payload: Bytes,
) -> Result<Tried<<A::Contract as Contract>::Args>, Failed> {
    let args = <A::Contract as Contract>::Args::decode(&payload).map_err(|_| {
        unreadable_stored::<<A::Contract as Contract>::Args>(&branch.action, payload.len())
    })?;
    Ok(Tried { branch: branch.clone(), args, payload })
}

impl<A: ActionInBatches> Worker<A> {
    /// Runs the batch in its own task, so that a caller that is dropped does not stop the calls of others.
    fn run(self, batch: Vec<Waiting>) {
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move { self.served.serve(self.phase, batch).await });
        }
        // If the runtime has stopped, no caller waits any more. The worker is dropped here, and its `drop` empties the queue.
    }
}

impl<A: ActionInBatches> Drop for Worker<A> {
    /// Continues with the waiting calls, however the previous work ended.
    fn drop(&mut self) {
        let Self { served, phase } = self;
        let Some(batch) = served.queue(*phase).next() else { return };
        Self { served: served.clone(), phase: *phase }.run(batch);
    }
}

impl<A: ActionInBatches> Served for InBatches<A> {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer> {
        match branch.phase {
            Phase::Try => self.0.alone.handle(branch, payload),
            Phase::Confirm | Phase::Cancel => Box::pin(self.phase_two(branch)),
        }
    }

    #[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
    fn handle_together<'a>(&'a self, branches: &'a [Branch]) -> BoxFuture<'a, Vec<Answer>> {
        Box::pin(async {
            let mut answers = Vec::new();
            let together = self.0.together(branches[0].phase, branches).await;
            for (branch, answer) in branches.iter().zip(together) {
                answers.push(match answer {
                    Some(answer) => answer,
                    None => self.0.alone.phase_two(branch).await,
                });
            }
            answers
        })
    }

    fn content_types(&self) -> ContentTypes {
        self.0.alone.content_types()
    }

    fn overdue<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<OverduePage, sqlx::Error>> {
        self.0.alone.overdue(after)
    }

    fn expired<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<ExpiredPage, sqlx::Error>> {
        self.0.alone.expired(after)
    }

    fn asking(&self, xid: Xid) -> BoxFuture<'_, Result<Vec<(BranchId, String)>, sqlx::Error>> {
        self.0.alone.asking(xid)
    }

    fn close<'a>(&'a self, branch: &'a Branch) -> BoxFuture<'a, Answer> {
        self.0.alone.close(branch)
    }

    fn clean_up(&self) -> BoxFuture<'_, Result<u64, sqlx::Error>> {
        self.0.alone.clean_up()
    }

    fn fence_id(&self) -> usize {
        self.0.alone.fence_id()
    }
}

/// Never prints arguments.
impl<Args> fmt::Debug for Tried<Args> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { branch, payload, .. } = self;
        write!(f, "Tried({} of {}, payload {} bytes)", branch.branch_id, branch.xid, payload.len())
    }
}
