//! A coordinator on MySQL or MariaDB: its tables, and the failover to the next coordinator when it ends.

use std::time::{Duration, Instant};

use handfast::{Answer, Branch, Fence, Json, Outcome, Phase, TryError, Tx};
use handfast_proto::v1::{
    BeginRequest, BranchSpec, DecideRequest, Decision,
    coordinator_service_client::CoordinatorServiceClient,
};
use handfast_tests::{
    database::{Database, Server, free_port, kinds, servers},
    process::{Coordinator, Signal, handfast},
    wait_for,
    warehouse::{Deduct, Warehouse},
};
use sqlx::{MySql, mysql::MySqlPoolOptions};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Runs `handfast`, which must fail, and returns its error message.
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
        for said in ["has its tables now", "has version 3 already"] {
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
async fn a_database_may_have_the_longest_name_that_there_is() {
    for server in servers() {
        let database = Database::empty(&server).await;
        let name = format!("handfast_test_{:050}", rand::random::<u64>());
        database.execute(&format!("CREATE DATABASE {name}")).await;
        for said in ["has its tables now", "has version 3 already"] {
            let migrated = handfast(&["migrate", "--store", &format!("{server}/{name}")]).await;
            assert!(String::from_utf8_lossy(&migrated.stderr).contains(said), "{migrated:?}");
        }
        database.execute(&format!("DROP DATABASE {name}")).await;
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

/// A server setting that loses commits or prevents them. `key` and `reason` are parts of the refusal; `sql` makes the setting.
/// `mend` is the statement in the refusal that repairs it.
struct Flaw {
    kinds: &'static [&'static str],
    key: &'static str,
    reason: &'static str,
    sql: &'static str,
    mend: &'static str,
}

const BOTH: &[&str] = &["mariadb", "mysql"];

const FLAWS: [Flaw; 6] = [
    Flaw {
        kinds: BOTH,
        key: "innodb_flush_log_at_trx_commit is 2",
        reason: "a crash loses commits",
        sql: "SET GLOBAL innodb_flush_log_at_trx_commit = 2",
        mend: "SET GLOBAL innodb_flush_log_at_trx_commit = 1",
    },
    Flaw {
        kinds: &["mysql"], // MariaDB has no binary log unless it is told to
        key: "sync_binlog is 0",
        reason: "a crash loses commits from the binary log",
        sql: "SET GLOBAL sync_binlog = 0",
        mend: "SET GLOBAL sync_binlog = 1",
    },
    Flaw {
        kinds: BOTH,
        key: "read_only = 1",
        reason: "a coordinator has to write",
        sql: "SET GLOBAL read_only = 1",
        mend: "SET GLOBAL read_only = 0",
    },
    Flaw {
        kinds: BOTH,
        key: "max_allowed_packet is 1048576",
        reason: "must be 16777216 or more",
        sql: "SET GLOBAL max_allowed_packet = 1048576",
        mend: "SET GLOBAL max_allowed_packet = 16777216",
    },
    Flaw {
        kinds: &["mysql"],
        key: "it is a replica",
        reason: "Connect to the source",
        sql: "CHANGE REPLICATION SOURCE TO SOURCE_HOST = '127.0.0.1', SOURCE_PORT = 1",
        mend: "",
    },
    Flaw {
        kinds: &["mariadb"],
        key: "it is a replica",
        reason: "Connect to the source",
        sql: "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = 1",
        mend: "",
    },
];

#[tokio::test]
async fn a_server_that_would_lose_commits_is_refused_with_what_mends_it() {
    for kind in kinds() {
        let server = Server::start(&kind).await;
        let database = Database::migrated(&server.url()).await;
        let url = database.url();
        let serve = ["serve", "--listen", "127.0.0.1:0", "--store", &url];
        // Settings that the coordinator's sessions set for themselves are not checked.
        let isolation = if kind == "mysql" { "transaction_isolation" } else { "tx_isolation" };
        let sloppy = format!(
            "SET GLOBAL sql_mode = '', GLOBAL {isolation} = 'READ-UNCOMMITTED', GLOBAL autocommit = 0"
        );
        database.execute(&sloppy).await;
        Coordinator::start_on(&url, &[]).await.kill().await;

        for flaw in FLAWS.iter().filter(|flaw| flaw.kinds.contains(&kind.as_str())) {
            database.execute(flaw.sql).await;
            let refused = refusal(&serve).await;
            let is_read_only = flaw.sql.contains("read_only");
            // A secondary in a replication group must not be made writable by hand, so the refusal does not suggest it.
            let hint = if is_read_only { "Connect to the primary" } else { flaw.mend };
            for said in [flaw.key, flaw.reason, hint] {
                assert!(refused.contains(said), "{kind}: {said:?} is not in {refused}");
            }
            assert!(!is_read_only || !refused.contains(flaw.mend), "{refused}");
            // With the override, the coordinator serves on this server and logs a warning.
            let mut allowed = Coordinator::command(&url, &["--take-over=always"]);
            allowed.env("HANDFAST_STORE_UNSAFE", "true");
            if !is_read_only {
                let allowed = Coordinator::spawn(allowed).await;
                let warned = allowed.log().lines().into_iter().any(|line| {
                    line["level"] == "WARN"
                        && line["flaw"].as_str().is_some_and(|text| text.contains(flaw.key))
                });
                assert!(warned, "{kind}: {:?}", allowed.log().lines());
                allowed.kill().await;
            }
            if flaw.mend.is_empty() {
                break; // the last one
            }
            database.execute(flaw.mend).await;
            Coordinator::start_on(&url, &["--take-over=always"]).await.kill().await;
        }
    }
}

/// The database of a participant fails over. The pool's connections to the old server, which is read-only now, must not be used
/// again: a new connection may lead to the new server.
#[tokio::test]
async fn a_participant_leaves_a_server_that_has_become_read_only() {
    for kind in kinds() {
        let server = Server::start(&kind).await;
        let database = Database::empty(&server.url()).await;
        // `read_only` does not bind root.
        database.execute("CREATE USER app").await;
        database.execute("GRANT ALL ON `handfast\\_test%`.* TO app").await;
        let pool = MySqlPoolOptions::new().max_connections(1);
        let pool = pool.connect(&database.url().replace("root@", "app@")).await.unwrap();
        let fence = Fence::new(pool.clone());
        fence.create_table_if_missing().await.unwrap();
        let connection = async || {
            let id = sqlx::query_scalar::<_, i64>("SELECT CAST(CONNECTION_ID() AS SIGNED)");
            id.fetch_one(&pool).await.unwrap()
        };
        let xid = "3-7-1042-9f3c01d2".parse().unwrap();
        let call = Branch::new(xid, "1".parse().unwrap(), "warehouse.deduct", Phase::Try);
        let nothing = async |_: &mut Tx<MySql>| Ok::<_, TryError>(());

        let before = connection().await;
        database.execute("SET GLOBAL read_only = 1").await;
        let answer = fence.run(&call, b"", nothing).await;
        assert!(matches!(&answer, Answer::Retry(text) if text.contains("1290")), "{answer:?}");
        assert_ne!(connection().await, before, "{kind}");
        database.execute("SET GLOBAL read_only = 0").await;
        let answer = fence.run(&call, b"", nothing).await;
        assert!(matches!(answer, Answer::Done(_)), "{answer:?}");
    }
}

/// The database is frozen for longer than callers wait. Callers get an error that says so, and afterwards everything works again.
#[tokio::test]
async fn a_database_that_is_away_for_a_while() {
    for kind in kinds() {
        let server = Server::start(&kind).await;
        let database = Database::migrated(&server.url()).await;
        let coordinator = Coordinator::start_on(&database.url(), &[]).await;
        let folder = tempfile::tempdir().unwrap();
        let warehouse = Warehouse::open("warehouse", folder.path()).await;
        let mut client = CoordinatorServiceClient::new(coordinator.channel());
        let handfast = coordinator.handfast();

        // This transaction is tried and not decided.
        let global = handfast.transaction("order").begin().await.unwrap();
        global.call::<Deduct>(&warehouse.remote(), Json(3)).await.unwrap();
        let xid = global.xid().await.unwrap();

        server.signal(Signal::STOP);
        let decide = DecideRequest {
            xid: xid.to_string(),
            decision: Decision::Confirm.into(),
            tried_branch_ids: vec!["1".to_owned()],
            ..DecideRequest::default()
        };
        let branch = BranchSpec {
            branch_id: "1".to_owned(),
            action: "warehouse.deduct".to_owned(),
            participant: "warehouse".to_owned(),
            target: warehouse.url(),
            ..BranchSpec::default()
        };
        let begin = BeginRequest {
            name: "order".to_owned(),
            branches: vec![branch],
            ..BeginRequest::default()
        };
        let deadline = Duration::from_secs(15); // longer than the coordinator waits for its store, which is 4 s
        let within = |message| {
            let mut request = tonic::Request::new(message);
            request.set_timeout(deadline);
            request
        };
        let began = Instant::now();
        let mut second = client.clone();
        let decided = client.decide(within(decide.clone()));
        let mut begin = tonic::Request::new(begin);
        begin.set_timeout(deadline);
        let (decided, begun) = tokio::join!(decided, second.begin(begin));
        assert_eq!(decided.unwrap_err().code(), Code::Unavailable, "{kind}");
        assert_eq!(begun.unwrap_err().code(), Code::Unavailable, "{kind}");
        assert!(began.elapsed() < deadline, "{kind}: {:?}", began.elapsed());
        let not_ready =
            async || (is_ready(&coordinator.address).await == Some(false)).then_some(());
        wait_for("readiness goes off", not_ready).await;
        assert_eq!(warehouse.stock().await.2, 0, "sold before the decision was durable");

        server.signal(Signal::CONT);
        let ready = async || (is_ready(&coordinator.address).await == Some(true)).then_some(());
        wait_for("readiness comes back", ready).await;
        // The decision whose answer was lost is durable. The coordinator carries it out by itself, and only once.
        let sold = async || (warehouse.stock().await.2 == 3).then_some(());
        wait_for("what was decided is done", sold).await;
        let again = client.decide(decide).await;
        assert!(again.is_ok(), "{kind}: {again:?}");
        assert!(matches!(handfast.outcome(xid).await.unwrap(), Outcome::Confirmed { .. }));
        let done = handfast.transaction("order").run(async |global| {
            global.call::<Deduct>(&warehouse.remote(), Json(2)).await?;
            Ok(())
        });
        done.await.unwrap();
        wait_for("the next one is done", async || (warehouse.stock().await.2 == 5).then_some(()))
            .await;
        coordinator.kill().await;
    }
}

/// Whether the process at this address reports ready. `None` if it does not answer.
async fn is_ready(address: &str) -> Option<bool> {
    health_of(address, "").await
}

async fn health_of(address: &str, service: &str) -> Option<bool> {
    let channel =
        Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.ok()?;
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel).check(request).await.ok()?;
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

        // The first coordinator gives up the store on shutdown, so the next one serves at once.
        let address = format!("127.0.0.1:{}", free_port());
        let second = Coordinator::spawn(Coordinator::command(&url, &["--listen", &address]));
        let meanwhile = async {
            let ready = wait_for("the standby answers", async || is_ready(&address).await);
            assert!(!ready.await, "two are ready");
            assert_eq!(health_of(&address, "liveness").await, Some(true), "it is not alive");
            let standby = Endpoint::from_shared(format!("http://{address}")).unwrap();
            let mut client = CoordinatorServiceClient::new(standby.connect_lazy());
            let away = client.begin(BeginRequest::default()).await.unwrap_err();
            assert_eq!(away.code(), Code::Unavailable, "{away:?}");
            first.signal(Signal::TERM);
            assert!(first.ended().await.success());
        };
        let (second, ()) = tokio::join!(second, meanwhile);
        assert_eq!(is_ready(&address).await, Some(true));

        // The second coordinator is killed, so the next one takes over only after the owner has been silent for a while.
        let third = Coordinator::spawn(Coordinator::command(&url, &[]));
        let meanwhile = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            second.kill().await;
        };
        let (mut third, ()) = tokio::join!(third, meanwhile);
        assert_eq!(third.log().with_message("the owner shows no life; taking over").len(), 1);

        // Another coordinator takes over. The third one notices without writing anything, and exits with a code of its own.
        let fourth = Coordinator::start_on(&url, &["--take-over"]).await;
        assert_eq!(third.ended().await.code(), Some(8));
        let outcome = fourth.handfast().outcome(xid).await.unwrap();
        assert_eq!(outcome, Outcome::Undecided, "three owners later it is still known");
        fourth.kill().await;
        database.drop().await;
    }
}
