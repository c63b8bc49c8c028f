//! Confirms, and Cancels, that wait at the same time are run as one batch: in one local transaction with one COMMIT, where the author
//! may write one statement instead of many.
//!
//! What must hold: each call of a batch gets the answer that it would have got alone, whatever happens to the batch. So a batch that
//! fails for any reason is rolled back, and each of its calls is run by itself ([`Fence::run`]) as if there had been no batch. Every
//! waiting call is woken: by its answer, or by a dropped sender if there will be none, also when the batch panics.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::{runtime::Handle, sync::oneshot};

use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    contract::{Contract, Payload as _},
    error::Failed,
    fence::{Fence, Tx, db::Statements as _, many::ToRun},
};

use super::{
    ParticipantBuilder,
    action::{Action, ContentTypes, Fenced, Overdue, Served, unreadable_stored},
};

mod queue;

use queue::{Arrival, Queue, Waiting};

/// A call is run in batches for this many attempts. After that it is run alone, so that whatever makes it fail cannot fail other
/// batches.
const ATTEMPTS_IN_BATCHES_MAX: u32 = 3;

/// A call that has waited this long for the workers starts another one. Many times what a batch takes, and less than its statements may
/// wait for a lock.
const WAIT_MAX: Duration = Duration::from_millis(250);

/// An [`Action`] whose Confirms, and whose Cancels, can be run several at a time. Served with
/// [`ParticipantBuilder::action_in_batches`].
///
/// Under load, calls wait for each other: for a connection, for a hot row, for the disk. Calls that wait at the same time are run in one
/// local transaction: up to 64 branches, one COMMIT, and in your code one `UPDATE` of a hot row instead of 64. A call that comes when no
/// other is being run goes at once and alone to `on_confirm` or `on_cancel`.
///
/// All that [`Action`] promises holds for each branch. If a batch fails, it is rolled back, and each of its branches is run alone. So a
/// branch that needs attention does not stop the others.
///
/// A batch keeps its locks until its end, so mind two things:
///
/// - Change rows that other transactions change too always in the same order, such as that of their keys. Two local transactions that
///   change the same two rows in opposite order are a deadlock.
/// - Be quick. Long work is better done side by side, by a plain [`Action`].
///
/// If you override nothing, the batch calls `on_confirm` or `on_cancel` for each branch in sequence: one COMMIT, but no fewer statements.
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
    /// Uses what was reserved for all of these branches: what `on_confirm` does for each.
    ///
    /// # Errors
    ///
    /// Rolls back the whole batch; then each branch is run alone, by `on_confirm`.
    fn on_confirm_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        in_sequence(self, tx, tried)
    }

    /// Releases what was reserved for all of these branches: what `on_cancel` does for each.
    ///
    /// # Errors
    ///
    /// Rolls back the whole batch; then each branch is run alone, by `on_cancel`.
    fn on_cancel_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        in_sequence(self, tx, tried)
    }
}

/// Runs the branches in sequence. After each it checks that the local transaction is still the one that began. If user code had ended it,
/// the work of the branches after it would be committed, and done again when they are run alone.
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

/// A branch that was tried, and is confirmed or cancelled now.
#[derive(Clone)]
#[non_exhaustive]
pub struct Tried<Args> {
    /// The branch, with the phase that is asked for.
    pub branch: Branch,
    /// The arguments that its Try got.
    pub args: Args,
    /// The same arguments, encoded.
    pub payload: Bytes,
}

impl ParticipantBuilder {
    /// Serves one more action, whose Confirms and Cancels are run in batches when they wait at the same time. Other programs may serve
    /// the same action without batches.
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
    /// Runs one call by itself.
    alone: Fenced<A>,
    confirms: Queue,
    cancels: Queue,
}

/// One of the workers that a queue allows at a time: it runs a call, or a batch, and then the calls that have come meanwhile.
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

    /// Waits for the answer from a batch. `None`: there will be none, and the call is run alone.
    async fn wait(&self, phase: Phase, mut answer: oneshot::Receiver<Answer>) -> Option<Answer> {
        loop {
            if let Ok(answer) = tokio::time::timeout(WAIT_MAX, &mut answer).await {
                return answer.ok();
            }
            // The workers hang, or wait for a row. One more worker takes the calls that are still in the queue.
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

    /// Serves these calls, all of one phase. A call that gets no answer here is run alone by its caller.
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
    /// Runs the batch in a task of its own, so that a caller that is dropped does not stop the calls of others.
    fn run(self, batch: Vec<Waiting>) {
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move { self.served.serve(self.phase, batch).await });
        }
        // Without a runtime no caller waits any more. The worker is dropped here, and so empties the queue batch by batch.
    }
}

impl<A: ActionInBatches> Drop for Worker<A> {
    /// Goes on with the calls that wait, however the work before ended.
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

    fn overdue(&self) -> BoxFuture<'_, Overdue> {
        self.0.alone.overdue()
    }
}

/// Never prints arguments.
impl<Args> fmt::Debug for Tried<Args> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { branch, payload, .. } = self;
        write!(f, "Tried({} of {}, payload {} bytes)", branch.branch_id, branch.xid, payload.len())
    }
}
