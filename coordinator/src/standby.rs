//! A standby waits for a store that another coordinator owns. It is alive but not ready. The wait ends when the owner hands its
//! partitions back, or when no partition has changed for a while by the standby's own clock. An owner with nothing else to
//! write appends an empty batch every few seconds. A wrong guess is safe: a takeover fences the owner off, whatever it is
//! doing.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::{store::Store, transaction::Timestamp};

/// How often the standby checks the owner.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// An owner whose partitions have not changed for this long is considered gone.
const STILL_MAX: Duration = Duration::from_secs(10);

/// After this many takeovers within this time, a coordinator that was told to take over at once waits instead. Otherwise two
/// such coordinators would take the store from each other for ever. The time is longer than the pause of supervisors before
/// they restart a process.
const TAKEOVERS_MAX: u64 = 6;
const TAKEOVERS_WITHIN: Duration = Duration::from_secs(600);

/// Whether a coordinator that was told to take over at once may do so. Each takeover is counted with the time of the clock of
/// its coordinator. If the clocks differ, two coordinators can alternate a little longer, but not for ever.
pub(crate) async fn may_take_over(store: &dyn Store, now: Timestamp) -> bool {
    let within = i64::try_from(TAKEOVERS_WITHIN.as_millis()).expect("a few minutes");
    match store.takeovers(Timestamp(now.0 - within), now).await {
        Ok(times) if times >= TAKEOVERS_MAX => {
            warn!(
                times,
                within_seconds = TAKEOVERS_WITHIN.as_secs(),
                "the store was taken over too often lately: waiting instead, so that two coordinators do not take it from each \
                 other for ever (--take-over=always does not wait)"
            );
            false
        }
        Ok(_) => true,
        Err(error) => {
            warn!(%error, "cannot read who owns the store");
            true // the takeover itself says what is wrong
        }
    }
}

/// Returns when the store is free: no partition has an owner, or the owner shows no sign of life. Only time between two
/// successful checks counts. While the store cannot be read, the owner may be unable to write its heartbeat either.
pub async fn until_free(store: &dyn Store) {
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
                warn!(%error, "cannot read who owns the store");
                looked_at = None;
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Whether no live coordinator owns the store. It takes a while to find out.
pub async fn is_free(store: &dyn Store) -> bool {
    tokio::time::timeout(STILL_MAX + 3 * LOOK_EVERY, until_free(store)).await.is_ok()
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
        let waiting = tokio::spawn(async move { until_free(&*looking).await });
        // Every third check fails.
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
