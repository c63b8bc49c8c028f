//! A variant: a model, limits on what may happen in it, and the expected result.

use std::{
    collections::BTreeSet,
    fmt::{self, Display},
    hash::Hash,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::json;
use stateright::{Model, Representative};

use crate::search::{Found, Violation, search};

/// How long a variant takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Seconds. The tests run these.
    Small,
    /// Minutes, and up to some gigabytes.
    Large,
}

/// A model with limits, and the expected result.
pub struct Variant {
    /// The model's name.
    pub model: &'static str,
    /// What may happen in it, or which guards are missing.
    pub name: String,
    /// The rule whose guard is missing; `None`: all guards are there.
    pub rule: Option<u8>,
    /// The property that must be broken, by the start of its name; `None`: no property may be broken.
    pub expects: Option<&'static str>,
    /// Whether the tests run it.
    pub size: Size,
    run: Box<dyn Fn() -> Found + Send + Sync>,
}

impl fmt::Debug for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.model, self.name)
    }
}

/// The result of a variant.
#[derive(Debug)]
pub struct Outcome {
    /// What the search found.
    pub found: Found,
    /// Whether that was expected.
    pub verdict: Verdict,
}

/// Whether the result was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every state was visited, no property was broken, and everything that should be possible happened.
    Clean,
    /// The expected property was broken, as it must be without the guard.
    Broken,
    /// The result was not expected.
    Wrong,
}

impl Variant {
    /// With all rules in place.
    pub(crate) fn clean<M>(kind: &'static str, name: &str, size: Size, model: M) -> Self
    where
        M: Model + Send + Sync + 'static,
        M::State: Clone + Hash + Representative,
        M::Action: Display,
    {
        let run = Box::new(move || search(&model, None));
        Self { model: kind, name: name.to_owned(), rule: None, expects: None, size, run }
    }

    /// Without a guard of a rule.
    pub(crate) fn broken<M>(
        kind: &'static str,
        name: String,
        rule: u8,
        expects: &'static str,
        model: M,
    ) -> Self
    where
        M: Model + Send + Sync + 'static,
        M::State: Clone + Hash + Representative,
        M::Action: Display,
    {
        let run = Box::new(move || search(&model, Some(expects)));
        let (rule, expects, size) = (Some(rule), Some(expects), Size::Small);
        Self { model: kind, name, rule, expects, size, run }
    }

    /// Visits every state, or stops at the expected violation.
    #[must_use]
    pub fn run(&self) -> Outcome {
        let found = (self.run)();
        let clean = found.complete && found.violations.is_empty() && found.unreached.is_empty();
        let verdict = match self.expects {
            None if clean => Verdict::Clean,
            Some(expects) if found.violation(expects).is_some() => Verdict::Broken,
            None | Some(_) => Verdict::Wrong,
        };
        Outcome { found, verdict }
    }
}

impl Outcome {
    /// The violation that was expected, if it was found.
    #[must_use]
    pub fn violation(&self, variant: &Variant) -> Option<&Violation> {
        variant.expects.and_then(|expects| self.found.violation(expects))
    }
}

/// Runs the variants, `jobs` at a time, and returns their results in the same order. `done` is called as each one ends.
pub fn run_all(
    variants: &[Variant],
    jobs: usize,
    done: impl Fn(&Variant, &Outcome) + Sync,
) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let outcomes: Vec<_> = variants.iter().map(|_| Mutex::new(None)).collect();
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((n, variant)) = take(variants, &next) {
                    let outcome = variant.run();
                    done(variant, &outcome);
                    *outcomes[n].lock().expect("locked once only") = Some(outcome);
                }
            });
        }
    });
    let outcome = |slot: Mutex<Option<Outcome>>| {
        slot.into_inner().expect("locked once only").expect("every variant has run")
    };
    outcomes.into_iter().map(outcome).collect()
}

fn take<'v>(variants: &'v [Variant], next: &AtomicUsize) -> Option<(usize, &'v Variant)> {
    let n = next.fetch_add(1, Ordering::Relaxed);
    variants.get(n).map(|variant| (n, variant))
}

/// The results of all variants in figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many variants have all rules, and how many of these are clean.
    pub clean: (usize, usize),
    /// How many variants lack a guard, and how many of these are broken as expected.
    pub broken: (usize, usize),
    /// States of all variants with all rules.
    pub states: usize,
    /// Rules with a guard whose absence broke something.
    pub rules: BTreeSet<u8>,
}

impl Summary {
    /// Adds up the results.
    #[must_use]
    pub fn of(variants: &[Variant], outcomes: &[Outcome]) -> Self {
        let mut summary = Self::default();
        for (variant, Outcome { found, verdict }) in variants.iter().zip(outcomes) {
            let right = usize::from(*verdict != Verdict::Wrong);
            if variant.expects.is_none() {
                summary.clean = (summary.clean.0 + 1, summary.clean.1 + right);
                summary.states += found.states;
            } else {
                summary.broken = (summary.broken.0 + 1, summary.broken.1 + right);
                summary.rules.extend(variant.rule.filter(|_| right == 1));
            }
        }
        summary
    }

    /// Whether every result was expected.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.clean.0 == self.clean.1 && self.broken.0 == self.broken.1
    }

    /// The same, with every variant and story, as JSON.
    #[must_use]
    pub fn json(&self, variants: &[Variant], outcomes: &[Outcome]) -> serde_json::Value {
        let rows = variants.iter().zip(outcomes).map(|(variant, outcome)| {
            let violation = outcome.violation(variant);
            json!({
                "model": variant.model,
                "variant": variant.name,
                "rule": variant.rule,
                "states": outcome.found.states,
                "depth": outcome.found.depth,
                "seconds": outcome.found.took.as_secs_f64(),
                "result": format!("{:?}", outcome.verdict).to_lowercase(),
                "violated": violation.map(|it| it.property),
                "steps": violation.map(|it| it.story.len()),
                "story": violation.map(|it| &it.story),
                "unreached": if variant.expects.is_none() { &outcome.found.unreached[..] } else { &[] },
            })
        });
        json!({
            "good": self.is_good(),
            "clean": self.clean.1,
            "clean_of": self.clean.0,
            "broken": self.broken.1,
            "broken_of": self.broken.0,
            "states": self.states,
            "rules": self.rules,
            "variants": rows.collect::<Vec<_>>(),
        })
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clean, broken, states, rules } = self;
        write!(
            f,
            "With all rules: {} of {} variants are clean, in {states} states. Without a guard: {} of {} are broken, in {} rules.",
            clean.1,
            clean.0,
            broken.1,
            broken.0,
            rules.len()
        )
    }
}
