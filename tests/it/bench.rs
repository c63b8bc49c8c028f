//! The exact cost of recording a transaction, and a check that the benchmark measures what it claims. No test here depends on timing.

use handfast::Json;
use handfast_tests::{
    process::{Coordinator, Signal, binary},
    warehouse::{Deduct, Warehouse},
};
use serde_json::Value;
use tokio::process::Command;

/// Number of transactions, run one after the other.
const TRANSACTIONS: u64 = 10;

#[tokio::test]
async fn a_transaction_of_three_branches_waits_for_two_commits_and_writes_three_rows() {
    let folder = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    let mut warehouses = Vec::new();
    for name in ["north", "south", "west"] {
        warehouses.push(Warehouse::open(name, folder.path()).await);
    }
    let remotes: Vec<_> = warehouses.iter().map(Warehouse::remote).collect();
    let [north, south, west] = &remotes[..] else { panic!("three") };
    let handfast = coordinator.handfast();
    for _ in 0..TRANSACTIONS {
        let confirmed = handfast.transaction("checkout").run(async |global| {
            tokio::try_join!(
                global.call::<Deduct>(north, Json(1)),
                global.call::<Deduct>(south, Json(1)),
                global.call::<Deduct>(west, Json(1)),
            )?;
            Ok(())
        });
        assert!(confirmed.await.unwrap().completed);
    }
    coordinator.signal(Signal::TERM);
    assert!(coordinator.ended().await.success());
    let recorded = coordinator.log().with_message("recorded").pop().unwrap();
    let count = |name: &str| recorded[name].as_u64().unwrap();
    // Callers wait for two batches: Begin with all branches, and Decide. No caller waits until "finished" is recorded.
    // It goes with the next batch, or with a batch of its own.
    assert_eq!(count("awaited"), 2 * TRANSACTIONS, "{recorded}");
    assert!(count("batches") <= 3 * TRANSACTIONS, "{recorded}");
    // Begin writes one row for the transaction and its branches. Decide and "finished" each write that row again.
    assert_eq!(count("rows"), 3 * TRANSACTIONS, "{recorded}");
    assert!(count("statements") <= 6 * TRANSACTIONS, "{recorded}");
}

async fn bench(flags: &[&str]) -> Value {
    let mut command = Command::new(binary("bench"));
    command.args(["--seconds", "1", "--warm-up", "0", "--json"]).args(flags);
    // Without CARGO, the benchmark does not build the coordinator; it is built already.
    let output = command.env_remove("CARGO").kill_on_drop(true).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn the_benchmark_counts_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let (plot, bars) = (folder.path().join("plot.svg"), folder.path().join("bars.svg"));
    let pictures = ["--plot", plot.to_str().unwrap(), "--bars", bars.to_str().unwrap()];
    let load = ["--branches", "2,3", "--concurrency", "4", "--fence", "sqlite"];
    let told = bench(&[&load[..], &pictures].concat()).await;
    let columns = told["columns"].as_array().unwrap();
    assert_eq!(columns.len(), 2);
    for column in columns {
        let medians = &column["medians"];
        assert_eq!(medians["violations"], 0.0, "{column}");
        assert_eq!(medians["rows"], 3.0, "{column}");
        assert!(medians["commits_awaited"].as_f64().unwrap() <= 2.0, "{column}");
    }
    let count = |path, what| std::fs::read_to_string(path).unwrap().matches(what).count();
    assert_eq!(
        count(&plot, "<polyline"),
        4,
        "one series, with a place for each number of branches"
    );
    assert_eq!(count(&bars, "<rect"), 6, "three processes in each of two bars");
}

#[tokio::test]
async fn the_benchmark_confirms_in_batches_and_one_by_one_and_what_was_sold_adds_up() {
    let flags = ["--fence", "sqlite", "--goods", "3", "--concurrency", "16"];
    let told = bench(&[&flags[..], &["--phase-two", "one-by-one,batches"]].concat()).await;
    let [one_by_one, batches] = &told["columns"].as_array().unwrap()[..] else { panic!("{told}") };
    for column in [one_by_one, batches] {
        assert_eq!(column["medians"]["violations"], 0.0, "{column}");
    }
    assert!(batches["medians"]["ratio"].is_f64(), "{batches}");
}

#[tokio::test]
async fn the_benchmark_compares_both_ways_of_recording() {
    let told = bench(&["--concurrency", "4", "--record", "begin,decision"]).await;
    let [begin, decision] = &told["columns"].as_array().unwrap()[..] else { panic!("{told}") };
    for column in [begin, decision] {
        assert_eq!(column["medians"]["violations"], 0.0, "{column}");
    }
    assert!(decision["medians"]["ratio"].is_f64(), "{decision}");
    // Nobody waits for Begin, and the transaction's row is written once before it is finished.
    let figure = |column: &Value, name: &str| column["medians"][name].as_f64().unwrap();
    assert!(figure(decision, "commits_awaited") < figure(begin, "commits_awaited"), "{told}");
    assert!(figure(decision, "rows") < figure(begin, "rows"), "{told}");
}

#[tokio::test]
async fn the_benchmark_holds_transactions_open_and_hangs_participants() {
    let told = bench(&["--open", "20"]).await;
    let medians = &told["columns"][0]["medians"];
    assert_eq!((&medians["violations"], &medians["rows"]), (&Value::from(0.0), &Value::from(3.0)));

    let told = bench(&["--hang", "--concurrency", "2", "--drive", "coordinator"]).await;
    for column in told["columns"].as_array().unwrap() {
        assert_eq!(column["medians"]["violations"], 0.0, "{column}");
    }
}
