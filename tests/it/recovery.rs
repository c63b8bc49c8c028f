//! A coordinator starts on a store with open transactions, here a few. All of them must complete, while it also serves new ones.
//! `cargo run --release -p handfast-tests --bin recovery` does this with a million.

use std::process::Stdio;

use handfast_tests::{PATIENCE, database::servers, process::binary};
use serde_json::Value;
use tokio::process::Command;

#[tokio::test]
async fn what_is_open_at_the_start_comes_to_its_end_beside_new_work() {
    for server in servers() {
        let mut command = Command::new(binary("recovery"));
        command.args(["--json", "--server", &server, "--open", "3000", "--stuck", "300"]);
        command.args(["--sample", "1", "--within", "40"]).env_remove("CARGO"); // it builds nothing: all is there
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends");
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said} {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{report}");
        assert_eq!((&report["open"], &report["left"]), (&3000.into(), &0.into()));
        for when in ["new_while_recovering", "new_alone", "new_beside_stuck"] {
            assert!(report[when]["count"].as_u64().unwrap() > 0, "{when}: {report}");
        }
    }
}
