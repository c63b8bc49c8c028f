//! The real coordinator in this process: its own code, from the rpc methods to the journal, over a store in memory. It can be
//! killed and started again; its clock stands still until the test moves it; participants fail when the test says so.

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

/// The coordinator's name in the network.
const COORDINATOR: &str = "coordinator.test";
/// Deadline of a call to a participant, in real time: a test does not wait long for a participant that never answers.
const CALL_TIMEOUT: Duration = Duration::from_millis(300);
/// Phase one, if the initiator does not say.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How far the clock is moved on, at most, to bring a transaction to its end, and in which steps.
const FINISH_WITHIN: [Duration; 2] = [Duration::from_secs(2 * 3600), Duration::from_secs(1)];

/// What is to happen to one call to a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It goes well.
    None,
    /// It does not arrive.
    Unavailable,
    /// It takes effect, and the answer is lost.
    AnswerLost,
    /// It does not arrive, and nobody says so: the caller's deadline has to pass.
    Silence,
    /// It takes effect, and the answer is garbage.
    Garbage,
}

type Script = Arc<Mutex<BTreeMap<(String, &'static str), VecDeque<Fault>>>>;

/// See the module's comment: the coordinator of one test.
#[derive(Debug)]
pub struct Coordinator {
    network: Network,
    store: Arc<MemoryStore>,
    clock: ManualClock,
    script: Script,
    /// Calls share streams.
    streams: bool,
    /// Everything that is the coordinator's runs here, so that it can be killed: at once, whatever it is doing.
    process: Option<Runtime>,
}

impl Coordinator {
    /// Starts one, with these participants at their names in its network.
    ///
    /// # Panics
    ///
    /// When there is no tokio runtime around it.
    pub async fn start(participants: impl IntoIterator<Item = Participant>) -> Self {
        Self::start_with(participants, true).await
    }

    /// The same, where every call is made by itself: no call shares a stream with others.
    ///
    /// # Panics
    ///
    /// When there is no tokio runtime around it.
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

    /// Kills the coordinator, whatever it is doing, and starts another one on the same store.
    ///
    /// # Panics
    ///
    /// When there are no threads to be had.
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

    /// Kills the coordinator, whatever it is doing. Nobody answers until [`Coordinator::restart`].
    pub fn kill(&mut self) {
        drop(self.network.host(COORDINATOR));
        if let Some(process) = self.process.take() {
            process.shutdown_background();
        }
    }

    /// From now on the store needs so long for each batch of changes.
    pub fn delay_store(&self, each: Duration) {
        self.store.delay(each);
    }

    /// A channel to it, for calls without the SDK.
    #[cfg(all(test, feature = "sqlite"))]
    pub(super) fn channel(&self) -> tonic::transport::Channel {
        self.network.connect(COORDINATOR)
    }

    /// A connection to it.
    #[must_use]
    pub fn handfast(&self) -> Handfast {
        let (calls, waits) = (self.network.connect(COORDINATOR), self.network.connect(COORDINATOR));
        let handfast = Handfast::from_channels(calls, waits);
        if self.streams { handfast } else { handfast.without_streams() }
    }

    /// One of its participants, for an initiator to call.
    #[must_use]
    pub fn remote(&self, name: &str) -> Remote {
        let host = host(name);
        let channel = self.network.connect(&host);
        let remote = Remote::with_channel(name, &format!("http://{host}:1"), channel);
        if self.streams { remote } else { remote.without_streams() }
    }

    /// What is to happen to the next calls of this action and phase, in order; to those after them, nothing.
    ///
    /// # Panics
    ///
    /// Never, unless a test has panicked here before.
    pub fn script(&self, action: &str, phase: Phase, faults: impl IntoIterator<Item = Fault>) {
        let mut script = self.script.lock().expect("nothing panics while it is locked");
        script.entry((action.to_owned(), phase.as_str())).or_default().extend(faults);
    }

    /// Moves the coordinator's clock on: pauses between attempts end, timeouts pass. (Participants' databases have clocks of
    /// their own; a Try that is sent after this has more time by them, not less.)
    pub fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// Brings a transaction to its end, and moves the clock on as far as that takes.
    ///
    /// # Panics
    ///
    /// When it does not end within two hours of the coordinator's time, or is not known.
    pub async fn finished(&self, xid: Xid) -> Outcome {
        let handfast = self.handfast();
        let steps = FINISH_WITHIN[0].as_secs() / FINISH_WITHIN[1].as_secs();
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
            self.advance(FINISH_WITHIN[1]);
            // Calls under way take real time.
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
    /// Lets `call` through, or not.
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
