//! The process: builds the parts, joins them, serves, and stops them in order.
//!
//! Stopping, in this order and within the grace period: not ready any more → no new connections, and those there are asked to
//! go → what is under way finishes → no further calls to participants, and those under way come back → what was waiting for
//! company is recorded → the partitions are handed back. A kill at any moment is just as right, only slower to recover from.

use std::{env, io, net::SocketAddr, sync::Arc, thread, time::Duration};

use futures_util::StreamExt as _;
use handfast_proto::FILE_DESCRIPTOR_SET;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{
    clock::{Clock as _, SystemClock},
    config::{Config, StoreUrl},
    coordinator::{Coordinator, Running},
    dispatch::{GrpcDispatch, Tcp},
    journal::Ended,
    partition::Settings,
    rpc::{Connection, STREAMS_MAX, Services},
    standby,
    store::{
        self, Store,
        memory::MemoryStore,
        mysql::{self, MySqlStore},
        sqlite::{self, SqliteStore},
    },
};

/// Bytes of the headers of one request.
const HEADERS_BYTES_MAX: u32 = 16 * 1024;
/// How often an idle connection is asked whether it lives, and how long it may take to say so.
const KEEP_ALIVE: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(10)];
/// How often readiness is looked at.
const READINESS_INTERVAL: Duration = Duration::from_millis(500);
/// Names that can be asked for with grpc.health.v1: the process, and its services.
pub(crate) const HEALTH_NAMES: [&str; 3] =
    ["", "handfast.v1.CoordinatorService", "handfast.v1.AdminService"];

/// What everything runs on: as many threads as TOKIO_WORKER_THREADS says, else half as many as there are processors. The work is many
/// small pieces that wake each other, across threads a quarter dearer than within one; and the other half is for the store's server
/// and whoever else is on this machine.
///
/// # Errors
///
/// When the system has no threads to give.
pub fn runtime() -> io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    // tokio reads it by itself.
    if env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        builder.worker_threads((processors / 2).max(1));
    }
    builder.enable_all().build()
}

/// What is told once the coordinator serves.
#[derive(Debug, Clone)]
pub struct Started {
    /// Where initiators connect.
    pub grpc: SocketAddr,
    /// The store, for people.
    pub store: String,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// In order, after a signal.
    Stopped,
    /// Another coordinator has taken over.
    Fenced,
    /// The store holds what cannot be; a person must look.
    Corrupt,
}

/// Why the coordinator could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store's file is not to be had.
    #[error(transparent)]
    OpenFile(#[from] sqlite::OpenError),
    /// The store's server is not to be had, or not to be trusted.
    #[error(transparent)]
    OpenServer(#[from] mysql::OpenError),
    /// The store does not answer.
    #[error("the store cannot be taken over: {0}")]
    Acquire(#[from] store::Error),
    /// The address is not to be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server broke.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// Signals cannot be received.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] io::Error),
}

/// What to do about a coordinator that has the store now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Wait until it hands back, or shows no life any more.
    Wait,
    /// Take over from it, unless that was done too often of late.
    AtOnce,
    /// Take over from it, however often.
    Always,
}

/// Runs the coordinator until SIGTERM or SIGINT, or until it is replaced. `announce` is called once it serves. A second signal
/// ends the process at once.
///
/// # Errors
///
/// See [`Error`]; nothing is left half done.
pub async fn run(
    config: Config,
    turn: Turn,
    announce: impl FnOnce(&Started),
) -> Result<Exit, Error> {
    let stop = stop_signal().map_err(Error::Signals)?;
    let store: Arc<dyn Store> = match &config.store {
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
    };
    let address = config.listen;
    let failed = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let started =
        Started { grpc: listener.local_addr().map_err(failed)?, store: config.store.to_string() };

    let clock = Arc::new(SystemClock::default());
    let at_once = match turn {
        Turn::Wait => false,
        Turn::AtOnce => standby::may_take_over(&*store, clock.now()).await,
        Turn::Always => true,
    };
    let listener = if at_once {
        listener
    } else {
        let waited = standby::wait(&*store, listener);
        tokio::select! {
            listener = waited => listener.map_err(failed)?,
            () = stop.cancelled() => return Ok(Exit::Stopped),
        }
    };
    let targets = Arc::new(config.targets.clone());
    let dispatch = Arc::new(GrpcDispatch::new(targets.clone(), Arc::new(Tcp), clock.clone()));
    let settings = Settings {
        retry: config.retry,
        call_timeout: config.calls.timeout,
        call_timeout_max: config.calls.timeout_max,
        open_max: config.limits.open,
        stuck_after: config.stuck,
    };
    let starting = Coordinator::start(store, dispatch.clone(), clock, settings, config.retention);
    let (coordinator, running) = tokio::select! {
        started = starting => started?,
        // Given up while it waits for the batch of the owner before; that one goes on then.
        () = stop.cancelled() => return Ok(Exit::Stopped),
    };
    let closing = CancellationToken::new();
    let services = Services::new(coordinator.clone(), targets, config.transaction_timeout)
        .until(closing.clone());
    let (router, health) = router(&services);

    let incoming = incoming(listener, config.limits.connections);
    let serving = tokio::spawn(
        router.serve_with_incoming_shutdown(incoming, closing.clone().cancelled_owned()),
    );
    let readiness = tokio::spawn(tell_readiness(coordinator.clone(), health.clone()));
    info!(address = %started.grpc, store = started.store, "serving");
    announce(&started);

    let exit = tokio::select! {
        () = stop.cancelled() => Exit::Stopped,
        ended = coordinator.ended() => match ended {
            Ended::Fenced => Exit::Fenced,
            Ended::Corrupt => Exit::Corrupt,
        },
    };
    let deadline = Instant::now() + config.shutdown_grace;
    info!(?exit, grace_seconds = config.shutdown_grace.as_secs(), "stopping");
    readiness.abort();
    set_ready(&health, false).await;
    closing.cancel();
    let in_time = stop_in_order(serving, &dispatch, running, deadline, config.shutdown_grace).await;
    info!(in_time, "stopped");
    Ok(exit)
}

/// All services, with every limit set that gRPC has none for by itself.
pub fn router(services: &Services) -> (Router, HealthReporter) {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Older tools ask for v1alpha only.
    let reflection_v1 = reflection().build_v1().expect("our own descriptors are sound");
    let reflection_v1alpha = reflection().build_v1alpha().expect("our own descriptors are sound");
    let router = tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .concurrency_limit_per_connection(STREAMS_MAX as usize)
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEP_ALIVE[0]))
        .http2_keepalive_timeout(Some(KEEP_ALIVE[1]))
        .add_service(services.for_initiators())
        .add_service(services.for_operators())
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    (router, reporter)
}

/// Connections, as many at a time as may be. One more is closed at once.
fn incoming(
    listener: TcpListener,
    connections_max: usize,
) -> impl futures_util::Stream<Item = io::Result<Connection<tokio::net::TcpStream>>> {
    let places = Arc::new(Semaphore::new(connections_max));
    TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(move |accepted| {
        let place = places.clone().try_acquire_owned();
        std::future::ready(match (accepted, place) {
            (Ok(stream), Ok(place)) => Some(Ok(Connection::new(stream, Some(place)))),
            (Ok(_), Err(_)) => {
                warn!(connections_max, "a connection was refused: there are as many as there may be (limits.connections)");
                None
            }
            (Err(error), _) => Some(Err(error)),
        })
    })
}

async fn tell_readiness(coordinator: Arc<Coordinator>, health: HealthReporter) {
    let mut told = None;
    loop {
        let ready = coordinator.is_ready();
        if told != Some(ready) {
            if told.is_some() {
                info!(ready, "readiness has changed");
            }
            set_ready(&health, ready).await;
            told = Some(ready);
        }
        tokio::time::sleep(READINESS_INTERVAL).await;
    }
}

async fn set_ready(health: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
}

/// Each step has a part of the grace period; what is not done by then is cut off. Returns whether all was done in time.
async fn stop_in_order(
    mut serving: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    dispatch: &GrpcDispatch,
    running: Running,
    deadline: Instant,
    grace: Duration,
) -> bool {
    // A stream that a client keeps open, such as a watch of our health, would hold the server up for ever.
    let served = tokio::time::timeout_at(deadline - grace * 4 / 10, &mut serving).await.is_ok();
    serving.abort();
    let called = tokio::time::timeout_at(deadline - grace * 2 / 10, dispatch.close()).await.is_ok();
    let recorded = tokio::time::timeout_at(deadline, running.stop()).await.is_ok();
    if !recorded {
        warn!("the store did not answer in time; the next owner asks participants once more");
    }
    served && called && recorded
}

/// Is cancelled with the first SIGTERM or SIGINT. The second one ends the process.
fn stop_signal() -> io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stopping.is_cancelled() {
                warn!("a second signal: ending at once");
                std::process::exit(1);
            }
            stopping.cancel();
        }
    });
    Ok(stop)
}
