//! Coordinator-driven transactions: one call carries the branches and their arguments; the coordinator calls every Try, decides,
//! and runs phase two. For initiators that cannot, or do not want to, call participants themselves.

use std::{fmt, time::Duration};

use bytes::Bytes;
use handfast_proto::{Xid, time::wire_duration, v1 as pb};
use serde::Serialize;
use tonic::{Code, Status};

use super::{
    description::{Description, PATIENCE, TIMEOUT},
    outcome::{Confirmation, Recorded, TransactionError},
};
use crate::{
    contract::{Contract, Payload, TRY_TIMEOUT},
    error::BoxError,
    remote::Remote,
    rpc::{Handfast, from_now},
    status::status_error,
};

/// Describes a global transaction that the coordinator runs.
#[must_use]
#[derive(Clone)]
pub struct ExecuteBuilder {
    handfast: Handfast,
    description: Description,
    branches: Vec<pb::BranchSpec>,
    in_order: bool,
    /// The first call whose arguments cannot be encoded, and why.
    unreadable: Option<String>,
}

/// It is confirmed, for ever.
#[derive(Clone)]
#[non_exhaustive]
pub struct Executed {
    /// The transaction.
    pub xid: Xid,
    /// Every participant has acknowledged. If not, the coordinator is still asking, and will until they have.
    pub completed: bool,
    /// The replies of the Trys, in order. `None`: it was executed before under this key, and replies are not kept.
    replies: Option<Vec<Bytes>>,
}

impl Handfast {
    /// Describes a global transaction of this name that the coordinator runs, Trys included.
    pub fn execute(&self, name: impl Into<String>) -> ExecuteBuilder {
        ExecuteBuilder {
            handfast: self.clone(),
            description: Description::new(name.into()),
            branches: Vec::new(),
            in_order: false,
            unreadable: None,
        }
    }
}

impl ExecuteBuilder {
    /// The same key gives the same transaction, until that is deleted after its retention. At most 128 bytes. By default a random
    /// key is used, so that a lost answer can be asked for again.
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

    /// A label to search by: `order` is `1042`. At most 16.
    pub fn label(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.description.label(key, value);
        self
    }

    /// Each Try after the one before it. Default: all at once.
    pub fn in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// Returns as soon as it is decided. Default: waits up to two seconds for the participants to acknowledge.
    pub fn until_decided(mut self) -> Self {
        self.description.wait = Duration::ZERO;
        self
    }

    /// One more branch. Branch ids are 1, 2, 3, … in this order.
    pub fn call<C: Contract>(mut self, participant: &Remote, args: &C::Args) -> Self {
        let data = args.encode().unwrap_or_else(|error| {
            self.unreadable.get_or_insert(format!("{}: {error}", C::NAME));
            Bytes::new()
        });
        self.branches.push(pb::BranchSpec {
            branch_id: (self.branches.len() + 1).to_string(),
            action: C::NAME.to_owned(),
            participant: participant.name().to_owned(),
            target: participant.target().to_owned(),
            payload: Some(pb::Payload { data, content_type: C::Args::CONTENT_TYPE.to_owned() }),
            carry_payload: false,
            // Only if the contract says so: else the coordinator's configuration counts.
            try_timeout: (C::TRY_TIMEOUT != TRY_TIMEOUT).then(|| wire_duration(C::TRY_TIMEOUT)),
            inquires: false,
        });
        self
    }

    /// Runs it. If an answer is lost, the call is repeated with the same key, so the transaction runs once.
    ///
    /// # Errors
    ///
    /// See [`TransactionError`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the coordinator goes on, and the outcome is unknown.
    pub async fn run(mut self) -> Result<Executed, TransactionError> {
        if let Some(unreadable) = self.unreadable.or(self.description.unreadable.take()) {
            return Err(TransactionError::NotBegun { cause: unreadable.into() });
        }
        let until = self.description.until();
        let random_key = || format!("{:032x}", rand::random::<u128>());
        let key = self.description.key().unwrap_or_else(random_key);
        let Description { name, timeout, labels, fingerprint, wait, .. } = self.description;
        let request = pb::ExecuteRequest {
            name,
            timeout: timeout.map(wire_duration),
            labels,
            idempotency_key: key.clone(),
            branches: self.branches,
            in_order: self.in_order,
            until: until.into(),
            wait: Some(wire_duration(wait)),
            fingerprint,
        };
        let lasts = timeout.unwrap_or(TIMEOUT).saturating_add(wait);
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
        match Recorded::of(xid, &transaction) {
            Recorded::Undecided => Err(unknown(Some(xid), key, "it is not decided yet".into())),
            Recorded::Cancelled(error) => Err(error),
            Recorded::Confirmed(Confirmation { completed, .. }) => {
                let replies =
                    response.replies.into_iter().map(|reply| reply.reply.unwrap_or_default().data);
                let replies = (!response.existed).then(|| replies.collect());
                Ok(Executed { xid, completed, replies })
            }
        }
    }
}

fn failed(status: Status, key: String) -> TransactionError {
    match status.code() {
        // The coordinator has refused the call, so nothing was done.
        Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::OutOfRange => TransactionError::NotBegun { cause: status_error(&status) },
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
        | Code::Unauthenticated => unknown(None, key, status_error(&status)),
    }
}

fn unknown(xid: Option<Xid>, key: String, cause: BoxError) -> TransactionError {
    TransactionError::Unknown { xid, idempotency_key: Some(key), cause }
}

impl Executed {
    /// The reply of the `n`th call's Try, counted from 0. `None` if the transaction was executed before under this key, or there
    /// was no such call.
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
            .field("description", &self.description)
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
