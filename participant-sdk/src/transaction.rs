//! How an initiator runs a global transaction: begin, try, decide.

use std::{collections::BTreeSet, fmt, time::Duration};

use handfast_proto::{
    BranchId, Xid, crash_point,
    limits::{self, cut},
    planted::Bug,
    time::wire_duration,
    v1 as pb,
};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::{
    async_func::AsyncFunc,
    client::{ASK_PATIENCE, Handfast, Reason, from_now, status_error},
    error::{BoxError, WorkError},
    global::{CallError, Calls, Global, NewTransaction},
    outcome::{Confirmed, TransactionError, standing},
    propagation,
};

/// What is unknown when a decision is answered without one.
const NO_DECISION: &str = "the coordinator's answer has no decision in it";
/// How long phase one may take, if nobody says.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long `run` waits for participants to acknowledge, once it is decided.
const COMPLETION_WAIT: Duration = Duration::from_secs(2);
/// How long a decision is asked for again while there is no answer, if nobody says.
const PATIENCE: Duration = Duration::from_secs(20);

/// Describes a global transaction before it is begun.
#[must_use]
#[derive(Debug, Clone)]
pub struct TransactionBuilder {
    handfast: Handfast,
    new: NewTransaction,
    wait: Duration,
    patience: Duration,
}

impl TransactionBuilder {
    pub(crate) fn new(handfast: Handfast, name: String) -> Self {
        let new = NewTransaction { name, ..NewTransaction::default() };
        Self { handfast, new, wait: COMPLETION_WAIT, patience: PATIENCE }
    }

    /// The same key gives the same transaction, until that is deleted after its retention: a repeat of the same operation, after
    /// a crash or by an impatient user, does not happen twice. At most 128 bytes.
    ///
    /// The first decision stands: a later run with a key that is confirmed is told so, and its closure is not run, so its arguments
    /// are not compared; one with a key that is cancelled is told that. Another attempt needs another key.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.new.key = key.into();
        self
    }

    /// How long phase one may take, from 1 ms to an hour; then it is cancelled. Default: 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.new.timeout = Some(timeout);
        self
    }

    /// A word for people who search: `order` is `1042`. At most 16.
    pub fn label(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.new.labels.insert(key.into(), value.to_string());
        self
    }

    /// Returns as soon as it is decided. Default: waits up to two seconds for the participants to acknowledge.
    pub fn until_decided(mut self) -> Self {
        self.wait = Duration::ZERO;
        self
    }

    /// How long the decision is asked for again while there is no answer; then the outcome is
    /// [`Unknown`](TransactionError::Unknown). Default: 20 s.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs the transaction: `work` calls the participants, then it is decided. `Ok` confirms, `Err` cancels; if any call was
    /// refused or had no clear answer it is cancelled too, also when `work` has swallowed the error.
    ///
    /// With an idempotency key that was decided before, `work` does not run; the outcome that stands is returned.
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
    /// If the future is dropped before the decision is asked for, the transaction is cancelled in the background. Dropped after
    /// that, the outcome is unknown, as after a crash.
    pub async fn run<T, F>(self, work: F) -> Result<Confirmed<T>, TransactionError>
    where
        F: for<'g> AsyncFunc<&'g Global, Result<T, WorkError>, Future: Send>,
    {
        if let Some(standing) = self.standing().await? {
            return standing;
        }
        let open = self.open();
        let global = open.global.clone();
        let within = propagation::scope(global.clone(), work(&global));
        let worked = tokio::time::timeout_at(global.deadline(), within).await;
        let (value, failed) = match worked {
            Ok(Ok(value)) => (Some(value), None),
            Ok(Err(WorkError(error))) => (None, Some(Failure::Work(error))),
            Err(_) => (None, Some(Failure::TimedOut)),
        };
        let confirmed = open.end(failed).await?;
        // Confirmed by another run with the same key: then the other's value counts.
        let value = if confirmed.value.is_some() { value } else { None };
        Ok(Confirmed { xid: confirmed.xid, value, completed: confirmed.completed })
    }

    /// Begins the transaction and hands it over, for those who decide in another place than they try. Durable once this returns
    /// if it has a key; without one it becomes durable with its first branch.
    ///
    /// # Errors
    ///
    /// [`TransactionError::NotBegun`]; or what stands, if its key was decided before: then [`TransactionError`] says how it was
    /// cancelled, or [`TransactionError::NotBegun`] that it is confirmed.
    pub async fn begin(self) -> Result<OpenTransaction, TransactionError> {
        let confirmed_before = |xid: Xid| TransactionError::NotBegun {
            cause: format!("its idempotency key belongs to {xid}, which is confirmed").into(),
        };
        if let Some(standing) = self.standing::<()>().await? {
            return Err(confirmed_before(standing?.xid));
        }
        let open = self.open();
        match open.global.xid().await {
            Ok(_) => Ok(open),
            Err(error) => Err(match open.end(Some(Failure::Work(error.into()))).await {
                Ok(confirmed) => confirmed_before(confirmed.xid),
                Err(error) => error,
            }),
        }
    }

    fn open(self) -> OpenTransaction {
        let timeout = self.new.timeout.unwrap_or(TIMEOUT);
        let global = Global::new(self.handfast, self.new, timeout);
        OpenTransaction { global, wait: self.wait, patience: self.patience, decided: false }
    }

    /// If there is a key: what was decided under it before.
    async fn standing<T>(
        &self,
    ) -> Result<Option<Result<Confirmed<T>, TransactionError>>, TransactionError> {
        if self.new.key.is_empty() {
            return Ok(None);
        }
        let by = pb::get_transaction_request::By::IdempotencyKey(self.new.key.clone());
        match self.handfast.get(by, Instant::now() + ASK_PATIENCE).await {
            Ok(transaction) if !self.new.is_same_operation(&transaction) => {
                let cause = format!(
                    "its idempotency key belongs to {}, which is another operation: {}",
                    transaction.xid, transaction.name
                );
                Err(TransactionError::NotBegun { cause: cause.into() })
            }
            Ok(transaction) => match transaction.xid.parse() {
                Ok(xid) => Ok(standing(xid, &transaction)),
                Err(error) => Err(TransactionError::NotBegun { cause: Box::new(error) }),
            },
            Err(status) if Reason::of(&status) == Reason::KeyUnknown => Ok(None),
            Err(status) if status.code() == Code::InvalidArgument => {
                Err(TransactionError::NotBegun { cause: status_error(status) })
            }
            // An earlier run with this key may be confirmed.
            Err(status) => Err(TransactionError::Unknown {
                xid: None,
                idempotency_key: Some(self.new.key.clone()),
                cause: status_error(status),
            }),
        }
    }
}

/// A global transaction that was begun and is not decided. Dropped, it is cancelled in the background.
#[must_use = "dropped, it is cancelled"]
#[derive(Debug)]
pub struct OpenTransaction {
    global: Global,
    wait: Duration,
    patience: Duration,
    /// A decision has been asked for.
    decided: bool,
}

/// Why it has to be cancelled.
enum Failure {
    /// `work` says so.
    Work(BoxError),
    TimedOut,
}

impl std::ops::Deref for OpenTransaction {
    type Target = Global;

    fn deref(&self) -> &Global {
        &self.global
    }
}

impl OpenTransaction {
    /// Confirms what has been tried; cancels if any call was refused or had no clear answer. A repeat after
    /// [`TransactionError::Unknown`]: ask [`Handfast::outcome`].
    ///
    /// # Errors
    ///
    /// See [`TransactionError`].
    pub async fn confirm(self) -> Result<Confirmed<()>, TransactionError> {
        self.end(None).await
    }

    /// Cancels it, with a reason for people. Once this returns `Ok` it is cancelled, for ever.
    ///
    /// # Errors
    ///
    /// [`TransactionError::Unknown`] when there was no answer: it will be cancelled when its time runs out.
    pub async fn cancel(self, reason: impl Into<String>) -> Result<(), TransactionError> {
        let idempotency_key = self.global.key();
        match self.end(Some(Failure::Work(reason.into().into()))).await {
            Err(
                TransactionError::Cancelled { .. }
                | TransactionError::Refused { .. }
                | TransactionError::TimedOut { .. }
                | TransactionError::NotBegun { .. },
            ) => Ok(()),
            Err(unknown @ TransactionError::Unknown { .. }) => Err(unknown),
            Ok(Confirmed { xid, .. }) => {
                let cause = "it has been confirmed by another run with the same key".into();
                Err(TransactionError::Unknown { xid: Some(xid), idempotency_key, cause })
            }
        }
    }

    /// Decides, and says what stands. `value` is there if it was this run that confirmed.
    async fn end(mut self, failure: Option<Failure>) -> Result<Confirmed<()>, TransactionError> {
        let global = self.global.clone();
        if failure.is_none() && matches!(global.calls(), Calls::Tried(_)) {
            // Whoever has called nobody confirms nothing, and gets an xid for it. (Else this is known, and costs nothing.)
            drop(global.xid().await);
        }
        let begun = global.close().await;
        let calls = global.calls();
        if let Some(transaction) = global.standing() {
            // The key led to a transaction that was decided before: that outcome stands, whatever happened here.
            self.decided = true;
            let xid = begun.map(|begun| begun.xid);
            if let Some(standing) = xid.and_then(|xid| standing(xid, &transaction)) {
                return standing;
            }
        }
        let xid = match begun {
            Some(begun) => begun.xid,
            None => {
                self.decided = true;
                let cause = why_not_begun(failure, calls);
                return Err(match global.key() {
                    // It may have been begun all the same, and then another run with this key may confirm it.
                    Some(key) if global.unanswered() => {
                        TransactionError::Unknown { xid: None, idempotency_key: Some(key), cause }
                    }
                    _ => TransactionError::NotBegun { cause },
                });
            }
        };
        match (failure, calls) {
            (None, Calls::Tried(tried)) => self.confirm_tried(xid, tried).await,
            (failure, Calls::Failed(CallError::Refused { branch_id, refusal, .. })) => {
                drop(failure); // the refusal says more than what the closure made of it
                let cancel = pb::DecideRequest {
                    refusal: Some(refusal.clone().into()),
                    refused_branch_id: branch_id.to_string(),
                    ..pb::DecideRequest::default()
                };
                let refused =
                    TransactionError::Refused { xid, branch_id: Some(branch_id), refusal };
                self.cancel_because(xid, cancel, refused).await
            }
            (Some(Failure::TimedOut), _) => {
                let reason = "the initiator's time for phase one ran out".to_owned();
                let cancel = pb::DecideRequest { reason, ..pb::DecideRequest::default() };
                self.cancel_because(xid, cancel, TransactionError::TimedOut { xid }).await
            }
            (Some(Failure::Work(cause)), _) => self.cancel_for(xid, cause).await,
            (None, Calls::Failed(error)) => self.cancel_for(xid, error.into()).await,
        }
    }

    async fn confirm_tried(
        mut self,
        xid: Xid,
        tried: BTreeSet<BranchId>,
    ) -> Result<Confirmed<()>, TransactionError> {
        let request = pb::DecideRequest {
            decision: pb::Decision::Confirm.into(),
            tried_branch_ids: tried.iter().map(ToString::to_string).collect(),
            ..pb::DecideRequest::default()
        };
        self.decided = true;
        match self.decide(xid, request).await {
            Ok(transaction) => match standing::<()>(xid, &transaction) {
                Some(Ok(confirmed)) => Ok(Confirmed { value: Some(()), ..confirmed }),
                Some(Err(error)) => Err(error),
                None => Err(self.unknown(xid, NO_DECISION.into())),
            },
            Err(status) => match Reason::of(&status) {
                Reason::AlreadyDecided => self.what_stands(xid, status).await,
                Reason::BranchesDiffer => {
                    // A nested service has registered a branch, and we do not know that it was tried.
                    self.cancel_for(xid, status_error(status)).await
                }
                Reason::NeverRecorded => {
                    Err(TransactionError::Cancelled { xid, cause: status_error(status) }) // nothing was tried
                }
                Reason::Other if Bug::UnknownIsRefused.is_planted() => {
                    Err(TransactionError::Cancelled { xid, cause: status_error(status) })
                }
                Reason::Forgotten | Reason::KeyUnknown | Reason::KeyTaken | Reason::Other => {
                    Err(self.unknown(xid, status_error(status)))
                }
            },
        }
    }

    async fn cancel_for(
        self,
        xid: Xid,
        cause: BoxError,
    ) -> Result<Confirmed<()>, TransactionError> {
        let reason =
            cut(cause.to_string(), limits::REASON_BYTES_MAX).replace(char::is_control, " ");
        let cancel = pb::DecideRequest { reason, ..pb::DecideRequest::default() };
        self.cancel_because(xid, cancel, TransactionError::Cancelled { xid, cause }).await
    }

    /// Cancels, and returns `error` if it is cancelled.
    async fn cancel_because(
        mut self,
        xid: Xid,
        request: pb::DecideRequest,
        error: TransactionError,
    ) -> Result<Confirmed<()>, TransactionError> {
        self.decided = true;
        let request = pb::DecideRequest { decision: pb::Decision::Cancel.into(), ..request };
        match self.decide(xid, request).await {
            Ok(transaction) => match standing(xid, &transaction) {
                Some(Ok(confirmed)) => Ok(confirmed), // by another run with this key
                Some(Err(_)) => Err(error),           // ours says more
                None => Err(self.unknown(xid, NO_DECISION.into())),
            },
            Err(status) => match Reason::of(&status) {
                Reason::AlreadyDecided => self.what_stands(xid, status).await,
                Reason::NeverRecorded => Err(error), // nothing was tried
                Reason::Forgotten
                | Reason::KeyUnknown
                | Reason::KeyTaken
                | Reason::BranchesDiffer
                | Reason::Other => match self.global.key() {
                    // Nobody but this run could have confirmed it, and it never will: it is cancelled when its time runs out.
                    None => Err(error),
                    Some(_) => Err(self.unknown(xid, status_error(status))),
                },
            },
        }
    }

    /// The opposite decision was there before ours.
    async fn what_stands(
        &self,
        xid: Xid,
        status: Status,
    ) -> Result<Confirmed<()>, TransactionError> {
        let by = pb::get_transaction_request::By::Xid(xid.to_string());
        let deadline = Instant::now() + ASK_PATIENCE;
        match self
            .global
            .handfast()
            .get(by, deadline)
            .await
            .ok()
            .and_then(|found| standing(xid, &found))
        {
            Some(standing) => standing,
            None => Err(self.unknown(xid, status_error(status))),
        }
    }

    fn unknown(&self, xid: Xid, cause: BoxError) -> TransactionError {
        TransactionError::Unknown { xid: Some(xid), idempotency_key: self.global.key(), cause }
    }

    async fn decide(
        &self,
        xid: Xid,
        request: pb::DecideRequest,
    ) -> Result<pb::Transaction, Status> {
        let until = if self.wait.is_zero() { pb::Until::Decided } else { pb::Until::Completed };
        let request = pb::DecideRequest {
            xid: xid.to_string(),
            until: until.into(),
            wait: Some(wire_duration(self.wait)),
            ..request
        };
        crash_point!("initiator.before_decide");
        let decided =
            self.global.handfast().decide(request, self.wait, from_now(self.patience)).await;
        crash_point!("initiator.after_decide");
        decided
    }
}

/// None of its calls got as far as the coordinator.
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
        let (global, patience) = (self.global.clone(), self.patience);
        runtime.spawn(async move {
            let abandoned =
                Self { global: global.clone(), wait: Duration::ZERO, patience, decided: true };
            // Begun by another run with the same key, it is that one's too; if nobody decides, its time will run out.
            if let Some(begun) = global.close().await
                && !global.existed()
            {
                let cause = "the initiator gave up before it decided".into();
                let outcome = abandoned.cancel_for(begun.xid, cause).await;
                tracing::debug!(xid = %begun.xid, ?outcome, "abandoned");
            }
        });
    }
}
