//! Calls to participants over gRPC. Calls to one server share a stream if the server supports streams.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use handfast_proto::{
    calls::{BranchCall, BranchRequest, ToParticipant},
    connection::{self, DEADLINE_MARGIN},
    crash_point,
    failure::code_name,
    stream::Line,
    time::timestamp,
    v1 as pb,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};

use super::{
    CallRequest, Dispatch, Later, Returned,
    address::{Address, Addresses, AllowList},
    answer::outcome,
    peer::{Peer, QueuePlace},
    servers::{Dialler, Servers},
};
use crate::{
    clock::Clock,
    transaction::{AttemptError, Outcome, Payload, Phase, Timestamp},
};

/// Participants that are known at a time. Participants are told apart by their addresses.
const PEERS_MAX: usize = 4096;
/// Pause before a call is tried again when all known participants are busy.
const PEERS_FULL_PAUSE: Duration = Duration::from_secs(1);
/// A participant without calls for this long is forgotten, and its connections are closed.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// How often idle participants are looked for.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// The part of the configuration that dispatch needs.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Addresses of participants, by name. They override the address that a branch was registered with, at every call. So a
    /// service that has moved can be reached again.
    pub participants: BTreeMap<String, Addresses>,
    /// Which addresses of branches may be called.
    pub allow: AllowList,
    /// Calls in flight to one participant, in addition to one for each of its actions.
    pub calls_max: usize,
    /// Whether calls to one server share a stream, if it supports streams.
    pub streams: bool,
}

/// Why a branch cannot be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Neither the configuration nor the branch has an address.
    #[error(
        "the configuration has no address for participant {0:?} (participants.{0}), and the branch brings no target"
    )]
    NoAddress(String),
    /// The branch's target is not an address.
    #[error(transparent)]
    Invalid(#[from] super::address::InvalidAddress),
    /// The branch's target may not be called.
    #[error("the target {address} is not allowed (targets.allow is: {allowed})")]
    NotAllowed {
        /// The branch's target.
        address: Address,
        /// The allowed addresses.
        allowed: String,
    },
}

impl Targets {
    /// Where a branch is called: at the address that the configuration has for its participant, otherwise at the branch's
    /// target.
    ///
    /// # Errors
    ///
    /// When there is no address, or it may not be called.
    pub fn addresses(&self, participant: &str, target: &str) -> Result<Addresses, Unreachable> {
        if let Some(addresses) = self.participants.get(participant) {
            return Ok(addresses.clone());
        }
        if target.is_empty() {
            return Err(Unreachable::NoAddress(participant.to_owned()));
        }
        let address: Address = target.parse()?;
        if self.allow.allows(&address) {
            Ok(address.into())
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
    peers: Mutex<Peers>,
    /// Counts every call that waits or is in flight.
    calls: TaskTracker,
    /// Cancelled when no further calls are accepted.
    closing: CancellationToken,
}

impl GrpcDispatch {
    /// A dispatch without connections.
    #[must_use]
    pub fn new(targets: Arc<Targets>, dialler: Arc<dyn Dialler>, clock: Arc<dyn Clock>) -> Self {
        let (peers, calls, closing) =
            (Mutex::default(), TaskTracker::new(), CancellationToken::new());
        Self { targets, dialler, clock, peers, calls, closing }
    }

    /// Accepts no further calls. Returns when all calls in flight have returned.
    pub async fn close(&self) {
        self.closing.cancel();
        self.calls.close();
        self.calls.wait().await;
    }

    pub(super) fn peer(&self, addresses: Addresses, now: Timestamp) -> Result<Arc<Peer>, Later> {
        let mut forgotten = Vec::new();
        let mut peers = self.peers.lock().expect("nothing panics while it is locked");
        if now - peers.checked_at >= IDLE_CHECK_INTERVAL {
            peers.checked_at = now;
            forgotten = peers.forget(now, IDLE_MAX);
        }
        let found = match peers.by_addresses.get(&addresses) {
            Some(peer) => Ok(peer.clone()),
            None => {
                if peers.by_addresses.len() >= PEERS_MAX {
                    forgotten.extend(peers.forget(now, Duration::ZERO));
                }
                if peers.by_addresses.len() < PEERS_MAX {
                    // The first call builds the channels, outside this lock and outside the partition's task.
                    let servers =
                        Servers::new(addresses.clone(), self.dialler.clone(), self.targets.streams);
                    let peer = Arc::new(Peer::new(servers, self.targets.calls_max));
                    peers.by_addresses.insert(addresses, peer.clone());
                    Ok(peer)
                } else {
                    Err(Later(PEERS_FULL_PAUSE))
                }
            }
        };
        drop(peers);
        drop(forgotten); // closes connections
        found
    }

    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.peers.lock().expect("nothing panics while it is locked").by_addresses.len()
    }
}

/// Recently called participants.
#[derive(Debug)]
struct Peers {
    by_addresses: BTreeMap<Addresses, Arc<Peer>>,
    /// When idle participants were last looked for.
    checked_at: Timestamp,
}

impl Default for Peers {
    fn default() -> Self {
        Self { by_addresses: BTreeMap::new(), checked_at: Timestamp(i64::MIN) }
    }
}

impl Peers {
    fn forget(&mut self, now: Timestamp, idle_for: Duration) -> Vec<Arc<Peer>> {
        let idle = self.by_addresses.extract_if(.., |_, peer| peer.is_idle(now, idle_for));
        idle.map(|(_, peer)| peer).collect()
    }
}

impl Dispatch for GrpcDispatch {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        if self.closing.is_cancelled() {
            return Err(Later(PEERS_FULL_PAUSE)); // the next owner makes it
        }
        let (clock, closing) = (self.clock.clone(), self.closing.clone());
        let returned = returned.clone();
        let spec = &call.spec;
        if let Some(damage) = &spec.damage {
            let error = AttemptError {
                code: code_name(Code::DataLoss).to_owned(),
                message: format!(
                    "its record in the store is damaged ({damage}), so the participant is not called"
                ),
                at: self.clock.now(),
            };
            let outcome = Outcome::Unknown { error, timed_out: false, hopeless: true };
            self.calls.spawn(async move { report(&returned, &call, outcome).await });
            return Ok(());
        }
        let addresses = match self.targets.addresses(&spec.participant, &spec.target) {
            Ok(addresses) => addresses,
            Err(unreachable) => {
                // The target was allowed when the branch was registered, but the configuration may have changed since.
                let status = Status::unimplemented(unreachable.to_string());
                self.calls.spawn(async move {
                    let outcome = outcome(call.phase, Err(status), clock.now());
                    report(&returned, &call, outcome).await;
                });
                return Ok(());
            }
        };
        let now = self.clock.now();
        let place = self.peer(addresses, now)?.enter(&spec.action, now, call.hurry)?;
        self.calls.spawn(async move {
            let waiting = place.permit();
            let permit = tokio::select! {
                biased;
                permit = waiting => Some(permit),
                () = closing.cancelled() => None,
                () = returned.closed() => None,
            };
            let outcome = match permit {
                Some(_permit) if !call.is_too_late(clock.now()) && !returned.is_closed() => {
                    make(&place, &call, &*clock).await
                }
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
    // At the end of the process the partition may be gone. The next owner makes the call again.
    drop(returned.send(Returned { xid, branch, phase, outcome }).await);
}

/// The outcome of a call that was not made, because the process, its partition or phase one ended before its turn.
fn not_made(call: &CallRequest, now: Timestamp) -> Outcome {
    outcome(
        call.phase,
        Err(Status::unavailable("waited too long for its turn, and was not made")),
        now,
    )
}

async fn make(place: &QueuePlace, call: &CallRequest, clock: &dyn Clock) -> Outcome {
    match call.phase {
        Phase::Try => crash_point!("phase_one.before_call"),
        Phase::Confirm | Phase::Cancel => crash_point!("phase_two.before_call"),
    }
    let answer = ask(place.peer(), call, clock).await;
    match call.phase {
        Phase::Try => crash_point!("phase_one.after_call"),
        Phase::Confirm | Phase::Cancel => crash_point!("phase_two.after_call"),
    }
    outcome(call.phase, answer, clock.now())
}

/// Calls one of the participant's servers. The next server is tried only if the previous one could not be reached.
async fn ask(
    peer: &Peer,
    call: &CallRequest,
    clock: &dyn Clock,
) -> Result<Option<Payload>, Status> {
    let deadline = Instant::now() + call.deadline;
    let timed_out = || {
        peer.timed_out();
        Err(Status::deadline_exceeded(format!("no answer within {:?}", call.deadline)))
    };
    let servers = match timeout_at(deadline, peer.servers.in_order(clock)).await {
        Ok(Ok(servers)) => servers,
        Ok(Err(status)) => {
            peer.not_reached(clock.now());
            return Err(status);
        }
        Err(_) => return timed_out(),
    };
    let mut failed = Status::unavailable("the participant has no servers");
    for server in servers {
        let begun = clock.now();
        let Ok(answer) = timeout_at(deadline, send(&server.line, call)).await else {
            server.did_not_answer(begun, clock.now());
            return timed_out();
        };
        match answer {
            Err(status) if connection::is_ours(&status) => {
                server.did_not_answer(begun, clock.now());
                let may_have_arrived = !connection::is_not_connected(&status);
                failed = status;
                if may_have_arrived {
                    break;
                }
            }
            answer => {
                server.answered();
                peer.answered();
                return answer;
            }
        }
    }
    peer.not_reached(clock.now());
    Err(failed)
}

async fn send(line: &Line<ToParticipant>, call: &CallRequest) -> Result<Option<Payload>, Status> {
    let context = Some(pb::BranchContext {
        xid: call.xid.to_string(),
        branch_id: call.spec.branch_id.to_string(),
        action: call.spec.action.clone(),
        attempt: call.attempt,
        expires_at: Some(timestamp(call.expires_at.0)),
        labels: call.labels.clone(),
        record: pb::Record::AtBegin.into(),
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
    // A transaction driven by the coordinator has a fixed set of branches, so no branch may join.
    let request = BranchCall { call: request, may_join: false };
    let reply = line.call(request, call.deadline + DEADLINE_MARGIN).await?.reply;
    Ok(reply.map(|reply| Payload { data: reply.data, content_type: reply.content_type }))
}
