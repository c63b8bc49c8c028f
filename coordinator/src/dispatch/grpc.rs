//! Calls over gRPC: those to one address share a stream, if it has streams.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use handfast_proto::{
    calls::{BranchCall, BranchRequest, ToParticipant},
    connection::{self, DEADLINE_MARGIN},
    crash_point,
    stream::Line,
    time::timestamp,
    v1 as pb,
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, transport::Channel};

use super::{
    CallRequest, Dispatch, Later, Returned,
    address::{Address, AllowList},
    answer::outcome,
    lane::{Lane, Place},
};
use crate::{
    clock::Clock,
    transaction::{Outcome, Payload, Phase, Timestamp},
};

/// Addresses with a connection at a time. Idle ones make room for new ones.
const LANES_MAX: usize = 4096;
/// How much later, when all of them are busy.
const LANES_FULL_PAUSE: Duration = Duration::from_secs(1);
/// Makes connections. The one place to put another network: none at all, or a simulated one.
pub trait Dialler: fmt::Debug + Send + Sync + 'static {
    /// A channel that connects when it is first used, and again when the connection is lost.
    fn channel(&self, address: &Address) -> Channel;
}

/// Connects over TCP.
#[derive(Debug, Clone, Copy)]
pub struct Tcp;

impl Dialler for Tcp {
    fn channel(&self, address: &Address) -> Channel {
        connection::endpoint(address).connect_lazy()
    }
}

/// What dispatch needs to know of the configuration.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Where participants are, by name. Wins over what a branch brought, at each call: a service that moved can be pointed at
    /// again.
    pub participants: BTreeMap<String, Address>,
    /// Which of the addresses that branches bring may be dialled.
    pub allow: AllowList,
    /// Calls to one address at a time.
    pub calls_max: usize,
    /// Calls to one address share a stream, if it has streams.
    pub streams: bool,
}

/// Why a branch cannot be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Neither the configuration nor the branch says where.
    #[error(
        "the configuration has no address for participant {0:?} (participants.{0}), and the branch brings no target"
    )]
    NoAddress(String),
    /// What the branch brought is none.
    #[error(transparent)]
    Invalid(#[from] super::address::InvalidAddress),
    /// What the branch brought must not be dialled.
    #[error("the target {address} is not allowed (targets.allow is: {allowed})")]
    NotAllowed {
        /// What the branch brought.
        address: Address,
        /// What may be.
        allowed: String,
    },
}

impl Targets {
    /// Where a branch is to be called.
    ///
    /// # Errors
    ///
    /// When nobody says, or it must not be called there.
    pub fn address(&self, participant: &str, target: &str) -> Result<Address, Unreachable> {
        if let Some(address) = self.participants.get(participant) {
            return Ok(address.clone());
        }
        if target.is_empty() {
            return Err(Unreachable::NoAddress(participant.to_owned()));
        }
        let address: Address = target.parse()?;
        if self.allow.allows(&address) {
            Ok(address)
        } else {
            Err(Unreachable::NotAllowed { address, allowed: self.allow.to_string() })
        }
    }
}

/// See the module's comment.
#[derive(Debug)]
pub struct GrpcDispatch {
    targets: Arc<Targets>,
    dialler: Arc<dyn Dialler>,
    clock: Arc<dyn Clock>,
    lanes: Mutex<BTreeMap<Address, Arc<Lane>>>,
    /// Every call that waits or is under way.
    calls: TaskTracker,
    /// No further ones are taken.
    closing: CancellationToken,
}

impl GrpcDispatch {
    /// One with no connections yet.
    #[must_use]
    pub fn new(targets: Arc<Targets>, dialler: Arc<dyn Dialler>, clock: Arc<dyn Clock>) -> Self {
        let (lanes, calls, closing) =
            (Mutex::default(), TaskTracker::new(), CancellationToken::new());
        Self { targets, dialler, clock, lanes, calls, closing }
    }

    /// Takes no further calls, and returns when those under way have come back.
    pub async fn close(&self) {
        self.closing.cancel();
        self.calls.close();
        self.calls.wait().await;
    }

    fn lane(&self, address: &Address) -> Result<Arc<Lane>, Later> {
        let mut lanes = self.lanes.lock().expect("nothing panics while it is locked");
        if let Some(lane) = lanes.get(address) {
            return Ok(lane.clone());
        }
        if lanes.len() >= LANES_MAX {
            let idle =
                lanes.iter().find(|(_, lane)| lane.is_idle()).map(|(address, _)| address.clone());
            lanes.remove(&idle.ok_or(Later(LANES_FULL_PAUSE))?);
        }
        let channel = self.dialler.channel(address);
        let line =
            if self.targets.streams { Line::new(channel) } else { Line::without_streams(channel) };
        let lane = Arc::new(Lane::new(line, self.targets.calls_max));
        lanes.insert(address.clone(), lane.clone());
        Ok(lane)
    }
}

impl Dispatch for GrpcDispatch {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        if self.closing.is_cancelled() {
            return Err(Later(LANES_FULL_PAUSE)); // the next owner makes it
        }
        let (clock, closing) = (self.clock.clone(), self.closing.clone());
        let returned = returned.clone();
        let address = match self.targets.address(&call.spec.participant, &call.spec.target) {
            Ok(address) => address,
            Err(unreachable) => {
                // The configuration may have changed since the door was passed.
                let status = Status::unimplemented(unreachable.to_string());
                self.calls.spawn(async move {
                    let outcome = outcome(call.phase, Err(status), clock.now());
                    report(&returned, &call, outcome).await;
                });
                return Ok(());
            }
        };
        let place = self.lane(&address)?.enter(self.clock.now(), call.hurried)?;
        self.calls.spawn(async move {
            let waiting = place.turn();
            let turn = tokio::select! {
                biased;
                turn = waiting => Some(turn),
                () = closing.cancelled() => None,
            };
            let outcome = match turn {
                Some(_turn) if !call.is_too_late(clock.now()) => make(&place, &call, &*clock).await,
                _ => not_made(&call, clock.now()),
            };
            drop(place);
            report(&returned, &call, outcome).await;
        });
        Ok(())
    }
}

async fn report(returned: &mpsc::Sender<Returned>, call: &CallRequest, outcome: Outcome) {
    let CallRequest { xid, branch, phase, .. } = *call;
    // At the end of the process nobody may be there any more; the next owner asks again.
    drop(returned.send(Returned { xid, branch, phase, outcome }).await);
}

/// The process ends, or phase one did, before it was this call's turn.
fn not_made(call: &CallRequest, now: Timestamp) -> Outcome {
    outcome(
        call.phase,
        Err(Status::unavailable("waited too long for its turn, and was not made")),
        now,
    )
}

async fn make(place: &Place, call: &CallRequest, clock: &dyn Clock) -> Outcome {
    let lane = place.lane();
    match call.phase {
        Phase::Try => crash_point!("phase_one.before_call"),
        Phase::Confirm | Phase::Cancel => crash_point!("phase_two.before_call"),
    }
    let answer = tokio::time::timeout(call.deadline, send(&lane.line, call)).await;
    match call.phase {
        Phase::Try => crash_point!("phase_one.after_call"),
        Phase::Confirm | Phase::Cancel => crash_point!("phase_two.after_call"),
    }
    let (answer, answered) = match answer {
        Ok(Ok(reply)) => (Ok(reply), true),
        // A status with a source was made on this side: no connection, or one that broke.
        Ok(Err(status)) => {
            let answered = std::error::Error::source(&status).is_none();
            (Err(named(status)), answered)
        }
        Err(_) => {
            (Err(Status::deadline_exceeded(format!("no answer within {:?}", call.deadline))), false)
        }
    };
    let now = clock.now();
    lane.returned(answered, now);
    outcome(call.phase, answer, now)
}

/// tonic says "transport error"; what a person needs is at the end of the chain: "connection refused".
fn named(status: Status) -> Status {
    let mut cause = std::error::Error::source(&status);
    while let Some(deeper) = cause.and_then(std::error::Error::source) {
        cause = Some(deeper);
    }
    let named = cause.map(|cause| Status::new(status.code(), cause.to_string()));
    named.unwrap_or(status)
}

async fn send(line: &Line<ToParticipant>, call: &CallRequest) -> Result<Option<Payload>, Status> {
    let context = Some(pb::BranchContext {
        xid: call.xid.to_string(),
        branch_id: call.spec.branch_id.to_string(),
        action: call.spec.action.clone(),
        attempt: call.attempt,
        expires_at: Some(timestamp(call.expires_at.0)),
        labels: call.labels.clone(),
    });
    let payload = call.spec.payload.as_ref().map(|payload| pb::Payload {
        data: payload.data.clone(),
        content_type: payload.content_type.clone(),
    });
    let request = match call.phase {
        Phase::Try => BranchRequest::TryBranch(pb::TryBranchRequest { context, payload }),
        Phase::Confirm => {
            BranchRequest::ConfirmBranch(pb::ConfirmBranchRequest { context, payload })
        }
        Phase::Cancel => BranchRequest::CancelBranch(pb::CancelBranchRequest { context, payload }),
    };
    // A transaction that the coordinator drives has the branches that it was begun with, and no others.
    let request = BranchCall { call: request, may_join: false };
    let reply = line.call(request, call.deadline + DEADLINE_MARGIN).await?.reply;
    Ok(reply.map(|reply| Payload { data: reply.data, content_type: reply.content_type }))
}
