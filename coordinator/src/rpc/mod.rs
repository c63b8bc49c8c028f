//! The gRPC services. A method is a few lines: parse, ask, answer. The .proto files say what each method guarantees.

mod connection;
mod deadline;
mod each_call;
pub(crate) mod health;
mod request;
mod response;
mod status;
mod stream;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use handfast_proto::{
    limits,
    v1::{
        self as pb,
        admin_service_server::{AdminService, AdminServiceServer},
        coordinator_service_server::{CoordinatorService, CoordinatorServiceServer},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use self::{
    connection::waiting_permit,
    deadline::bounded,
    request::{NewRequest, invalid},
};
pub use self::{
    connection::{Connection, HANDSHAKE_WITHIN, STREAMS_MAX},
    deadline::InTime,
    each_call::EachCall,
};
use crate::{
    coordinator::Coordinator,
    dispatch::Targets,
    partition::{Error, Until, What},
    store::Listed,
    transaction::{Drive, GlobalTransaction},
};

/// Both services of one coordinator.
#[derive(Debug, Clone)]
pub struct Services {
    coordinator: Arc<Coordinator>,
    targets: Arc<Targets>,
    timeout_default: Duration,
    /// Cancelled when streams accept no further calls.
    closing: CancellationToken,
    /// Holds a token for each call until its last byte is sent.
    under_way: TaskTracker,
}

impl Services {
    /// `timeout_default` is the timeout of phase one for transactions that set none.
    #[must_use]
    pub fn new(
        coordinator: Arc<Coordinator>,
        targets: Arc<Targets>,
        timeout_default: Duration,
    ) -> Self {
        Self {
            coordinator,
            targets,
            timeout_default,
            closing: CancellationToken::new(),
            under_way: TaskTracker::new(),
        }
    }

    /// Once `closing` is cancelled, streams accept no further calls, and end when the accepted ones are answered. Otherwise
    /// tonic would wait for the callers to end their streams.
    #[must_use]
    pub fn until(self, closing: CancellationToken) -> Self {
        Self { closing, ..self }
    }

    /// The wrapper for these services and for gRPC's own.
    #[must_use]
    pub fn each_call(&self) -> EachCall {
        EachCall::new(self.under_way.clone(), self.closing.clone())
    }

    /// Completes when no call is in flight.
    pub async fn all_answered(&self) {
        self.under_way.close();
        self.under_way.wait().await;
    }

    /// The service for initiators, with its limits.
    #[must_use]
    pub fn for_initiators(&self) -> InTime<CoordinatorServiceServer<Self>> {
        let service = CoordinatorServiceServer::new(self.clone())
            .max_decoding_message_size(limits::REQUEST_BYTES_MAX)
            .max_encoding_message_size(limits::RESPONSE_BYTES_MAX);
        InTime(service)
    }

    /// The service for operators, with its limits.
    #[must_use]
    pub fn for_operators(&self) -> InTime<AdminServiceServer<Self>> {
        let service = AdminServiceServer::new(self.clone())
            .max_decoding_message_size(limits::REQUEST_BYTES_MAX)
            .max_encoding_message_size(limits::RESPONSE_BYTES_MAX);
        InTime(service)
    }

    fn transaction(&self, global: &GlobalTransaction) -> Option<pb::Transaction> {
        Some(response::transaction(global, self.coordinator.is_stuck(global), &self.targets))
    }

    /// A transaction without labels and branches, for the calls that every transaction makes.
    fn head(&self, global: &GlobalTransaction) -> Option<pb::Transaction> {
        Some(response::head(global, self.coordinator.is_stuck(global)))
    }
}

#[tonic::async_trait]
impl CoordinatorService for Services {
    async fn begin(
        &self,
        request: Request<pb::BeginRequest>,
    ) -> Result<Response<pb::BeginResponse>, Status> {
        let request = NewRequest::from(request.into_inner());
        let new = request::new_transaction(request, &self.targets, self.timeout_default)?;
        let answer = self.coordinator.begin(new, Until::Now).await?;
        let transaction = self.head(&answer.global);
        Ok(Response::new(pb::BeginResponse { transaction, existed: answer.existed }))
    }

    async fn register_branch(
        &self,
        request: Request<pb::RegisterBranchRequest>,
    ) -> Result<Response<pb::RegisterBranchResponse>, Status> {
        let pb::RegisterBranchRequest { xid, branches } = request.into_inner();
        let xid = request::xid(&xid)?;
        if branches.is_empty() {
            return invalid("branches", "must not be empty")?;
        }
        let branches = request::branches(branches, Drive::Initiator, &self.targets)?;
        let answer =
            self.coordinator.ask(xid, What::Register(branches), Until::Now, Duration::ZERO).await?;
        Ok(Response::new(pb::RegisterBranchResponse { transaction: self.head(&answer.global) }))
    }

    async fn decide(
        &self,
        request: Request<pb::DecideRequest>,
    ) -> Result<Response<pb::DecideResponse>, Status> {
        // An answer means that the transaction is decided. If too many calls of this connection wait already, this
        // one does not wait for completion. A decision is never refused for that reason.
        let (_permit, until) = match request::until(request.get_ref().until()) {
            Until::Completed => match waiting_permit(&request) {
                Ok(permit) => (permit, Until::Completed),
                Err(_) => (None, Until::Now),
            },
            Until::Now | Until::Decided => (None, Until::Now),
        };
        let wait = bounded(request::wait(request.get_ref().wait)?, request.metadata());
        let (xid, what) = request::decide(request.into_inner())?;
        let answer = self.coordinator.ask(xid, what, until, wait).await?;
        Ok(Response::new(pb::DecideResponse { transaction: self.head(&answer.global) }))
    }

    async fn execute(
        &self,
        request: Request<pb::ExecuteRequest>,
    ) -> Result<Response<pb::ExecuteResponse>, Status> {
        let _permit = waiting_permit(&request)?;
        let wait = bounded(request::wait(request.get_ref().wait)?, request.metadata());
        let request = request.into_inner();
        let until = request::until(request.until());
        let new = request::new_transaction(request.into(), &self.targets, self.timeout_default)?;
        let decided = self.coordinator.begin(new, Until::Decided).await?;
        let replies = if decided.existed { Vec::new() } else { response::replies(&decided.global) };
        let global = match until {
            Until::Completed if !decided.global.state.is_final() => {
                let xid = decided.global.xid;
                match self.coordinator.ask(xid, What::Get, Until::Completed, wait).await {
                    Ok(completed) => completed.global,
                    // Only the wait failed. The decision is durable and must not be answered with an error that says "nothing was done".
                    Err(error) => {
                        debug!(%xid, %error, "the wait for completion failed; the decision is answered");
                        decided.global
                    }
                }
            }
            Until::Completed | Until::Decided | Until::Now => decided.global,
        };
        let transaction = self.transaction(&global);
        Ok(Response::new(pb::ExecuteResponse { transaction, replies, existed: decided.existed }))
    }

    async fn get_transaction(
        &self,
        request: Request<pb::GetTransactionRequest>,
    ) -> Result<Response<pb::GetTransactionResponse>, Status> {
        use pb::get_transaction_request::By;
        let pb::GetTransactionRequest { by, fingerprint } = request.into_inner();
        let answer = match by {
            Some(By::Xid(xid)) => {
                self.coordinator
                    .ask(request::xid(&xid)?, What::Get, Until::Now, Duration::ZERO)
                    .await?
            }
            Some(By::IdempotencyKey(key)) => {
                let digest = request::fingerprint(&fingerprint)?;
                let answer = self.coordinator.find_key(request::key(key)?).await?;
                let known = answer.global.key.map(|key| key.digest);
                if digest.is_some() && digest != known {
                    return Err(Error::KeyTaken(answer.global.xid).into());
                }
                answer
            }
            None => return invalid("by", "must be an xid or an idempotency_key")?,
        };
        Ok(Response::new(pb::GetTransactionResponse {
            transaction: self.transaction(&answer.global),
        }))
    }

    async fn wait_transaction(
        &self,
        request: Request<pb::WaitTransactionRequest>,
    ) -> Result<Response<pb::WaitTransactionResponse>, Status> {
        let _permit = waiting_permit(&request)?;
        let wait = bounded(request::wait(request.get_ref().wait)?, request.metadata());
        let request = request.into_inner();
        let until = request::until(request.until());
        let answer =
            self.coordinator.ask(request::xid(&request.xid)?, What::Get, until, wait).await?;
        Ok(Response::new(pb::WaitTransactionResponse {
            transaction: self.transaction(&answer.global),
        }))
    }

    async fn inquire_branches(
        &self,
        request: Request<pb::InquireBranchesRequest>,
    ) -> Result<Response<pb::InquireBranchesResponse>, Status> {
        let branches = request::inquired(request.into_inner())?;
        let asking = branches.into_iter().map(|(xid, id)| self.coordinator.inquire(xid, id));
        let answers = join_all(asking).await.into_iter();
        let answers = answers.map(|fate| response::inquiry(fate).into()).collect();
        Ok(Response::new(pb::InquireBranchesResponse { answers }))
    }

    type CallStreamStream = stream::Answers;

    async fn call_stream(
        &self,
        request: Request<Streaming<pb::CallStreamRequest>>,
    ) -> Result<Response<stream::Answers>, Status> {
        Ok(Response::new(stream::serve(self, request)))
    }
}

#[tonic::async_trait]
impl AdminService for Services {
    async fn list_transactions(
        &self,
        request: Request<pb::ListTransactionsRequest>,
    ) -> Result<Response<pb::ListTransactionsResponse>, Status> {
        let (filter, limit) = request::list(request.into_inner(), self.coordinator.stuck_now())?;
        let (found, next) = self.coordinator.list(&filter, limit).await?;
        let message = |global: Arc<GlobalTransaction>| {
            let transaction = pb::Transaction { result: None, ..self.transaction(&global)? };
            Some((Listed::of(&global), transaction))
        };
        Ok(Response::new(response::page(found.into_iter().filter_map(message).collect(), next)))
    }

    async fn retry_transaction(
        &self,
        request: Request<pb::RetryTransactionRequest>,
    ) -> Result<Response<pb::RetryTransactionResponse>, Status> {
        let xid = request::xid(&request.into_inner().xid)?;
        let answer = self.coordinator.ask(xid, What::Retry, Until::Now, Duration::ZERO).await?;
        Ok(Response::new(pb::RetryTransactionResponse {
            transaction: self.transaction(&answer.global),
        }))
    }

    async fn resolve_branch(
        &self,
        request: Request<pb::ResolveBranchRequest>,
    ) -> Result<Response<pb::ResolveBranchResponse>, Status> {
        let (xid, what) = request::resolve_branch(request.into_inner())?;
        let answer = self.coordinator.ask(xid, what, Until::Now, Duration::ZERO).await?;
        Ok(Response::new(pb::ResolveBranchResponse {
            transaction: self.transaction(&answer.global),
        }))
    }

    async fn resolve_transaction(
        &self,
        request: Request<pb::ResolveTransactionRequest>,
    ) -> Result<Response<pb::ResolveTransactionResponse>, Status> {
        let (xid, what) = request::resolve_transaction(request.into_inner())?;
        let answer = self.coordinator.ask(xid, what, Until::Now, Duration::ZERO).await?;
        Ok(Response::new(pb::ResolveTransactionResponse {
            transaction: self.transaction(&answer.global),
        }))
    }
}
