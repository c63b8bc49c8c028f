//! Coordinator-driven transactions: one call carries the branches and their arguments; the coordinator calls every Try, decides,
//! and runs phase two. For initiators that cannot, or do not want to, call participants themselves.

use std::{fmt, time::Duration};

use bytes::Bytes;
use handfast_proto::{Xid, time::wire_duration, v1 as pb};
use tonic::{Code, Status};

use crate::{
    client::{Handfast, Remote, from_now, status_error},
    contract::{Contract, Payload},
    error::BoxError,
    global::NewTransaction,
    outcome::{TransactionError, standing},
};

/// How long phase one may take, if nobody says.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for participants to acknowledge, once it is decided.
const COMPLETION_WAIT: Duration = Duration::from_secs(2);
/// How much longer than phase one a lost answer is asked for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Describes a global transaction that the coordinator runs.
#[must_use]
#[derive(Clone)]
pub struct ExecuteBuilder {
    handfast: Handfast,
    new: NewTransaction,
    branches: Vec<pb::BranchSpec>,
    in_order: bool,
    wait: Duration,
    /// The first call whose arguments cannot be written.
    wrong: Option<String>,
}

/// It is confirmed, for ever.
#[derive(Clone)]
#[non_exhaustive]
pub struct Executed {
    /// Which.
    pub xid: Xid,
    /// Every participant has acknowledged. If not, the coordinator is still asking, and will until they have.
    pub completed: bool,
    /// What the Trys answered, in order; `None`: it was executed before under this key, and replies are not kept.
    replies: Option<Vec<Bytes>>,
}

impl ExecuteBuilder {
    pub(crate) fn new(handfast: Handfast, name: String) -> Self {
        let new = NewTransaction { name, ..NewTransaction::default() };
        Self {
            handfast,
            new,
            branches: Vec::new(),
            in_order: false,
            wait: COMPLETION_WAIT,
            wrong: None,
        }
    }

    /// The same key gives the same transaction, until that is deleted after its retention. At most 128 bytes. Without one a key
    /// is made up, so that a lost answer can be asked for.
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

    /// Each Try after the one before it. Default: all at once.
    pub fn in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// Returns as soon as it is decided. Default: waits up to two seconds for the participants to acknowledge.
    pub fn until_decided(mut self) -> Self {
        self.wait = Duration::ZERO;
        self
    }

    /// One more branch. Branch ids are 1, 2, 3, … in this order.
    pub fn call<C: Contract>(mut self, participant: &Remote, args: &C::Args) -> Self {
        let data = args.encode().unwrap_or_else(|error| {
            self.wrong.get_or_insert(format!("{}: {error}", C::NAME));
            Bytes::new()
        });
        self.branches.push(pb::BranchSpec {
            branch_id: (self.branches.len() + 1).to_string(),
            action: C::NAME.to_owned(),
            participant: participant.name().to_owned(),
            target: participant.target().to_owned(),
            payload: Some(pb::Payload { data, content_type: C::Args::CONTENT_TYPE.to_owned() }),
            carry_payload: false,
        });
        self
    }

    /// Runs it. A lost answer is asked for again under the same key, which does not run it twice.
    ///
    /// # Errors
    ///
    /// See [`TransactionError`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped the outcome is unknown: the coordinator goes on.
    pub async fn run(self) -> Result<Executed, TransactionError> {
        if let Some(wrong) = self.wrong {
            return Err(TransactionError::NotBegun { cause: wrong.into() });
        }
        let key = if self.new.key.is_empty() {
            format!("{:032x}", rand::random::<u128>())
        } else {
            self.new.key
        };
        let until = if self.wait.is_zero() { pb::Until::Decided } else { pb::Until::Completed };
        let request = pb::ExecuteRequest {
            name: self.new.name,
            timeout: self.new.timeout.map(wire_duration),
            labels: self.new.labels,
            idempotency_key: key.clone(),
            branches: self.branches,
            in_order: self.in_order,
            until: until.into(),
            wait: Some(wire_duration(self.wait)),
        };
        let lasts = self.new.timeout.unwrap_or(TIMEOUT).saturating_add(self.wait);
        let deadline = from_now(lasts.saturating_add(PATIENCE));
        let response = match self.handfast.run_execute(request, lasts, deadline).await {
            Ok(response) => response,
            Err(status) => return Err(failed(status, key)),
        };
        let transaction = response.transaction.unwrap_or_default();
        let xid: Xid = match transaction.xid.parse() {
            Ok(xid) => xid,
            Err(error) => return Err(unknown(None, key, Box::new(error))),
        };
        match standing::<()>(xid, &transaction) {
            None => Err(unknown(Some(xid), key, "it is not decided yet".into())),
            Some(Err(error)) => Err(error),
            Some(Ok(confirmed)) => {
                let replies =
                    response.replies.into_iter().map(|reply| reply.reply.unwrap_or_default().data);
                let replies = (!response.existed).then(|| replies.collect());
                Ok(Executed { xid, completed: confirmed.completed, replies })
            }
        }
    }
}

fn failed(status: Status, key: String) -> TransactionError {
    match status.code() {
        // The call was not taken, and says why.
        Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::OutOfRange => TransactionError::NotBegun { cause: status_error(status) },
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => unknown(None, key, status_error(status)),
    }
}

fn unknown(xid: Option<Xid>, key: String, cause: BoxError) -> TransactionError {
    TransactionError::Unknown { xid, idempotency_key: Some(key), cause }
}

impl Executed {
    /// What the Try of the `n`th call (from 0) answered; `None` if it was executed before under this key, or there was no such
    /// call.
    ///
    /// # Errors
    ///
    /// When the reply cannot be read.
    pub fn reply<C: Contract>(&self, n: usize) -> Result<Option<C::Reply>, BoxError> {
        let reply = self.replies.as_ref().and_then(|replies| replies.get(n));
        reply.map(|reply| C::Reply::decode(reply)).transpose()
    }
}

/// Never prints a payload.
impl fmt::Debug for ExecuteBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let branches: Vec<_> = self.branches.iter().map(|branch| &branch.action).collect();
        f.debug_struct("ExecuteBuilder")
            .field("new", &self.new)
            .field("branches", &branches)
            .finish_non_exhaustive()
    }
}

/// Never prints a reply.
impl fmt::Debug for Executed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executed")
            .field("xid", &self.xid)
            .field("completed", &self.completed)
            .finish_non_exhaustive()
    }
}
