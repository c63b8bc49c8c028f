//! Participants that answer garbage, never answer, answer late or crash; an action that no participant serves; a full disk.
//! Each fault gets one clear error and leaves nothing half done. Once the fault is repaired, every transaction completes.

use std::{sync::Arc, time::Duration};

use handfast::{Answer, Branch, Contract as _, Participant, Phase};
use handfast_proto::{
    calls::{BranchAnswers, serve_branches},
    v1::{
        self as pb,
        admin_service_client::AdminServiceClient,
        coordinator_service_client::CoordinatorServiceClient,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use handfast_tests::{
    process::{Coordinator, binary},
    wait_for,
    warehouse::{Deduct, Warehouse},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    process::Command,
};
use tonic::{Code, Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// Status codes of a broken connection. The code depends on where the connection broke.
const BROKEN: [&str; 4] = ["UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED"];

/// A participant that waits before it handles a call. Without a time it never answers.
#[derive(Clone)]
struct Slow {
    time: Option<Duration>,
    behind: Participant,
}

impl Slow {
    async fn wait(&self) {
        match self.time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    }
}

#[tonic::async_trait]
impl ParticipantService for Slow {
    async fn try_branch(
        &self,
        request: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        self.wait().await;
        self.behind.try_branch(request).await
    }

    async fn confirm_branch(
        &self,
        request: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        self.wait().await;
        self.behind.confirm_branch(request).await
    }

    async fn cancel_branch(
        &self,
        request: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        self.wait().await;
        self.behind.cancel_branch(request).await
    }

    async fn list_actions(
        &self,
        request: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        self.behind.list_actions(request).await
    }

    async fn inquire_branch(
        &self,
        request: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        self.behind.inquire_branch(request).await
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn slow(time: Option<Duration>, warehouse: &Warehouse) -> String {
    let (listener, url) = listen().await;
    let service =
        ParticipantServiceServer::new(Slow { time, behind: warehouse.participant.clone() });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    url
}

/// A server that is not a participant: it reads a little, writes `words`, and closes the connection.
async fn stranger(words: &'static str) -> String {
    let (listener, url) = listen().await;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = [0; 64];
                if stream.read(&mut request).await.is_ok() {
                    drop(stream.write_all(words.as_bytes()).await);
                }
            });
        }
    });
    url
}

/// A coordinator with short call deadlines and short retry delays.
async fn hasty(store: &std::path::Path, config: &str) -> Coordinator {
    let file = store.with_extension("toml");
    let config = format!(
        "[calls]\ntimeout = \"200ms\"\ntimeout_max = \"2s\"\n[retry]\ninitial = \"20ms\"\nmax = \"100ms\"\n{config}"
    );
    std::fs::write(&file, config).unwrap();
    Coordinator::start(store, &["--config", file.to_str().unwrap()]).await
}

type Client = CoordinatorServiceClient<tonic::transport::Channel>;

async fn get(client: &mut Client, xid: &str) -> pb::Transaction {
    let by = Some(pb::get_transaction_request::By::Xid(xid.to_owned()));
    let response = client
        .get_transaction(pb::GetTransactionRequest { by, ..Default::default() })
        .await
        .unwrap();
    response.into_inner().transaction.unwrap()
}

/// Confirms a transaction with one branch at `target`. The Try runs at the warehouse directly.
async fn confirmed_at(client: &mut Client, warehouse: &Warehouse, target: &str) -> String {
    let branch = pb::BranchSpec {
        branch_id: "1".to_owned(),
        action: Deduct::NAME.to_owned(),
        participant: "warehouse".to_owned(),
        target: target.to_owned(),
        ..Default::default()
    };
    let request =
        pb::BeginRequest { name: "order".to_owned(), branches: vec![branch], ..Default::default() };
    let xid = client.begin(request).await.unwrap().into_inner().transaction.unwrap().xid;
    let branch = Branch::new(xid.parse().unwrap(), "1".parse().unwrap(), Deduct::NAME, Phase::Try);
    assert!(matches!(warehouse.participant.handle(&branch, b"3").await, Answer::Done(_)));
    let request = pb::DecideRequest {
        xid: xid.clone(),
        decision: pb::Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        ..Default::default()
    };
    client.decide(request).await.unwrap();
    xid
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bad_participant_does_is_told_and_it_can_be_pointed_at_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store.db");
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let coordinator = hasty(&store, "").await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    // The port is bound, so that no other process takes it, but nothing listens on it.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let nobody = format!("http://{}", socket.local_addr().unwrap());
    let mut xids = Vec::new();
    for (what, target, code) in [
        ("nobody is there", nobody, &["UNAVAILABLE"][..]),
        ("it never answers", slow(None, &warehouse).await, &["DEADLINE_EXCEEDED"]),
        (
            "it speaks another protocol",
            stranger("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await,
            &BROKEN,
        ),
        ("it answers garbage", stranger("\0\0garbage").await, &BROKEN),
        ("it dies in the middle of the call", stranger("").await, &BROKEN),
    ] {
        let xid = confirmed_at(&mut client, &warehouse, &target).await;
        let error = wait_for(what, async || {
            let branch = get(&mut client, &xid).await.branches.remove(0);
            (branch.attempts >= 2).then_some(branch.last_error).flatten()
        });
        let error = error.await;
        assert!(code.contains(&error.code.as_str()), "{what}: {error:?}");
        assert!(!error.message.is_empty(), "{what}");
        xids.push(xid);
    }
    assert_eq!(warehouse.stock().await.2, 0, "something was sold");
    // A slow participant gets a longer deadline with each retry, until it answers in time.
    let xid = confirmed_at(
        &mut client,
        &warehouse,
        &slow(Some(Duration::from_millis(700)), &warehouse).await,
    )
    .await;
    let finished = wait_for("a slow participant is waited for", async || {
        Some(get(&mut client, &xid).await)
            .filter(|global| global.state() == pb::TransactionState::Confirmed)
    });
    assert!(finished.await.branches[0].attempts >= 3);

    // The participant has moved. The configuration gives its new address, which overrides the address in the branches.
    coordinator.kill().await;
    let moved = format!("[participants]\nwarehouse = \"{}\"\n", warehouse.url());
    let coordinator = hasty(&store, &moved).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    for xid in &xids {
        let finished = wait_for("confirmed where it is now", async || {
            Some(get(&mut client, xid).await)
                .filter(|global| global.state() == pb::TransactionState::Confirmed)
        });
        finished.await;
    }
    assert_eq!(warehouse.stock().await.2, 3 * 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_hanging_participant_does_not_hold_up_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    let hanging = slow(None, &warehouse).await;
    for _ in 0..200 {
        confirmed_at(&mut client, &warehouse, &hanging).await;
    }
    let (handfast, remote) = (coordinator.handfast(), warehouse.remote());
    let orders = async {
        for _ in 0..20 {
            let done = handfast.transaction("order").run(async |global| {
                global.call::<Deduct>(&remote, handfast::Json(1)).await?;
                Ok(())
            });
            assert!(done.await.unwrap().completed, "it waited for somebody else's participant");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), orders).await.expect("they are not held up");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_nobody_serves_is_cancelled_and_shown_to_an_operator() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let coordinator = hasty(&folder.path().join("store.db"), "").await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    let branch = |id: &str, action: &str| pb::BranchSpec {
        branch_id: id.to_owned(),
        action: action.to_owned(),
        participant: "warehouse".to_owned(),
        target: warehouse.url(),
        payload: Some(pb::Payload {
            data: b"3".as_slice().into(),
            content_type: "application/json".to_owned(),
        }),
        ..Default::default()
    };
    let branches = vec![branch("1", Deduct::NAME), branch("2", "warehouse.deducct")];
    let request = pb::ExecuteRequest { name: "order".to_owned(), branches, ..Default::default() };
    let executed = client.execute(request).await.unwrap().into_inner().transaction.unwrap();
    assert_eq!(executed.cancel_cause(), pb::CancelCause::TryUnknown);
    for word in ["UNIMPLEMENTED", "warehouse.deducct", "it serves warehouse.deduct"] {
        assert!(executed.cancel_reason.contains(word), "{word}: {}", executed.cancel_reason);
    }
    let stuck = wait_for("it is shown as stuck", async || {
        Some(get(&mut client, &executed.xid).await).filter(|global| global.stuck)
    });
    assert_eq!(stuck.await.state(), pb::TransactionState::Cancelling);
    let given_back = wait_for("what was reserved is given back meanwhile", async || {
        (warehouse.stock().await.1 == 0).then_some(())
    });
    given_back.await;
    // An operator resolves the branch by hand.
    let request = pb::ResolveBranchRequest {
        xid: executed.xid.clone(),
        branch_id: "2".to_owned(),
        reason: "a typing error".to_owned(),
        operator: "ann".to_owned(),
    };
    AdminServiceClient::new(coordinator.channel()).resolve_branch(request).await.unwrap();
    let over = wait_for("over", async || {
        Some(get(&mut client, &executed.xid).await)
            .filter(|global| global.state() == pb::TransactionState::Cancelled)
    });
    assert_eq!(over.await.branches[1].resolution.as_ref().unwrap().operator, "ann");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_new_work_loses_nothing_and_is_got_over() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store.db");
    Coordinator::start(&store, &[]).await.kill().await; // it has made the tables
    // The process may not write files above a megabyte. It ignores the signal for that limit, so the writes fail instead.
    let mut command = Command::new("sh");
    let limited = "trap '' XFSZ; ulimit -S -f 2048; exec \"$0\" serve --log-format json --listen 127.0.0.1:0 --store \"sqlite:$1\"";
    command.args(["-c", limited]).arg(binary("handfast")).arg(&store);
    let coordinator = Coordinator::spawn(command).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    let begin = || {
        let labels = (0..16).map(|n| (n.to_string(), "x".repeat(256))).collect();
        let idempotency_key = format!("{:032x}", rand::random::<u128>());
        let mut request = Request::new(pb::BeginRequest {
            name: "order".to_owned(),
            labels,
            idempotency_key,
            ..Default::default()
        });
        request.set_timeout(Duration::from_secs(15));
        request
    };
    let mut begun = Vec::new();
    let refused = loop {
        match client.begin(begin()).await {
            Ok(response) => begun.push(response.into_inner().transaction.unwrap().xid),
            Err(status) => break status,
        }
        assert!(begun.len() < 10_000, "the disk is never full");
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.message().contains("the store does not answer"), "{refused:?}");
    let log = coordinator.log().with_message("store did not answer; retrying the same batch");
    assert!(!log.is_empty(), "the log says nothing");
    // An operator frees space.
    let more = format!("prlimit --pid {} --fsize=unlimited", coordinator.pid());
    assert!(Command::new("sh").args(["-c", &more]).status().await.unwrap().success());
    let again = wait_for("it goes on by itself", async || client.begin(begin()).await.ok());
    begun.push(again.await.into_inner().transaction.unwrap().xid);
    // Acknowledged transactions are still in the store, even after a kill.
    coordinator.kill().await;
    let coordinator = Coordinator::start(&store, &[]).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    for xid in &begun {
        assert_eq!(get(&mut client, xid).await.xid, *xid);
    }
}
