//! The process: builds the parts of the coordinator, connects them, serves, and stops them in a fixed order.
//!
//! A shutdown goes in this order, within the grace period:
//!
//! 1. Health says not ready.
//! 2. No new connections are accepted, and clients are asked to close theirs.
//! 3. Requests in flight finish. Those that only wait for a transaction to complete are answered at once.
//! 4. No new calls go to participants, and those in flight return.
//! 5. The journal records all remaining changes.
//! 6. The partitions are handed back, and the store is closed.
//!
//! A kill at any moment is equally safe, but recovery takes longer.

use std::{env, io, net::SocketAddr, sync::Arc, thread, time::Duration};

use handfast_proto::{FILE_DESCRIPTOR_SET, crash_point};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;
use tower_layer::{Identity, Stack};
use tracing::{error, info, warn};

use crate::{
    clock::{Clock as _, SystemClock},
    config::{Config, StoreUrl},
    coordinator::{Coordinator, End, Running},
    dispatch::{GrpcDispatch, Tcp},
    journal::Ended,
    listen::{self, Permits},
    lobby::Lobby,
    partition::Settings,
    rpc::{
        EachCall, Services,
        health::{set_ready, tell_readiness},
    },
    signals::{self, Hangup},
    standby,
    store::{
        self, Store,
        memory::MemoryStore,
        mysql::{self, MySqlStore},
        sqlite::{self, SqliteStore},
    },
};

/// At shutdown, how long connections may take to send the last answers. A responsive client closes its connection before that.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// At shutdown, how often the coordinator checks whether the store still answers.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// If the store is silent for this long during a shutdown, the process ends without it.
const SILENT_AT_THE_END: Duration = Duration::from_millis(1500);

/// The runtime of the process. It has as many threads as TOKIO_WORKER_THREADS says, otherwise half as many as there are
/// processors. The work is many small tasks that wake each other, and that costs a quarter more across threads. The other
/// processors are left to the store's server and to other programs on this machine.
///
/// # Errors
///
/// When the system cannot start the threads.
pub fn runtime() -> io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    // tokio reads the variable itself.
    if env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        builder.worker_threads((processors / 2).max(1));
    }
    builder.enable_all().build()
}

/// What is announced once the coordinator serves.
#[derive(Debug, Clone)]
pub struct Started {
    /// The address that initiators connect to.
    pub grpc: SocketAddr,
    /// The store, for people.
    pub store: String,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// An orderly shutdown after a signal.
    Stopped,
    /// Another coordinator has taken over.
    Fenced,
    /// The store holds damaged data, or refused a batch; a person must look. Only the partitions of that batch have ended by
    /// then, but the process ends as well: while it lacks a partition it must not look as if it served all.
    Corrupt,
    /// A task ended that should run for ever. Holds its name.
    Broken(&'static str),
    /// The store's file was deleted, moved or replaced.
    StoreGone,
}

impl Exit {
    /// The word for the log.
    fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Fenced => "fenced",
            Self::Corrupt => "corrupt",
            Self::Broken(task) => task,
            Self::StoreGone => "store gone",
        }
    }
}

/// Why the coordinator could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store's file cannot be opened.
    #[error(transparent)]
    OpenFile(#[from] sqlite::OpenError),
    /// The store's server cannot be reached, or cannot be trusted to keep what it acknowledges.
    #[error(transparent)]
    OpenServer(#[from] mysql::OpenError),
    /// The store does not answer.
    #[error("the store cannot be taken over: {0}")]
    Acquire(#[from] store::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address of the configuration (`listen`).
        address: SocketAddr,
        /// Why the system refuses it.
        #[source]
        source: io::Error,
    },
    /// The gRPC server failed.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// Signals cannot be received.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] io::Error),
}

/// What to do if another coordinator owns the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeOver {
    /// Wait until the owner hands the store back, or shows no sign of life for a while.
    WhenFree,
    /// Take over at once. But if the store has been taken over too often lately, wait.
    AtOnce,
    /// Take over at once, however often the store has been taken over.
    Always,
}

/// Runs the coordinator until SIGTERM or SIGINT, or until another coordinator takes over. `announce` is called once it serves.
/// A second signal ends the process at once.
///
/// # Errors
///
/// See [`Error`]. A failed start or stop leaves nothing half done.
pub async fn run(
    config: Config,
    take_over: TakeOver,
    hangup: Hangup,
    announce: impl FnOnce(&Started),
) -> Result<Exit, Error> {
    let stop = signals::stop_token(hangup).map_err(Error::Signals)?;
    let permits = Permits::new(listen::connections_max(config.limits.connections));
    let (listener, listening) = listen_on(config.listen).await?;
    let failed = |source| Error::Listen { address: listening, source };
    let lobby = Lobby::open(listener, permits.clone()).await.map_err(failed)?;
    let Ready { services, dispatch, mut running, coordinator } = tokio::select! {
        ready = start(&config, take_over) => ready?,
        // Starting is abandoned, whatever it waits for. A takeover that has begun still completes in the store, and the next
        // owner takes over from it.
        () = stop.cancelled() => {
            info!("stopped before it served");
            return Ok(Exit::Stopped);
        }
    };
    let closing = CancellationToken::new();
    let services = services.until(closing.clone());
    let (router, health) = router(&services);
    let listener = lobby.close().await.map_err(failed)?;
    let incoming = listen::incoming(listener, permits, closing.clone());
    let mut serving = tokio::spawn(
        router.serve_with_incoming_shutdown(Box::pin(incoming), closing.clone().cancelled_owned()),
    );
    let readiness = tokio::spawn(tell_readiness(coordinator.clone(), health.clone()));
    let started = Started { grpc: listening, store: config.store.to_string() };
    info!(address = %started.grpc, store = started.store, "serving");
    announce(&started);

    let exit = tokio::select! {
        () = stop.cancelled() => Exit::Stopped,
        end = running.ended() => match end {
            End::Partition(_, Ended::Fenced) => Exit::Fenced,
            End::Partition(_, Ended::Corrupt) => Exit::Corrupt,
            End::Task(task) => Exit::Broken(task),
            End::StoreGone(what) => {
                error!(what, "the store is not where it was; ending at once");
                Exit::StoreGone
            }
        },
    };
    if exit == Exit::StoreGone {
        // Nothing can be recorded any more, so there is nothing to wait for.
        set_ready(&health, false).await;
        return Ok(exit);
    }
    if let Exit::Broken(task) = exit {
        // A coordinator with a dead part would only delay its callers. The next owner continues from what is durable.
        set_ready(&health, false).await;
        error!(task, "a task has ended that should run for ever; ending at once");
        return Ok(exit);
    }
    let deadline = Instant::now() + config.shutdown_grace;
    info!(exit = exit.as_str(), grace_seconds = config.shutdown_grace.as_secs(), "stopping");
    readiness.abort();
    set_ready(&health, false).await;
    closing.cancel();
    coordinator.end_waits();
    let in_order = async {
        let answered = answered(&mut serving, &services);
        stop_in_order(answered, &dispatch, running, deadline, config.shutdown_grace).await
    };
    let in_time = tokio::select! {
        biased;
        in_time = in_order => in_time,
        // Every step of the shutdown may wait for the store, so stop waiting if it does not answer.
        () = silence(&coordinator) => {
            warn!("the store does not answer; the next owner will ask some participants once more");
            false
        }
    };
    info!(in_time, "stopped");
    Ok(exit)
}

/// The coordinator once it owns its store.
struct Ready {
    services: Services,
    dispatch: Arc<GrpcDispatch>,
    running: Running,
    coordinator: Arc<Coordinator>,
}

/// Opens the store, waits for its turn, and takes the store over. May be dropped at any moment.
async fn start(config: &Config, take_over: TakeOver) -> Result<Ready, Error> {
    let store = open_store(config).await?;
    let clock = Arc::new(SystemClock::default());
    let at_once = match take_over {
        TakeOver::WhenFree => false,
        TakeOver::AtOnce => standby::may_take_over(&*store, clock.now()).await,
        TakeOver::Always => true,
    };
    if !at_once {
        standby::until_free(&*store).await;
        crash_point!("standby.takes_over");
    }
    let targets = Arc::new(config.targets.clone());
    let dispatch = Arc::new(GrpcDispatch::new(targets.clone(), Arc::new(Tcp), clock.clone()));
    let settings = settings(config);
    let starting = Coordinator::start(store, dispatch.clone(), clock, settings, config.retention);
    let (coordinator, running) = starting.await?;
    let services = Services::new(coordinator.clone(), targets, config.transaction_timeout);
    Ok(Ready { services, dispatch, running, coordinator })
}

async fn open_store(config: &Config) -> Result<Arc<dyn Store>, Error> {
    Ok(match &config.store {
        StoreUrl::Sqlite(path) => Arc::new(SqliteStore::open(path).await?),
        StoreUrl::MySql(url) => {
            Arc::new(MySqlStore::open(url.secret(), config.store_unsafe).await?)
        }
        StoreUrl::Memory => {
            warn!(
                "NOTHING IS DURABLE: the store is in memory, and every decision is forgotten when this process ends"
            );
            Arc::new(MemoryStore::default())
        }
    })
}

/// Starts to listen. Returns the actual address, since the configured port may be 0.
async fn listen_on(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let listening = listener.local_addr().map_err(failed)?;
    Ok((listener, listening))
}

fn settings(config: &Config) -> Settings {
    Settings {
        retry: config.retry,
        call_timeout: config.calls.timeout,
        call_timeout_max: config.calls.timeout_max,
        open_max: config.limits.open,
        open_bytes_max: config.limits.open_megabytes * 1_000_000,
        stuck_after: config.stuck,
        log_labels: config.log_labels.clone(),
        record_after: config.record_after,
    }
}

/// All services, with the limits that gRPC does not set by itself.
pub fn router(services: &Services) -> (Router<Stack<EachCall, Identity>>, HealthReporter) {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Older tools support only v1alpha.
    let reflection_v1 = reflection().build_v1().expect("our own descriptors are sound");
    let reflection_v1alpha = reflection().build_v1alpha().expect("our own descriptors are sound");
    let router = listen::server()
        .layer(services.each_call())
        .add_service(services.for_initiators())
        .add_service(services.for_operators())
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    (router, reporter)
}

/// Each step has its share of the grace period and is cut off at its end. Returns whether all steps finished in time.
async fn stop_in_order(
    answered: impl Future<Output = ()>,
    dispatch: &GrpcDispatch,
    running: Running,
    deadline: Instant,
    grace: Duration,
) -> bool {
    let answered = timeout_at(deadline - grace * 4 / 10, answered).await.is_ok();
    let called = timeout_at(deadline - grace * 2 / 10, dispatch.close()).await.is_ok();
    let recorded = timeout_at(deadline, running.stop()).await.is_ok();
    if !recorded {
        warn!(
            "the store did not answer in time; the next owner will ask some participants once more"
        );
    }
    answered && called && recorded
}

/// Completes when all calls are answered and the answers are sent. A connection with a silent client does not close by itself,
/// so it is not waited for.
async fn answered(
    serving: &mut tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    services: &Services,
) {
    let all_answered = async {
        services.all_answered().await;
        sleep(LAST_ANSWERS).await;
        services.all_answered().await; // those that were on their way
    };
    tokio::select! {
        _closed = serving => {}
        () = all_answered => {}
    }
}

/// Completes when the store has stopped answering. One slow commit is not enough: calls to participants may still come back.
async fn silence(coordinator: &Coordinator) {
    let mut silent_since = None;
    loop {
        if coordinator.is_ready() {
            silent_since = None;
        } else if silent_since.get_or_insert_with(Instant::now).elapsed() >= SILENT_AT_THE_END {
            return;
        }
        sleep(LOOK_EVERY).await;
    }
}
