//! Waiting for a store that another coordinator has: alive, and not ready. The wait ends when that one hands the partitions back, or
//! when nothing that it owns has changed for a while by this process's own clock: an owner with nothing else to write writes an
//! empty batch every few seconds. To be wrong about it is safe: a takeover fences the other off, whatever it is doing.

use std::time::Duration;

use handfast_proto::crash_point;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes, transport::server::TcpIncoming};
use tonic_health::ServingStatus;
use tracing::{info, warn};

use crate::{server::HEALTH_NAMES, store::Store, transaction::Timestamp};

/// How often the owner is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// An owner of whom nothing was seen for so long is gone.
const STILL_MAX: Duration = Duration::from_secs(10);

/// The store may be taken over so often within so long a time until one that was told to do it at once waits for its turn all the
/// same. Longer than supervisors wait before they start again what has ended: two coordinators that are both told to would else
/// take it from each other for ever.
const TAKEOVERS_MAX: u64 = 6;
const TAKEOVERS_WITHIN: Duration = Duration::from_secs(600);

/// Whether one that was told to take over at once may. Each counts also what it did itself, by its own clock: clocks that differ
/// let two of them take turns a little longer, not for ever.
pub(crate) async fn may_take_over(store: &dyn Store, now: Timestamp) -> bool {
    let within = i64::try_from(TAKEOVERS_WITHIN.as_millis()).expect("a few minutes");
    match store.takeovers(Timestamp(now.0 - within), now).await {
        Ok(times) if times >= TAKEOVERS_MAX => {
            warn!(
                times,
                within_seconds = TAKEOVERS_WITHIN.as_secs(),
                "the store is taken over too often: not at once again, as two that do it to each other would never stop \
                 (--take-over=always does)"
            );
            false
        }
        Ok(_) => true,
        Err(error) => {
            warn!(%error, "the store cannot be looked at");
            true // the takeover itself says what is wrong
        }
    }
}

/// Returns when it is this process's turn. Meanwhile it answers who asks after its health; everybody else is told to come again.
pub(crate) async fn wait(store: &dyn Store, listener: TcpListener) -> std::io::Result<TcpListener> {
    let listener = listener.into_std()?;
    let incoming = TcpIncoming::from(TcpListener::from_std(listener.try_clone()?)?);
    let closing = CancellationToken::new();
    let server = tonic::transport::Server::builder()
        .add_routes(routes().await)
        .serve_with_incoming_shutdown(incoming, closing.clone().cancelled_owned());
    let server = tokio::spawn(server);
    turn(store).await;
    crash_point!("standby.turn");
    closing.cancel();
    server.abort(); // also with connections that are open: their clients come again
    drop(server.await);
    TcpListener::from_std(listener)
}

async fn routes() -> Routes {
    let (reporter, health) = tonic_health::server::health_reporter();
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
    let turned_away = async || {
        let status =
            Status::unavailable("this coordinator is a standby: another one has the store");
        status.into_http::<Body>()
    };
    Routes::from(Routes::new(health).into_axum_router().fallback(turned_away))
}

/// Returns when nobody has the store, or its owner shows no life. Only time between two looks counts that both saw the store: while
/// it cannot be looked at, the owner's heartbeat may stand still for the same reason.
pub async fn turn(store: &dyn Store) {
    let mut seen = None;
    let mut still = Duration::ZERO;
    let mut looked_at: Option<Instant> = None;
    loop {
        match store.seats().await {
            Ok(seats) if seats.iter().all(|seat| seat.owner.is_none()) => return,
            Ok(seats) => {
                if seen.is_none() {
                    let owner = seats.iter().find_map(|seat| seat.owner.as_deref());
                    info!(owner, "another coordinator has the store; waiting as its standby");
                }
                if seen.as_ref() == Some(&seats) {
                    still += looked_at.map_or(Duration::ZERO, |at| at.elapsed());
                } else {
                    (seen, still) = (Some(seats), Duration::ZERO);
                }
                if still >= STILL_MAX {
                    warn!(still_seconds = still.as_secs(), "the owner shows no life; taking over");
                    return;
                }
                looked_at = Some(Instant::now());
            }
            Err(error) => {
                warn!(%error, "the store cannot be looked at");
                looked_at = None;
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        store::{ALL_PARTITIONS, scripted::ScriptedStore},
        transaction::Timestamp,
    };

    #[tokio::test(start_paused = true)]
    async fn looks_that_fail_neither_count_nor_begin_the_wait_anew() {
        let store = Arc::new(ScriptedStore::default());
        store.acquire(&ALL_PARTITIONS, "the first", Timestamp(1)).await.unwrap();
        let began = Instant::now();
        let looking = store.clone();
        let waiting = tokio::spawn(async move { turn(&*looking).await });
        // Every third look fails.
        let mut looks = 0_u32;
        while !waiting.is_finished() {
            store.fail_reads(looks % 3 == 2);
            looks += 1;
            sleep(LOOK_EVERY).await;
            assert!(began.elapsed() < STILL_MAX * 6, "it waits for ever");
        }
        assert!(
            began.elapsed() >= STILL_MAX * 2,
            "{:?}: only what was seen counts",
            began.elapsed()
        );
    }
}
