//! A global transaction while it is being tried: its calls to participants.
//!
//! A branch is durable at the coordinator before its Try is sent, unless the transaction is recorded with its decision (see
//! `registrar.rs`).

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use handfast_proto::{
    BranchId, Xid,
    calls::{BranchCall, BranchRequest},
    connection::DEADLINE_MARGIN,
    crash_point,
    failure::with_code,
    id::InvalidBranchId,
    time::timestamp,
    v1 as pb,
};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{
    description::Description,
    ledger::{CallError, Calls, Ledger},
    registrar::{Closed, Registrar, Registration},
};
use crate::{
    branch::{Branch, Phase},
    context::Context,
    contract::{Contract, Payload},
    error::{BoxError, Refusal},
    remote::{Reach, Remote},
    rpc::{Handfast, from_now},
    status::may_be_repeated,
};

/// Attempts of one Try. A repeat is harmless, since Trys are fenced.
const TRY_ATTEMPTS_MAX: u32 = 3;
/// Pause before the second attempt of a Try; it doubles with each further one.
const TRY_PAUSE: Duration = Duration::from_millis(50);
/// How long phase one of a transaction that was joined may take by this program's clock. The coordinator ends it earlier if the
/// initiator has asked for that.
const JOINED_TIMEOUT: Duration = Duration::from_secs(30);

/// A global transaction while it is being tried. Every method takes `&self`, so calls can run side by side. Cheap to clone.
#[derive(Clone)]
pub struct Global {
    inner: Arc<Inner>,
}

struct Inner {
    registrar: Registrar,
    ledger: Ledger,
    /// Who was called in a transaction that may be lost: the branch and its participant.
    called: Mutex<Vec<(BranchId, Remote)>>,
    next_branch: AtomicUsize,
    /// The call with which this program joined the transaction. Branch ids are named below its own, and what is tried with success
    /// is reported to its caller. `None`: the transaction is this program's own.
    joined_by: Option<Context>,
}

impl Handfast {
    /// Joins the global transaction that a call came with, to register branches of one's own and to call further services.
    /// Branches that are tried with success are reported to the caller with the response, if the service has the
    /// [`ContextLayer`](crate::ContextLayer).
    #[must_use]
    pub fn join(&self, context: &Context) -> Global {
        let deadline = from_now(JOINED_TIMEOUT);
        let registrar = Registrar::joined(self.clone(), context, deadline);
        Global::with(registrar, Some(context.clone()))
    }
}

impl Global {
    pub(super) fn new(handfast: Handfast, description: Description, timeout: Duration) -> Self {
        Self::with(Registrar::new(handfast, description, from_now(timeout)), None)
    }

    fn with(registrar: Registrar, joined_by: Option<Context>) -> Self {
        let (ledger, next_branch) = (Ledger::default(), AtomicUsize::new(1));
        let called = Mutex::default();
        Self { inner: Arc::new(Inner { registrar, ledger, called, next_branch, joined_by }) }
    }

    /// Its xid. Begins the transaction at the coordinator, if no call has done that yet.
    ///
    /// # Errors
    ///
    /// When it cannot be begun.
    pub async fn xid(&self) -> Result<Xid, CallError> {
        Ok(self.registration().await?.xid)
    }

    pub(super) async fn registration(&self) -> Result<Registration, CallError> {
        match self.inner.registrar.registration() {
            Some(registration) => Ok(registration),
            None => self.inner.registrar.register(None).await,
        }
    }

    /// Registers a branch and calls its Try. Calls that are awaited together (`try_join!`) are registered together and tried in
    /// parallel.
    ///
    /// The branch ids are 1, 2, 3, … in the order in which `call` is called. If the transaction has an idempotency key, keep that
    /// order the same in a repeat: the same call must be the same branch.
    ///
    /// Without a clear answer the Try is repeated a few times; that is harmless, since Trys are fenced.
    ///
    /// # Errors
    ///
    /// When it was refused, or has no clear answer. `run` ends in Cancel then, whatever you do with the error.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the call counts as one without a clear answer.
    pub fn call<'a, C: Contract>(
        &'a self,
        participant: &'a Remote,
        args: C::Args,
    ) -> impl Future<Output = Result<C::Reply, CallError>> + Send + 'a {
        self.call_within::<C>(participant, args, C::TRY_TIMEOUT)
    }

    /// The same, with `timeout` for one attempt of the Try in the place of the contract's
    /// [`TRY_TIMEOUT`](Contract::TRY_TIMEOUT).
    ///
    /// # Errors
    ///
    /// As [`Global::call`].
    pub fn call_within<'a, C: Contract>(
        &'a self,
        participant: &'a Remote,
        args: C::Args,
        timeout: Duration,
    ) -> impl Future<Output = Result<C::Reply, CallError>> + Send + 'a {
        let branch_id = self.next_branch_id();
        async move {
            let branch_id = branch_id?;
            let reply = self.call_and_decode::<C>(participant, &branch_id, &args, timeout).await;
            match &reply {
                Ok(_) => self.tried(branch_id),
                Err(error) => self.inner.ledger.failed(error.clone()),
            }
            reply
        }
    }

    async fn call_and_decode<C: Contract>(
        &self,
        participant: &Remote,
        branch_id: &BranchId,
        args: &C::Args,
        timeout: Duration,
    ) -> Result<C::Reply, CallError> {
        let unreadable = |cause: BoxError| CallError::Payload {
            action: C::NAME.to_owned(),
            cause: cause.to_string(),
        };
        let data = args.encode().map_err(unreadable)?;
        let payload = pb::Payload { data, content_type: C::Args::CONTENT_TYPE.to_owned() };
        let reply = self.call_raw(participant, branch_id, C::NAME, payload, timeout).await?;
        C::Reply::decode(&reply).map_err(unreadable)
    }

    async fn call_raw(
        &self,
        participant: &Remote,
        branch_id: &BranchId,
        action: &str,
        payload: pb::Payload,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let Inner { registrar, ledger, .. } = &*self.inner;
        ledger.meant(branch_id.clone(), participant.name(), action);
        let spec = pb::BranchSpec {
            branch_id: branch_id.to_string(),
            action: action.to_owned(),
            participant: participant.name().to_owned(),
            target: participant.target().to_owned(),
            inquires: registrar.may_be_lost() && participant.inquires().await,
            ..pb::BranchSpec::default()
        };
        let begun = registrar.register(Some(spec)).await?;
        if begun.at_decision {
            self.called().push((branch_id.clone(), participant.clone()));
        }
        crash_point!("initiator.registered");
        let mut attempt = 1;
        loop {
            let mut branch = Branch::new(begun.xid, branch_id.clone(), action, Phase::Try);
            branch.attempt = attempt;
            branch.expires_at = begun.expires_at;
            branch.labels = registrar.description().labels.clone();
            branch.at_decision = begun.at_decision;
            let status = match self.try_once(participant, branch, &payload, timeout).await {
                Ok(reply) => return Ok(reply),
                Err(status) => status,
            };
            let (branch_id, action) = (branch_id.clone(), action.to_owned());
            if let Some(refusal) = Refusal::from_status(&status) {
                return Err(CallError::Refused { branch_id, action, refusal });
            }
            // After a deadline there is no further attempt: a participant that is slow has enough to do.
            let again = may_be_repeated(&status) && status.code() != Code::DeadlineExceeded;
            let pause = TRY_PAUSE * 2_u32.pow(attempt - 1);
            if !again
                || attempt >= TRY_ATTEMPTS_MAX
                || Instant::now() + pause >= registrar.deadline()
            {
                let (participant, cause) = (participant.name().to_owned(), with_code(&status));
                return Err(CallError::Unknown { branch_id, participant, action, cause });
            }
            attempt += 1;
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_once(
        &self,
        participant: &Remote,
        branch: Branch,
        payload: &pb::Payload,
        timeout: Duration,
    ) -> Result<Bytes, Status> {
        let ends = self.inner.registrar.deadline().min(from_now(timeout));
        let attempt = async {
            match participant.reach() {
                Reach::Here(participant) => {
                    participant.answer(&branch, &payload.data).await.into_result()
                }
                Reach::Line(line) => {
                    let request = pb::TryBranchRequest {
                        context: Some(branch.to_context()),
                        payload: Some(payload.clone()),
                    };
                    let call =
                        BranchCall { call: BranchRequest::TryBranch(request), may_join: true };
                    let timeout = ends.saturating_duration_since(Instant::now()) + DEADLINE_MARGIN;
                    let answer = line.call(call, timeout).await?;
                    self.nested(answer.nested_branch_ids.iter().map(String::as_bytes));
                    Ok(answer.reply.unwrap_or_default().data)
                }
            }
        };
        tokio::time::timeout_at(ends, attempt).await.unwrap_or_else(|_| {
            let text = if Instant::now() < self.inner.registrar.deadline() {
                format!(
                    "no answer within {timeout:?}, the limit of one Try (Contract::TRY_TIMEOUT)"
                )
            } else {
                "no answer before the end of phase one (the transaction's timeout)".to_owned()
            };
            Err(Status::deadline_exceeded(text))
        })
    }

    /// Notes branches that a callee has registered and tried with success, as the headers of its response name them.
    pub(super) fn nested<'a>(&self, headers: impl Iterator<Item = &'a [u8]>) {
        for id in headers.flat_map(|header| header.split(|byte| *byte == b',')) {
            let id = std::str::from_utf8(id).ok().and_then(|id| id.trim().parse().ok());
            // What is no branch id is left out. Confirm names every registered branch, so a branch that is missing here is
            // cancelled, not confirmed by mistake.
            if let Some(branch_id) = id {
                self.tried(branch_id);
            }
        }
    }

    fn tried(&self, branch_id: BranchId) {
        if let Some(context) = &self.inner.joined_by {
            context.tried(branch_id.clone());
        }
        self.inner.ledger.tried(branch_id);
    }

    /// Notes that a call was not made. The transaction is cancelled, also if the closure swallows the error.
    pub(super) fn call_not_made(&self, error: CallError) -> CallError {
        self.inner.ledger.failed(error.clone());
        error
    }

    /// Notes that an ordinary call within the transaction failed.
    pub(super) fn ordinary_call_failed(&self, branch_id: BranchId, cause: String) {
        let action = "a call to another service".to_owned();
        let participant = String::new();
        self.inner.ledger.failed(CallError::Unknown { branch_id, participant, action, cause });
    }

    /// Takes the next branch id.
    pub(super) fn next_branch_id(&self) -> Result<BranchId, CallError> {
        let n = self.inner.next_branch.fetch_add(1, Ordering::Relaxed);
        let id = match &self.inner.joined_by {
            None => n.to_string().parse(),
            Some(context) => context.branch_id().child(n),
        };
        id.map_err(|error: InvalidBranchId| {
            let cause = format!("services are nested too deep: {error}");
            self.call_not_made(CallError::NotRegistered { cause })
        })
    }

    /// Registers no further branch, and says what is known of the transaction.
    pub(super) async fn close(&self) -> Closed {
        self.inner.registrar.close().await
    }

    /// Tells the participants that were called, whether they answered or not, to ask what became of their branches. For an initiator that
    /// hears that its transaction was never recorded. They would ask by themselves once phase one is over. Nothing is cancelled here.
    pub(super) fn nudge(&self, xid: Xid) {
        let called = std::mem::take(&mut *self.called());
        if called.is_empty() {
            return;
        }
        tokio::spawn(async move {
            let nudge = |(branch_id, participant): (BranchId, Remote)| async move {
                participant.nudge(xid, &branch_id).await;
            };
            join_all(called.into_iter().map(nudge)).await;
        });
    }

    fn called(&self) -> MutexGuard<'_, Vec<(BranchId, Remote)>> {
        self.inner.called.lock().expect("nothing panics while it is locked")
    }

    pub(super) fn deadline(&self) -> Instant {
        self.inner.registrar.deadline()
    }

    pub(super) fn calls(&self) -> Calls {
        self.inner.ledger.calls()
    }
}

impl Branch {
    fn to_context(&self) -> pb::BranchContext {
        pb::BranchContext {
            xid: self.xid.to_string(),
            branch_id: self.branch_id.to_string(),
            action: self.action.clone(),
            attempt: self.attempt,
            expires_at: self.expires_at.map(timestamp),
            labels: self.labels.clone(),
            record: match self.at_decision {
                true => pb::Record::AtDecision,
                false => pb::Record::AtBegin,
            }
            .into(),
        }
    }
}

impl fmt::Debug for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registrar = &self.inner.registrar;
        f.debug_struct("Global")
            .field("name", &registrar.description().name)
            .field("begun", &registrar.registration())
            .finish()
    }
}
