//! A proxy in front of a service that delays or fails calls on demand. The services do not know about it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use handfast_proto::{
    calls::{BranchAnswers, serve_branches},
    v1::{
        self as pb,
        participant_service_client::ParticipantServiceClient,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::task::JoinHandle;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};

use super::events::{Call, Event, Events, What};

/// What the proxy does to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The call fails at once and does not reach the service.
    Fail,
    /// The call reaches the service after this delay.
    Delay(Duration),
}

/// The result shown for a delayed call.
pub(crate) const HELD_UP: &str = "held up on its way";

/// One proxy. It forwards calls unchanged unless a fault was scheduled.
#[derive(Debug)]
pub(crate) struct Network {
    url: String,
    faults: Faults,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// The scheduled faults, in order, each with the phase that it applies to.
type Faults = Arc<Mutex<VecDeque<(&'static str, Fault)>>>;

impl Network {
    /// A proxy to the service at `channel`.
    pub(crate) fn to(channel: Channel, events: &Events) -> anyhow::Result<Self> {
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into())?.with_nodelay(Some(true));
        let url = format!("http://{}", incoming.local_addr()?);
        let faults = Faults::default();
        let door = Door { service: channel, faults: faults.clone(), events: events.clone() };
        let service = Server::builder().add_service(ParticipantServiceServer::new(door));
        let server = tokio::spawn(service.serve_with_incoming(incoming));
        Ok(Self { url, faults, server })
    }

    /// The URL at which the proxy listens.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Applies `fault` to each of the next `times` calls of `phase`.
    pub(crate) fn next(&self, phase: &'static str, fault: Fault, times: usize) {
        lock(&self.faults).extend(std::iter::repeat_n((phase, fault), times));
    }

    /// How many scheduled faults have not been applied yet.
    pub(crate) fn left(&self) -> usize {
        lock(&self.faults).len()
    }
}

fn lock(faults: &Faults) -> MutexGuard<'_, VecDeque<(&'static str, Fault)>> {
    faults.lock().expect("nothing panics while it is locked")
}

impl Drop for Network {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The proxy's server side.
#[derive(Debug, Clone)]
struct Door {
    service: Channel,
    faults: Faults,
    events: Events,
}

impl Door {
    /// Applies a scheduled fault, if there is one, and forwards the call.
    async fn pass(
        &self,
        phase: &'static str,
        context: Option<&pb::BranchContext>,
    ) -> Result<ParticipantServiceClient<Channel>, Status> {
        match self.fault(phase) {
            None => {}
            Some(Fault::Fail) => {
                self.tell(phase, context, "made to fail", "UNAVAILABLE");
                return Err(Status::unavailable("the network was told to fail this call"));
            }
            Some(Fault::Delay(delay)) => {
                self.tell(phase, context, HELD_UP, "");
                tokio::time::sleep(delay).await;
            }
        }
        Ok(ParticipantServiceClient::new(self.service.clone()))
    }

    fn fault(&self, phase: &str) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let place = faults.iter().position(|(of, _)| *of == phase)?;
        faults.remove(place).map(|(_, fault)| fault)
    }

    fn tell(&self, phase: &str, context: Option<&pb::BranchContext>, result: &str, reason: &str) {
        let Some(context) = context else { return };
        self.events.add(Event::now(What::Called(Call {
            xid: context.xid.clone(),
            branch_id: context.branch_id.clone(),
            action: context.action.clone(),
            phase: phase.to_owned(),
            attempt: context.attempt,
            result: result.to_owned(),
            reason: reason.to_owned(),
            took_ms: None,
        })));
    }
}

#[tonic::async_trait]
impl ParticipantService for Door {
    async fn try_branch(
        &self,
        request: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        let mut service = self.pass("try", request.get_ref().context.as_ref()).await?;
        service.try_branch(request).await
    }

    async fn confirm_branch(
        &self,
        request: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        let mut service = self.pass("confirm", request.get_ref().context.as_ref()).await?;
        service.confirm_branch(request).await
    }

    async fn cancel_branch(
        &self,
        request: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        let mut service = self.pass("cancel", request.get_ref().context.as_ref()).await?;
        service.cancel_branch(request).await
    }

    async fn list_actions(
        &self,
        request: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        ParticipantServiceClient::new(self.service.clone()).list_actions(request).await
    }

    async fn inquire_branch(
        &self,
        request: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        ParticipantServiceClient::new(self.service.clone()).inquire_branch(request).await
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}
