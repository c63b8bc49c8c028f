//! A participant that can be told to hang: it serves Trys, and answers no Confirm until it is released.

use std::sync::Arc;

use handfast::Participant;
use handfast_proto::{
    calls::{BranchAnswers, serve_branches},
    limits,
    v1::{
        BranchStreamRequest, CancelBranchRequest, CancelBranchResponse, ConfirmBranchRequest,
        ConfirmBranchResponse, InquireBranchRequest, InquireBranchResponse, ListActionsRequest,
        ListActionsResponse, TryBranchRequest, TryBranchResponse,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

#[derive(Debug, Clone)]
pub(crate) struct Hanging {
    participant: Participant,
    hangs: watch::Receiver<bool>,
}

impl Hanging {
    pub(crate) fn new(participant: Participant, hangs: watch::Receiver<bool>) -> Self {
        Self { participant, hangs }
    }

    pub(crate) fn into_service(self) -> ParticipantServiceServer<Self> {
        ParticipantServiceServer::new(self)
            .max_decoding_message_size(limits::REQUEST_BYTES_MAX)
            .max_encoding_message_size(limits::RESPONSE_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl ParticipantService for Hanging {
    async fn try_branch(
        &self,
        request: Request<TryBranchRequest>,
    ) -> Result<Response<TryBranchResponse>, Status> {
        self.participant.try_branch(request).await
    }

    async fn confirm_branch(
        &self,
        request: Request<ConfirmBranchRequest>,
    ) -> Result<Response<ConfirmBranchResponse>, Status> {
        let mut hangs = self.hangs.clone();
        drop(hangs.wait_for(|hangs| !hangs).await); // whoever could let it go may be gone: then so are we
        self.participant.confirm_branch(request).await
    }

    async fn cancel_branch(
        &self,
        request: Request<CancelBranchRequest>,
    ) -> Result<Response<CancelBranchResponse>, Status> {
        self.participant.cancel_branch(request).await
    }

    async fn list_actions(
        &self,
        request: Request<ListActionsRequest>,
    ) -> Result<Response<ListActionsResponse>, Status> {
        self.participant.list_actions(request).await
    }

    async fn inquire_branch(
        &self,
        request: Request<InquireBranchRequest>,
    ) -> Result<Response<InquireBranchResponse>, Status> {
        self.participant.inquire_branch(request).await
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}
