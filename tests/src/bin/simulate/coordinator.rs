//! The program on a coordinator's host: what `handfast serve` does, over the simulated network, clock and store.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::StreamExt as _;
use handfast_coordinator::{
    clock::{Clock as _, SystemClock},
    coordinator::Coordinator,
    dispatch::{GrpcDispatch, Targets, address::AllowList},
    partition::Settings,
    rpc::{self, Services},
    server, standby,
    store::Store,
    transaction::{StuckAfter, retry::RetryPolicy},
};
use tokio_util::sync::CancellationToken;

use crate::{network::Dials, store::Client, world::World};

/// The default time for phase one.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long an orderly stop may take.
const GRACE: Duration = Duration::from_secs(4);

/// Runs until it is replaced or told to stop. Then it tells the world, which kills the rest of the host.
pub(crate) async fn run(number: usize, world: Arc<World>) -> turmoil::Result {
    let why = serve(number, &world).await;
    world.chronicle.note(format_args!("coordinator {number} ends: {why}"));
    world.exited(number);
    std::future::pending().await
}

async fn serve(number: usize, world: &Arc<World>) -> String {
    let client = Arc::new(Client::new(world.database.clone(), number));
    let store: Arc<dyn Store> = client.clone();
    let seat = &world.coordinators[number];
    if !seat.take_over.swap(false, Ordering::Relaxed) {
        standby::until_free(&*store).await;
    }
    let wall = seat.wall.clone();
    let clock = Arc::new(SystemClock::of(move || wall.now()));
    let targets = Arc::new(Targets {
        participants: BTreeMap::new(),
        allow: AllowList::parse(["*.test:*"]).expect("a rule"),
        calls_max: 64,
        streams: world.mix.streams,
    });
    let dials = Arc::new(Dials(world.network.clone()));
    let dispatch = Arc::new(GrpcDispatch::new(targets.clone(), dials, clock.clone()));
    let mix = &world.mix;
    let settings = Settings {
        retry: RetryPolicy { initial: mix.retry_initial, max: mix.retry_max },
        call_timeout: mix.call_timeout,
        call_timeout_max: mix.call_timeout * 4,
        open_max: 10_000,
        open_bytes_max: 1_000_000_000,
        stuck_after: StuckAfter { attempts: 8, time: Duration::from_secs(120) },
        log_labels: Arc::default(),
        record_after: mix.record_after,
    };
    let started = Coordinator::start(store, dispatch.clone(), clock, settings, mix.retention).await;
    let (coordinator, mut running) = match started {
        Ok(started) => started,
        Err(error) => return error.to_string(),
    };
    world.chronicle.count("coordinator started");
    let closing = CancellationToken::new();
    let services = Services::new(coordinator.clone(), targets, TIMEOUT).until(closing.clone());
    let (router, _health) = server::router(&services);
    let incoming = match world.network.listen().await {
        Ok(incoming) => incoming,
        Err(error) => return error.to_string(),
    };
    let incoming = incoming
        .map(|connection| Ok::<_, std::io::Error>(rpc::Connection::new(connection?, None)))
        .take_until(closing.clone().cancelled_owned());
    // Not `serve_with_incoming_shutdown`: with it, each connection chooses at random whether it first reads what has arrived or first
    // closes, and a seed would not be the same run twice.
    let serving = tokio::spawn(router.serve_with_incoming(incoming.boxed()));
    let why = tokio::select! {
        biased;
        ended = running.ended() => format!("{ended:?}"),
        () = seat.stop.notified() => "stopped".to_owned(),
    };
    client.stops();
    // In the same order as the server.
    closing.cancel();
    let in_order = async {
        drop(serving.await); // accepts no more connections
        tokio::time::sleep(GRACE / 8).await;
        drop(tokio::time::timeout(GRACE / 4, dispatch.close()).await);
        running.stop().await;
    };
    drop(tokio::time::timeout(GRACE, in_order).await);
    why
}
