//! The demo does what it says: the walk, the burst, the audit; and it leaves nothing behind.

use std::{path::Path, process::Stdio};

use handfast_tests::{PATIENCE, process::binary, wait_for};
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

/// The demo with these flags, with `folder` for its temporary files. It builds nothing: all is there.
fn shop(folder: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("shop"));
    command.args(flags).env_remove("CARGO").env("TMPDIR", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Walks to the end. Returns the JSON, and the talk.
async fn walked(flags: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let walk = shop(folder.path(), flags).arg("--json").output();
    let output = tokio::time::timeout(PATIENCE, walk).await.expect("it ends").unwrap();
    let (json, talk) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{json}\n{talk}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "it has left something behind");
    (serde_json::from_str(&json).unwrap(), talk.into_owned())
}

fn count(report: &Value, what: &str) -> u64 {
    report[what].as_u64().unwrap_or_else(|| panic!("{what} in {report}"))
}

#[tokio::test]
async fn the_whole_walk() {
    let (report, talk) = walked(&["--orders", "50"]).await;
    assert_eq!(report["violations"], serde_json::json!([]));
    let [orders, placed, cancelled, refused] =
        ["orders", "placed", "cancelled", "refused"].map(|what| count(&report, what));
    // Steps 1 to 7 place one each; but for 2, which is refused, and 4 and 6, which are cancelled.
    assert_eq!((orders, placed + cancelled + refused), (57, 57), "{report}");
    assert_eq!(cancelled, 2, "{report}");
    assert!(placed > 20 && refused > 1, "{report}");
    for shown in [
        "refused: OUT_OF_STOCK",
        "made to fail: UNAVAILABLE",
        "empty rollback: nothing to do",
        "suspension: too late",
        "coordinator is killed (SIGKILL)",
        "CANCEL: timed out",
        "\u{2713} each order's services agree: placed in all three, or in none",
    ] {
        assert!(talk.contains(shown), "{shown:?} is not in\n{talk}");
    }
}

#[tokio::test]
async fn a_burst_with_a_coordinator_that_is_killed() {
    let (report, talk) = walked(&["--only", "8", "--orders", "100", "--kill", "3"]).await;
    assert_eq!((count(&report, "orders"), &report["violations"]), (100, &serde_json::json!([])));
    assert!(talk.contains("killed and started again 3 times"), "{talk}");
}

#[tokio::test]
async fn wrong_flags_are_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (flags, sentence) in [
        (vec!["--only", "9"], "the steps are 1 to 8"),
        (vec!["--only", "1", "--kill", "2"], "step 8, which --only leaves out"),
        (vec!["--orders", "0"], "1..=1000000"),
        (vec!["--order", "5"], "--orders"),
    ] {
        let output = shop(folder.path(), &flags).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {error}");
        assert!(error.contains(sentence), "{flags:?}: {error}");
    }
}

/// Whoever stops it finds the machine as it was.
#[tokio::test]
async fn it_is_left_running_until_it_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let mut walk = shop(folder.path(), &["--only", "1", "--keep"]);
    let talk = folder.path().join("talk");
    let mut walk = walk.stdout(std::fs::File::create(&talk).unwrap()).spawn().unwrap();
    let kept = async || {
        let said = std::fs::read_to_string(&talk).unwrap();
        said.contains("Stop: Ctrl-C").then_some(said)
    };
    let said = wait_for("it says how to stop it", kept).await;
    let address = said.lines().find_map(|line| line.split_once("coordinator  http://")).unwrap().1;
    let address = address.split_whitespace().next().unwrap();
    let mut coordinator = tokio::net::TcpStream::connect(address).await.expect("it is running");
    coordinator.write_all(b"\n").await.unwrap();

    let terminate = format!("kill -TERM {}", walk.id().unwrap());
    assert!(Command::new("sh").args(["-c", &terminate]).status().await.unwrap().success());
    let ended = tokio::time::timeout(PATIENCE, walk.wait()).await.expect("it stops").unwrap();
    assert!(ended.success(), "{ended}");
    assert!(
        tokio::net::TcpStream::connect(address).await.is_err(),
        "the coordinator still listens"
    );
    std::fs::remove_file(talk).unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "it has left something behind");
}
