//! Runs every fuzz target for a short time. A long run is `cargo run --release -p handfast-tests --bin fuzz -- --seconds 600`.

use std::thread;

use handfast_tests::fuzz::{Target, Until, run};

/// A fixed seed, so that every run tries the same inputs.
const SEED: u64 = 1;

#[test]
fn bad_input_gets_a_clear_error() {
    thread::scope(|scope| {
        for target in Target::ALL {
            // Fewer inputs where each one is written to disk.
            let inputs = if target == Target::Records { 200 } else { 2_000 };
            scope.spawn(move || {
                let report = run(target, SEED, Until::Inputs(inputs));
                assert_eq!(report.findings, [], "{target:?}");
                assert_eq!(report.inputs, inputs, "{target:?}");
                let some = inputs / 50..=inputs - inputs / 50;
                assert!(
                    some.contains(&report.accepted),
                    "{target:?}: {} accepted",
                    report.accepted
                );
            });
        }
    });
}
