//! Confirms, and Cancels, that wait together go together: in one local transaction with one COMMIT, where the author may make one statement
//! of many.
//!
//! What must hold: whatever happens to a batch, each of its calls gets the answer that it would have got alone. So a batch that fails,
//! for whatever reason, is rolled back, and each of its calls goes the ordinary way ([`Fence::run`]) as if there had been none. Who waits
//! in the queue is woken by an answer, or by hearing that there is none; a batch that panics says so by being dropped.

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
    participant::{
        Action, ContentTypes, Fenced, Overdue, ParticipantBuilder, Served, unreadable_stored,
    },
};

mod queue;

use queue::{Arrival, Queue, Waiting};

/// Who has been called more often goes alone: whatever makes its call fail would fail the batches that it is in.
const ATTEMPTS_TOGETHER: u32 = 3;

/// Who has waited for so long for those at work does not wait for them any more. Many times what a batch takes, and less than its statements
/// may wait for a lock.
const HELD_UP: Duration = Duration::from_millis(250);

/// An [`Action`] whose Confirms may be done several at a time, and whose Cancels may. Served with
/// [`ParticipantBuilder::action_in_batches`].
///
/// Under load, calls wait for each other: for a connection, for a hot row, for the disk. Those that wait then go together, in one local
/// transaction: up to 64 branches, one COMMIT, and in your code one `UPDATE` of a hot row instead of 64. A call that comes when nobody is
/// at work goes at once and alone, to `on_confirm` or `on_cancel`.
///
/// All that [`Action`] promises holds for each branch. If a batch fails, it is rolled back, and each of its branches goes alone: one that
/// needs attention does not keep the others from being done.
///
/// Mind two things, for what is in a batch is locked until its end:
///
/// - Change rows that others change too in an order that is always the same, such as that of their keys. Two local transactions that change
///   the same two rows crosswise are a deadlock.
/// - Be quick. Work that takes long is better done side by side, by a plain [`Action`].
///
/// If you override nothing, each branch goes to `on_confirm` or `on_cancel`, one after the other: one COMMIT, but no fewer statements.
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
    /// Rolls back all of it; then each goes to `on_confirm`, alone.
    fn on_confirm_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        one_by_one(self, tx, tried)
    }

    /// Releases what was reserved for all of these branches: what `on_cancel` does for each.
    ///
    /// # Errors
    ///
    /// Rolls back all of it; then each goes to `on_cancel`, alone.
    fn on_cancel_many(
        &self,
        tx: &mut Tx<Self::Db>,
        tried: &[Tried<<Self::Contract as Contract>::Args>],
    ) -> impl Future<Output = Result<(), Failed>> + Send {
        one_by_one(self, tx, tried)
    }
}

/// One after the other. After each it is looked whether this is still the local transaction that began: had one ended it without a word,
/// what the others do would be kept for ever, and done again when they go alone.
pub(crate) async fn one_by_one<A: Action + ?Sized>(
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
    /// Which one.
    pub branch: Branch,
    /// What its Try got.
    pub args: Args,
    /// The same, as its bytes.
    pub payload: Bytes,
}

impl ParticipantBuilder {
    /// Serves one more action, whose Confirms and Cancels go together when they wait together. One action may well be served in batches
    /// by one program and by another one by one.
    ///
    /// # Panics
    ///
    /// As [`ParticipantBuilder::action`].
    pub fn action_in_batches<A: ActionInBatches>(self, fence: &Fence<A::Db>, action: A) -> Self {
        let queue = || Queue::new(A::Db::BATCHES_AT_A_TIME);
        let alone = Fenced { fence: fence.clone(), action };
        let served = Shared { alone, confirms: queue(), cancels: queue() };
        self.serve(<A::Contract as Contract>::NAME, Box::new(InBatches(Arc::new(served))))
    }
}

struct InBatches<A: Action>(Arc<Shared<A>>);

struct Shared<A: Action> {
    /// What there is without batches.
    alone: Fenced<A>,
    confirms: Queue,
    cancels: Queue,
}

/// The right to work on a queue: with a call, or with a batch.
struct Turn<A: ActionInBatches> {
    served: Arc<Shared<A>>,
    phase: Phase,
}

impl<A: ActionInBatches> InBatches<A> {
    async fn phase_two(&self, branch: &Branch) -> Answer {
        let served = &self.0;
        if branch.attempt > ATTEMPTS_TOGETHER {
            return served.alone.phase_two(branch).await;
        }
        match served.queue(branch.phase).arrive(branch) {
            Arrival::Turn => {
                let _turn = Turn { served: served.clone(), phase: branch.phase };
                served.alone.phase_two(branch).await
            }
            Arrival::Wait(answer) => match self.waited_for(branch.phase, answer).await {
                Some(answer) => answer,
                None => served.alone.phase_two(branch).await,
            },
            Arrival::Alone => served.alone.phase_two(branch).await,
        }
    }

    /// The answer of a batch. `None`: there will be none.
    async fn waited_for(
        &self,
        phase: Phase,
        mut answer: oneshot::Receiver<Answer>,
    ) -> Option<Answer> {
        loop {
            if let Ok(answer) = tokio::time::timeout(HELD_UP, &mut answer).await {
                return answer.ok();
            }
            // Somebody is at work who hangs, or waits for a row. All who wait here go on without, unless they are at work already.
            if let Some(batch) = self.0.queue(phase).overtake() {
                Turn { served: self.0.clone(), phase }.take(batch);
            }
        }
    }
}

impl<A: ActionInBatches> Shared<A> {
    fn queue(&self, phase: Phase) -> &Queue {
        if phase == Phase::Cancel { &self.cancels } else { &self.confirms }
    }

    /// Serves these calls, all of one phase. Who gets no answer goes alone.
    async fn work(&self, phase: Phase, batch: Vec<Waiting>) {
        let (branches, askers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|call| (call.branch, call.answer)).unzip();
        let answers = match &branches[..] {
            [branch] => vec![Some(self.alone.phase_two(branch).await)],
            branches => self.together(phase, branches).await,
        };
        for (asker, answer) in askers.into_iter().zip(answers) {
            if let Some(answer) = answer {
                // It may have gone away.
                let _heard = asker.send(answer);
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

impl<A: ActionInBatches> Turn<A> {
    /// Works on the batch, in a task of its own: no caller that goes away takes others with it.
    fn take(self, batch: Vec<Waiting>) {
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move { self.served.work(self.phase, batch).await });
        }
        // Else there is no runtime any more, and nobody who waits: dropped here, it goes on to the next ones, until there are none.
    }
}

impl<A: ActionInBatches> Drop for Turn<A> {
    /// Whatever became of the work, the turn goes on to those who wait.
    fn drop(&mut self) {
        let Self { served, phase } = self;
        let Some(batch) = served.queue(*phase).next() else { return };
        Self { served: served.clone(), phase: *phase }.take(batch);
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
