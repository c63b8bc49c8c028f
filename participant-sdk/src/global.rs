//! A global transaction while it is being tried: its calls, and what is known of each.
//!
//! A branch is durable at the coordinator before its Try is sent. Registrations of calls that are polled together travel
//! together, the first ones with Begin itself, so that a transaction whose Trys run in parallel waits for one durable write
//! before them.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use handfast_proto::{
    BranchId, Xid,
    calls::{BranchCall, BranchRequest},
    connection::DEADLINE_MARGIN,
    crash_point,
    time::{millis, timestamp, wire_duration},
    v1 as pb,
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tonic::{Code, Status};

use crate::{
    branch::{Branch, Phase},
    client::{
        Handfast, Reach, Reason, Remote, from_now, leaves_open, may_be_repeated, status_error,
    },
    contract::{Contract, Payload},
    error::{BoxError, Refusal},
    propagation::Context,
};

/// How long one attempt of a Try may take.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts of one Try. A repeat is harmless, since Trys are fenced.
const TRY_ATTEMPTS_MAX: u32 = 3;
/// Pause before a Try is repeated; doubles.
const TRY_PAUSE: Duration = Duration::from_millis(50);
/// How long phase one of a transaction that was joined may take, as far as this service can tell. The coordinator knows better.
const JOINED_TIMEOUT: Duration = Duration::from_secs(30);

/// What is asked for when it begins.
#[derive(Debug, Clone, Default)]
pub(crate) struct NewTransaction {
    pub(crate) name: String,
    pub(crate) timeout: Option<Duration>,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    pub(crate) key: String,
}

impl NewTransaction {
    /// Whether this one, found under the same key, is the same operation, whoever drives it: then its outcome is ours.
    pub(crate) fn is_same_operation(&self, found: &pb::Transaction) -> bool {
        found.name == self.name
    }
}

/// A global transaction while it is being tried. `&self` everywhere, so calls can run side by side; cheap to clone.
#[derive(Clone)]
pub struct Global {
    inner: Arc<Inner>,
}

struct Inner {
    handfast: Handfast,
    new: NewTransaction,
    /// In front of the branch ids, in a transaction that was joined.
    parent: Option<BranchId>,
    /// Where a transaction that was joined reports what was tried with success.
    report: Option<Context>,
    next_branch: AtomicUsize,
    /// When phase one ends, as far as this side can tell.
    deadline: Instant,
    registrar: Mutex<Registrar>,
    /// The registrar has nothing under way.
    idle: Notify,
    ledger: Mutex<Ledger>,
}

/// Begin and RegisterBranch.
#[derive(Default)]
struct Registrar {
    begun: Option<Begun>,
    /// Waiting for the next call. Without a branch: only for the xid.
    queue: Vec<Wanted>,
    under_way: bool,
    /// Nothing more is registered: it is being decided, or was given up.
    closed: bool,
    /// Found by its key, and decided before.
    standing: Option<pb::Transaction>,
    /// Its key led to one that was there before.
    existed: bool,
    /// Begin had no clear answer.
    unanswered: bool,
}

/// A registration, and who waits for it.
type Wanted = (Option<pb::BranchSpec>, oneshot::Sender<Result<Begun, CallError>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) xid: Xid,
    /// UTC milliseconds since 1970.
    expires_at: Option<i64>,
}

/// What became of the calls so far.
#[derive(Default)]
struct Ledger {
    /// Branches that somebody here meant to try.
    meant: BTreeSet<BranchId>,
    /// Branches whose Try is known to be OK, nested ones too.
    tried: BTreeSet<BranchId>,
    /// The first refusal, else the first failure.
    failed: Option<CallError>,
}

/// Why a call brought no reply. The transaction will be cancelled, also if you swallow this.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The participant said no.
    #[error("{action} refused: {refusal}")]
    #[non_exhaustive]
    Refused {
        /// Which branch.
        branch_id: BranchId,
        /// What was asked for.
        action: String,
        /// Why, as the participant wrote it.
        refusal: Refusal,
    },
    /// Nobody knows whether something was reserved.
    #[error("{action} brought no clear answer: {cause}")]
    #[non_exhaustive]
    Unknown {
        /// Which branch.
        branch_id: BranchId,
        /// What was asked for.
        action: String,
        /// What came instead.
        cause: String,
    },
    /// The branch could not be registered, so it was not tried.
    #[error("cannot register with the coordinator, so nothing was tried: {cause}")]
    #[non_exhaustive]
    NotRegistered {
        /// Why not.
        cause: String,
    },
    /// The arguments cannot be written, or the reply cannot be read.
    #[error("{action}: {cause}")]
    #[non_exhaustive]
    Payload {
        /// What was asked for.
        action: String,
        /// What is wrong.
        cause: String,
    },
}

/// How phase one went, as far as the calls tell.
pub(crate) enum Calls {
    /// Every branch here has been tried with success.
    Tried(BTreeSet<BranchId>),
    /// One was refused, or had no clear answer.
    Failed(CallError),
}

impl Global {
    pub(crate) fn new(handfast: Handfast, new: NewTransaction, timeout: Duration) -> Self {
        Self::from_parts(handfast, new, None, Registrar::default(), timeout)
    }

    pub(crate) fn joined(handfast: Handfast, context: &Context) -> Self {
        let begun = Some(Begun { xid: context.xid, expires_at: None });
        let registrar = Registrar { begun, ..Registrar::default() };
        Self::from_parts(
            handfast,
            NewTransaction::default(),
            Some(context.clone()),
            registrar,
            JOINED_TIMEOUT,
        )
    }

    fn from_parts(
        handfast: Handfast,
        new: NewTransaction,
        report: Option<Context>,
        registrar: Registrar,
        timeout: Duration,
    ) -> Self {
        let inner = Inner {
            handfast,
            new,
            parent: report.as_ref().map(|context| context.branch_id.clone()),
            report,
            next_branch: AtomicUsize::new(1),
            deadline: from_now(timeout),
            registrar: Mutex::new(registrar),
            idle: Notify::new(),
            ledger: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Its xid. Begins it at the coordinator, if no call has done that yet.
    ///
    /// # Errors
    ///
    /// When it cannot be begun.
    pub async fn xid(&self) -> Result<Xid, CallError> {
        let begun = self.registrar().begun;
        match begun {
            Some(begun) => Ok(begun.xid),
            None => Ok(self.register(None).await?.xid),
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
    /// A call that is given up counts as one without a clear answer.
    pub fn call<'a, C: Contract>(
        &'a self,
        participant: &'a Remote,
        args: C::Args,
    ) -> impl Future<Output = Result<C::Reply, CallError>> + Send + 'a {
        let branch_id = self.next_branch_id();
        async move {
            let branch_id = branch_id?;
            let wrong = |cause: BoxError| CallError::Payload {
                action: C::NAME.to_owned(),
                cause: cause.to_string(),
            };
            let payload = args.encode().map_err(wrong);
            let reply = match payload {
                Ok(payload) => {
                    let payload = pb::Payload {
                        data: payload,
                        content_type: C::Args::CONTENT_TYPE.to_owned(),
                    };
                    self.call_raw(participant, &branch_id, C::NAME, payload).await
                }
                Err(error) => Err(error),
            };
            let reply = reply.and_then(|reply| C::Reply::decode(&reply).map_err(wrong));
            let mut ledger = self.ledger();
            match &reply {
                Ok(_) => {
                    ledger.tried.insert(branch_id.clone());
                    if let Some(context) = &self.inner.report {
                        context.tried(branch_id);
                    }
                }
                Err(error) => ledger.failed(error.clone()),
            }
            drop(ledger);
            reply
        }
    }

    async fn call_raw(
        &self,
        participant: &Remote,
        branch_id: &BranchId,
        action: &str,
        payload: pb::Payload,
    ) -> Result<Bytes, CallError> {
        self.ledger().meant.insert(branch_id.clone());
        let spec = pb::BranchSpec {
            branch_id: branch_id.to_string(),
            action: action.to_owned(),
            participant: participant.name().to_owned(),
            target: participant.target().to_owned(),
            payload: None,
            carry_payload: false,
        };
        let begun = self.register(Some(spec)).await?;
        crash_point!("initiator.registered");
        let mut attempt = 1;
        loop {
            let mut branch = Branch::new(begun.xid, branch_id.clone(), action, Phase::Try);
            branch.attempt = attempt;
            branch.expires_at = begun.expires_at;
            branch.labels = self.inner.new.labels.clone();
            let status = match self.try_once(participant, branch, &payload).await {
                Ok(reply) => return Ok(reply),
                Err(status) => status,
            };
            if let Some(refusal) = Refusal::from_status(&status) {
                let (branch_id, action) = (branch_id.clone(), action.to_owned());
                return Err(CallError::Refused { branch_id, action, refusal });
            }
            // A participant that is slow is not asked again: it has work enough.
            let again = may_be_repeated(&status) && status.code() != Code::DeadlineExceeded;
            let pause = TRY_PAUSE * 2_u32.pow(attempt - 1);
            if !again
                || attempt >= TRY_ATTEMPTS_MAX
                || Instant::now() + pause >= self.inner.deadline
            {
                let (branch_id, action) = (branch_id.clone(), action.to_owned());
                return Err(CallError::Unknown {
                    branch_id,
                    action,
                    cause: status_error(status).to_string(),
                });
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
    ) -> Result<Bytes, Status> {
        let ends = self.inner.deadline.min(Instant::now() + TRY_TIMEOUT);
        let attempt = async {
            match &participant.reach {
                Reach::Here(participant) => {
                    participant.handle(&branch, &payload.data).await.into_result()
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
        tokio::time::timeout_at(ends, attempt)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("the Try was not answered in time")))
    }

    /// Takes in the branch ids that a callee has registered and tried with success, from the headers of its response.
    pub(crate) fn nested<'a>(&self, headers: impl Iterator<Item = &'a [u8]>) {
        for id in headers.flat_map(|header| header.split(|byte| *byte == b',')) {
            let Some(id) =
                std::str::from_utf8(id).ok().and_then(|id| id.trim().parse::<BranchId>().ok())
            else {
                continue; // not ours; the coordinator knows what is registered, and Confirm must name it all
            };
            if let Some(context) = &self.inner.report {
                context.tried(id.clone());
            }
            self.ledger().tried.insert(id);
        }
    }

    /// Notes that a call was not even made. If the closure swallows it, the transaction is cancelled all the same.
    pub(crate) fn call_not_made(&self, error: CallError) -> CallError {
        self.ledger().failed(error.clone());
        error
    }

    /// Notes that an ordinary call within the transaction failed.
    pub(crate) fn ordinary_call_failed(&self, branch_id: BranchId, cause: String) {
        self.ledger().failed(CallError::Unknown {
            branch_id,
            action: "a call to another service".to_owned(),
            cause,
        });
    }

    /// Sets the next branch id aside.
    pub(crate) fn next_branch_id(&self) -> Result<BranchId, CallError> {
        let n = self.inner.next_branch.fetch_add(1, Ordering::Relaxed);
        let id = match &self.inner.parent {
            None => n.to_string().parse(),
            Some(parent) => parent.child(n),
        };
        id.map_err(|error: handfast_proto::id::InvalidBranchId| {
            let error = CallError::NotRegistered {
                cause: format!("services are nested too deep: {error}"),
            };
            self.ledger().failed(error.clone());
            error
        })
    }

    /// Registers a branch, and begins the transaction if it is the first. Completes when it is durable.
    async fn register(&self, spec: Option<pb::BranchSpec>) -> Result<Begun, CallError> {
        let (registered, answer) = oneshot::channel();
        {
            let mut registrar = self.registrar();
            if registrar.closed {
                return Err(CallError::NotRegistered {
                    cause: "the transaction is over".to_owned(),
                });
            }
            registrar.queue.push((spec, registered));
        }
        // Calls that are polled together put theirs into the queue before this one goes on.
        tokio::task::yield_now().await;
        let send = {
            let mut registrar = self.registrar();
            let send = !registrar.under_way && !registrar.queue.is_empty();
            registrar.under_way |= send;
            send
        };
        if send {
            // In a task of its own: whoever asked may give up, and the others still wait for it.
            tokio::spawn(self.clone().send_registrations());
        }
        answer.await.unwrap_or_else(|_| {
            Err(CallError::NotRegistered { cause: "it was given up before that".to_owned() })
        })
    }

    async fn send_registrations(self) {
        loop {
            let (queue, begun) = {
                let mut registrar = self.registrar();
                if registrar.queue.is_empty() {
                    registrar.under_way = false;
                    drop(registrar);
                    self.inner.idle.notify_waiters();
                    return;
                }
                (std::mem::take(&mut registrar.queue), registrar.begun)
            };
            let (specs, waiting): (Vec<_>, Vec<_>) = queue.into_iter().unzip();
            let specs: Vec<_> = specs.into_iter().flatten().collect();
            let answer = match begun {
                None => self.send_begin(specs).await,
                Some(begun) if specs.is_empty() => Ok(begun),
                Some(begun) => self.send_register(begun, specs).await,
            };
            for waiting in waiting {
                drop(waiting.send(answer.clone())); // it may have been given up
            }
        }
    }

    async fn send_begin(&self, branches: Vec<pb::BranchSpec>) -> Result<Begun, CallError> {
        let NewTransaction { name, timeout, labels, key } = self.inner.new.clone();
        let timeout = timeout.map(wire_duration);
        let request = pb::BeginRequest {
            name,
            timeout,
            labels,
            idempotency_key: key,
            branches: branches.clone(),
        };
        let (transaction, existed) =
            match self.inner.handfast.begin(request, self.inner.deadline).await {
                Ok(response) => (response.transaction.unwrap_or_default(), response.existed),
                Err(status) => (self.begun_otherwise(status).await?, true),
            };
        let begun = begun(&transaction)?;
        self.registrar().begun = Some(begun);
        if existed {
            self.registrar().existed = true;
            if transaction.decision() != pb::Decision::Unspecified {
                self.registrar().standing = Some(transaction);
                return Err(CallError::NotRegistered {
                    cause: "this key has been decided before".to_owned(),
                });
            }
            // Begun by an earlier run, perhaps with fewer branches than these.
            return self.send_register(begun, branches).await;
        }
        Ok(begun)
    }

    /// A key that was taken may have been taken by an earlier run of the same operation that got its first branches together in
    /// another way. That one is taken up: branch by branch the coordinator sees to it that they are the same.
    async fn begun_otherwise(&self, status: Status) -> Result<pb::Transaction, CallError> {
        if Reason::of(&status) == Reason::KeyTaken {
            let by = pb::get_transaction_request::By::IdempotencyKey(self.inner.new.key.clone());
            match self.inner.handfast.get(by, self.inner.deadline).await {
                Ok(taken) if !self.inner.new.is_same_operation(&taken) => {}
                // Branch by branch the coordinator sees to it that they are the same.
                Ok(taken) if taken.drive() == pb::Drive::Initiator => return Ok(taken),
                Ok(_) => {
                    // Driven by the coordinator, which may confirm it.
                    self.registrar().unanswered = true;
                    return Err(not_registered(status));
                }
                Err(status) => {
                    // Another run with this key is there, and may confirm.
                    self.registrar().unanswered = true;
                    return Err(not_registered(status));
                }
            }
        }
        self.registrar().unanswered = leaves_open(&status);
        Err(not_registered(status))
    }

    async fn send_register(
        &self,
        before: Begun,
        branches: Vec<pb::BranchSpec>,
    ) -> Result<Begun, CallError> {
        if branches.is_empty() {
            return Ok(before);
        }
        let request = pb::RegisterBranchRequest { xid: before.xid.to_string(), branches };
        let transaction = self
            .inner
            .handfast
            .register(request, self.inner.deadline)
            .await
            .map_err(not_registered)?;
        let begun = begun(&transaction)?;
        self.registrar().begun = Some(begun);
        Ok(begun)
    }

    /// No further branch is registered from here on. Waits for what is under way, and tells whether it was begun.
    pub(crate) async fn close(&self) -> Option<Begun> {
        loop {
            let idle = self.inner.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            {
                let mut registrar = self.registrar();
                registrar.closed = true;
                registrar.queue.clear();
                if !registrar.under_way {
                    return registrar.begun;
                }
            }
            idle.await;
        }
    }

    /// What was decided before, if the key led to a transaction that was.
    pub(crate) fn standing(&self) -> Option<pb::Transaction> {
        self.registrar().standing.clone()
    }

    /// Its key led to a transaction that another run had begun.
    pub(crate) fn existed(&self) -> bool {
        self.registrar().existed
    }

    /// Begin had no clear answer, so a transaction of this run's key may be there.
    pub(crate) fn unanswered(&self) -> bool {
        self.registrar().unanswered
    }

    pub(crate) fn key(&self) -> Option<String> {
        Some(self.inner.new.key.clone()).filter(|key| !key.is_empty())
    }

    pub(crate) fn handfast(&self) -> &Handfast {
        &self.inner.handfast
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.inner.deadline
    }

    pub(crate) fn calls(&self) -> Calls {
        let ledger = self.ledger();
        if let Some(error) = &ledger.failed {
            return Calls::Failed(error.clone());
        }
        match ledger.meant.difference(&ledger.tried).next() {
            None => Calls::Tried(ledger.tried.clone()),
            Some(given_up) => Calls::Failed(CallError::Unknown {
                branch_id: given_up.clone(),
                action: "a call".to_owned(),
                cause: "it was given up before it was answered".to_owned(),
            }),
        }
    }

    fn registrar(&self) -> MutexGuard<'_, Registrar> {
        self.inner.registrar.lock().expect("nothing panics while it is locked")
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.inner.ledger.lock().expect("nothing panics while it is locked")
    }
}

impl Ledger {
    fn failed(&mut self, error: CallError) {
        let refused = matches!(error, CallError::Refused { .. });
        match &self.failed {
            None => self.failed = Some(error),
            Some(CallError::Refused { .. }) => {}
            Some(_) if refused => self.failed = Some(error), // says more than a failure
            Some(_) => {}
        }
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
        }
    }
}

fn not_registered(status: Status) -> CallError {
    CallError::NotRegistered { cause: status_error(status).to_string() }
}

fn begun(transaction: &pb::Transaction) -> Result<Begun, CallError> {
    let xid = transaction.xid.parse().map_err(|error: handfast_proto::id::InvalidXid| {
        CallError::NotRegistered {
            cause: format!("the coordinator's answer makes no sense: {error}"),
        }
    })?;
    Ok(Begun { xid, expires_at: transaction.expires_at.as_ref().map(millis) })
}

impl fmt::Debug for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Global")
            .field("name", &self.inner.new.name)
            .field("begun", &self.registrar().begun)
            .finish()
    }
}
