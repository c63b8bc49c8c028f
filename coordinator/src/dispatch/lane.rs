//! One address: how many calls go to it at a time, how many wait, and whether it answers at all.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::{calls::ToParticipant, stream::Line};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Later;
use crate::transaction::Timestamp;

/// Calls that wait for one address. What comes on top is due later.
const QUEUE_MAX: usize = 1024;
/// How much later, when the queue is full: so long for each queue of calls that were turned away before. They come back spread over
/// that time, about as fast as calls are made; all at once and again and again they would keep the processor from everything else.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(50);
/// How much later at most. Below what makes a transaction leave memory, which costs a write.
const QUEUE_FULL_PAUSE_MAX: Duration = Duration::from_secs(4);
/// So many calls in a row without an answer open the breaker.
const BREAKER_FAILURES: u32 = 5;
/// How long the breaker stays open the first time; doubles up to the longest.
const BREAKER_PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

/// See the module's comment.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) line: Line<ToParticipant>,
    permits: Arc<Semaphore>,
    /// Calls that wait or are under way.
    held: AtomicUsize,
    /// Calls that were turned away because the queue was full, less those that were made since.
    turned_away: AtomicUsize,
    calls_max: usize,
    breaker: Mutex<Breaker>,
}

/// A place in the queue. Gives it back when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Lane>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
        let one_less = |turned_away: usize| turned_away.checked_sub(1);
        // None is none.
        let _none = self.0.turned_away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
    }
}

impl Place {
    /// Waits for its turn.
    pub(super) async fn turn(&self) -> OwnedSemaphorePermit {
        self.0.permits.clone().acquire_owned().await.expect("never closed")
    }

    pub(super) fn lane(&self) -> &Lane {
        &self.0
    }
}

impl Lane {
    pub(super) fn new(line: Line<ToParticipant>, calls_max: usize) -> Self {
        Self {
            line,
            permits: Arc::new(Semaphore::new(calls_max)),
            held: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
            calls_max,
            breaker: Mutex::default(),
        }
    }

    /// Whether nobody uses it.
    pub(super) fn is_idle(&self) -> bool {
        self.held.load(Ordering::Relaxed) == 0
    }

    /// Takes a place in the queue. Whoever is `hurried` passes the breaker.
    pub(super) fn enter(self: &Arc<Self>, now: Timestamp, hurried: bool) -> Result<Place, Later> {
        if self.held.load(Ordering::Relaxed) >= self.calls_max + QUEUE_MAX {
            let queues = 1 + self.turned_away.fetch_add(1, Ordering::Relaxed) / QUEUE_MAX;
            let pause = QUEUE_FULL_PAUSE.saturating_mul(u32::try_from(queues).unwrap_or(u32::MAX));
            return Err(spread(pause.min(QUEUE_FULL_PAUSE_MAX / 2)));
        }
        if !hurried {
            self.breaker.lock().expect("nothing panics while it is locked").admit(now)?;
        }
        self.held.fetch_add(1, Ordering::Relaxed);
        Ok(Place(self.clone()))
    }

    /// A call came back: with an answer, whatever it said, or without one.
    pub(super) fn returned(&self, answered: bool, now: Timestamp) {
        self.breaker.lock().expect("nothing panics while it is locked").returned(answered, now);
    }
}

/// Spread over as much again, so that those who were turned away do not come back together.
fn spread(wait: Duration) -> Later {
    Later(wait + wait * fastrand::u32(..65_536) / 65_536)
}

/// Keeps callers away from an address that does not answer, and lets one at a time try whether it does again.
#[derive(Debug, Default)]
struct Breaker {
    /// Calls in a row without an answer.
    failures: u32,
    /// While open: until when nobody is let through.
    open_until: Option<Timestamp>,
    /// Since it opened somebody was let through, and is not back.
    probing: bool,
}

impl Breaker {
    fn admit(&mut self, now: Timestamp) -> Result<(), Later> {
        let Some(until) = self.open_until else { return Ok(()) };
        if now < until {
            return Err(spread(until - now));
        }
        // This one is the probe; the others stay away until it is back, or was lost.
        self.open_until = Some(now + self.pause());
        self.probing = true;
        Ok(())
    }

    fn returned(&mut self, answered: bool, now: Timestamp) {
        if answered {
            *self = Self::default();
            return;
        }
        if self.open_until.is_some() && !std::mem::take(&mut self.probing) {
            return; // it was under way when the breaker opened, and says nothing new
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= BREAKER_FAILURES {
            self.open_until = Some(now + self.pause());
        }
    }

    fn pause(&self) -> Duration {
        let doublings = self.failures.saturating_sub(BREAKER_FAILURES).min(16);
        BREAKER_PAUSES[0].saturating_mul(1 << doublings).min(BREAKER_PAUSES[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_breaker_opens_after_failures_in_a_row_and_closes_with_the_first_answer() {
        let mut breaker = Breaker::default();
        let mut now = Timestamp(0);
        for _ in 0..BREAKER_FAILURES {
            breaker.admit(now).unwrap();
            breaker.returned(false, now);
        }
        let Later(wait) = breaker.admit(now).unwrap_err();
        assert!((BREAKER_PAUSES[0]..=BREAKER_PAUSES[0] * 2).contains(&wait), "{wait:?}");
        // One probe at a time.
        now = now + BREAKER_PAUSES[0];
        breaker.admit(now).unwrap();
        breaker.admit(now).unwrap_err();
        // It fails: twice as long.
        breaker.returned(false, now);
        breaker.admit(now + BREAKER_PAUSES[0]).unwrap_err();
        now = now + BREAKER_PAUSES[0] * 2;
        breaker.admit(now).unwrap();
        breaker.returned(true, now);
        for _ in 0..100 {
            breaker.admit(now).unwrap();
        }
    }

    #[test]
    fn an_answer_in_between_starts_the_count_again() {
        let mut breaker = Breaker::default();
        for n in 0..100 {
            breaker.admit(Timestamp(0)).unwrap();
            breaker.returned(n % (BREAKER_FAILURES - 1) == 0, Timestamp(0));
        }
        breaker.admit(Timestamp(0)).unwrap();
    }

    #[tokio::test]
    async fn a_full_queue_turns_callers_away_without_waiting() {
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let lane = Arc::new(Lane::new(Line::new(channel), 2));
        let places: Vec<_> =
            (0..QUEUE_MAX + 2).map(|_| lane.enter(Timestamp(0), false).unwrap()).collect();
        let Later(wait) = lane.enter(Timestamp(0), true).unwrap_err();
        assert!((QUEUE_FULL_PAUSE..=QUEUE_FULL_PAUSE * 2).contains(&wait), "{wait:?}");
        let (_one, _two) = (places[0].turn().await, places[1].turn().await);
        assert!(
            tokio::time::timeout(Duration::from_millis(10), places[2].turn()).await.is_err(),
            "two at a time"
        );
        drop(places);
        assert!(lane.is_idle());
    }

    #[tokio::test]
    async fn the_more_are_turned_away_the_later_they_come_back() {
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let lane = Arc::new(Lane::new(Line::new(channel), 2));
        let mut places: Vec<_> =
            (0..QUEUE_MAX + 2).map(|_| lane.enter(Timestamp(0), false).unwrap()).collect();
        let turned_away = || lane.enter(Timestamp(0), false).unwrap_err().0;
        let waits: Vec<_> = (0..10 * QUEUE_MAX).map(|_| turned_away()).collect();
        assert!(waits[..QUEUE_MAX].iter().all(|wait| *wait <= QUEUE_FULL_PAUSE * 2));
        assert!(waits[9 * QUEUE_MAX..].iter().all(|wait| *wait >= QUEUE_FULL_PAUSE * 10));
        assert!((0..100 * QUEUE_MAX).all(|_| turned_away() <= QUEUE_FULL_PAUSE_MAX));
        // As calls are made, there are fewer to come back.
        for _ in 0..200 * QUEUE_MAX {
            drop(places.pop());
            places.push(lane.enter(Timestamp(0), false).unwrap());
        }
        assert!(turned_away() <= QUEUE_FULL_PAUSE * 2);
    }

    #[test]
    fn calls_that_fail_together_keep_it_open_no_longer_than_one_does() {
        let mut breaker = Breaker::default();
        for _ in 0..64 {
            breaker.admit(Timestamp(0)).unwrap();
        }
        for _ in 0..64 {
            breaker.returned(false, Timestamp(0)); // one connection broke
        }
        let Later(wait) = breaker.admit(Timestamp(0)).unwrap_err();
        assert!(wait <= BREAKER_PAUSES[0] * 2, "{wait:?}");
    }
}
