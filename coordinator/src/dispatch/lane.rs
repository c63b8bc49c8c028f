//! The calls of one action to one participant: how many are in flight, and how many wait.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Later;

/// Calls that may wait for one action. Further calls are turned away and made later.
pub(super) const QUEUE_MAX: usize = 1024;
/// When the queue is full, a call is put off by this time, multiplied by the turned-away calls and divided by the queue's length. So calls come
/// back at about the rate at which they can be made. If they all came back at once, again and again, they would use up the
/// processor.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(50);
/// The longest such pause. It is below `PARK_AFTER`: a transaction with a longer pause leaves memory, which costs a write.
const QUEUE_FULL_PAUSE_MAX: Duration = Duration::from_secs(4);

#[derive(Debug)]
pub(super) struct Lane {
    /// One permit for each call that may be in flight: three quarters of the participant's slots. The rest is for its other
    /// actions.
    permits: Arc<Semaphore>,
    /// One slot that other actions cannot take.
    own_slot: Arc<Semaphore>,
    /// Calls that wait or are in flight.
    held: AtomicUsize,
    /// Calls that were turned away because the queue was full, minus the calls made since then.
    turned_away: AtomicUsize,
    permits_max: usize,
}

impl Lane {
    /// `calls_max` is the number of the participant's slots.
    pub(super) fn new(calls_max: usize) -> Self {
        let permits_max = calls_max - calls_max / 4;
        Self {
            permits: Arc::new(Semaphore::new(permits_max)),
            own_slot: Arc::new(Semaphore::new(1)),
            held: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
            permits_max,
        }
    }

    /// Whether no call waits or is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.held.load(Ordering::Relaxed) == 0
    }

    /// Takes a place in the queue, if fewer than `room` calls wait and the call is admitted.
    pub(super) fn enter(
        &self,
        room: usize,
        admit: impl FnOnce() -> Result<(), Later>,
    ) -> Result<(), Later> {
        if self.held.load(Ordering::Relaxed) >= self.permits_max + room {
            let queues = 1 + self.turned_away.fetch_add(1, Ordering::Relaxed) / QUEUE_MAX;
            let pause = QUEUE_FULL_PAUSE.saturating_mul(u32::try_from(queues).unwrap_or(u32::MAX));
            return Err(spread(pause.min(QUEUE_FULL_PAUSE_MAX / 2)));
        }
        admit()?;
        self.held.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the place back.
    pub(super) fn leave(&self) {
        self.held.fetch_sub(1, Ordering::Relaxed);
        let one_less = |turned_away: usize| turned_away.checked_sub(1);
        // An error means that the counter was already 0.
        let _was_zero =
            self.turned_away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
    }

    /// Waits until fewer calls than allowed are in flight.
    pub(super) async fn permit(&self) -> OwnedSemaphorePermit {
        self.permits.clone().acquire_owned().await.expect("never closed")
    }

    /// Waits for the slot that only this action can use.
    pub(super) async fn own_slot(&self) -> OwnedSemaphorePermit {
        self.own_slot.clone().acquire_owned().await.expect("never closed")
    }
}

/// Adds a random part of up to the same length, so that calls that were turned away do not all come back at once.
pub(super) fn spread(wait: Duration) -> Later {
    Later(wait + wait * fastrand::u32(..65_536) / 65_536)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call that holds a place in the lane.
    struct Held<'a>(&'a Lane);

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.leave();
        }
    }

    fn enter(lane: &Lane) -> Result<Held<'_>, Later> {
        lane.enter(QUEUE_MAX, || Ok(()))?;
        Ok(Held(lane))
    }

    #[tokio::test]
    async fn a_full_queue_turns_callers_away_without_waiting() {
        let lane = Lane::new(2);
        let places: Vec<_> = (0..QUEUE_MAX + 2).map(|_| enter(&lane).ok().unwrap()).collect();
        let Err(Later(wait)) = enter(&lane) else { panic!("there is room") };
        assert!((QUEUE_FULL_PAUSE..=QUEUE_FULL_PAUSE * 2).contains(&wait), "{wait:?}");
        let (_one, _two) = (lane.permit().await, lane.permit().await);
        assert!(
            tokio::time::timeout(Duration::from_millis(10), lane.permit()).await.is_err(),
            "two at a time"
        );
        drop(places);
        assert!(lane.is_idle());
    }

    #[test]
    fn the_more_are_turned_away_the_later_they_come_back() {
        let lane = Lane::new(2);
        let mut places: Vec<_> = (0..QUEUE_MAX + 2).map(|_| enter(&lane).ok().unwrap()).collect();
        let turned_away = || enter(&lane).err().unwrap().0;
        let waits: Vec<_> = (0..10 * QUEUE_MAX).map(|_| turned_away()).collect();
        assert!(waits[..QUEUE_MAX].iter().all(|wait| *wait <= QUEUE_FULL_PAUSE * 2));
        assert!(waits[9 * QUEUE_MAX..].iter().all(|wait| *wait >= QUEUE_FULL_PAUSE * 10));
        assert!((0..100 * QUEUE_MAX).all(|_| turned_away() <= QUEUE_FULL_PAUSE_MAX));
        // Each call that is made reduces the number of calls that will come back.
        for _ in 0..200 * QUEUE_MAX {
            drop(places.pop());
            places.push(enter(&lane).ok().unwrap());
        }
        assert!(turned_away() <= QUEUE_FULL_PAUSE * 2);
    }
}
