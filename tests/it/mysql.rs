//! A coordinator on MySQL or MariaDB: its tables, and who is next when it is gone.

use std::time::Duration;

use handfast_proto::v1::{BeginRequest, coordinator_service_client::CoordinatorServiceClient};
use handfast_tests::{
    database::{Database, free_port, servers},
    process::{Coordinator, Signal, handfast},
    wait_for,
};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// What a run of `handfast` that fails says.
async fn refusal(arguments: &[&str]) -> String {
    let output = handfast(arguments).await;
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn the_tables_are_made_by_migrate_and_looked_at_by_serve() {
    for server in servers() {
        let database = Database::empty(&server).await;
        let url = database.url();
        let serve = ["serve", "--listen", "127.0.0.1:0", "--store", &url];
        let refused = refusal(&serve).await;
        assert!(
            refused.contains("no tables yet") && refused.contains("handfast migrate"),
            "{refused}"
        );

        let migrate = ["migrate", "--store", &url];
        let dry = handfast(&["migrate", "--store", &url, "--dry-run"]).await;
        assert!(String::from_utf8_lossy(&dry.stdout).contains("CREATE TABLE"), "{dry:?}");
        assert!(refusal(&serve).await.contains("no tables yet"), "a dry run has made them");
        for said in ["has its tables now", "has version 1 already"] {
            let migrated = handfast(&migrate).await;
            assert!(migrated.status.success(), "{migrated:?}");
            assert!(String::from_utf8_lossy(&migrated.stderr).contains(said), "{migrated:?}");
        }

        database
            .execute("INSERT INTO handfast_schema (version, program) VALUES (99, 'later')")
            .await;
        for refused in [refusal(&serve).await, refusal(&migrate).await] {
            assert!(refused.contains("99") && refused.contains("newer"), "{refused}");
        }
        database.drop().await;
    }
}

#[tokio::test]
async fn a_server_that_does_not_let_us_in_is_told_without_the_password() {
    for server in servers() {
        let url = server.replace("root@", "nobody:s3cret@") + "/handfast";
        let refused = refusal(&["serve", "--listen", "127.0.0.1:0", "--store", &url]).await;
        assert!(refused.contains("cannot connect to the store"), "{refused}");
        assert!(!refused.contains("s3cret"), "{refused}");
    }
}

/// Whether what listens there says that it is ready; `None`: it does not say.
async fn is_ready(address: &str) -> Option<bool> {
    let channel =
        Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.ok()?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await.ok()?;
    Some(answer.into_inner().status() == tonic_health::ServingStatus::Serving.into())
}

#[tokio::test]
async fn a_standby_is_alive_and_not_ready_until_it_is_its_turn() {
    for server in servers() {
        let database = Database::migrated(&server).await;
        let url = database.url();
        let mut first = Coordinator::start_on(&url, &[]).await;
        let begun = first.handfast().transaction("order").begin().await.unwrap();
        let xid = begun.xid().await.unwrap();

        // Handed back: the next one is there at once.
        let address = format!("127.0.0.1:{}", free_port());
        let second = Coordinator::spawn(Coordinator::command(&url, &["--listen", &address]));
        let meanwhile = async {
            let ready = wait_for("the standby answers", async || is_ready(&address).await);
            assert!(!ready.await, "two are ready");
            let standby = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let mut client = CoordinatorServiceClient::new(standby.connect_lazy());
            let away = client.begin(BeginRequest::default()).await.unwrap_err();
            assert_eq!(away.code(), Code::Unavailable, "{away:?}");
            first.signal(Signal::TERM);
            assert!(first.ended().await.success());
        };
        let (second, ()) = tokio::join!(second, meanwhile);
        assert_eq!(is_ready(&address).await, Some(true));

        // Killed: the next one is there after a while.
        let third = Coordinator::spawn(Coordinator::command(&url, &[]));
        let meanwhile = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            second.kill().await;
        };
        let (mut third, ()) = tokio::join!(third, meanwhile);
        assert_eq!(third.log().with_message("the owner shows no life; taking over").len(), 1);

        // Taken over from: it learns that without anything to write, and says so with a code of its own.
        let fourth = Coordinator::start_on(&url, &["--take-over"]).await;
        assert_eq!(third.ended().await.code(), Some(8));
        let outcome = fourth.handfast().outcome(xid).await.unwrap();
        assert_eq!(outcome, handfast::Outcome::Undecided, "three owners later it is still known");
        fourth.kill().await;
        database.drop().await;
    }
}
