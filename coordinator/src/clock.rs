//! The only access to time: the present moment, which never goes back, and waiting for a moment.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use handfast_proto::time::Timestamp;
use tokio::{sync::watch, time::Instant};

/// Longest sleep before the time is read again.
const SLEEP_MAX: Duration = Duration::from_secs(10);

/// The source of time. Correctness never depends on it: a wrong clock can end phase one early, but cannot lead to two
/// decisions.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The present moment. Never earlier than a moment returned before.
    fn now(&self) -> Timestamp;

    /// Completes when [`Clock::now`] has reached `at`.
    fn sleep_until(&self, at: Timestamp) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The machine's clock, smoothed. When it jumps forward (after a suspend, for example), this clock follows at once:
/// participants compare deadlines with their own clocks. When it jumps back, this clock runs at nine tenths of its speed until
/// the two agree. So timers neither stand still nor fire twice.
#[derive(Clone)]
pub struct SystemClock {
    last: Arc<Mutex<Told>>,
    wall: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

#[derive(Debug, Clone, Copy)]
struct Told {
    instant: Instant,
    at: Timestamp,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::of(wall)
    }
}

impl SystemClock {
    /// A clock over another source of wall-clock time, such as a simulated machine whose clock jumps.
    pub fn of(wall: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        let told = Told { instant: Instant::now(), at: wall() };
        Self { last: Arc::new(Mutex::new(told)), wall: Arc::new(wall) }
    }
}

impl fmt::Debug for SystemClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SystemClock")
    }
}

#[allow(clippy::disallowed_methods, reason = "this is the clock that everybody else asks")]
fn wall() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(0) + since_1970
}

impl Told {
    /// The moment that is `elapsed` after this one, when the machine's clock says `wall`.
    fn next(self, elapsed: Duration, wall: Timestamp) -> Timestamp {
        wall.max(self.at + elapsed * 9 / 10)
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let mut last = self.last.lock().expect("nothing panics while it is locked");
        let instant = Instant::now();
        let at = last.next(instant - last.instant, (self.wall)());
        if at > last.at {
            // Less than a millisecond has passed: keep the old reading, so that fractions add up.
            *last = Told { instant, at };
        }
        last.at
    }

    fn sleep_until(&self, at: Timestamp) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let clock = self.clone();
        Box::pin(async move {
            loop {
                let now = clock.now();
                if now >= at {
                    return;
                }
                // Sleep in steps: tokio's clock may stand still while the machine is suspended, but this clock does not.
                tokio::time::sleep((at - now).min(SLEEP_MAX)).await;
            }
        })
    }
}

/// A clock that moves only when it is told to. For tests.
#[derive(Debug, Clone)]
pub struct ManualClock {
    now: watch::Sender<Timestamp>,
}

impl ManualClock {
    /// A clock that stands at `now`.
    #[must_use]
    pub fn at(now: Timestamp) -> Self {
        Self { now: watch::Sender::new(now) }
    }

    /// A clock that stands at the machine's present time, so that participants with their own clocks agree.
    #[must_use]
    pub fn at_wall_time() -> Self {
        Self::at(wall())
    }

    /// Moves the clock on, and wakes every sleeper whose time has come.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now = *now + by);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        *self.now.borrow()
    }

    fn sleep_until(&self, at: Timestamp) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut now = self.now.subscribe();
        Box::pin(async move {
            if now.wait_for(|now| *now >= at).await.is_err() {
                std::future::pending::<()>().await; // the clock is gone: the moment never comes
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_follows_jumps_forward_and_slows_down_after_jumps_back() {
        let told = Told { instant: Instant::now(), at: Timestamp(1_000_000) };
        let second = Duration::from_secs(1);
        assert_eq!(told.next(second, Timestamp(1_001_000)), Timestamp(1_001_000), "in step");
        assert_eq!(
            told.next(second, Timestamp(4_600_000)),
            Timestamp(4_600_000),
            "an hour forward"
        );
        assert_eq!(
            told.next(second, Timestamp(0)),
            Timestamp(1_000_900),
            "back: never stands still, never goes back"
        );
    }

    #[tokio::test]
    async fn the_system_clock_wakes_a_sleeper_in_time() {
        let clock = SystemClock::default();
        let at = clock.now() + Duration::from_millis(20);
        clock.sleep_until(at).await;
        assert!(clock.now() >= at);
    }

    #[tokio::test]
    async fn a_manual_clock_wakes_those_whose_time_has_come() {
        let clock = ManualClock::at(Timestamp(0));
        let sleeper = tokio::spawn(clock.sleep_until(Timestamp(1_000)));
        clock.advance(Duration::from_millis(999));
        tokio::task::yield_now().await;
        assert!(!sleeper.is_finished());
        clock.advance(Duration::from_millis(1));
        sleeper.await.unwrap();
    }
}
