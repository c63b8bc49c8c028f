//! The delay before a retry: exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter", 2015), so that calls
//! that failed together are not retried together.

use std::time::Duration;

/// The delays between attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The longest delay after the first failed attempt. It doubles with each further attempt.
    pub initial: Duration,
    /// The delay never exceeds this.
    pub max: Duration,
}

impl RetryPolicy {
    /// The delay after `attempt` attempts (from 1) have failed. `jitter` (0 to `u32::MAX`) scales it between zero and the longest delay.
    /// At least a millisecond.
    #[must_use]
    pub fn delay(&self, attempt: u32, jitter: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        let longest = self.initial.saturating_mul(1 << doublings).min(self.max);
        (longest / 1000 * (jitter / (u32::MAX / 1000)).min(1000)).max(Duration::from_millis(1))
    }
}

/// The deadline of a call after `timeouts` calls in a row ran into theirs. It doubles each time, up to `max`, so that a
/// participant that has become slow can still answer in time.
#[must_use]
pub fn call_deadline(initial: Duration, timeouts: u32, max: Duration) -> Duration {
    initial.saturating_mul(1 << timeouts.min(16)).min(max.max(initial))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy =
        RetryPolicy { initial: Duration::from_millis(200), max: Duration::from_secs(60) };

    #[test]
    fn delays_double_up_to_the_ceiling() {
        let longest = |attempt| POLICY.delay(attempt, u32::MAX).as_millis();
        assert_eq!(
            [1, 2, 3, 8, 9, 10, 1000].map(longest),
            [200, 400, 800, 25_600, 51_200, 60_000, 60_000]
        );
    }

    #[test]
    fn jitter_spreads_over_the_whole_length() {
        assert_eq!(POLICY.delay(4, 0), Duration::from_millis(1));
        let middle = POLICY.delay(4, u32::MAX / 2);
        assert!(
            (Duration::from_millis(790)..Duration::from_millis(810)).contains(&middle),
            "{middle:?}"
        );
    }

    #[test]
    fn a_call_that_timed_out_gets_more_time() {
        let deadline = |timeouts| {
            call_deadline(Duration::from_secs(5), timeouts, Duration::from_secs(60)).as_secs()
        };
        assert_eq!([0, 1, 2, 3, 4, 99].map(deadline), [5, 10, 20, 40, 60, 60]);
    }
}
