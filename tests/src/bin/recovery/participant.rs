//! A participant that says yes to everything, and costs nothing.

use std::sync::Arc;

use handfast_proto::{
    calls::{BranchAnswers, serve_branches},
    v1::{
        self as pb,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

#[derive(Clone)]
struct Yes;

/// Serves one; gives its URL.
pub(crate) async fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("it listens"));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(ParticipantServiceServer::new(Yes))
            .serve_with_incoming(incoming),
    );
    url
}

#[tonic::async_trait]
impl ParticipantService for Yes {
    async fn try_branch(
        &self,
        _: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        let reply = Some(pb::Payload::default());
        Ok(Response::new(pb::TryBranchResponse { reply }))
    }

    async fn confirm_branch(
        &self,
        _: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        Ok(Response::new(pb::ConfirmBranchResponse {}))
    }

    async fn cancel_branch(
        &self,
        _: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        Ok(Response::new(pb::CancelBranchResponse {}))
    }

    async fn list_actions(
        &self,
        _: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        Ok(Response::new(pb::ListActionsResponse::default()))
    }

    async fn inquire_branch(
        &self,
        _: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        Err(Status::unimplemented("it does not ask"))
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}
