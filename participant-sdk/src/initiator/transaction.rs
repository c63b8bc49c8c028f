//! How an initiator runs a global transaction: begin, try, decide.

use std::{fmt, time::Duration};

use handfast_proto::{
    Xid, reason,
    v1::{self as pb, get_transaction_request::By},
};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    decision::{Cancel, Decide, Decider, Failure},
    description::{Description, PATIENCE, TIMEOUT},
    global::Global,
    ledger::Calls,
    outcome::{Confirmation, Confirmed, Recorded, TransactionError},
    propagation,
    registrar::Closed,
    remembered::Memory,
};
use crate::{
    async_func::AsyncFunc,
    error::{BoxError, WorkError},
    rpc::{Handfast, from_now},
    status::{Reason, status_error},
};

/// Describes a global transaction before it is begun.
#[must_use]
#[derive(Debug, Clone)]
pub struct TransactionBuilder {
    handfast: Handfast,
    description: Description,
    patience: Duration,
}

impl Handfast {
    /// Describes a global transaction of this name (`checkout`), whose Trys this program calls itself.
    pub fn transaction(&self, name: impl Into<String>) -> TransactionBuilder {
        TransactionBuilder {
            handfast: self.clone(),
            description: Description::new(name.into()),
            patience: PATIENCE,
        }
    }
}

impl TransactionBuilder {
    /// The same key gives the same transaction, until that is deleted after its retention. So an operation that is repeated, after
    /// a crash or by an impatient user, happens once. At most 128 bytes.
    ///
    /// The first decision stands. A later run with a key that is confirmed is told so; its closure does not run, so its arguments
    /// are not compared. A run with a key that is cancelled is told that. Another attempt needs another key.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.description.key = key.into();
        self
    }

    /// Says with which arguments the operation of this idempotency key runs. A run with the same key and other arguments is refused
    /// before anything is tried: [`NotBegun`](TransactionError::NotBegun). `arguments` is hashed as JSON; a repeat must give the
    /// same JSON.
    pub fn fingerprint(mut self, arguments: &impl Serialize) -> Self {
        self.description.fingerprint(arguments);
        self
    }

    /// How long phase one may take, from 1 ms to an hour. Then the transaction is cancelled. Default: 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.description.timeout = Some(timeout);
        self
    }

    /// Has the coordinator record the transaction with its decision, and not before: phase one then waits for no durable write. If the
    /// coordinator crashes before the decision, the transaction is lost as a whole and never confirmed, and its participants give back
    /// what they reserved when they ask. So reservations may stay until the end of the timeout: keep it short. An idempotency key is
    /// free again then: the initiator is told `Cancelled`, and a later run with the key begins anew.
    ///
    /// Participants that do not ask (an older version, another language, no [`coordinator`](crate::ParticipantBuilder::coordinator))
    /// make the transaction durable before they are called, as without this. A coordinator that cannot do it refuses to begin.
    pub fn record_at_decision(mut self) -> Self {
        self.description.at_decision = true;
        self
    }

    /// A label to search by: `order` is `1042`. At most 16.
    pub fn label(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.description.label(key, value);
        self
    }

    /// Returns as soon as it is decided. Default: waits up to two seconds for the participants to acknowledge.
    pub fn until_decided(mut self) -> Self {
        self.description.wait = Duration::ZERO;
        self
    }

    /// How long Decide, and the first question about an idempotency key, are repeated while they have no answer; then the outcome
    /// is [`Unknown`](TransactionError::Unknown). The wait for acknowledgements is not part of it. Default: 20 s.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs the transaction: `work` calls the participants, then it is decided. `Ok` confirms, `Err` cancels; if any call was
    /// refused or had no clear answer it is cancelled too, also when `work` has swallowed the error.
    ///
    /// With an idempotency key that was decided before, `work` does not run; the outcome that stands is returned, without a value.
    /// [`run_and_remember`](Self::run_and_remember) brings the value back, too.
    ///
    /// ```no_run
    /// # use handfast::{Contract, Handfast, Json, Remote};
    /// # struct CreateOrder; struct DeductStock;
    /// # impl Contract for CreateOrder { const NAME: &'static str = "order.create"; type Args = Json<u64>; type Reply = (); }
    /// # impl Contract for DeductStock { const NAME: &'static str = "inventory.deduct"; type Args = Json<u64>; type Reply = Json<u64>; }
    /// # async fn example(handfast: Handfast, orders: Remote, inventory: Remote) -> Result<(), Box<dyn std::error::Error>> {
    /// let done = handfast
    ///     .transaction("checkout")
    ///     .idempotency_key("order-1042")
    ///     .run(async |global| {
    ///         let (_, left) = tokio::try_join!(
    ///             global.call::<CreateOrder>(&orders, Json(1042)),
    ///             global.call::<DeductStock>(&inventory, Json(7)),
    ///         )?;
    ///         Ok(left.0)
    ///     })
    ///     .await?;
    /// println!("{} is confirmed, {:?} left", done.xid, done.value);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// See [`TransactionError`]: what each means for the user is different.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before Decide is sent, the transaction is cancelled in the background. If it is dropped later, the
    /// outcome is unknown, as after a crash.
    pub async fn run<T, F>(self, work: F) -> Result<Confirmed<T>, TransactionError>
    where
        F: for<'g> AsyncFunc<&'g Global, Result<T, WorkError>, Future: Send>,
    {
        self.run_with(None, work).await
    }

    /// As [`run`](Self::run), and the coordinator keeps the value of `work` with the decision: a later run with the same idempotency
    /// key gets it back. Of several runs at the same time, all get the value of the one that has confirmed. Without a key nothing is
    /// kept.
    ///
    /// The value is kept as JSON of at most 4 KiB, for as long as the transaction, and whoever may read the transaction may read it.
    /// A value that cannot be kept cancels the transaction, and the error says why. A kept value that cannot be read as `T` is told
    /// in [`Confirmed::unreadable`]. A coordinator that is older than this function keeps no value: a later run gets `None`.
    ///
    /// # Errors
    ///
    /// See [`TransactionError`]: what each means for the user is different.
    ///
    /// # Cancel safety
    ///
    /// As [`run`](Self::run).
    pub async fn run_and_remember<T, F>(self, work: F) -> Result<Confirmed<T>, TransactionError>
    where
        T: Serialize + DeserializeOwned,
        F: for<'g> AsyncFunc<&'g Global, Result<T, WorkError>, Future: Send>,
    {
        self.run_with(Some(&Memory::JSON), work).await
    }

    async fn run_with<T, F>(
        self,
        memory: Option<&Memory<T>>,
        work: F,
    ) -> Result<Confirmed<T>, TransactionError>
    where
        F: for<'g> AsyncFunc<&'g Global, Result<T, WorkError>, Future: Send>,
    {
        let memory = memory.filter(|_| self.description.key().is_some());
        match self.earlier().await? {
            Earlier::Nothing => {}
            Earlier::Confirmed(confirmation) => return Ok(confirmation.with_value(memory, None)),
            Earlier::Cancelled(error) => return Err(error),
        }
        let open = self.open();
        let global = open.global.clone();
        let within = propagation::scope(global.clone(), work(&global));
        let worked = tokio::time::timeout_at(global.deadline(), within).await;
        let mut result = None;
        let (value, failed) = match worked {
            Ok(Ok(value)) => match memory.map(|memory| (memory.write)(&value)).transpose() {
                Ok(kept) => {
                    result = kept;
                    (Some(value), None)
                }
                Err(why) => (None, Some(Failure::Work(why.into()))),
            },
            Ok(Err(WorkError(error))) => (None, Some(Failure::Work(error))),
            Err(_) => (None, Some(Failure::TimedOut)),
        };
        let confirmation = open.end(failed, result).await?;
        Ok(confirmation.with_value(memory, value))
    }

    /// Begins the transaction and hands it over, for programs that decide in another place than they try. With a key it is durable
    /// when this returns; without one it becomes durable with its first branch.
    ///
    /// # Errors
    ///
    /// [`TransactionError::NotBegun`]. If its key was decided before: how it was cancelled, or [`TransactionError::NotBegun`] if it
    /// is confirmed.
    pub async fn begin(self) -> Result<OpenTransaction, TransactionError> {
        let confirmed_before = |xid: Xid| TransactionError::NotBegun {
            cause: format!("its idempotency key belongs to {xid}, which is confirmed").into(),
        };
        match self.earlier().await? {
            Earlier::Nothing => {}
            Earlier::Confirmed(confirmation) => return Err(confirmed_before(confirmation.xid)),
            Earlier::Cancelled(error) => return Err(error),
        }
        let open = self.open();
        match open.global.xid().await {
            Ok(_) => Ok(open),
            Err(error) => Err(match open.end(Some(Failure::Work(error.into())), None).await {
                Ok(confirmed) => confirmed_before(confirmed.xid),
                Err(error) => error,
            }),
        }
    }

    fn open(self) -> OpenTransaction {
        let Self { handfast, description, patience } = self;
        let (key, until, wait) = (description.key(), description.until(), description.wait);
        let timeout = description.timeout.unwrap_or(TIMEOUT);
        let global = Global::new(handfast.clone(), description, timeout);
        let decider = Decider { handfast, global: global.clone(), key, until, wait, patience };
        OpenTransaction { global, decider, decided: false }
    }

    /// What was decided under this key before.
    async fn earlier(&self) -> Result<Earlier, TransactionError> {
        let not_begun = |cause| TransactionError::NotBegun { cause };
        if let Some(unreadable) = &self.description.unreadable {
            return Err(not_begun(unreadable.clone().into()));
        }
        let Some(key) = self.description.key() else { return Ok(Earlier::Nothing) };
        let by = By::IdempotencyKey(key.clone());
        let fingerprint = self.description.fingerprint.clone();
        match self.handfast.get_same(by, fingerprint, from_now(self.patience)).await {
            Ok(transaction) if !self.description.is_same_operation(&transaction) => {
                let cause = format!(
                    "its idempotency key belongs to {}, which is another operation: {}",
                    transaction.xid, transaction.name
                );
                Err(not_begun(cause.into()))
            }
            Ok(transaction) => {
                let xid = transaction.xid.parse().map_err(|error| not_begun(Box::new(error)))?;
                Ok(Earlier::of(xid, &transaction))
            }
            Err(status) if Reason::of(&status) == Reason::KeyUnknown => Ok(Earlier::Nothing),
            Err(status) if Reason::of(&status) == Reason::KeyTaken => {
                Err(not_begun(other_arguments(&status)))
            }
            Err(status) if status.code() == Code::InvalidArgument => {
                Err(not_begun(status_error(&status)))
            }
            // An earlier run with this key may be confirmed.
            Err(status) => Err(TransactionError::Unknown {
                xid: None,
                idempotency_key: Some(key),
                cause: status_error(&status),
            }),
        }
    }
}

fn other_arguments(status: &Status) -> BoxError {
    let details = status.get_details_error_info();
    let xid = details.and_then(|mut details| details.metadata.remove(reason::XID));
    let xid = xid.as_deref().unwrap_or("a transaction");
    format!("its idempotency key belongs to {xid}, which has another fingerprint").into()
}

/// What earlier runs with the same key have come to.
enum Earlier {
    /// No decision: this run goes on.
    Nothing,
    Confirmed(Confirmation),
    Cancelled(TransactionError),
}

impl Earlier {
    fn of(xid: Xid, transaction: &pb::Transaction) -> Self {
        match Recorded::of(xid, transaction) {
            Recorded::Undecided => Self::Nothing,
            Recorded::Confirmed(confirmation) => Self::Confirmed(confirmation),
            Recorded::Cancelled(error) => Self::Cancelled(error),
        }
    }
}

/// A global transaction that was begun and is not decided. Dropped, it is cancelled in the background.
#[must_use = "dropped, it is cancelled"]
#[derive(Debug)]
pub struct OpenTransaction {
    global: Global,
    decider: Decider,
    /// A decision has been asked for, or there is nothing to decide.
    decided: bool,
}

impl std::ops::Deref for OpenTransaction {
    type Target = Global;

    fn deref(&self) -> &Global {
        &self.global
    }
}

impl OpenTransaction {
    /// Confirms if every call was tried with success; else cancels. After [`TransactionError::Unknown`] do not call it again: ask
    /// [`Handfast::outcome`].
    ///
    /// # Errors
    ///
    /// See [`TransactionError`].
    pub async fn confirm(self) -> Result<Confirmed<()>, TransactionError> {
        Ok(self.end(None, None).await?.with_value(None, Some(())))
    }

    /// Cancels it, with a reason for people. Once this returns `Ok` it is cancelled, for ever.
    ///
    /// # Errors
    ///
    /// [`TransactionError::Unknown`] when there was no answer: it will be cancelled when its time runs out.
    pub async fn cancel(self, reason: impl Into<String>) -> Result<(), TransactionError> {
        let idempotency_key = self.decider.key.clone();
        match self.end(Some(Failure::Work(reason.into().into())), None).await {
            Err(
                TransactionError::Cancelled { .. }
                | TransactionError::Refused { .. }
                | TransactionError::TimedOut { .. }
                | TransactionError::NotBegun { .. },
            ) => Ok(()),
            Err(unknown @ TransactionError::Unknown { .. }) => Err(unknown),
            Ok(Confirmation { xid, .. }) => {
                let cause = "it has been confirmed by another run with the same key".into();
                Err(TransactionError::Unknown { xid: Some(xid), idempotency_key, cause })
            }
        }
    }

    /// Decides, and returns the decision that was recorded. `result` is kept with Confirm.
    async fn end(
        mut self,
        failure: Option<Failure>,
        result: Option<pb::Payload>,
    ) -> Result<Confirmation, TransactionError> {
        if failure.is_none() && matches!(self.global.calls(), Calls::Tried(_)) {
            // A transaction without calls is begun only here. Confirm needs its xid.
            drop(self.global.xid().await);
        }
        let closed = self.global.close().await;
        self.decided = true;
        let calls = self.global.calls();
        match closed {
            Closed::NotBegun { unanswered } => {
                Err(self.decider.not_begun(unanswered, why_not_begun(failure, calls)))
            }
            Closed::DecidedBefore { xid, transaction } => self.decider.recorded(xid, &transaction),
            Closed::Begun { xid, .. } => match Decide::of(xid, failure, calls) {
                Decide::Confirm { tried } => self.decider.confirm(xid, &tried, result).await,
                Decide::Cancel(cancel) => self.decider.cancel(xid, cancel).await,
            },
        }
    }
}

/// No call has begun the transaction.
fn why_not_begun(failure: Option<Failure>, calls: Calls) -> BoxError {
    match (failure, calls) {
        (Some(Failure::Work(cause)), _) => cause,
        (_, Calls::Failed(error)) => error.into(),
        (Some(Failure::TimedOut), Calls::Tried(_)) => "the time for phase one ran out".into(),
        (None, Calls::Tried(_)) => "the coordinator does not answer".into(),
    }
}

impl Drop for OpenTransaction {
    fn drop(&mut self) {
        if self.decided {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return; // its time will run out
        };
        let global = self.global.clone();
        let decider =
            Decider { until: pb::Until::Decided, wait: Duration::ZERO, ..self.decider.clone() };
        runtime.spawn(async move {
            // A transaction that another run with the same key has begun is left to that run.
            if let Closed::Begun { xid, existed: false } = global.close().await {
                let cause = "the initiator gave up before it decided".into();
                match decider.cancel(xid, Cancel::because(xid, cause)).await {
                    // Another run with this key has confirmed it.
                    Ok(_) => tracing::debug!(%xid, "abandoned, but confirmed"),
                    Err(outcome) => tracing::debug!(%xid, %outcome, "abandoned"),
                }
            }
        });
    }
}
