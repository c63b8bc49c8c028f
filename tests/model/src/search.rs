//! Visits every state of a model, breadth first, and tells the shortest story that leads to each broken property.
//!
//! The models are stateright's. This search replaces stateright's own (0.31), which reports the last violation that it meets and not
//! the first: its stories are twice as long. A test (`tests/it.rs`) shows that both visit the same number of states and find the
//! same properties broken.

#![expect(
    clippy::disallowed_types,
    reason = "it has tens of millions of entries, and their order does not matter"
)]

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt::Display,
    hash::{BuildHasherDefault, Hash, Hasher},
    time::{Duration, Instant},
};

use stateright::{Expectation, Model, Representative};

/// A search ends here, incomplete, if a model has more states.
const STATES_MAX: usize = 60_000_000;

/// What a search found.
#[derive(Debug)]
pub struct Found {
    /// How many states were visited. States that mirror each other count once.
    pub states: usize,
    /// The length of the longest of all shortest paths to a state.
    pub depth: usize,
    /// How long the search took.
    pub took: Duration,
    /// Whether every state was visited. A search also ends at the violation that it was told to look for, or at `STATES_MAX`.
    pub complete: bool,
    /// The properties that were broken, the shortest story first.
    pub violations: Vec<Violation>,
    /// The properties that should be possible and never happened.
    pub unreached: Vec<&'static str>,
}

impl Found {
    /// The violation of the property whose name starts with `property`.
    #[must_use]
    pub fn violation(&self, property: &str) -> Option<&Violation> {
        self.violations.iter().find(|violation| violation.property.starts_with(property))
    }
}

/// A property that does not hold.
#[derive(Debug)]
pub struct Violation {
    /// The property's name.
    pub property: &'static str,
    /// The shortest path to a state in which the property does not hold.
    pub story: Vec<String>,
}

/// Visits every state, or stops when the property whose name starts with `until` is broken.
pub fn search<M>(model: &M, until: Option<&str>) -> Found
where
    M: Model,
    M::State: Clone + Hash + Representative,
    M::Action: Display,
{
    let began = Instant::now();
    let properties = model.properties();
    // The fingerprint of each state, with that of the state from which it was reached first.
    let mut seen: Seen = HashMap::default();
    let mut met: Vec<(&'static str, Expectation, Fingerprint)> = Vec::new();
    let mut level: Vec<_> =
        model.init_states().into_iter().map(|state| (fingerprint(&state), state)).collect();
    seen.extend(level.iter().map(|(first, _)| (*first, None)));
    let (mut depth, mut complete, mut actions) = (0, true, Vec::new());
    'search: while !level.is_empty() {
        let mut next = Vec::new();
        for (from, state) in level {
            for property in &properties {
                let wanted = matches!(property.expectation, Expectation::Sometimes);
                if !met.iter().any(|(name, ..)| *name == property.name)
                    && (property.condition)(model, &state) == wanted
                {
                    met.push((property.name, property.expectation.clone(), from));
                    if until.is_some_and(|until| property.name.starts_with(until)) {
                        complete = false;
                        break 'search;
                    }
                }
            }
            actions.clear();
            model.actions(&state, &mut actions);
            for action in actions.drain(..) {
                let Some(to) = model.next_state(&state, action) else { continue };
                let reached = fingerprint(&to);
                if let Entry::Vacant(entry) = seen.entry(reached) {
                    entry.insert(Some(from));
                    next.push((reached, to));
                }
            }
            if seen.len() > STATES_MAX {
                complete = false;
                break 'search;
            }
        }
        level = next;
        depth += usize::from(!level.is_empty());
    }
    let broken = met.iter().filter(|(_, expected, _)| matches!(expected, Expectation::Always));
    let mut violations: Vec<_> = broken
        .map(|(property, _, end)| Violation { property, story: story(model, &seen, *end) })
        .collect();
    violations.sort_by_key(|violation| violation.story.len());
    let sometimes = properties.iter().filter(|p| matches!(p.expectation, Expectation::Sometimes));
    let unreached = sometimes.map(|property| property.name);
    Found {
        states: seen.len(),
        depth,
        took: began.elapsed(),
        complete,
        violations,
        unreached: unreached.filter(|name| !met.iter().any(|(met, ..)| met == name)).collect(),
    }
}

/// The actions on the path to a state. The path is known by fingerprints, so each action is tried again.
fn story<M>(model: &M, seen: &Seen, end: Fingerprint) -> Vec<String>
where
    M: Model,
    M::State: Clone + Hash + Representative,
    M::Action: Display,
{
    let mut way = vec![end];
    while let Some(Some(before)) = way.last().and_then(|last| seen.get(last)) {
        way.push(*before);
    }
    let mut way = way.into_iter().rev();
    let first = way.next().expect("a path has at least its end");
    let mut state = model
        .init_states()
        .into_iter()
        .find(|state| fingerprint(state) == first)
        .expect("every path starts at an initial state");
    let mut story = Vec::new();
    for wanted in way {
        let mut actions = Vec::new();
        model.actions(&state, &mut actions);
        let step = actions.into_iter().find_map(|action| {
            let text = action.to_string();
            let to = model.next_state(&state, action)?;
            (fingerprint(&to) == wanted).then_some((text, to))
        });
        let (text, to) = step.expect("a mirrored state has the mirrored action");
        story.push(text);
        state = to;
    }
    story
}

type Fingerprint = u64;
type Seen = HashMap<Fingerprint, Option<Fingerprint>, BuildHasherDefault<AsItIs>>;

/// The same for a state and its mirror images. There are 2^64 fingerprints: two of 20 million states share one in one search of 90,000.
fn fingerprint<S: Hash + Representative>(state: &S) -> Fingerprint {
    let mut mix = Mix(0);
    state.representative().hash(&mut mix);
    mix.finish()
}

/// A fast hash for many small numbers. It is the same in every run.
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        let folded = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        folded ^ (folded >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value.cast_unsigned() as u64); // which variant of an enum
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

/// For keys that are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only numbers of 64 bits are hashed");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}
