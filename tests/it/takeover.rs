//! Several coordinators compete for a store on MySQL or MariaDB. They are real processes, stopped and killed at the worst moments.

use std::time::Duration;

use handfast::Outcome;
use handfast_proto::v1::{
    BeginRequest, BranchSpec, coordinator_service_client::CoordinatorServiceClient,
};
use handfast_tests::{
    database::{Database, servers},
    process::{Coordinator, SERVING, Signal, is_stopped},
    wait_for,
};
use tonic::transport::Channel;

const WAITING: &str = "another coordinator has the store; waiting as its standby";
const TAKE_OVER: &[&str] = &["--take-over"];
/// Exit code of a coordinator that was fenced off by another one.
const FENCED: Option<i32> = Some(8);

type Client = CoordinatorServiceClient<Channel>;

/// Begins a transaction with one branch. Begin is answered once it is durable. `None` if there is no answer in time.
async fn begin(client: &mut Client) -> Option<String> {
    let branch = BranchSpec {
        branch_id: "1".to_owned(),
        action: "warehouse.deduct".to_owned(),
        participant: "warehouse".to_owned(),
        target: "http://127.0.0.1:1".to_owned(),
        ..BranchSpec::default()
    };
    let mut request =
        tonic::Request::new(BeginRequest { branches: vec![branch], ..BeginRequest::default() });
    request.get_mut().name = "order".to_owned();
    request.set_timeout(Duration::from_secs(2));
    let begun = client.begin(request).await.ok()?;
    Some(begun.into_inner().transaction?.xid)
}

/// The epoch, which must be the same for all partitions.
async fn epoch(database: &Database) -> u64 {
    let [least, most] = ["MIN", "MAX"]
        .map(|which| format!("SELECT CAST({which}(epoch) AS SIGNED) FROM `partition`"));
    let epoch = database.number(&least).await;
    assert_eq!(epoch, database.number(&most).await, "the partitions have different owners");
    epoch
}

/// Two supervisors each run a coordinator with --take-over, and restart it whenever it exits.
/// After a few takeovers one coordinator must stay the owner and the other must stay on standby.
#[tokio::test]
async fn two_that_take_over_from_each_other_come_to_rest() {
    for server in servers() {
        let database = Database::migrated(&server).await;
        let url = database.url();
        let mut owner = Coordinator::start_on(&url, TAKE_OVER).await;
        let mut takeovers = 1;
        let standby = loop {
            let mut next = Coordinator::launch(Coordinator::command(&url, TAKE_OVER));
            if next.says(&[SERVING, WAITING]).await == WAITING {
                break next;
            }
            takeovers += 1;
            assert!(takeovers < 10, "they take the store from each other for ever");
            let mut fenced = std::mem::replace(&mut owner, next.serves().await);
            assert_eq!(fenced.ended().await.code(), FENCED);
        };
        assert_eq!((takeovers, epoch(&database).await), (6, 6));
        // From now on one coordinator serves and the other is standby.
        assert!(begin(&mut Client::new(owner.channel())).await.is_some());
        owner.signal(Signal::TERM);
        assert!(owner.ended().await.success());
        let mut owner = standby.serves().await;
        // An operator can still force a takeover.
        let last = Coordinator::start_on(&url, &["--take-over=always"]).await;
        assert_eq!(owner.ended().await.code(), FENCED);
        last.kill().await;
        database.drop().await;
    }
}

/// The owner is stopped while it holds row locks: it neither commits nor disconnects.
#[tokio::test]
async fn an_owner_that_stops_before_its_commit_keeps_nobody_out() {
    for server in servers() {
        tokio::join!(
            stopped_before_its_commit(&server, TAKE_OVER),
            stopped_before_its_commit(&server, &[])
        );
    }
}

async fn stopped_before_its_commit(server: &str, flags: &[&str]) {
    let database = Database::migrated(server).await;
    let mut command = Coordinator::command(&database.url(), &[]);
    command.env("CRASH_POINT", "batch.before_commit:5:stop");
    let mut owner = Coordinator::spawn(command).await;
    let mut client = Client::new(owner.channel());
    let mut begun = Vec::new();
    while !is_stopped(owner.pid()) {
        begun.extend(begin(&mut client).await);
    }
    let mut other = database.connect().await;
    let locked = sqlx::query("SELECT epoch FROM `partition` FOR UPDATE NOWAIT").execute(&mut other);
    assert!(locked.await.is_err(), "it was stopped outside of its local transaction");

    let next = Coordinator::start_on(&database.url(), flags).await;
    assert!(is_stopped(owner.pid()), "nobody but the server can have ended its batch");
    let recorded = "SELECT COUNT(*) FROM global_transaction";
    assert_eq!(database.number(recorded).await, begun.len() as u64, "{begun:?}");
    let mut client = Client::new(next.channel());
    for xid in &begun {
        let outcome = next.handfast().outcome(xid.parse().unwrap()).await;
        assert_eq!(outcome.unwrap(), Outcome::Undecided, "what was acknowledged is there");
    }

    // The old owner resumes at the point where it was stopped, just before its COMMIT.
    owner.signal(Signal::CONT);
    assert_eq!(owner.ended().await.code(), FENCED);
    assert_eq!(epoch(&database).await, 2);
    assert_eq!(database.number(recorded).await, begun.len() as u64, "a zombie has written");
    assert!(begin(&mut client).await.is_some());
    next.kill().await;
    database.drop().await;
}

/// The standby's UPDATE waits for row locks in the database. If the standby ends, the UPDATE must not take effect afterwards.
#[tokio::test]
async fn a_takeover_that_is_given_up_has_not_happened() {
    for server in servers() {
        tokio::join!(given_up(&server, Signal::KILL), given_up(&server, Signal::TERM));
    }
}

async fn given_up(server: &str, signal: Signal) {
    let database = Database::migrated(server).await;
    let mut owner = Coordinator::start_on(&database.url(), &[]).await;
    let mut client = Client::new(owner.channel());
    assert!(begin(&mut client).await.is_some());
    let mut holder = database.connect().await;
    for sql in ["BEGIN", "SELECT epoch FROM `partition` FOR UPDATE"] {
        sqlx::raw_sql(sql).execute(&mut holder).await.unwrap();
    }

    let mut second = Coordinator::launch(Coordinator::command(&database.url(), TAKE_OVER));
    let mut looking = database.connect().await;
    let mut waits = async |is: bool| {
        let waiting = "SELECT COUNT(*) FROM information_schema.processlist \
                       WHERE db = DATABASE() AND info LIKE 'UPDATE `partition` SET epoch%'";
        let waits = async || {
            // The query fails while another session runs a statement that is not valid text.
            let waiting = sqlx::query_scalar(waiting).fetch_one(&mut looking).await;
            waiting.is_ok_and(|waiting: i64| is == (waiting == 1)).then_some(())
        };
        wait_for("it waits for the rows, or not", waits).await;
    };
    waits(true).await;
    if signal == Signal::TERM {
        // The first attempt fails, and the coordinator tries again.
        second.says(&["the store was not taken over; trying again"]).await;
        waits(true).await;
    }
    let ended = second.end(signal).await;
    assert_eq!(ended.success(), signal == Signal::TERM, "{ended}");
    waits(true).await; // the server has not noticed
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.unwrap();
    waits(false).await;

    wait_for("the owner goes on", async || begin(&mut client).await).await;
    assert_eq!(epoch(&database).await, 1);
    owner.signal(Signal::TERM);
    assert!(owner.ended().await.success(), "it was not fenced off");
    database.drop().await;
}
