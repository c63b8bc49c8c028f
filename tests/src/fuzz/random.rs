//! Generates nearly valid values. Most of an input must be valid; otherwise the first check would refuse every input.

use std::collections::BTreeMap;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// Lengths around the size limits of the contract.
const LENGTHS: [usize; 14] = [0, 1, 31, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 1025, 70_000];
const TEXTS: [&str; 18] = [
    "",
    " ",
    "checkout",
    "inventory",
    "inventory.deduct",
    "1",
    "2.1",
    "A",
    "é",
    "\0",
    "a\nb",
    "🙂",
    "../..",
    "'; --",
    "%s",
    "http://127.0.0.1:7001",
    "https://[::1]:70000/x",
    "application/json",
];
const NUMBERS: [i64; 13] = [
    0,
    1,
    -1,
    2,
    59,
    60,
    3600,
    1_000_000_000,
    1_700_000_000_000,
    i32::MAX as i64,
    i64::MAX - 1,
    i64::MAX,
    i64::MIN,
];

/// The random source of a round.
pub(super) struct Random(StdRng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// True in one of `n` calls on average.
    pub(super) fn once_in(&mut self, n: u32) -> bool {
        self.0.random_range(0..n) == 0
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n)
    }

    pub(super) fn of<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())].clone()
    }

    pub(super) fn number(&mut self) -> i64 {
        match self.below(3) {
            0 => self.0.random_range(-3..70),
            1 => self.of(&NUMBERS),
            _ => self.0.random(),
        }
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes[..]);
        bytes
    }

    /// A payload with one of these lengths. It repeats one byte, so that long payloads are cheap.
    pub(super) fn payload(&mut self, lengths: &[usize]) -> Vec<u8> {
        let len = self.of(lengths);
        vec![self.of(b"0a\xff\0"); len]
    }

    pub(super) fn some_bytes(&mut self) -> Vec<u8> {
        let len = self.below(64);
        self.bytes(len)
    }

    /// An arbitrary text. It is often too long, empty or odd.
    pub(super) fn text(&mut self) -> String {
        match self.below(4) {
            0 => {
                let len = self.of(&LENGTHS);
                let letter = self.of(&["a", "0", "-", "é"]);
                letter.repeat(len / letter.len())
            }
            1 => String::from_utf8_lossy(&self.some_bytes()).into_owned(),
            _ => self.of(&TEXTS).to_owned(),
        }
    }

    /// One of `good`; sometimes an arbitrary text instead.
    pub(super) fn text_of(&mut self, good: &[&str]) -> String {
        if self.once_in(12) { self.text() } else { self.of(good).to_owned() }
    }

    pub(super) fn texts(&mut self) -> BTreeMap<String, String> {
        let n = if self.once_in(10) { self.below(20) } else { self.below(3) };
        (0..n).map(|_| (self.text(), self.text())).collect()
    }

    /// Mutates a text or an encoded message in a few places.
    pub(super) fn bend(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(5) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.0.random()),
                2 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                3 if at < bytes.len() => bytes[at] = self.of(&[0, 1, 0x7f, 0x80, 0xff]),
                _ => {
                    let copied = bytes[at..].iter().copied().take(16).collect::<Vec<_>>();
                    bytes.splice(at..at, copied);
                }
            }
        }
    }

    pub(super) fn duration(&mut self) -> Option<prost_types::Duration> {
        if self.once_in(2) {
            return None;
        }
        if self.once_in(4) {
            let nanos = i32::try_from(self.number()).unwrap_or(i32::MIN);
            return Some(prost_types::Duration { seconds: self.number(), nanos });
        }
        Some(prost_types::Duration { seconds: 0, nanos: self.of(&[0, 1_000_000, 5_000_000]) })
    }
}
