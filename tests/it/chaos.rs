//! Runs `chaos` for a short time on each store. Every kind of fault must happen, no acknowledged result may be lost, and no
//! guarantee may be broken. `scripts/prove` runs it for longer.

use std::{process::Stdio, time::Duration};

use handfast_tests::{
    database::{groups, kinds},
    process::binary,
};
use serde_json::{Value, json};
use tokio::process::Command;

/// Deadline of a run, far more than it needs. A run that is killed also ends the processes that it started.
const PATIENCE: Duration = Duration::from_secs(300);
const SEED: &str = "1";

/// Runs `chaos` until it exits, and returns its report.
async fn chaos(store: &str, seconds: u32, flags: &[&str]) -> Value {
    let mut command = Command::new(binary("chaos"));
    command.args(["--json", "--seed", SEED, "--store", store, "--seconds", &seconds.to_string()]);
    command.args(flags).env_remove("CARGO"); // it builds nothing: all is there
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").unwrap();
    let (json, talk) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{talk}");
    assert!(output.status.success(), "{talk}");
    serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json}"))
}

/// No acknowledged transaction was lost, no promise was broken, and there were transactions that could have been lost.
fn check_promises(report: &Value) {
    assert_eq!((&report["lost"], &report["violations"]), (&json!(0), &json!([])));
    // On a busy machine clients give up on many transactions. It is enough that some were acknowledged and could have been lost.
    let told = report["acknowledged"]["confirmed"].as_u64().unwrap();
    let confirmed = told + report["unknown_resolved"]["confirmed"].as_u64().unwrap();
    assert!(told > 0 && confirmed > 10, "too little went on to show anything: {report}");
}

/// The promises were kept under every kind of fault.
fn check(report: &Value) {
    check_promises(report);
    assert_eq!(report["faults_missing"], json!([]), "some faults have not come about");
}

// The shortest time in which every kind of fault happens. A run may take up to six times as long, until all of them
// have happened.
// Each store has a test of its own, so that the tests of several stores can run at a time.

#[tokio::test]
async fn nothing_is_lost_on_sqlite_whatever_breaks() {
    check(&chaos("sqlite", 10, &[]).await);
}

#[tokio::test]
async fn nothing_is_lost_on_mariadb_whatever_breaks() {
    on_a_server("mariadb").await;
}

#[tokio::test]
async fn nothing_is_lost_on_mysql_whatever_breaks() {
    on_a_server("mysql").await;
}

async fn on_a_server(kind: &str) {
    if is_among(&kinds(), kind) {
        check(&chaos(kind, 12, &[]).await);
    }
}

// A failover: new connections reach another server while old connections still exist. Reads on an old connection may be stale.
// The tests above ask for every other kind of fault. Three servers are slower, so here it is enough that the database moves.

#[tokio::test]
async fn nothing_is_lost_when_a_replica_becomes_the_primary() {
    on_a_group("replication").await;
}

#[tokio::test]
async fn nothing_is_lost_when_connections_lead_to_another_member_of_galera() {
    on_a_group("galera").await;
}

#[tokio::test]
async fn nothing_is_lost_when_group_replication_has_another_primary() {
    on_a_group("group-replication").await;
}

async fn on_a_group(kind: &str) {
    if !is_among(&groups(), kind) {
        return;
    }
    let report = chaos(kind, 12, &["--only-switches"]).await;
    check_promises(&report);
    let moves = report["faults"]["database: new connections led to another server"].as_u64();
    assert!(moves > Some(0), "the database has not moved: {report}");
}

/// Whether this machine has servers of this kind. `scripts/test` says at its end which kinds were not tested.
fn is_among(kinds: &[String], kind: &str) -> bool {
    let has = kinds.iter().any(|one| one == kind);
    if !has {
        println!("not tested: there is no {kind}");
    }
    has
}
