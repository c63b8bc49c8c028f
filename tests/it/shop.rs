//! The demo shows what it promises (the walk, the burst, the audit), and it leaves no files, processes or databases behind.

use std::{path::Path, process::Stdio};

use handfast_tests::{
    PATIENCE,
    database::{free_port, servers},
    process::{Signal, binary, send},
    wait_for,
};
use serde_json::Value;
use sqlx::{Connection as _, MySqlConnection};
use tokio::{io::AsyncWriteExt as _, process::Command};

/// The demo with these flags and `folder` for temporary files. Without CARGO it does not build; its binaries exist.
fn shop(folder: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("shop"));
    command.args(flags).env_remove("CARGO").env("TMPDIR", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs the walk to its end. Returns the JSON report and the printed text.
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
    // Each of the steps 1 to 8 places one order. The order of step 2 is refused; those of steps 4, 6 and 8 are cancelled.
    assert_eq!((orders, placed + cancelled + refused), (58, 58), "{report}");
    assert_eq!(cancelled, 3, "{report}");
    assert!(placed > 20 && refused > 1, "{report}");
    for shown in [
        "refused: OUT_OF_STOCK",
        "made to fail: UNAVAILABLE",
        "empty rollback: nothing to do",
        "suspension: too late",
        "coordinator is killed (SIGKILL)",
        "CANCEL: timed out",
        "was never recorded, so it was not confirmed and never will be",
        "\u{2713} each order's services agree: placed in all three, or in none",
    ] {
        assert!(talk.contains(shown), "{shown:?} is not in\n{talk}");
    }
}

#[tokio::test]
async fn a_burst_with_a_coordinator_that_is_killed() {
    let (report, talk) = walked(&["--only", "9", "--orders", "100", "--kill", "3"]).await;
    assert_eq!((count(&report, "orders"), &report["violations"]), (100, &serde_json::json!([])));
    assert!(talk.contains("killed and started again 3 times"), "{talk}");
}

/// All shop databases on a server. Other tests run at the same time, so the list includes theirs.
async fn databases(server: &str) -> Vec<String> {
    let mut connection = MySqlConnection::connect(server).await.unwrap();
    let names = "SELECT schema_name AS name FROM information_schema.schemata WHERE schema_name LIKE 'handfast_shop_%'";
    sqlx::query_scalar(names).fetch_all(&mut connection).await.unwrap()
}

/// Names of the databases that the printed text says were created.
fn made(talk: &str) -> Vec<String> {
    let words = talk.split_whitespace().filter_map(|word| word.rsplit_once('/'));
    let mut names: Vec<_> = words.map(|(_, name)| name.to_owned()).collect();
    names.retain(|name| name.starts_with("handfast_shop_"));
    names.sort();
    names.dedup();
    names
}

#[tokio::test]
async fn the_walk_on_servers_of_mysql_and_mariadb() {
    for server in servers() {
        let flags = ["--store", &server, "--orders", "30", "--kill", "1"];
        let (report, talk) = walked(&flags).await;
        assert_eq!((count(&report, "orders"), &report["violations"]), (38, &serde_json::json!([])));
        assert_eq!(made(&talk).len(), 4, "{talk}");
        let there = databases(&server).await;
        assert!(made(&talk).iter().all(|name| !there.contains(name)), "left behind: {there:?}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_used_is_told_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = format!("mysql://root:s3cret@127.0.0.1:{}", free_port());
    let mut wrong = vec![(nowhere, "Connection refused")];
    wrong.extend(servers().iter().map(|url| (url.replace("root", "nobody:s3cret"), "denied")));
    for (url, reason) in wrong {
        let output = shop(folder.path(), &["--store", &url]).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{error}");
        assert!(error.contains(reason) && !error.contains("s3cret"), "{error}");
    }
}

#[tokio::test]
async fn wrong_flags_are_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (flags, sentence) in [
        (vec!["--only", "10"], "the steps are 1 to 9"),
        (vec!["--only", "1", "--kill", "2"], "step 9, which --only leaves out"),
        (vec!["--orders", "0"], "1..=1000000"),
        (vec!["--order", "5"], "--orders"),
        (vec!["--store", "mysql://root@127.0.0.1:3306/shop"], "name the server alone"),
    ] {
        let output = shop(folder.path(), &flags).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {error}");
        assert!(error.contains(sentence), "{flags:?}: {error}");
    }
}

/// Stopping the demo restores the machine and the database server to their earlier state.
#[tokio::test]
async fn it_is_left_running_until_it_is_stopped() {
    is_left_running_until_it_is_stopped(&[]).await;
    for server in servers() {
        let talk = is_left_running_until_it_is_stopped(&["--store", &server]).await;
        let there = databases(&server).await;
        assert!(made(&talk).iter().all(|name| !there.contains(name)), "left behind: {there:?}");
    }
}

async fn is_left_running_until_it_is_stopped(store: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut walk = shop(folder.path(), &["--only", "1", "--keep"]);
    walk.args(store);
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

    send(walk.id().unwrap(), Signal::TERM);
    let ended = tokio::time::timeout(PATIENCE, walk.wait()).await.expect("it stops").unwrap();
    assert!(ended.success(), "{ended}");
    assert!(
        tokio::net::TcpStream::connect(address).await.is_err(),
        "the coordinator still listens"
    );
    std::fs::remove_file(talk).unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "it has left something behind");
    said
}
