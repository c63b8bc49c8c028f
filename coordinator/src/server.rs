//! The process: builds the parts, joins them, serves, and stops them in order.
//!
//! It stops in this order, within the grace period: health says not ready → no new connections, and open ones are asked to close
//! → requests in flight finish → no further calls to participants, and those in flight return → changes that waited to be
//! recorded with later ones are recorded → the partitions are handed back. A kill at any moment is just as safe, only slower to
//! recover from.

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
use tonic_health::server::HealthReporter;
use tracing::{error, info, warn};

use crate::{
    clock::{Clock, SystemClock},
    config::{Config, StoreUrl},
    coordinator::{Coordinator, End, Running},
    dispatch::{GrpcDispatch, Tcp},
    journal::Ended,
    partition::Settings,
    rpc::{
        Connection, STREAMS_MAX, Services,
        health::{set_ready, tell_readiness},
    },
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
/// The runtime of the process: as many threads as TOKIO_WORKER_THREADS says, else half as many as there are processors. The work is
/// many small pieces that wake each other, which costs a quarter more across threads than within one. The other processors are for
/// the store's server and for other programs on this machine.
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
    /// A task ended that should run for ever. Names it.
    Broken(&'static str),
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

/// What to do if another coordinator owns the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeOver {
    /// Wait until it hands the store back, or shows no life for a while.
    WhenFree,
    /// Take over at once, unless the store was taken over too often lately. Then wait.
    AtOnce,
    /// Take over at once, however often that was done.
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
    take_over: TakeOver,
    announce: impl FnOnce(&Started),
) -> Result<Exit, Error> {
    let stop = stop_signal().map_err(Error::Signals)?;
    let store = open_store(&config).await?;
    let (listener, listening) = listen(config.listen).await?;
    let clock = Arc::new(SystemClock::default());
    let taken = until_free(take_over, &*store, &*clock, listener);
    let listener = tokio::select! {
        listener = taken => listener.map_err(|source| Error::Listen { address: listening, source })?,
        () = stop.cancelled() => return Ok(Exit::Stopped),
    };
    let targets = Arc::new(config.targets.clone());
    let dispatch = Arc::new(GrpcDispatch::new(targets.clone(), Arc::new(Tcp), clock.clone()));
    let settings = settings(&config);
    let starting = Coordinator::start(store, dispatch.clone(), clock, settings, config.retention);
    let (coordinator, mut running) = tokio::select! {
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
    let readiness = tokio::spawn(tell_readiness(coordinator, health.clone()));
    let started = Started { grpc: listening, store: config.store.to_string() };
    info!(address = %started.grpc, store = started.store, "serving");
    announce(&started);

    let exit = tokio::select! {
        () = stop.cancelled() => Exit::Stopped,
        end = running.ended() => match end {
            End::Partition(_, Ended::Fenced) => Exit::Fenced,
            End::Partition(_, Ended::Corrupt) => Exit::Corrupt,
            End::Task(task) => Exit::Broken(task),
        },
    };
    if let Exit::Broken(task) = exit {
        // Half of a coordinator would hold its callers up. What is durable is carried on by the next one.
        set_ready(&health, false).await;
        error!(task, "a task has ended that should run for ever; ending at once");
        return Ok(exit);
    }
    let deadline = Instant::now() + config.shutdown_grace;
    info!(?exit, grace_seconds = config.shutdown_grace.as_secs(), "stopping");
    readiness.abort();
    set_ready(&health, false).await;
    closing.cancel();
    let in_time = stop_in_order(serving, &dispatch, running, deadline, config.shutdown_grace).await;
    info!(in_time, "stopped");
    Ok(exit)
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

/// Listens. Returns the address too: a configured port 0 has become a real one.
async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let listening = listener.local_addr().map_err(failed)?;
    Ok((listener, listening))
}

/// Returns the listener when the store may be taken over. Until then this process is a standby.
async fn until_free(
    take_over: TakeOver,
    store: &dyn Store,
    clock: &dyn Clock,
    listener: TcpListener,
) -> io::Result<TcpListener> {
    let at_once = match take_over {
        TakeOver::WhenFree => false,
        TakeOver::AtOnce => standby::may_take_over(store, clock.now()).await,
        TakeOver::Always => true,
    };
    if at_once { Ok(listener) } else { standby::serve_until_free(store, listener).await }
}

fn settings(config: &Config) -> Settings {
    Settings {
        retry: config.retry,
        call_timeout: config.calls.timeout,
        call_timeout_max: config.calls.timeout_max,
        open_max: config.limits.open,
        open_bytes_max: config.limits.open_megabytes * 1_000_000,
        stuck_after: config.stuck,
    }
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
        // After a pause of this process there may be as many calls that their callers have given up. That is no attack.
        .http2_max_pending_accept_reset_streams(Some(STREAMS_MAX as usize))
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

/// Connections, at most so many at a time. One more is closed at once.
fn incoming(
    listener: TcpListener,
    connections_max: usize,
) -> impl futures_util::Stream<Item = io::Result<Connection<tokio::net::TcpStream>>> {
    let permits = Arc::new(Semaphore::new(connections_max));
    TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(move |accepted| {
        let permit = permits.clone().try_acquire_owned();
        std::future::ready(match (accepted, permit) {
            (Ok(stream), Ok(permit)) => Some(Ok(Connection::new(stream, Some(permit)))),
            (Ok(_), Err(_)) => {
                warn!(connections_max, "connection refused: limits.connections are open already");
                None
            }
            (Err(error), _) => Some(Err(error)),
        })
    })
}

/// Each step has a part of the grace period, and is cut off at the end of it. Returns whether all steps were done in time.
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
        warn!(
            "the store did not answer in time; the next owner will ask some participants once more"
        );
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
