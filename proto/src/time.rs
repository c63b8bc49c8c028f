//! Times: conversions between wire types and internal times (UTC milliseconds since 1970), and the pauses between retries.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// A moment: UTC milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(
    /// Milliseconds since 1970, UTC.
    pub i64,
);

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, length: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(length.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl Sub for Timestamp {
    type Output = Duration;

    /// How long after `earlier` this is; zero if it is not after.
    fn sub(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// The pauses between retries. Each pause is twice as long as the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    /// The pause before the first retry.
    pub first: Duration,
    /// No pause is longer.
    pub longest: Duration,
}

impl Pauses {
    /// The pause that comes after a pause of this length.
    #[must_use]
    pub fn after(self, pause: Duration) -> Duration {
        pause.saturating_mul(2).min(self.longest)
    }
}

/// The timestamp of `millis` milliseconds since 1970, UTC.
#[must_use]
pub fn timestamp(millis: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(millis.rem_euclid(1000) * 1_000_000).expect("less than a second");
    prost_types::Timestamp { seconds: millis.div_euclid(1000), nanos }
}

/// Milliseconds since 1970, UTC. Fractions are cut off; values out of range are clamped.
#[must_use]
pub fn millis(timestamp: &prost_types::Timestamp) -> i64 {
    timestamp.seconds.saturating_mul(1000).saturating_add(i64::from(timestamp.nanos) / 1_000_000)
}

/// Converts a duration to its wire type.
#[must_use]
pub fn wire_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("less than a second"),
    }
}

/// Converts a duration from its wire type. `None` if it is negative or out of range.
#[must_use]
pub fn duration(wire: &prost_types::Duration) -> Option<Duration> {
    let nanos = u32::try_from(wire.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(wire.seconds).ok()?, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_wire_before_and_after_1970() {
        for at in [0, 1, 999, 1000, 1_700_000_000_123, -1, -1001] {
            assert_eq!(millis(&timestamp(at)), at);
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let pauses = Pauses { first: Duration::from_secs(1), longest: Duration::from_secs(5) };
        let next = |pause: &Duration| Some(pauses.after(*pause));
        let all = std::iter::successors(Some(pauses.first), next).take(5);
        assert_eq!(all.map(|pause| pause.as_secs()).collect::<Vec<_>>(), [1, 2, 4, 5, 5]);
        assert_eq!(pauses.after(Duration::MAX), pauses.longest);
    }

    #[test]
    fn a_negative_length_is_none() {
        assert_eq!(duration(&prost_types::Duration { seconds: -1, nanos: 0 }), None);
        assert_eq!(duration(&prost_types::Duration { seconds: 0, nanos: -1 }), None);
        assert_eq!(
            duration(&prost_types::Duration { seconds: 1, nanos: 5 }),
            Some(Duration::new(1, 5))
        );
    }
}
