//! Calls over real connections to participants that answer, hang, are frozen or dead, or speak another protocol.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use handfast_proto::{
    address::Address,
    calls::{BranchAnswers, serve_branches},
    v1::{
        self as pb,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::Instant,
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};

use super::{address::AllowList, *};
use crate::{clock::SystemClock, transaction::AttemptError};

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);

/// A participant whose behaviour depends on the action. It counts the calls that it gets.
#[derive(Clone, Default)]
struct Participant {
    asked: Arc<AtomicUsize>,
}

impl Participant {
    async fn asked(&self, context: Option<pb::BranchContext>) -> Result<(), Status> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match context.unwrap_or_default().action.as_str() {
            "hang" => std::future::pending().await,
            "invalid" => Err(Status::invalid_argument("no such sku")),
            _ => Ok(()),
        }
    }

    /// Serves until the test ends. Returns its address.
    async fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let serving = Server::builder()
            .add_service(ParticipantServiceServer::new(self.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(serving);
        format!("http://{at}")
    }
}

#[tonic::async_trait]
impl ParticipantService for Participant {
    async fn try_branch(
        &self,
        request: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        self.asked(request.into_inner().context).await?;
        Ok(Response::new(pb::TryBranchResponse { reply: None }))
    }

    async fn confirm_branch(
        &self,
        request: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        self.asked(request.into_inner().context).await?;
        Ok(Response::new(pb::ConfirmBranchResponse {}))
    }

    async fn cancel_branch(
        &self,
        request: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        self.asked(request.into_inner().context).await?;
        Ok(Response::new(pb::CancelBranchResponse {}))
    }

    async fn list_actions(
        &self,
        _: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        Ok(Response::new(pb::ListActionsResponse::default()))
    }

    async fn inquire_branch(
        &self,
        _: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        Err(Status::unimplemented("it does not ask"))
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}

/// An address without a listener.
async fn dead() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// An address that accepts connections and never answers, like a suspended process.
async fn frozen() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (format!("http://{}", listener.local_addr().unwrap()), listener)
}

/// A server that answers every connection with these bytes and closes it.
async fn says(bytes: &'static [u8]) -> String {
    let (address, listener) = frozen().await;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 1024];
            drop(stream.read(&mut hello).await);
            drop(stream.write_all(bytes).await);
        }
    });
    address
}

/// A dispatch with one configured participant, `inventory`, at these addresses. Other participants on this machine are allowed.
fn dispatch(addresses: &[&str]) -> GrpcDispatch {
    dispatch_over(addresses, Arc::new(Tcp))
}

fn dispatch_over(addresses: &[&str], dialler: Arc<dyn Dialler>) -> GrpcDispatch {
    let mut participants = BTreeMap::new();
    if !addresses.is_empty() {
        participants.insert("inventory".to_owned(), addresses.join(" ").parse().unwrap());
    }
    let targets = Targets {
        participants,
        allow: AllowList::parse(["loopback", "*.shop.internal:7001"]).unwrap(),
        calls_max: 8,
        streams: true,
    };
    GrpcDispatch::new(Arc::new(targets), dialler, Arc::new(SystemClock::default()))
}

fn confirm(action: &str, deadline: Duration) -> CallRequest {
    CallRequest {
        xid: "3-7-1042-9f3c01d2".parse().unwrap(),
        branch: 0,
        spec: Arc::new(BranchSpec {
            branch_id: "1".parse().unwrap(),
            action: action.to_owned(),
            participant: "inventory".to_owned(),
            target: String::new(),
            payload: None,
            carry_payload: false,
            try_timeout: None,
            inquires: false,
            damage: None,
        }),
        phase: Phase::Confirm,
        attempt: 1,
        expires_at: Timestamp(i64::MAX),
        labels: BTreeMap::new(),
        deadline,
        hurry: Hurry::No,
    }
}

fn at(target: &str, call: CallRequest) -> CallRequest {
    let spec = Arc::new(BranchSpec { target: target.to_owned(), ..(*call.spec).clone() });
    CallRequest { spec, ..call }
}

async fn outcome(dispatch: &GrpcDispatch, call: CallRequest) -> Outcome {
    let (returned, mut outcomes) = mpsc::channel(1);
    dispatch.submit(call, &returned).expect("it is not turned away");
    outcomes.recv().await.expect("every call comes back").outcome
}

/// The error text of a failed call, and whether the failure is hopeless.
async fn failure(dispatch: &GrpcDispatch, call: CallRequest) -> (String, bool) {
    match outcome(dispatch, call).await {
        Outcome::Unknown { error: AttemptError { code, message, .. }, hopeless, .. } => {
            (format!("{code}: {message}"), hopeless)
        }
        other @ (Outcome::Done { .. } | Outcome::Refused(_)) => panic!("{other:?}"),
    }
}

async fn is_done(dispatch: &GrpcDispatch, call: CallRequest) -> bool {
    matches!(outcome(dispatch, call).await, Outcome::Done { .. })
}

#[tokio::test]
async fn a_target_that_is_no_address_is_stuck_with_its_reason_and_hurts_nobody_else() {
    let dispatch = dispatch(&[]);
    for target in
        ["http://x[.shop.internal:]:7001", "http://user@127.0.0.1:1", "inventory", "http://127.1:1"]
    {
        let (error, hopeless) = failure(&dispatch, at(target, confirm("deduct", LONG))).await;
        assert!(error.starts_with(&format!("UNIMPLEMENTED: {target:?} is no address")), "{error}");
        assert!(hopeless, "{error}");
    }
    let participant = Participant::default().serve().await;
    assert!(is_done(&dispatch, at(&participant, confirm("deduct", LONG))).await);
}

#[tokio::test]
async fn a_branch_whose_record_is_damaged_is_not_called() {
    let participant = Participant::default();
    let dispatch = dispatch(&[&participant.serve().await]);
    let call = confirm("deduct", LONG);
    let spec = BranchSpec {
        damage: Some(crate::transaction::BranchDamage::NoPayload),
        ..(*call.spec).clone()
    };
    let damaged = CallRequest { spec: Arc::new(spec), ..call };
    let (error, hopeless) = failure(&dispatch, damaged).await;
    assert!(error.starts_with("DATA_LOSS: its record"), "{error}");
    assert!(error.contains("its payload is missing") && hopeless, "{error}");
    assert_eq!(participant.asked.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn an_action_that_hangs_holds_up_no_other_one() {
    let dispatch = dispatch(&[&Participant::default().serve().await]);
    let (returned, _outcomes) = mpsc::channel(1);
    for _ in 0..100 {
        dispatch.submit(confirm("hang", LONG), &returned).unwrap();
    }
    let begun = Instant::now();
    for _ in 0..20 {
        assert!(is_done(&dispatch, confirm("deduct", LONG)).await);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_action_that_hangs_does_not_make_its_participant_a_dead_one() {
    let dispatch = dispatch(&[&Participant::default().serve().await]);
    let (returned, mut outcomes) = mpsc::channel(100);
    for _ in 0..30 {
        dispatch.submit(confirm("hang", SHORT), &returned).unwrap();
    }
    for _ in 0..30 {
        outcomes.recv().await.unwrap();
    }
    assert!(is_done(&dispatch, confirm("deduct", LONG)).await, "it is not turned away");
}

#[tokio::test]
async fn a_dead_participant_is_left_alone_for_a_while() {
    let dispatch = dispatch(&[&dead().await]);
    let (returned, _outcomes) = mpsc::channel(100);
    for _ in 0..5 {
        let (error, hopeless) = failure(&dispatch, confirm("deduct", LONG)).await;
        assert_eq!((error.as_str(), hopeless), ("UNAVAILABLE: connection refused", false));
    }
    dispatch.submit(confirm("deduct", LONG), &returned).unwrap_err();
    let hurried = CallRequest { hurry: Hurry::Yes, ..confirm("deduct", LONG) };
    dispatch.submit(hurried, &returned).expect("an operator asks for it");
}

#[tokio::test]
async fn all_servers_of_a_participant_are_used() {
    let participants = [Participant::default(), Participant::default(), Participant::default()];
    let [one, two, three] = &participants;
    let dispatch = dispatch(&[&one.serve().await, &two.serve().await, &three.serve().await]);
    for _ in 0..30 {
        assert!(is_done(&dispatch, confirm("deduct", LONG)).await);
    }
    let asked = participants.map(|participant| participant.asked.load(Ordering::Relaxed));
    assert_eq!(asked, [10, 10, 10]);
}

#[tokio::test]
async fn a_dead_or_frozen_server_does_not_hold_up_the_others() {
    let (frozen, _listener) = frozen().await;
    let (dead, alive) = (dead().await, Participant::default());
    let dispatch = dispatch(&[&dead, &frozen, &alive.serve().await]);
    let mut failed = 0;
    for _ in 0..50 {
        failed += usize::from(!is_done(&dispatch, confirm("deduct", SHORT)).await);
    }
    assert!(failed <= 2, "{failed} calls went to the frozen server");
    assert!(alive.asked.load(Ordering::Relaxed) >= 48);
}

/// A network in which one name resolves to several servers.
#[derive(Debug)]
struct Names(Vec<SocketAddr>);

#[async_trait::async_trait]
impl Dialler for Names {
    async fn destinations(&self, address: &Address) -> io::Result<Vec<Destination>> {
        if address.to_string() != "http://inventory.shop.internal:7001" {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name x was not found"));
        }
        Ok(self
            .0
            .iter()
            .map(|at| Destination { address: address.clone(), at: Some(*at) })
            .collect())
    }

    fn channel(&self, destination: &Destination) -> Channel {
        Tcp.channel(destination)
    }
}

#[tokio::test]
async fn every_server_that_a_name_stands_for_is_used() {
    let participants = [Participant::default(), Participant::default()];
    let mut addresses = vec![dead().await];
    for participant in &participants {
        addresses.push(participant.serve().await);
    }
    let ips = addresses.iter().map(|it| it.trim_start_matches("http://").parse().unwrap());
    let dispatch = dispatch_over(&[], Arc::new(Names(ips.collect())));
    let target = "http://inventory.shop.internal:7001";
    for _ in 0..30 {
        assert!(is_done(&dispatch, at(target, confirm("deduct", LONG))).await);
    }
    for participant in participants {
        let asked = participant.asked.load(Ordering::Relaxed);
        assert!((10..=20).contains(&asked), "{asked}");
    }
    let unknown = at("http://x.shop.internal:7001", confirm("deduct", LONG));
    let (error, _) = failure(&dispatch, unknown).await;
    assert_eq!(error, "UNAVAILABLE: the name x was not found");
}

#[tokio::test]
async fn what_is_wrong_with_a_connection_is_told_in_words() {
    for (bytes, words) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "the server speaks HTTP/1, not HTTP/2"),
        (
            &b"\x15\x03\x03\x00\x02\x02\x46"[..],
            "the server speaks TLS, and this connection does not",
        ),
        (&b"220 mail.shop.internal ESMTP\r\n"[..], "the server does not speak HTTP/2"),
        (&b""[..], "connection reset"),
    ] {
        let dispatch = dispatch(&[&says(bytes).await]);
        let (error, hopeless) = failure(&dispatch, confirm("deduct", LONG)).await;
        assert_eq!((error, hopeless), (format!("UNAVAILABLE: {words}"), false));
    }
}

#[tokio::test]
async fn a_try_with_an_invalid_argument_is_not_repeated() {
    let dispatch = dispatch(&[&Participant::default().serve().await]);
    let call = CallRequest { phase: Phase::Try, ..confirm("invalid", LONG) };
    let (error, hopeless) = failure(&dispatch, call).await;
    assert_eq!((error.as_str(), hopeless), ("INVALID_ARGUMENT: no such sku", true));
    let (_, hopeless) = failure(&dispatch, confirm("invalid", LONG)).await;
    assert!(!hopeless, "a Confirm is repeated until it is done");
}

#[tokio::test]
async fn participants_that_nobody_calls_are_forgotten() {
    let dispatch = dispatch(&[]);
    let now = Timestamp(0);
    let peer = |n: u16, now| {
        let address: Address = format!("http://127.0.0.1:{n}").parse().unwrap();
        dispatch.peer(address.into(), now)
    };
    for n in 1..=5000 {
        peer(n, now).unwrap();
    }
    assert!(dispatch.known() <= 4096, "{} are known", dispatch.known());
    peer(1, now + Duration::from_secs(600)).unwrap();
    assert_eq!(dispatch.known(), 1);
}

/// The next owner makes these calls. Here they would only take the turns of others.
#[tokio::test]
async fn calls_that_wait_for_a_partition_that_has_ended_are_not_made() {
    let participant = Participant::default();
    let address = participant.serve().await;
    let dispatch = dispatch(&[&address]);
    let (returned, outcomes) = mpsc::channel(64);
    for _ in 0..20 {
        dispatch.submit(confirm("hang", SHORT), &returned).unwrap();
    }
    let in_flight = async {
        while participant.asked.load(Ordering::Relaxed) < 6 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, in_flight).await.expect("six of eight slots");
    drop(outcomes);
    let peer = dispatch.peer(address.parse().unwrap(), Timestamp(0)).unwrap();
    let over = async {
        while !peer.is_idle(Timestamp(i64::MAX), Duration::ZERO) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, over).await.expect("they end");
    assert_eq!(participant.asked.load(Ordering::Relaxed), 6);
}
