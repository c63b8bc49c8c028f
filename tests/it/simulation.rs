//! A short run of the simulation. A long one is a command: `cargo run --release -p handfast-tests --bin simulate -- --seeds 2000`.

use std::{collections::BTreeMap, process::Command};

use handfast_proto::planted::Bug;
use serde_json::Value;

/// Runs `simulate` with these arguments. Returns whether it exited with 0, and its report.
fn simulate(args: &[&str]) -> (bool, Value) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_simulate")).args(args).arg("--json").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.success(), report)
}

/// A hash of everything that happened, for each seed.
fn traces(args: &[&str]) -> BTreeMap<u64, String> {
    let (_, report) = simulate(args);
    let outcomes = report["outcomes"].as_array().unwrap().iter();
    outcomes
        .map(|outcome| {
            (outcome["seed"].as_u64().unwrap(), outcome["trace"].as_str().unwrap().to_owned())
        })
        .collect()
}

#[test]
fn a_seed_replays_exactly_alone_and_after_others() {
    let together = traces(&["--seed", "40", "--seeds", "4", "--jobs", "1"]);
    assert_eq!(together, traces(&["--seed", "40", "--seeds", "4", "--jobs", "2"]));
    assert_eq!(together[&43], traces(&["--seed", "43", "--seeds", "1"])[&43]);
    assert_ne!(together[&42], together[&43]);
}

#[test]
fn no_promise_is_broken_in_a_few_seeds() {
    let (well, report) = simulate(&["--seeds", "16"]);
    assert!(well, "{report:#}");
    // Some transactions were confirmed, some were cancelled, and faults were injected.
    for what in ["confirmed", "cancelled"] {
        assert!(report[what].as_u64().unwrap() > 100, "{what}: {report:#}");
    }
    for fault in ["coordinator killed", "participant killed", "link cut", "link held up"] {
        assert!(report["counts"][fault].as_u64().unwrap_or(0) > 0, "{fault}: {report:#}");
    }
}

/// The table says for each planted bug how soon it was found.
#[test]
fn the_readme_knows_all_planted_bugs() {
    for text in [include_str!("../../README.md"), include_str!("../../README.zh-CN.md")] {
        let row = text.lines().find(|line| line.starts_with("| planted bugs |")).unwrap();
        assert!(row.contains(&format!("| {}, one at a time |", Bug::ALL.len())), "{row}");
        for (bug, _) in Bug::ALL {
            assert!(row.contains(&format!("{} ", bug.replace('-', " "))), "{bug}: {row}");
        }
    }
}

/// For each planted bug: a first seed and a number of seeds that find the bug quickly.
#[cfg(feature = "planted-bugs")]
const FOUND: [(&str, &str, &str); Bug::ALL.len()] = [
    ("decide-before-durable", "0", "30"),
    ("skip-epoch-check", "1", "30"),
    ("forget-trying", "1", "30"),
    ("drop-empty-rollback", "440", "30"),
    ("unknown-is-refused", "5", "30"),
    ("believe-old-read", "4", "30"),
    ("forget-loss", "15", "30"),
    ("believe-clock", "43", "30"),
    ("never-ask", "0", "30"),
    ("believe-nudge", "0", "30"),
];

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_bugs_are_found() {
    for (bug, first, seeds) in FOUND {
        let (found, report) = simulate(&["--bug", bug, "--seed", first, "--seeds", seeds]);
        assert!(found, "{bug} is not found: {report:#}");
    }
}
