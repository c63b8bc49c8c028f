//! Stops calls to a dead participant: one that cannot be connected to, or whose connection breaks again and again. Slow answers
//! do not count, so an action that hangs does not block the participant's other actions.

use std::time::Duration;

use handfast_proto::time::Pauses;

use super::{Later, lane::spread};
use crate::transaction::Timestamp;

/// The breaker opens after this many calls in a row without a connection.
const BREAKER_FAILURES: u32 = 5;
/// How long the breaker stays open.
const OPEN_PAUSES: Pauses =
    Pauses { first: Duration::from_millis(500), longest: Duration::from_secs(10) };

/// While open, lets one probe call at a time test whether the participant is back.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    /// While open: no call is made before this moment.
    open_until: Option<Timestamp>,
    /// Whether a probe is in flight.
    probing: bool,
}

impl Breaker {
    pub(super) fn admit(&mut self, now: Timestamp) -> Result<(), Later> {
        let Some(until) = self.open_until else { return Ok(()) };
        if now < until {
            return Err(spread(until - now));
        }
        // This call is the probe. Other calls wait until it returns, or until the pause shows that it was lost.
        self.open_until = Some(now + self.pause());
        self.probing = true;
        Ok(())
    }

    /// A call was answered, with whatever result.
    pub(super) fn answered(&mut self) {
        *self = Self::default();
    }

    /// A call found no connection, or its connection broke.
    pub(super) fn not_reached(&mut self, now: Timestamp) {
        if self.open_until.is_some() && !std::mem::take(&mut self.probing) {
            return; // it was under way when the breaker opened, and says nothing new
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= BREAKER_FAILURES {
            self.open_until = Some(now + self.pause());
        }
    }

    /// A call passed its deadline. It is unknown whether there was a connection.
    pub(super) fn timed_out(&mut self) {
        self.probing = false;
    }

    fn pause(&self) -> Duration {
        let doublings = self.failures.saturating_sub(BREAKER_FAILURES).min(16);
        OPEN_PAUSES.first.saturating_mul(1 << doublings).min(OPEN_PAUSES.longest)
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
            breaker.not_reached(now);
        }
        let Later(wait) = breaker.admit(now).unwrap_err();
        assert!((OPEN_PAUSES.first..=OPEN_PAUSES.first * 2).contains(&wait), "{wait:?}");
        // Only one probe at a time.
        now = now + OPEN_PAUSES.first;
        breaker.admit(now).unwrap();
        breaker.admit(now).unwrap_err();
        // The probe fails, so the pause doubles.
        breaker.not_reached(now);
        breaker.admit(now + OPEN_PAUSES.first).unwrap_err();
        now = now + OPEN_PAUSES.first * 2;
        breaker.admit(now).unwrap();
        breaker.answered();
        for _ in 0..100 {
            breaker.admit(now).unwrap();
        }
    }

    #[test]
    fn an_answer_in_between_starts_the_count_again() {
        let mut breaker = Breaker::default();
        for n in 0..100 {
            breaker.admit(Timestamp(0)).unwrap();
            match n % (BREAKER_FAILURES - 1) {
                0 => breaker.answered(),
                _ => breaker.not_reached(Timestamp(0)),
            }
        }
        breaker.admit(Timestamp(0)).unwrap();
    }

    #[test]
    fn calls_that_fail_together_keep_it_open_no_longer_than_one_does() {
        let mut breaker = Breaker::default();
        for _ in 0..64 {
            breaker.admit(Timestamp(0)).unwrap();
        }
        for _ in 0..64 {
            breaker.not_reached(Timestamp(0)); // one connection broke
        }
        let Later(wait) = breaker.admit(Timestamp(0)).unwrap_err();
        assert!(wait <= OPEN_PAUSES.first * 2, "{wait:?}");
    }

    #[test]
    fn deadlines_that_pass_do_not_open_it() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            breaker.admit(Timestamp(0)).unwrap();
            breaker.timed_out();
        }
    }
}
