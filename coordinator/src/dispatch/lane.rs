//! The calls of one action to one participant: how many are under way at a time, and how many wait.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Later;

/// Calls that wait for one action at most. What comes on top is due later.
pub(super) const QUEUE_MAX: usize = 1024;
/// How much later, when the queue is full: so long for each queue of calls that were turned away before. They come back spread over
/// that time, about as fast as calls are made; all at once and again and again they would keep the processor from everything else.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(50);
/// How much later at most. Below what makes a transaction leave memory, which costs a write.
const QUEUE_FULL_PAUSE_MAX: Duration = Duration::from_secs(4);

/// See the module's comment.
#[derive(Debug)]
pub(super) struct Lane {
    /// As many as may be under way at a time: three quarters of the participant's slots, so that the rest is left to other actions.
    turns: Arc<Semaphore>,
    /// The one slot that no other action can take.
    own_slot: Arc<Semaphore>,
    /// Calls that wait or are under way.
    held: AtomicUsize,
    /// Calls that were turned away because the queue was full, less those that were made since.
    turned_away: AtomicUsize,
    turns_max: usize,
}

impl Lane {
    /// `calls_max`: slots of the participant.
    pub(super) fn new(calls_max: usize) -> Self {
        let turns_max = calls_max - calls_max / 4;
        Self {
            turns: Arc::new(Semaphore::new(turns_max)),
            own_slot: Arc::new(Semaphore::new(1)),
            held: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
            turns_max,
        }
    }

    /// Whether nobody uses it.
    pub(super) fn is_idle(&self) -> bool {
        self.held.load(Ordering::Relaxed) == 0
    }

    /// Takes a place in the queue, if fewer than `room` calls wait and the call is admitted.
    pub(super) fn enter(
        &self,
        room: usize,
        admit: impl FnOnce() -> Result<(), Later>,
    ) -> Result<(), Later> {
        if self.held.load(Ordering::Relaxed) >= self.turns_max + room {
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
        // An error means that it was 0 already.
        let _was_zero =
            self.turned_away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
    }

    /// Waits until fewer than the most are under way.
    pub(super) async fn turn(&self) -> OwnedSemaphorePermit {
        self.turns.clone().acquire_owned().await.expect("never closed")
    }

    /// Waits for the slot that only this action can take.
    pub(super) async fn own_slot(&self) -> OwnedSemaphorePermit {
        self.own_slot.clone().acquire_owned().await.expect("never closed")
    }
}

/// Spread over as much again, so that those who were turned away do not come back together.
pub(super) fn spread(wait: Duration) -> Later {
    Later(wait + wait * fastrand::u32(..65_536) / 65_536)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody who holds a place.
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
        let (_one, _two) = (lane.turn().await, lane.turn().await);
        assert!(
            tokio::time::timeout(Duration::from_millis(10), lane.turn()).await.is_err(),
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
        // As calls are made, there are fewer to come back.
        for _ in 0..200 * QUEUE_MAX {
            drop(places.pop());
            places.push(enter(&lane).ok().unwrap());
        }
        assert!(turned_away() <= QUEUE_FULL_PAUSE * 2);
    }
}
