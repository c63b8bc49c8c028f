//! A participant, as its callers see it.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::BoxFuture;
use handfast_proto::{
    BranchId, Xid,
    address::InvalidAddress,
    calls::ToParticipant,
    connection::endpoint,
    stream::Line,
    v1::{self as pb, participant_service_client::ParticipantServiceClient},
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{answer::Answer, branch::Branch};

/// How long a participant may take to say what it is, or to take a nudge.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// A participant: its name, its address, and how to reach it from here. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    name: Arc<str>,
    target: Arc<str>,
    reach: Reach,
    /// Whether it asks about its reservations, once it has said so.
    inquires: Arc<OnceLock<bool>>,
}

#[derive(Clone)]
pub(crate) enum Reach {
    /// Over the network.
    Line(Line<ToParticipant>),
    /// In this process.
    Here(Arc<dyn Local>),
}

/// A participant in this process.
pub(crate) trait Local: Send + Sync {
    fn answer<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer>;
    /// Whether it asks about its reservations.
    fn inquires(&self) -> bool;
    /// As [`Participant::ask_now`](crate::Participant).
    fn nudge<'a>(&'a self, xid: Xid, branch_id: &'a BranchId) -> BoxFuture<'a, ()>;
}

impl Remote {
    /// The participant of this name at `url`: `http://127.0.0.1:7001`. The coordinator calls it there too, unless its
    /// configuration has another address for the name. Does not wait for a connection. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn connect(name: &str, url: &str) -> Result<Self, InvalidAddress> {
        Ok(Self::with_channel(name, url, endpoint(&url.parse()?).connect_lazy()))
    }

    /// The participant of this name, called from here through `channel` and by the coordinator at `target`.
    #[must_use]
    pub fn with_channel(name: &str, target: &str, channel: Channel) -> Self {
        Self::new(name, target, Reach::Line(Line::new(channel)))
    }

    pub(crate) fn new(name: &str, target: &str, reach: Reach) -> Self {
        Self { name: name.into(), target: target.into(), reach, inquires: Arc::default() }
    }

    /// The same participant, with every call from here made by itself. By default calls share a stream, if the participant has
    /// streams; a load balancer in between spreads calls over several instances only if they are made by themselves.
    #[must_use]
    pub fn without_streams(self) -> Self {
        let reach = match self.reach {
            Reach::Line(line) => Reach::Line(line.to_unary()),
            here @ Reach::Here(_) => here,
        };
        Self { reach, ..self }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address at which the coordinator calls it.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Whether it asks about its reservations. It is asked once. As long as it does not say so, it does not.
    pub(crate) async fn inquires(&self) -> bool {
        if let Some(known) = self.inquires.get() {
            return *known;
        }
        let told = match &self.reach {
            Reach::Here(participant) => Ok(participant.inquires()),
            Reach::Line(line) => {
                let mut client = ParticipantServiceClient::new(line.channel().clone());
                let list = client.list_actions(within(pb::ListActionsRequest {}));
                timeout(QUESTION_TIMEOUT, list)
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))
                    .map(|actions| actions.into_inner().inquires)
            }
        };
        match told {
            Ok(told) => *self.inquires.get_or_init(|| told),
            // It serves no such method, and does not ask either.
            Err(status) if status.code() == Code::Unimplemented => {
                *self.inquires.get_or_init(|| false)
            }
            Err(_) => false,
        }
    }

    /// Makes it ask its coordinator about this branch. What it does not hear it asks about later.
    pub(crate) async fn nudge(&self, xid: Xid, branch_id: &BranchId) {
        match &self.reach {
            Reach::Here(participant) => participant.nudge(xid, branch_id).await,
            Reach::Line(line) => {
                let (xid, branch_id) = (xid.to_string(), branch_id.to_string());
                let mut client = ParticipantServiceClient::new(line.channel().clone());
                let nudge =
                    client.inquire_branch(within(pb::InquireBranchRequest { xid, branch_id }));
                drop(timeout(QUESTION_TIMEOUT, nudge).await);
            }
        }
    }

    pub(crate) fn reach(&self) -> &Reach {
        &self.reach
    }
}

fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(QUESTION_TIMEOUT);
    request
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({} at {})", self.name, self.target)
    }
}
