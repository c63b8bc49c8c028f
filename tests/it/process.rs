//! The coordinator's process and its surroundings: the operating system, a supervisor, a log collector and careless clients.

use std::{
    fs::File,
    net::SocketAddr,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream};

use handfast::{Handfast, Json};
use handfast_proto::v1::{
    BeginRequest, BranchSpec, DecideRequest, Decision, GetTransactionRequest,
    GetTransactionResponse, TransactionState, Until, WaitTransactionRequest,
    coordinator_service_client::CoordinatorServiceClient, get_transaction_request::By,
};
use handfast_tests::{
    PATIENCE,
    database::{Database, servers},
    process::{Coordinator, Signal, binary, send},
    wait_for,
    warehouse::{Deduct, Warehouse},
};
use http::uri::PathAndQuery;
use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};
use tonic::{Code, Request, Status, body::Body, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tower::Service as _;

/// The connection preface of an HTTP/2 client, with an empty SETTINGS frame.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A coordinator whose output the test redirects. Dropping it kills the process.
struct Bare {
    child: Child,
    address: SocketAddr,
}

impl Bare {
    fn start(store: &Path, stdout: Stdio, stderr: Stdio) -> Self {
        // Bind a port and release it, to find one that is free.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(binary("handfast"));
        command.args(["serve", "--log", "debug", "--log-format", "json"]);
        command.args(["--listen", &address.to_string()]);
        command.args(["--store", &format!("sqlite:{}", store.display())]);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).kill_on_drop(true);
        Self { child: command.spawn().unwrap(), address }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn is_ready(&self) -> Option<()> {
        let channel = Endpoint::from_shared(self.url()).unwrap().connect_lazy();
        let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await.ok()?;
        (answer.into_inner().status() == ServingStatus::Serving).then_some(())
    }

    async fn end(mut self) -> ExitStatus {
        send(self.child.id().unwrap(), Signal::TERM);
        tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("it ends").unwrap()
    }
}

async fn order(handfast: &Handfast, warehouse: &Warehouse) {
    let remote = warehouse.remote();
    let done = handfast.transaction("order").run(async |global| {
        global.call::<Deduct>(&remote, Json(1)).await?;
        Ok(())
    });
    assert!(done.await.unwrap().completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_that_cannot_be_written_neither_end_nor_deafen_it() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for what in ["a full disk", "a closed pipe"] {
        let is_full = what == "a full disk";
        let (stdout, stderr) =
            if is_full { (full(), full()) } else { (Stdio::piped(), Stdio::piped()) };
        let store = folder.path().join(format!("{is_full}.db"));
        let mut coordinator = Bare::start(&store, stdout, stderr);
        drop((coordinator.child.stdout.take(), coordinator.child.stderr.take()));
        wait_for(what, async || coordinator.is_ready().await).await;
        let handfast = Handfast::connect(&coordinator.url()).unwrap();
        for _ in 0..20 {
            order(&handfast, &warehouse).await;
        }
        assert!(coordinator.end().await.success(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_collector_that_stops_reading_holds_up_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let store = folder.path().join("store.db");
    let mut coordinator = Bare::start(&store, Stdio::piped(), Stdio::inherit());
    let unread = coordinator.child.stdout.take();
    wait_for("it serves", async || coordinator.is_ready().await).await;
    let handfast = Handfast::connect(&coordinator.url()).unwrap();
    // A pipe holds 64 KiB, and each order logs more than a kilobyte of DEBUG lines.
    let orders = async {
        for _ in 0..150 {
            order(&handfast, &warehouse).await;
        }
    };
    tokio::time::timeout(PATIENCE, orders).await.expect("it does not wait for its reader");
    assert!(coordinator.end().await.success());
    drop(unread);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let mut coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    for times in 1..=2 {
        coordinator.signal(Signal::HUP);
        let log = coordinator.log();
        let told = wait_for("it is told", async || {
            let lines = log.lines();
            let told = lines.iter().filter(|line| line["message"].to_string().contains("SIGHUP"));
            (told.count() == times).then_some(())
        });
        told.await;
        order(&coordinator.handfast(), &warehouse).await;
    }
    coordinator.signal(Signal::TERM);
    assert!(coordinator.ended().await.success());
}

/// Shuts the coordinator down and returns how long that took.
async fn end(coordinator: &mut Coordinator) -> Duration {
    let began = Instant::now();
    coordinator.signal(Signal::TERM);
    assert!(coordinator.ended().await.success());
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_with_nothing_under_way_do_not_hold_up_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    // Clients: one sends nothing, one sends half of the preface, one stops answering, and two hold streams that never end.
    let silent = TcpStream::connect(&coordinator.address).await.unwrap();
    let mut slow = TcpStream::connect(&coordinator.address).await.unwrap();
    slow.write_all(&HELLO[..10]).await.unwrap();
    let mut frozen = TcpStream::connect(&coordinator.address).await.unwrap();
    frozen.write_all(HELLO).await.unwrap();
    assert!(frozen.read(&mut [0; 64]).await.unwrap() > 0);
    let mut health = HealthClient::new(coordinator.channel());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let mut reflection = ServerReflectionClient::new(coordinator.channel());
    let asked = reflection.server_reflection_info(stream::pending()).await.unwrap().into_inner();
    // A call without a message.
    let mut raw = tonic::client::Grpc::new(coordinator.channel());
    raw.ready().await.unwrap();
    let empty = tokio::spawn(async move {
        let path = PathAndQuery::from_static("/handfast.v1.CoordinatorService/GetTransaction");
        let codec =
            tonic_prost::ProstCodec::<GetTransactionRequest, GetTransactionResponse>::default();
        raw.client_streaming(Request::new(stream::pending()), path, codec).await
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let took = end(&mut coordinator).await;
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert_eq!(empty.await.unwrap().unwrap_err().code(), Code::Unavailable);
    drop((silent, slow, frozen, asked));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_for_completion_do_not_hold_up_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    let mut client = CoordinatorServiceClient::new(coordinator.channel());
    // Nothing listens there, so the transaction is decided and does not complete.
    let branch = BranchSpec {
        branch_id: "1".to_owned(),
        action: "warehouse.deduct".to_owned(),
        participant: "warehouse".to_owned(),
        target: "http://127.0.0.1:9".to_owned(),
        ..BranchSpec::default()
    };
    let begin = BeginRequest {
        name: "order".to_owned(),
        branches: vec![branch],
        ..BeginRequest::default()
    };
    let xid = client.begin(begin).await.unwrap().into_inner().transaction.unwrap().xid;
    let wait = Some(prost_types::Duration { seconds: 30, nanos: 0 });
    let decide = DecideRequest {
        xid: xid.clone(),
        decision: Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        until: Until::Completed.into(),
        wait,
        ..DecideRequest::default()
    };
    let mut deciding = client.clone();
    let decided = tokio::spawn(async move { deciding.decide(decide).await });
    let is_decided = wait_for("it is decided", async || {
        let by = Some(By::Xid(xid.clone()));
        let get = GetTransactionRequest { by, ..GetTransactionRequest::default() };
        let found = client.clone().get_transaction(get).await.unwrap().into_inner();
        (found.transaction.unwrap().decision() == Decision::Confirm).then_some(())
    });
    is_decided.await;
    let wait = WaitTransactionRequest { xid, until: Until::Completed.into(), wait };
    let waited = tokio::spawn(async move { client.wait_transaction(wait).await });
    tokio::time::sleep(Duration::from_millis(100)).await; // until it waits
    let took = end(&mut coordinator).await;
    assert!(took < Duration::from_secs(6), "{took:?}");
    let decided = decided.await.unwrap().unwrap().into_inner().transaction.unwrap();
    let waited = waited.await.unwrap().unwrap().into_inner().transaction.unwrap();
    for told in [decided, waited] {
        assert_eq!(
            (told.decision(), told.state()),
            (Decision::Confirm, TransactionState::Confirming)
        );
    }
}

/// A proxy that forwards connections to a server until it is told to stop forwarding.
struct Proxy {
    address: SocketAddr,
    frozen: Arc<AtomicBool>,
}

impl Proxy {
    async fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self { address: listener.local_addr().unwrap(), frozen: Arc::default() };
        let frozen = proxy.frozen.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (from_client, to_client) = client.into_split();
                let server = TcpStream::connect(&server).await.unwrap();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(pass_on(from_client, to_server, frozen.clone()));
                tokio::spawn(pass_on(from_server, to_client, frozen.clone()));
            }
        });
        proxy
    }
}

async fn pass_on(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    frozen: Arc<AtomicBool>,
) {
    let mut bytes = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        while frozen.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if to.write_all(&bytes[..length]).await.is_err() {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_its_database_does_not_answer_it_ends_at_once() {
    // During startup: the database server accepts the connection but sends nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mysql://root@{}/handfast", silent.local_addr().unwrap());
    let launched = Coordinator::launch(Coordinator::command(&url, &[]));
    let taken = silent.accept().await.unwrap();
    let began = Instant::now();
    assert!(launched.end(Signal::TERM).await.success());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    drop(taken);
    let Some(server) = servers().first().cloned() else { return };
    let database = Database::migrated(&server).await;
    let (user, rest) = server.split_once('@').unwrap();
    let proxy = Proxy::start(rest.to_owned()).await;
    let name = database.url().rsplit_once('/').unwrap().1.to_owned();
    let url = format!("{user}@{}/{name}", proxy.address);
    let mut coordinator = Coordinator::start_on(&url, &[]).await;
    let mut standby = Coordinator::launch(Coordinator::command(&url, &[]));
    standby.says(&["another coordinator has the store; waiting as its standby"]).await;
    proxy.frozen.store(true, Ordering::Relaxed);
    let began = Instant::now();
    assert!(standby.end(Signal::TERM).await.success());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let took = end(&mut coordinator).await;
    assert!(took < Duration::from_secs(6), "{took:?}");
    database.drop().await;
}

/// A coordinator with this soft limit and this hard limit on open files.
async fn limited(store: &Path, [soft, hard]: [u32; 2]) -> Coordinator {
    let mut command = Command::new("sh");
    let limited = format!(
        "ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"$0\" serve --log-format json --listen 127.0.0.1:0 --store \"sqlite:$1\""
    );
    command.args(["-c", &limited]).arg(binary("handfast")).arg(store);
    Coordinator::spawn(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_take_neither_the_files_of_the_rest_nor_their_place_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let coordinator = limited(&folder.path().join("store.db"), [40, 256]).await;
    let log = coordinator.log();
    let told = &log.with_message(
        "too few file descriptors for limits.connections; raise the hard limit (ulimit -Hn, LimitNOFILE)",
    )[0];
    assert_eq!((&told["descriptors"], &told["connections"]), (&256.into(), &192.into()), "{told}");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", coordinator.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(files.contains("256 "), "{files}");
    // 300 connections take all places. Clients that connected earlier still work.
    // The coordinator can still call participants and write to its store.
    let handfast = coordinator.handfast();
    order(&handfast, &warehouse).await;
    let silent = join_all((0..300).map(|_| TcpStream::connect(&coordinator.address))).await;
    let refused =
        "connections were refused: there are as many as there may be (limits.connections)";
    let told = wait_for("it is told", async || log.with_message(refused).pop());
    told.await;
    let other = Warehouse::open("other", folder.path()).await;
    order(&handfast, &other).await;
    // A new client still gets a place, although none of the 300 connections closes by itself.
    let mut health = HealthClient::new(coordinator.channel());
    let answered = wait_for("a place", async || {
        health.check(HealthCheckRequest::default()).await.ok().map(drop)
    });
    answered.await;
    drop(silent);
}

/// Processor time that a process has used, in ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_file_for_one_more_connection_it_waits_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    let pid = coordinator.pid();
    let limit = async |soft: &str| {
        let files = format!("--nofile={soft}:");
        let set = Command::new("prlimit").args(["--pid", &pid.to_string(), &files]).status().await;
        assert!(set.unwrap().success());
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    limit(&open.to_string()).await;
    let before = ticks(pid);
    let mut client = TcpStream::connect(&coordinator.address).await.unwrap();
    let log = coordinator.log();
    let told = "cannot accept connections; trying again";
    wait_for("it is told", async || log.with_message(told).pop()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = ticks(pid) - before;
    assert!(used < 50, "{used} ticks of 10 ms in two seconds: it spins");
    assert!(log.with_message(told).len() <= 2, "it says so too often");
    limit("1000").await;
    client.write_all(HELLO).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, client.read(&mut [0; 64])).await;
    assert!(answer.expect("it is accepted now").unwrap() > 0);
}

/// Resident memory of a process, in kilobytes.
fn memory_kb(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_announce_much_and_send_little_cost_little() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    let mut health = HealthClient::new(coordinator.channel());
    health.check(HealthCheckRequest::default()).await.unwrap();
    let before = memory_kb(coordinator.pid());
    let calls = (0..1000).map(|_| {
        let mut channel = coordinator.channel();
        let url = coordinator.url();
        async move {
            let announced = [&[0][..], &(2_u32 << 20).to_be_bytes(), b"x"].concat();
            let frame = Ok::<_, Status>(Frame::data(Bytes::from(announced)));
            let body = StreamBody::new(stream::iter([frame]).chain(stream::pending()));
            let request =
                http::Request::post(format!("{url}/handfast.v1.CoordinatorService/Begin"))
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(Body::new(body))
                    .unwrap();
            std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
            drop(channel.call(request).await);
        }
    });
    // Each call has its own connection. A hundred calls on each connection would work as well.
    let calls = tokio::spawn(join_all(calls));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let began = Instant::now();
    health.check(HealthCheckRequest::default()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "deaf for {:?}", began.elapsed());
    let grown = memory_kb(coordinator.pid()).saturating_sub(before) / 1024;
    assert!(grown < 300, "{grown} MB more");
    assert!(!calls.is_finished(), "they were answered");
    calls.abort();
}
