//! Begin and RegisterBranch: how the coordinator learns of branches before their Trys are sent.
//!
//! Calls that are polled together are registered together, the first ones with Begin itself. So a transaction whose Trys run in
//! parallel waits for one durable write before them.

use std::sync::{Arc, Mutex, MutexGuard};

use handfast_proto::{
    Xid,
    id::InvalidXid,
    time::{millis, wire_duration},
    v1 as pb,
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tonic::Status;

use super::{description::Description, ledger::CallError};
use crate::{
    context::Context,
    rpc::Handfast,
    status::{Reason, leaves_open, status_error},
};

/// Registers the branches of one global transaction. Cheap to clone.
#[derive(Clone)]
pub(super) struct Registrar(Arc<Inner>);

struct Inner {
    handfast: Handfast,
    description: Description,
    /// When phase one ends, as far as this program can tell.
    deadline: Instant,
    state: Mutex<State>,
    /// Notified when no call to the coordinator is in flight any more.
    idle: Notify,
}

#[derive(Default)]
struct State {
    /// `None`: the transaction is not begun.
    registration: Option<Registration>,
    /// They wait for the next call to the coordinator.
    queue: Vec<Waiting>,
    /// A task is sending what is in the queue.
    in_flight: bool,
    /// Nothing more is registered: the transaction is being decided, or was given up.
    closed: bool,
    /// The key led to this transaction, which was decided before this run.
    decided_before: Option<pb::Transaction>,
    /// The key led to a transaction that another run had begun.
    existed: bool,
    /// Begin had no clear answer, so there may be a transaction with this key.
    unanswered: bool,
}

/// A caller that waits until its branch is registered.
struct Waiting {
    /// `None`: the caller only wants the xid.
    branch: Option<pb::BranchSpec>,
    caller: oneshot::Sender<Result<Registration, CallError>>,
}

/// What the coordinator has said of an open transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) xid: Xid,
    /// The end of phase one, UTC milliseconds since 1970.
    pub(super) expires_at: Option<i64>,
    /// It may be lost until it is decided. Its Trys must say so.
    pub(super) at_decision: bool,
}

/// What is known of the transaction once no further branch is registered.
pub(super) enum Closed {
    Begun {
        xid: Xid,
        /// Another run with the same key had begun it.
        existed: bool,
    },
    /// Its key led to a transaction that was decided before.
    DecidedBefore { xid: Xid, transaction: Box<pb::Transaction> },
    NotBegun {
        /// It may have been begun all the same: Begin had no clear answer.
        unanswered: bool,
    },
}

impl Registrar {
    /// For a transaction that is begun with its first branch.
    pub(super) fn new(handfast: Handfast, description: Description, deadline: Instant) -> Self {
        Self::with_state(handfast, description, deadline, State::default())
    }

    /// For a transaction that somebody else has begun.
    pub(super) fn joined(handfast: Handfast, context: &Context, deadline: Instant) -> Self {
        let (xid, at_decision) = (context.xid(), context.at_decision());
        let registration = Some(Registration { xid, expires_at: None, at_decision });
        let state = State { registration, ..State::default() };
        Self::with_state(handfast, Description::new(String::new()), deadline, state)
    }

    fn with_state(
        handfast: Handfast,
        description: Description,
        deadline: Instant,
        state: State,
    ) -> Self {
        let (state, idle) = (Mutex::new(state), Notify::new());
        Self(Arc::new(Inner { handfast, description, deadline, state, idle }))
    }

    pub(super) fn description(&self) -> &Description {
        &self.0.description
    }

    pub(super) fn deadline(&self) -> Instant {
        self.0.deadline
    }

    /// `None`: the transaction is not begun.
    pub(super) fn registration(&self) -> Option<Registration> {
        self.state().registration
    }

    /// Whether participants should be asked if they inquire.
    pub(super) fn may_be_lost(&self) -> bool {
        self.registration().map_or(self.0.description.at_decision, |begun| begun.at_decision)
    }

    /// Registers a branch, and begins the transaction if it is the first one. Returns when the branch is durable.
    pub(super) async fn register(
        &self,
        branch: Option<pb::BranchSpec>,
    ) -> Result<Registration, CallError> {
        let (caller, answer) = oneshot::channel();
        {
            let mut state = self.state();
            if state.closed {
                return Err(CallError::NotRegistered {
                    cause: "the transaction is over".to_owned(),
                });
            }
            state.queue.push(Waiting { branch, caller });
        }
        // Calls that are polled together put theirs into the queue before this one goes on.
        tokio::task::yield_now().await;
        let send = {
            let mut state = self.state();
            let send = !state.in_flight && !state.queue.is_empty();
            state.in_flight |= send;
            send
        };
        if send {
            // In a task of its own: this caller may be dropped while the others still wait for the answer.
            tokio::spawn(self.clone().send_queue());
        }
        answer.await.unwrap_or_else(|_| {
            Err(CallError::NotRegistered { cause: "the registration was abandoned".to_owned() })
        })
    }

    async fn send_queue(self) {
        loop {
            let (mut queue, registration) = {
                let mut state = self.state();
                if state.queue.is_empty() {
                    state.in_flight = false;
                    drop(state);
                    self.0.idle.notify_waiters();
                    return;
                }
                (std::mem::take(&mut state.queue), state.registration)
            };
            let branches: Vec<_> =
                queue.iter_mut().filter_map(|waiting| waiting.branch.take()).collect();
            let answer = match registration {
                None => self.begin(branches).await,
                Some(registration) => self.add(registration, branches).await,
            };
            for Waiting { caller, .. } in queue {
                drop(caller.send(answer.clone())); // the caller may have been dropped
            }
        }
    }

    async fn begin(&self, branches: Vec<pb::BranchSpec>) -> Result<Registration, CallError> {
        let Description { name, timeout, labels, key, fingerprint, at_decision, .. } =
            self.0.description.clone();
        let request = pb::BeginRequest {
            name,
            timeout: timeout.map(wire_duration),
            labels,
            idempotency_key: key,
            branches: branches.clone(),
            fingerprint,
            record: match at_decision {
                true => pb::Record::AtDecision,
                false => pb::Record::AtBegin,
            }
            .into(),
        };
        let (transaction, existed) = match self.0.handfast.begin(request, self.0.deadline).await {
            Ok(response) => (response.transaction.unwrap_or_default(), response.existed),
            Err(status) => (self.begun_by_another_run(status).await?, true),
        };
        let registration = Registration::of(&transaction)?;
        {
            let mut state = self.state();
            state.registration = Some(registration);
            state.existed = existed;
            if !existed {
                return Ok(registration);
            }
            if transaction.decision() != pb::Decision::Unspecified {
                state.decided_before = Some(transaction);
                return Err(CallError::NotRegistered {
                    cause: "this key has been decided before".to_owned(),
                });
            }
        }
        // An earlier run has begun it, perhaps with fewer branches than these.
        self.add(registration, branches).await
    }

    /// The key was taken. An earlier run of the same operation may have taken it and sent other branches with its Begin. Then this
    /// run continues that transaction: the coordinator compares each branch when it is registered.
    async fn begun_by_another_run(&self, status: Status) -> Result<pb::Transaction, CallError> {
        if Reason::of(&status) != Reason::KeyTaken {
            self.state().unanswered = leaves_open(&status);
            return Err(not_registered(status));
        }
        let by = pb::get_transaction_request::By::IdempotencyKey(self.0.description.key.clone());
        let fingerprint = self.0.description.fingerprint.clone();
        match self.0.handfast.get_same(by, fingerprint, self.0.deadline).await {
            Err(status) if Reason::of(&status) == Reason::KeyTaken => {
                // It belongs to a run with other arguments.
                self.state().unanswered = false;
                Err(not_registered(status))
            }
            Ok(taken) if !self.0.description.is_same_operation(&taken) => {
                self.state().unanswered = false;
                Err(not_registered(status))
            }
            Ok(taken) if taken.drive() == pb::Drive::Initiator => Ok(taken),
            Ok(_) => {
                // The coordinator drives it, and may confirm it.
                self.state().unanswered = true;
                Err(not_registered(status))
            }
            Err(status) => {
                // Another run with this key exists, and may confirm it.
                self.state().unanswered = true;
                Err(not_registered(status))
            }
        }
    }

    async fn add(
        &self,
        before: Registration,
        branches: Vec<pb::BranchSpec>,
    ) -> Result<Registration, CallError> {
        if branches.is_empty() {
            return Ok(before);
        }
        let request = pb::RegisterBranchRequest { xid: before.xid.to_string(), branches };
        let transaction =
            self.0.handfast.register(request, self.0.deadline).await.map_err(not_registered)?;
        let registration = Registration::of(&transaction)?;
        self.state().registration = Some(registration);
        Ok(registration)
    }

    /// Registers no further branch. Waits for the call in flight, then says what is known of the transaction.
    pub(super) async fn close(&self) -> Closed {
        loop {
            let idle = self.0.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            {
                let mut state = self.state();
                state.closed = true;
                state.queue.clear();
                if !state.in_flight {
                    return state.closed();
                }
            }
            idle.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("nothing panics while it is locked")
    }
}

impl State {
    fn closed(&self) -> Closed {
        match (self.registration, &self.decided_before) {
            (None, _) => Closed::NotBegun { unanswered: self.unanswered },
            (Some(Registration { xid, .. }), None) => Closed::Begun { xid, existed: self.existed },
            (Some(Registration { xid, .. }), Some(transaction)) => {
                Closed::DecidedBefore { xid, transaction: Box::new(transaction.clone()) }
            }
        }
    }
}

fn not_registered(status: Status) -> CallError {
    CallError::NotRegistered { cause: status_error(&status).to_string() }
}

impl Registration {
    fn of(transaction: &pb::Transaction) -> Result<Self, CallError> {
        let xid =
            transaction.xid.parse().map_err(|error: InvalidXid| CallError::NotRegistered {
                cause: format!("the coordinator's answer has an invalid xid: {error}"),
            })?;
        let at_decision = transaction.record() == pb::Record::AtDecision;
        let expires_at = transaction.expires_at.as_ref().map(millis);
        Ok(Self { xid, expires_at, at_decision })
    }
}
