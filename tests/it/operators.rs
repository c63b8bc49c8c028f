//! The operators' command line, used on a coordinator with a stuck transaction.

use handfast::{Json, Outcome, Remote};
use handfast_proto::v1::{
    BeginRequest, BranchSpec, DecideRequest, Decision, Payload,
    coordinator_service_client::CoordinatorServiceClient,
};
use handfast_tests::{
    process::{Coordinator, Signal, handfast},
    wait_for,
    warehouse::{Deduct, Warehouse},
};
use serde_json::Value;
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

/// Runs an operator command. Returns its exit code, stdout and stderr.
async fn run(coordinator: &Coordinator, arguments: &[&str]) -> (i32, String, String) {
    let url = coordinator.url();
    let output = handfast(&[arguments, &["--server", &url]].concat()).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

async fn json(coordinator: &Coordinator, arguments: &[&str]) -> Value {
    let (code, printed, words) = run(coordinator, &[arguments, &["-o", "json"]].concat()).await;
    assert_eq!(code, 0, "{arguments:?}: {words}");
    serde_json::from_str(&printed).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_transaction_is_found_understood_hurried_and_resolved() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("handfast.toml");
    std::fs::write(
        &config,
        "log_labels = [\"customer\"]\n[stuck]\nafter_attempts = 2\n[retry]\ninitial = \"10ms\"\nmax = \"1h\"\n",
    )
    .unwrap();
    let flags = ["--config", config.to_str().unwrap()];
    let coordinator = Coordinator::start(&folder.path().join("store.db"), &flags).await;
    let (east, west) = (
        Warehouse::open("east", folder.path()).await,
        Warehouse::open("west", folder.path()).await,
    );
    // The branch at the west is tried. Nothing listens at its address afterwards.
    let initiator = coordinator.handfast();
    let open = initiator
        .transaction("order")
        .label("customer", "ann")
        .idempotency_key("order-1042")
        .until_decided()
        .begin()
        .await
        .unwrap();
    open.call::<Deduct>(&east.remote(), Json(3)).await.unwrap();
    let gone = Remote::here(&west.participant, "http://127.0.0.1:9"); // the discard port: closed
    open.call::<Deduct>(&gone, Json(2)).await.unwrap();
    let xid = open.confirm().await.unwrap().xid;
    let text = xid.to_string();

    let listed = wait_for("it is listed as stuck", async || {
        let list = json(&coordinator, &["list", "--stuck"]).await;
        list["transactions"].as_array().unwrap().first().cloned()
    });
    let listed = listed.await;
    assert_eq!(
        (listed["xid"].as_str(), listed["state"].as_str()),
        (Some(&*text), Some("confirming"))
    );
    assert_eq!(listed["branches"][1]["last_error"]["code"], "UNAVAILABLE");
    let (code, table, _) = run(&coordinator, &["list", "--open", "--name", "order"]).await;
    assert_eq!(code, 0);
    assert!(table.contains(&text) && table.contains("stuck"), "{table}");

    let log = coordinator.log().lines();
    let failed: Vec<_> =
        log.iter().filter(|line| line["message"] == "call failed; will retry").collect();
    assert!(!failed.is_empty());
    for line in failed {
        assert_eq!(
            (line["xid"].as_str(), line["labels"].as_str()),
            (Some(&*text), Some("customer=ann"))
        );
    }
    for (label, found) in [("customer=ann", 1), ("customer=an", 0), ("order=ann", 0)] {
        let list = json(&coordinator, &["list", "--label", label]).await;
        assert_eq!(list["transactions"].as_array().unwrap().len(), found, "{label}");
    }

    let (code, shown, _) = run(&coordinator, &["show", &text]).await;
    assert_eq!(code, 0);
    for word in
        ["CONFIRMING", "customer=ann", "west", "UNAVAILABLE", "handfast retry", "handfast resolve"]
    {
        assert!(shown.contains(word), "{word} is not in:\n{shown}");
    }
    assert_eq!(json(&coordinator, &["show", "--key", "order-1042"]).await["xid"], *text);
    // The branch is in backoff. `retry` sends the next attempt now, even if the circuit breaker is open.
    let attempts = |shown: &Value| shown["branches"][1]["attempts"].as_u64().unwrap();
    let before = attempts(&json(&coordinator, &["show", &text]).await);
    run(&coordinator, &["retry", &text]).await;
    let again = wait_for("one more attempt", async || {
        (attempts(&json(&coordinator, &["show", &text]).await) > before).then_some(())
    });
    again.await;

    // Each kind of mistake has its own error message.
    for (arguments, expected, says) in [
        (&["show", "3-7-1042"][..], 2, "3-7-1042-9f3c01d2"),
        (&["show", "3-1-999999-00000000"], 3, "may have been lost"), // no epoch of this store has that nonce
        (&["show", "--key", "order-1043"], 3, "order-1043"),
        (&["show"], 2, "XID"),
        (&["resolve", &text, "7", "--reason", "x", "--operator", "ann"], 3, "no branch 7"),
        (&["resolve", &text, "1", "--reason", "x", "--operator", "ann"], 4, "acknowledged"),
        (&["resolve", &text, "2"], 2, "--reason"),
        (&["list", "--limit", "1001"], 2, "1000"),
    ] {
        let (code, _, words) = run(&coordinator, arguments).await;
        assert_eq!(code, expected, "{arguments:?}: {words}");
        assert!(words.contains(says), "{arguments:?} does not say {says:?}: {words}");
    }

    let resolve = ["resolve", &text, "2", "--reason", "booked by hand", "--operator", "ann"];
    for _ in 0..2 {
        let (code, told, words) = run(&coordinator, &resolve).await;
        assert_eq!(code, 0, "{words}");
        assert!(told.contains("resolved"), "{told}");
    }
    assert_eq!(initiator.outcome(xid).await.unwrap(), Outcome::Confirmed { completed: true });
    assert_eq!(east.stock().await.2, 3);
    let shown = json(&coordinator, &["show", &text]).await;
    assert_eq!(shown["branches"][1]["state"], "resolved");
    assert_eq!(shown["branches"][1]["resolution"]["reason"], "booked by hand");
    assert_eq!(
        json(&coordinator, &["list", "--stuck"]).await["transactions"].as_array().unwrap().len(),
        0
    );
}

/// The payload's type is gone from the record, so the participant cannot be called.
#[tokio::test(flavor = "multi_thread")]
async fn a_branch_whose_record_is_damaged_is_stuck_with_its_reason_and_resolved() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store.db");
    let east = Warehouse::open("east", folder.path()).await;
    let mut coordinator = Coordinator::start(&store, &[]).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    let branch = |id: &str, target: String, data: Option<&str>| BranchSpec {
        branch_id: id.to_owned(),
        action: "warehouse.deduct".to_owned(),
        participant: "east".to_owned(),
        target,
        carry_payload: data.is_some(),
        payload: data.map(|data| Payload {
            content_type: "application/json".to_owned(),
            data: data.as_bytes().to_vec().into(),
        }),
        ..BranchSpec::default()
    };
    let branches = vec![
        branch("1", "http://127.0.0.1:9".to_owned(), None),
        branch("2", east.url(), Some("2")),
    ];
    let begin = BeginRequest { name: "order".to_owned(), branches, ..BeginRequest::default() };
    let begun = client.begin(begin).await.unwrap().into_inner().transaction.unwrap();
    coordinator.signal(Signal::TERM);
    assert!(coordinator.ended().await.success());
    let options = SqliteConnectOptions::new().filename(&store);
    let mut db = SqliteConnection::connect_with(&options).await.unwrap();
    let damage = "UPDATE branch SET payload_type = NULL WHERE payload_type IS NOT NULL";
    assert_eq!(sqlx::query(damage).execute(&mut db).await.unwrap().rows_affected(), 1);
    db.close().await.unwrap();

    let coordinator = Coordinator::start(&store, &[]).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    let decide = DecideRequest {
        xid: begun.xid.clone(),
        decision: Decision::Cancel.into(),
        ..DecideRequest::default()
    };
    client.decide(decide).await.unwrap();
    let stuck = wait_for("it is stuck", async || {
        let list = json(&coordinator, &["list", "--stuck"]).await;
        list["transactions"].as_array().unwrap().first().cloned()
    });
    let error = stuck.await["branches"][1]["last_error"].clone();
    assert_eq!(error["code"], "DATA_LOSS");
    assert!(error["message"].to_string().contains("type of its payload"), "{error}");
    let resolve = ["resolve", &begun.xid, "2", "--reason", "given back", "--operator", "ann"];
    let (code, _, words) = run(&coordinator, &resolve).await;
    assert_eq!(code, 0, "{words}");
    let shown = json(&coordinator, &["show", &begun.xid]).await;
    assert_eq!(shown["branches"][1]["state"], "resolved");
}

#[tokio::test]
async fn without_a_coordinator_the_commands_say_so() {
    let output = handfast(&["list", "--server", "http://127.0.0.1:9", "--timeout", "2s"]).await;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{words}");
    assert!(words.contains("handfast dev"), "{words}");
}

/// A store is restored from a backup that was made before the decision: the initiator was told what the store has forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_may_have_lost_its_decision_is_listed_and_decided() {
    let folder = tempfile::tempdir().unwrap();
    let (store, backup) = (folder.path().join("store.db"), folder.path().join("a.backup"));
    let (at, backup) = (format!("sqlite:{}", store.display()), backup.display().to_string());
    let coordinator = Coordinator::start(&store, &[]).await;
    let east = Warehouse::open("east", folder.path()).await;
    let initiator = coordinator.handfast();
    let order = initiator.transaction("order").idempotency_key("order-1042").begin().await.unwrap();
    order.call::<Deduct>(&east.remote(), Json(3)).await.unwrap();
    let backed_up = handfast(&["backup", &backup, "--store", &at]).await;
    assert!(backed_up.status.success(), "{backed_up:?}");
    let text = order.confirm().await.unwrap().xid.to_string();
    coordinator.signal(Signal::TERM);
    wait_for("it has ended", async || {
        let restored = handfast(&["restore", &backup, "--store", &at]).await;
        restored.status.success().then_some(())
    })
    .await;

    let coordinator = Coordinator::start(&store, &[]).await;
    let at = coordinator.log().with_message("the store has lost batches up to this epoch");
    assert!(!at.is_empty(), "{:?}", coordinator.log().lines());
    for arguments in [&["show", &text][..], &["show", "--key", "order-1042"], &["retry", &text]] {
        let (code, _, words) = run(&coordinator, arguments).await;
        assert_eq!(code, 3, "{arguments:?}: {words}");
        assert!(words.contains("may have been lost") && words.contains("--decision"), "{words}");
    }
    let lost = json(&coordinator, &["list", "--lost"]).await;
    assert_eq!(lost["transactions"][0]["xid"], *text);
    assert_eq!(lost["transactions"][0]["state"], "trying");

    let by = ["--operator", "ann", "--reason", "the warehouse has confirmed"];
    let resolve = |decision| [&["resolve", &text, "--decision", decision], &by[..]].concat();
    for _ in 0..2 {
        let (code, told, words) = run(&coordinator, &resolve("confirm")).await;
        assert_eq!(code, 0, "{words}");
        assert!(told.contains("CONFIRM"), "{told}");
    }
    let (code, _, words) = run(&coordinator, &resolve("cancel")).await;
    assert_eq!(code, 4, "{words}");
    wait_for("the participant has acknowledged", async || {
        let shown = json(&coordinator, &["show", &text]).await;
        (shown["state"] == "confirmed").then_some(())
    })
    .await;
    assert_eq!(east.stock().await.2, 3, "it was confirmed once");
    let lost = json(&coordinator, &["list", "--lost"]).await;
    assert_eq!(lost["transactions"].as_array().unwrap().len(), 0);
    let mut store = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&store))
        .await
        .unwrap();
    let kept: (String, String, i64) =
        sqlx::query_as("SELECT operator, reason, decision FROM resolution WHERE branch_id = ''")
            .fetch_one(&mut store)
            .await
            .unwrap();
    assert_eq!(kept, ("ann".to_owned(), by[3].to_owned(), 1));
}
