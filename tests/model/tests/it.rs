//! The protocol holds in the model, and the model finds what is missing from it. These are the small variants; all variants run with
//! `cargo run --release -p handfast-model`.

use std::{collections::BTreeSet, thread};

use handfast_model::{
    Size, Summary, all,
    protocol::{Guard, Protocol, Scope},
    run_all,
    search::search,
};
use stateright::{Checker as _, Expectation, Model as _, Representative as _};

/// States of all small variants with all rules. A change of the model changes it, and README has the same figure.
const STATES: usize = 7_742_644;

#[test]
fn all_rules_hold_and_each_is_needed() {
    let mut variants = all();
    variants.retain(|variant| variant.size == Size::Small);
    let jobs = thread::available_parallelism().unwrap().get();
    let outcomes = run_all(&variants, jobs, |_, _| {});
    let summary = Summary::of(&variants, &outcomes);
    assert!(summary.is_good(), "{:#}", summary.json(&variants, &outcomes));
    assert_eq!(summary.rules, BTreeSet::from_iter(1..=26), "each rule has a guard that is needed");
    assert_eq!(summary.states, STATES);
    println!("{summary}");
}

/// Our search and stateright's visit the same states and find the same properties broken.
#[test]
fn the_search_agrees_with_stateright() {
    let alone = Scope { crashes: 1, faults: 1, ..Scope::default() };
    let zombie = Scope { standby: true, takeovers: 1, ..Scope::default() };
    let nested = Scope { nested: true, ..alone };
    for protocol in [
        Protocol::new(alone),
        Protocol::new(zombie),
        Protocol::new(nested),
        Protocol::new(alone).without(Guard::EmptyRollbackRecorded),
        Protocol::new(zombie).without(Guard::NewerEpochsAreNotOurs),
    ] {
        let ours = search(&protocol, None);
        let theirs = protocol
            .checker()
            .symmetry_fn(|state| state.representative())
            // By default it ends when it has met every property.
            .finish_when(stateright::HasDiscoveries::AllOf(["no property has this name"].into()))
            .spawn_dfs()
            .join();
        assert_eq!(ours.states, theirs.unique_state_count(), "{protocol:?}");
        let always = |name: &&str| {
            let mut properties = protocol.properties().into_iter();
            properties.any(|it| it.name == *name && it.expectation == Expectation::Always)
        };
        let broken: BTreeSet<_> = ours.violations.iter().map(|it| it.property).collect();
        let theirs: BTreeSet<_> = theirs.discoveries().into_keys().filter(always).collect();
        assert_eq!(broken, theirs, "{protocol:?}");
    }
}

/// Rule 21 is a second line. With it alone no decision changes, whatever a coordinator read. (The coordinator stops, and what is open
/// waits for a person.)
#[test]
fn guarded_rows_alone_let_no_decision_change() {
    let lagging = Scope { crashes: 1, old_reads: true, ..Scope::default() };
    let protocol = Guard::SIGHT
        .into_iter()
        .fold(Protocol::new(lagging), |protocol, guard| protocol.without(guard));
    let found = search(&protocol, None);
    assert!(found.complete);
    for kept in ["I1", "I2", "I3", "I7", "I8", "I9", "J", "L"] {
        assert!(found.violation(kept).is_none(), "{:#?}", found.violation(kept));
    }
    assert!(found.violation("O").is_some(), "an owner that believes an old row stops");
}

/// stateright's own search would report the last violation that it meets.
#[test]
fn the_shortest_story_is_told() {
    let alone = Scope { crashes: 1, faults: 1, ..Scope::default() };
    let found = search(&Protocol::new(alone).without(Guard::RegisteredToldWhenDurable), None);
    assert_eq!(
        found.violation("I5").unwrap().story,
        [
            "A begins the transaction",
            "branch 0 registers at A",
            "A is killed",
            "A starts",
            "A takes over",
            "Try arrives at branch 0",
        ]
    );
}
