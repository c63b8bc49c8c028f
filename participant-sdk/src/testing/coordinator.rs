//! The real coordinator in this process. It runs the production code, from the RPC methods to the journal, on an in-memory
//! store. A test can kill and restart it. Its clock stands still until the test moves it, and calls to participants fail when
//! the test says so.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use handfast_coordinator::{
    clock::ManualClock,
    coordinator::Coordinator as Engine,
    dispatch::{GrpcDispatch, Targets, address::AllowList},
    partition::Settings,
    rpc::Services,
    server,
    store::memory::MemoryStore,
    transaction::{StuckAfter, retry::RetryPolicy},
};
use handfast_proto::{
    Xid,
    calls::{BranchAnswers, serve_branches},
    v1::{
        self as pb,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status, Streaming};

use super::network::Network;
use crate::{Handfast, Outcome, Participant, Phase, Remote};

/// The coordinator's host name in the in-memory network.
const COORDINATOR: &str = "coordinator.test";
/// Deadline of a call to a participant, in real time. Short, so that a test does not wait long for a silent participant.
const CALL_TIMEOUT: Duration = Duration::from_millis(300);
/// Timeout of phase one, if the initiator sets none.
const TIMEOUT: Duration = Duration::from_secs(30);
/// [`Coordinator::finished`] moves the clock by at most this.
const FINISH_WITHIN: Duration = Duration::from_secs(2 * 3600);
/// How far [`Coordinator::finished`] moves the clock at a time.
const FINISH_STEP: Duration = Duration::from_secs(1);

/// A fault of one call to a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// No fault.
    None,
    /// The call fails and does not arrive.
    Unavailable,
    /// The call takes effect, and its answer is lost.
    AnswerLost,
    /// The call does not arrive, and the caller gets no error: its deadline must pass.
    Silence,
    /// The call takes effect, and its answer is garbage.
    Garbage,
}

type Script = Arc<Mutex<BTreeMap<(String, &'static str), VecDeque<Fault>>>>;

/// A coordinator for one test: the real code, in this process.
#[derive(Debug)]
pub struct Coordinator {
    network: Network,
    store: Arc<MemoryStore>,
    clock: ManualClock,
    script: Script,
    /// Whether calls share streams.
    streams: bool,
    /// The runtime of all the coordinator's tasks. Shutting it down kills the coordinator at once, in the middle of anything.
    process: Option<Runtime>,
}

impl Coordinator {
    /// Starts a coordinator. The participants are reachable by their names in its network.
    ///
    /// # Panics
    ///
    /// When it is not called within a tokio runtime.
    pub async fn start(participants: impl IntoIterator<Item = Participant>) -> Self {
        Self::start_with(participants, true).await
    }

    /// As [`Coordinator::start`], but all calls are unary.
    ///
    /// # Panics
    ///
    /// When it is not called within a tokio runtime.
    pub async fn without_streams(participants: impl IntoIterator<Item = Participant>) -> Self {
        Self::start_with(participants, false).await
    }

    async fn start_with(
        participants: impl IntoIterator<Item = Participant>,
        streams: bool,
    ) -> Self {
        let (network, script) = (Network::default(), Script::default());
        for participant in participants {
            let incoming = network.host(&host(participant.name()));
            let service =
                ParticipantServiceServer::new(Scripted { participant, script: script.clone() });
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(service)
                    .serve_with_incoming(incoming),
            );
        }
        let (store, clock) = (Arc::default(), ManualClock::at_wall_time());
        let mut coordinator = Self { network, store, clock, script, streams, process: None };
        coordinator.restart().await;
        coordinator
    }

    /// Kills the coordinator in the middle of anything, and starts another one on the same store.
    ///
    /// # Panics
    ///
    /// When no threads can be created.
    pub async fn restart(&mut self) {
        self.kill();
        let process = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("coordinator")
            .enable_all()
            .build()
            .expect("a thread can be started");
        let incoming = self.network.host(COORDINATOR);
        let (network, store, clock) =
            (self.network.clone(), self.store.clone(), self.clock.clone());
        let streams = self.streams;
        let started = process.spawn(async move {
            let targets = Arc::new(Targets {
                participants: BTreeMap::new(),
                allow: AllowList::parse(["*.test:*"]).expect("a rule"),
                calls_max: 64,
                streams,
            });
            let clock = Arc::new(clock);
            let dispatch =
                Arc::new(GrpcDispatch::new(targets.clone(), Arc::new(network), clock.clone()));
            let settings = Settings {
                retry: RetryPolicy {
                    initial: Duration::from_millis(200),
                    max: Duration::from_secs(60),
                },
                call_timeout: CALL_TIMEOUT,
                call_timeout_max: CALL_TIMEOUT,
                open_max: 100_000,
                open_bytes_max: 1_000_000_000,
                stuck_after: StuckAfter { attempts: 8, time: Duration::from_secs(120) },
                log_labels: Arc::default(),
                record_after: Duration::from_millis(500),
            };
            let retention = Duration::from_secs(7 * 24 * 3600);
            let (engine, running) = Engine::start(store, dispatch, clock, settings, retention)
                .await
                .expect("memory answers");
            let (router, _health) = server::router(&Services::new(engine, targets, TIMEOUT));
            tokio::spawn(async move {
                let _running = running; // as long as the process lives
                drop(router.serve_with_incoming(incoming).await);
            });
        });
        started.await.expect("it starts");
        self.process = Some(process);
    }

    /// Kills the coordinator in the middle of anything. Calls fail until [`Coordinator::restart`].
    pub fn kill(&mut self) {
        drop(self.network.host(COORDINATOR));
        if let Some(process) = self.process.take() {
            process.shutdown_background();
        }
    }

    /// From now on, the store takes this long for each batch of changes.
    pub fn delay_store(&self, each: Duration) {
        self.store.delay(each);
    }

    /// A channel to the coordinator, for calls without the SDK.
    #[cfg(all(test, feature = "sqlite"))]
    pub(super) fn channel(&self) -> tonic::transport::Channel {
        self.network.connect(COORDINATOR)
    }

    /// Connects the SDK to the coordinator.
    #[must_use]
    pub fn handfast(&self) -> Handfast {
        let (calls, waits) = (self.network.connect(COORDINATOR), self.network.connect(COORDINATOR));
        let handfast = Handfast::from_channels(calls, waits);
        if self.streams { handfast } else { handfast.without_streams() }
    }

    /// One of the coordinator's participants, for an initiator to call.
    #[must_use]
    pub fn remote(&self, name: &str) -> Remote {
        let host = host(name);
        let channel = self.network.connect(&host);
        let remote = Remote::with_channel(name, &format!("http://{host}:1"), channel);
        if self.streams { remote } else { remote.without_streams() }
    }

    /// Sets the faults of the next calls of this action and phase, in order. Later calls have no faults.
    ///
    /// # Panics
    ///
    /// Only if a test has panicked here before.
    pub fn script(&self, action: &str, phase: Phase, faults: impl IntoIterator<Item = Fault>) {
        let mut script = self.script.lock().expect("nothing panics while it is locked");
        script.entry((action.to_owned(), phase.as_str())).or_default().extend(faults);
    }

    /// Moves the coordinator's clock forward, so that retries become due and timeouts expire. (Participants' databases have
    /// their own clocks. By those, a Try that is sent afterwards has more time, not less.)
    pub fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// Brings a transaction to its end, moving the clock forward as far as necessary.
    ///
    /// # Panics
    ///
    /// When the transaction does not end within two hours of the coordinator's clock, or is unknown.
    pub async fn finished(&self, xid: Xid) -> Outcome {
        let handfast = self.handfast();
        let steps = FINISH_WITHIN.as_secs() / FINISH_STEP.as_secs();
        let mut last = None;
        for _ in 0..steps {
            let outcome = handfast.outcome(xid).await.expect("the coordinator answers");
            match &outcome {
                Outcome::Confirmed { completed: true }
                | Outcome::Cancelled { completed: true, .. } => return outcome,
                Outcome::NeverRecorded | Outcome::Forgotten | Outcome::KeyUnknown => {
                    panic!("{xid}: {outcome:?}")
                }
                Outcome::Undecided | Outcome::Confirmed { .. } | Outcome::Cancelled { .. } => {
                    last = Some(outcome);
                }
            }
            self.advance(FINISH_STEP);
            // Calls in flight take real time.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("{xid} does not end: {last:?}");
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.kill();
    }
}

fn host(participant: &str) -> String {
    format!("{participant}.test")
}

/// A participant that fails on demand.
#[derive(Clone)]
struct Scripted {
    participant: Participant,
    script: Script,
}

impl Scripted {
    /// Lets `call` through, or applies the next fault.
    async fn meet<T>(
        &self,
        context: Option<&pb::BranchContext>,
        phase: Phase,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<Response<T>, Status> {
        let action = context.map(|context| context.action.clone()).unwrap_or_default();
        let fault = {
            let mut script = self.script.lock().expect("nothing panics while it is locked");
            script
                .get_mut(&(action, phase.as_str()))
                .and_then(VecDeque::pop_front)
                .unwrap_or(Fault::None)
        };
        match fault {
            Fault::None => call.await,
            Fault::Unavailable => Err(Status::unavailable("the script says: it does not arrive")),
            Fault::AnswerLost => {
                drop(call.await);
                Err(Status::unavailable("the script says: the answer is lost"))
            }
            Fault::Silence => std::future::pending().await,
            Fault::Garbage => {
                drop(call.await);
                Err(Status::data_loss("the script says: garbage"))
            }
        }
    }
}

#[tonic::async_trait]
impl ParticipantService for Scripted {
    async fn try_branch(
        &self,
        request: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        let context = request.get_ref().context.clone();
        self.meet(context.as_ref(), Phase::Try, self.participant.try_branch(request)).await
    }

    async fn confirm_branch(
        &self,
        request: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        let context = request.get_ref().context.clone();
        self.meet(context.as_ref(), Phase::Confirm, self.participant.confirm_branch(request)).await
    }

    async fn cancel_branch(
        &self,
        request: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        let context = request.get_ref().context.clone();
        self.meet(context.as_ref(), Phase::Cancel, self.participant.cancel_branch(request)).await
    }

    async fn list_actions(
        &self,
        request: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        self.participant.list_actions(request).await
    }

    async fn inquire_branch(
        &self,
        request: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        self.participant.inquire_branch(request).await
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scripted({})", self.participant.name())
    }
}
