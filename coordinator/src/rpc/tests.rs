//! The services over a coordinator whose store is in memory and whose participants always say yes: what the calls promise, and
//! that bad input gets one clear error that names the field and the limit, and leaves nothing behind.

use std::collections::BTreeMap;

use handfast_proto::{limits, reason, time::wire_duration};
use tokio::sync::mpsc;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::*;
use crate::{
    clock::ManualClock,
    coordinator::Running,
    dispatch::{CallRequest, Dispatch, Later, Returned, address::AllowList},
    partition::Settings,
    store::memory::MemoryStore,
    transaction::{Outcome, StuckAfter, Timestamp, retry::RetryPolicy},
};

/// Participants that do whatever they are asked. A Try is answered with its own payload.
#[derive(Debug)]
struct Willing;

impl Dispatch for Willing {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        let CallRequest { xid, branch, phase, spec, .. } = call;
        let reply = spec.payload.clone();
        let returned = returned.clone();
        tokio::spawn(async move {
            drop(
                returned
                    .send(Returned { xid, branch, phase, outcome: Outcome::Done { reply } })
                    .await,
            );
        });
        Ok(())
    }
}

struct Rig {
    store: Arc<MemoryStore>,
    services: Services,
    clock: ManualClock,
    _running: Running,
}

impl Rig {
    async fn new() -> Self {
        let clock = ManualClock::at(Timestamp(1_700_000_000_000));
        let settings = Settings {
            retry: RetryPolicy {
                initial: Duration::from_millis(200),
                max: Duration::from_secs(60),
            },
            call_timeout: Duration::from_secs(5),
            call_timeout_max: Duration::from_secs(60),
            open_max: 1000,
            stuck_after: StuckAfter { attempts: 3, time: Duration::from_secs(120) },
        };
        let store = Arc::new(MemoryStore::default());
        let retention = Duration::from_secs(3600);
        let (coordinator, running) = Coordinator::start(
            store.clone(),
            Arc::new(Willing),
            Arc::new(clock.clone()),
            settings,
            retention,
        )
        .await
        .unwrap();
        let targets = Targets {
            participants: BTreeMap::from([(
                "inventory".to_owned(),
                "http://10.0.0.1:7001".parse().unwrap(),
            )]),
            allow: AllowList::parse(["loopback"]).unwrap(),
            calls_max: 64,
            streams: true,
        };
        let services = Services::new(coordinator, Arc::new(targets), Duration::from_secs(30));
        Self { store, services, clock, _running: running }
    }

    async fn begin(&self, request: pb::BeginRequest) -> Result<pb::BeginResponse, Status> {
        self.services.begin(Request::new(request)).await.map(Response::into_inner)
    }

    async fn begun(&self, ids: &[&str]) -> String {
        self.begin(begin(ids)).await.unwrap().transaction.unwrap().xid
    }

    async fn register(
        &self,
        xid: &str,
        branches: Vec<pb::BranchSpec>,
    ) -> Result<pb::Transaction, Status> {
        let request = pb::RegisterBranchRequest { xid: xid.to_owned(), branches };
        let response = self.services.register_branch(Request::new(request)).await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn decide(&self, request: pb::DecideRequest) -> Result<pb::Transaction, Status> {
        let response = self.services.decide(Request::new(request)).await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn confirm(&self, xid: &str, tried: &[&str]) -> Result<pb::Transaction, Status> {
        let tried_branch_ids = tried.iter().map(|id| (*id).to_owned()).collect();
        let (xid, decision) = (xid.to_owned(), pb::Decision::Confirm.into());
        self.decide(pb::DecideRequest { xid, decision, tried_branch_ids, ..Default::default() })
            .await
    }

    async fn cancel(&self, xid: &str) -> Result<pb::Transaction, Status> {
        let (xid, decision) = (xid.to_owned(), pb::Decision::Cancel.into());
        let reason = "no longer wanted".to_owned();
        self.decide(pb::DecideRequest { xid, decision, reason, ..Default::default() }).await
    }

    async fn get(&self, xid: &str) -> Result<pb::Transaction, Status> {
        let by = Some(pb::get_transaction_request::By::Xid(xid.to_owned()));
        let response =
            self.services.get_transaction(Request::new(pb::GetTransactionRequest { by })).await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn completed(&self, xid: &str) -> pb::Transaction {
        let until = pb::Until::Completed.into();
        let request = pb::WaitTransactionRequest { xid: xid.to_owned(), until, wait: None };
        self.services
            .wait_transaction(Request::new(request))
            .await
            .unwrap()
            .into_inner()
            .transaction
            .unwrap()
    }

    async fn open(&self) -> usize {
        let show = pb::list_transactions_request::Show::Open.into();
        let request = pb::ListTransactionsRequest { show, ..Default::default() };
        self.services
            .list_transactions(Request::new(request))
            .await
            .unwrap()
            .into_inner()
            .transactions
            .len()
    }
}

fn spec(branch_id: &str) -> pb::BranchSpec {
    pb::BranchSpec {
        branch_id: branch_id.to_owned(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        ..Default::default()
    }
}

fn begin(ids: &[&str]) -> pb::BeginRequest {
    let branches = ids.iter().map(|id| spec(id)).collect();
    pb::BeginRequest { name: "checkout".to_owned(), branches, ..Default::default() }
}

fn payload(bytes: usize) -> Option<pb::Payload> {
    Some(pb::Payload { data: vec![7; bytes].into(), content_type: "text/plain".to_owned() })
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().expect("every error says why, for programs");
    assert_eq!(info.domain, reason::DOMAIN);
    info.reason
}

fn detail(status: &Status, key: &str) -> String {
    status.get_details_error_info().unwrap().metadata[key].clone()
}

/// Checks an INVALID_ARGUMENT: that it names the field, and says what would be right.
#[track_caller]
fn invalid(result: Result<impl std::fmt::Debug, Status>, field: &str, says: &str) {
    let status = result.expect_err("it was taken");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(reason(&status), reason::INVALID_FIELD);
    let details = status.get_details_bad_request().unwrap();
    assert_eq!(details.field_violations[0].field, field, "{}", status.message());
    assert!(status.message().contains(says), "{:?} does not say {says:?}", status.message());
}

// ---- What the calls promise.

#[tokio::test]
async fn a_transaction_from_begin_to_end() {
    let rig = Rig::new().await;
    let labels = BTreeMap::from([("order".to_owned(), "1042".to_owned())]);
    let timeout = Some(wire_duration(Duration::from_secs(60)));
    let begun = rig
        .begin(pb::BeginRequest { labels: labels.clone(), timeout, ..begin(&["1"]) })
        .await
        .unwrap();
    let begun = begun.transaction.unwrap();
    assert_eq!(
        (begun.state(), begun.decision()),
        (pb::TransactionState::Trying, pb::Decision::Unspecified)
    );
    assert_eq!((begun.name.as_str(), begun.drive()), ("checkout", pb::Drive::Initiator));
    assert_eq!(begun.timeout, timeout);
    assert_eq!(begun.begun_at.unwrap().seconds + 60, begun.expires_at.unwrap().seconds);

    let registered = rig.register(&begun.xid, vec![spec("2.1")]).await.unwrap();
    for answer in [&begun, &registered] {
        assert!(answer.branches.is_empty() && answer.labels.is_empty(), "its caller has said them");
    }
    let registered = rig.get(&begun.xid).await.unwrap();
    assert_eq!(registered.labels, labels);
    assert_eq!(
        registered.branches.iter().map(|b| b.branch_id.as_str()).collect::<Vec<_>>(),
        ["1", "2.1"]
    );
    assert_eq!(registered.branches[1].state(), pb::BranchState::Registered);

    let decided = rig.confirm(&begun.xid, &["2.1", "1"]).await.unwrap();
    assert_eq!(decided.decision(), pb::Decision::Confirm);
    assert!(decided.decided_at.is_some());
    let completed = rig.completed(&begun.xid).await;
    assert_eq!(completed.state(), pb::TransactionState::Confirmed);
    assert!(completed.finished_at.is_some());
    assert!(completed.branches.iter().all(|branch| branch.state() == pb::BranchState::Confirmed));
    // Repeats.
    assert_eq!(
        rig.confirm(&begun.xid, &["1", "2.1"]).await.unwrap().state(),
        pb::TransactionState::Confirmed
    );
    assert_eq!(rig.get(&begun.xid).await.unwrap(), completed);
}

#[tokio::test]
async fn a_refusal_reaches_whoever_asks() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1", "2"]).await;
    let refusal = pb::Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: "only 2\nleft".to_owned(),
        metadata: BTreeMap::from([("sku".to_owned(), "7".to_owned())]),
    };
    let request = pb::DecideRequest {
        xid: xid.clone(),
        decision: pb::Decision::Cancel.into(),
        refusal: Some(refusal.clone()),
        refused_branch_id: "2".to_owned(),
        until: pb::Until::Completed.into(),
        ..Default::default()
    };
    let cancelled = rig.decide(request).await.unwrap();
    assert_eq!(cancelled.state(), pb::TransactionState::Cancelled);
    assert_eq!(cancelled.cancel_cause(), pb::CancelCause::Refused);
    let told = cancelled.refusal.unwrap();
    assert_eq!((told.reason, told.metadata), (refusal.reason, refusal.metadata));
    assert_eq!(told.message, "only 2 left", "on one line, for logs");
    assert_eq!(cancelled.refused_branch_id, "2");
    assert!(cancelled.cancel_reason.contains("OUT_OF_STOCK"));
    assert!(cancelled.branches.iter().all(|branch| branch.state() == pb::BranchState::Cancelled));
}

#[tokio::test]
async fn the_opposite_decision_is_told_which_one_stands() {
    let rig = Rig::new().await;
    let (one, two) = (rig.begun(&["1"]).await, rig.begun(&["1"]).await);
    rig.confirm(&one, &["1"]).await.unwrap();
    rig.cancel(&two).await.unwrap();
    for (xid, result, decision) in [
        (&one, rig.cancel(&one).await, "CONFIRM"),
        (&two, rig.confirm(&two, &["1"]).await, "CANCEL"),
        (&two, rig.register(&two, vec![spec("9")]).await, "CANCEL"),
    ] {
        let status = result.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::FailedPrecondition, reason::ALREADY_DECIDED)
        );
        assert_eq!(
            (&detail(&status, reason::XID), detail(&status, reason::DECISION).as_str()),
            (xid, decision)
        );
        if decision == "CANCEL" {
            assert_eq!(detail(&status, reason::CANCEL_CAUSE), "REQUESTED");
            assert!(status.message().contains("no longer wanted"), "{}", status.message());
        }
    }
}

#[tokio::test]
async fn confirm_that_names_another_set_is_refused_and_decides_nothing() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1", "2.1"]).await;
    let status = rig.confirm(&xid, &["1", "3"]).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, reason::BRANCHES_DIFFER)
    );
    assert_eq!(
        (detail(&status, reason::NOT_NAMED), detail(&status, reason::NOT_REGISTERED)),
        ("2.1".into(), "3".into())
    );
    assert_eq!(rig.get(&xid).await.unwrap().state(), pb::TransactionState::Trying);
}

#[tokio::test]
async fn the_same_key_gives_the_same_transaction() {
    let rig = Rig::new().await;
    let keyed =
        |ids: &[&str]| pb::BeginRequest { idempotency_key: "order-1042".to_owned(), ..begin(ids) };
    let first = rig.begin(keyed(&["1"])).await.unwrap();
    let again = rig.begin(keyed(&["1"])).await.unwrap();
    assert_eq!((first.existed, again.existed), (false, true));
    let xid = first.transaction.unwrap().xid;
    assert_eq!(again.transaction.unwrap().xid, xid);
    // Timeout, labels and target may differ; name and branches may not.
    let labels = BTreeMap::from([("try".to_owned(), "2".to_owned())]);
    let timeout = Some(wire_duration(Duration::from_secs(1)));
    let mut moved = pb::BeginRequest { labels, timeout, ..keyed(&["1"]) };
    moved.branches[0].target = "http://127.0.0.1:7001".to_owned();
    assert!(rig.begin(moved).await.unwrap().existed);
    let mut other_action = keyed(&["1"]);
    other_action.branches[0].action = "inventory.add".to_owned();
    let mut carried = keyed(&["1"]);
    (carried.branches[0].payload, carried.branches[0].carry_payload) = (payload(1), true);
    let renamed = pb::BeginRequest { name: "refund".to_owned(), ..keyed(&["1"]) };
    for other in [renamed, keyed(&["2"]), keyed(&[]), other_action, carried] {
        let status = rig.begin(other).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::AlreadyExists, reason::KEY_TAKEN)
        );
        assert_eq!(detail(&status, reason::XID), xid);
    }
    let by = |key: &str| {
        let by = Some(pb::get_transaction_request::By::IdempotencyKey(key.to_owned()));
        rig.services.get_transaction(Request::new(pb::GetTransactionRequest { by }))
    };
    assert_eq!(by("order-1042").await.unwrap().into_inner().transaction.unwrap().xid, xid);
    let status = by("order-1043").await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, reason::KEY_UNKNOWN));
}

#[tokio::test]
async fn execute_runs_both_phases_and_brings_the_replies() {
    let rig = Rig::new().await;
    let branches =
        ["1", "2"].map(|id| pb::BranchSpec { payload: payload(id.len()), ..spec(id) }).to_vec();
    for in_order in [false, true] {
        let request = pb::ExecuteRequest {
            name: "checkout".to_owned(),
            idempotency_key: format!("order-{in_order}"),
            branches: branches.clone(),
            in_order,
            until: pb::Until::Completed.into(),
            ..Default::default()
        };
        let executed =
            rig.services.execute(Request::new(request.clone())).await.unwrap().into_inner();
        let transaction = executed.transaction.unwrap();
        assert_eq!(transaction.state(), pb::TransactionState::Confirmed);
        assert_eq!(transaction.drive(), pb::Drive::Coordinator);
        assert_eq!(executed.replies.len(), 2);
        assert_eq!(executed.replies[0].reply, payload(1));
        // The answer was lost: the outcome, without replies.
        let again = rig.services.execute(Request::new(request)).await.unwrap().into_inner();
        assert_eq!((again.existed, again.replies.len()), (true, 0));
        assert_eq!(again.transaction.unwrap().state(), pb::TransactionState::Confirmed);
    }
}

#[tokio::test]
async fn an_operator_lists_hurries_and_resolves() {
    let rig = Rig::new().await;
    let (trying, done) = (rig.begun(&["1"]).await, rig.begun(&["1"]).await);
    rig.confirm(&done, &["1"]).await.unwrap();
    rig.completed(&done).await;
    assert_eq!(rig.open().await, 1);
    let resolve = |xid: &str, branch: &str| {
        let request = pb::ResolveBranchRequest {
            xid: xid.to_owned(),
            branch_id: branch.to_owned(),
            reason: "booked by hand".to_owned(),
            operator: "ann".to_owned(),
        };
        rig.services.resolve_branch(Request::new(request))
    };
    for (result, code, why) in [
        (resolve(&trying, "1").await, Code::FailedPrecondition, reason::NOT_DECIDED),
        (resolve(&done, "1").await, Code::FailedPrecondition, reason::ALREADY_ACKNOWLEDGED),
        (resolve(&done, "7").await, Code::NotFound, reason::BRANCH_UNKNOWN),
    ] {
        let status = result.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (code, why));
    }
    let retry = pb::RetryTransactionRequest { xid: trying.clone() };
    let retried = rig.services.retry_transaction(Request::new(retry)).await.unwrap().into_inner();
    assert_eq!(
        retried.transaction.unwrap().state(),
        pb::TransactionState::Trying,
        "no effect while trying"
    );
}

// ---- Bad input.

#[tokio::test]
async fn malformed_and_unknown_xids() {
    let rig = Rig::new().await;
    for text in ["", "1042", "3-7-1042", "3-7-1042-9F3C01D2", "DROP TABLE"] {
        invalid(rig.get(text).await, "xid", "3-7-1042-9f3c01d2");
        invalid(rig.confirm(text, &[]).await, "xid", "3-7-1042-9f3c01d2");
        invalid(rig.register(text, vec![spec("1")]).await, "xid", "3-7-1042-9f3c01d2");
    }
    let known: handfast_proto::Xid = rig.begun(&["1"]).await.parse().unwrap();
    let never = handfast_proto::Xid { sequence: known.sequence + 99, ..known };
    for (xid, code, why) in [
        (never, Code::NotFound, reason::NEVER_RECORDED),
        (handfast_proto::Xid { nonce: !known.nonce, ..known }, Code::NotFound, reason::FORGOTTEN),
        (
            handfast_proto::Xid { epoch: known.epoch + 1, ..known },
            Code::Unavailable,
            reason::OWNED_ELSEWHERE,
        ),
        (
            handfast_proto::Xid { partition: 999, ..known },
            Code::Unavailable,
            reason::OWNED_ELSEWHERE,
        ),
    ] {
        let xid = xid.to_string();
        for status in [
            rig.get(&xid).await.unwrap_err(),
            rig.confirm(&xid, &["1"]).await.unwrap_err(),
            rig.cancel(&xid).await.unwrap_err(),
            rig.register(&xid, vec![spec("1")]).await.unwrap_err(),
        ] {
            assert_eq!((status.code(), reason(&status).as_str()), (code, why));
            assert!(status.message().contains(&xid), "{}", status.message());
        }
    }
}

#[tokio::test]
async fn names_and_labels() {
    let rig = Rig::new().await;
    let named = |name: &str| pb::BeginRequest { name: name.to_owned(), ..begin(&["1"]) };
    invalid(rig.begin(named("")).await, "name", "empty");
    invalid(rig.begin(named(&"x".repeat(129))).await, "name", "128");
    invalid(rig.begin(named("two\nlines")).await, "name", "control character");
    let labelled = |labels: BTreeMap<String, String>| pb::BeginRequest { labels, ..begin(&["1"]) };
    let many = (0..17).map(|n| (n.to_string(), String::new())).collect();
    invalid(rig.begin(labelled(many)).await, "labels", "16");
    let label =
        |key: &str, value: &str| labelled(BTreeMap::from([(key.to_owned(), value.to_owned())]));
    invalid(rig.begin(label("", "x")).await, "labels[\"\"] key", "empty");
    invalid(rig.begin(label("order", &"x".repeat(257))).await, "labels[\"order\"]", "256");
    invalid(
        rig.begin(label(&"x".repeat(65), "")).await,
        &format!("labels[{:?}] key", "x".repeat(64)),
        "64",
    );
    let keyed = pb::BeginRequest { idempotency_key: "x".repeat(129), ..begin(&["1"]) };
    invalid(rig.begin(keyed).await, "idempotency_key", "128");
    assert_eq!(rig.open().await, 0, "something was begun");
}

#[tokio::test]
async fn timeouts() {
    let rig = Rig::new().await;
    let lasting = |seconds, nanos| {
        let timeout = Some(prost_types::Duration { seconds, nanos });
        rig.begin(pb::BeginRequest { timeout, ..begin(&["1"]) })
    };
    for (seconds, nanos) in
        [(0, 0), (0, 999_999), (365 * 24 * 3600, 0), (3601, 0), (-1, 0), (i64::MAX, i32::MAX)]
    {
        invalid(lasting(seconds, nanos).await, "timeout", "from 1ms to 3600s");
    }
    for (seconds, nanos) in [(0, 1_000_000), (3600, 0)] {
        lasting(seconds, nanos).await.unwrap();
    }
    let xid = rig.begun(&["1"]).await;
    let request = pb::WaitTransactionRequest {
        xid,
        until: pb::Until::Completed.into(),
        wait: Some(wire_duration(Duration::from_secs(61))),
    };
    invalid(rig.services.wait_transaction(Request::new(request)).await, "wait", "60s");
}

#[tokio::test]
async fn branches_and_their_parts() {
    let rig = Rig::new().await;
    let with = |branch: pb::BranchSpec| pb::BeginRequest {
        branches: vec![spec("1"), branch],
        ..begin(&[])
    };
    let bad: [(pb::BranchSpec, &str, &str); 9] = [
        (spec(""), "branch_id", "1 to 32 bytes"),
        (spec("A b"), "branch_id", "a-z"),
        (spec(&"x".repeat(33)), "branch_id", "1 to 32 bytes"),
        (pb::BranchSpec { action: String::new(), ..spec("2") }, "action", "empty"),
        (pb::BranchSpec { participant: String::new(), ..spec("2") }, "participant", "empty"),
        (pb::BranchSpec { participant: "p".repeat(65), ..spec("2") }, "participant", "64"),
        (pb::BranchSpec { carry_payload: true, ..spec("2") }, "payload", "missing"),
        (pb::BranchSpec { payload: payload(1), ..spec("2") }, "payload", "carry_payload"),
        (
            pb::BranchSpec { payload: payload(65_537), carry_payload: true, ..spec("2") },
            "payload.data",
            "65536",
        ),
    ];
    for (branch, field, says) in bad {
        invalid(rig.begin(with(branch.clone())).await, &format!("branches[1].{field}"), says);
        let xid = rig.begun(&["1"]).await;
        invalid(rig.register(&xid, vec![branch]).await, &format!("branches[0].{field}"), says);
        assert_eq!(rig.get(&xid).await.unwrap().branches.len(), 1, "something was registered");
        rig.cancel(&xid).await.unwrap();
    }
}

#[tokio::test]
async fn targets_must_be_known_or_allowed() {
    let rig = Rig::new().await;
    let at = |target: &str| {
        let branch = pb::BranchSpec {
            participant: "points".to_owned(),
            target: target.to_owned(),
            ..spec("1")
        };
        rig.begin(pb::BeginRequest { branches: vec![branch], ..begin(&[]) })
    };
    at("http://127.0.0.1:7003").await.unwrap();
    invalid(at("").await, "branches[0].target", "participants.points");
    invalid(
        at("http://10.0.0.7:7003").await,
        "branches[0].target",
        "not allowed (targets.allow is: loopback)",
    );
    invalid(at("https://127.0.0.1:7003").await, "branches[0].target", "http://");
    invalid(at("file:///etc/passwd").await, "branches[0].target", "http://127.0.0.1:7001");
}

#[tokio::test]
async fn the_same_branch_twice() {
    let rig = Rig::new().await;
    let other = pb::BranchSpec { action: "inventory.add".to_owned(), ..spec("1") };
    // In one request.
    let xid = rig.begun(&["1", "1"]).await;
    assert_eq!(rig.get(&xid).await.unwrap().branches.len(), 1);
    let twice = pb::BeginRequest { branches: vec![spec("1"), other.clone()], ..begin(&[]) };
    invalid(rig.begin(twice).await, "branches[1].branch_id", "1 is there twice");
    // In two.
    rig.register(&xid, vec![spec("1")]).await.unwrap();
    let status = rig.register(&xid, vec![spec("2"), other]).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::AlreadyExists, reason::BRANCH_TAKEN)
    );
    assert_eq!(rig.get(&xid).await.unwrap().branches.len(), 1, "half of it was registered");
}

#[tokio::test]
async fn more_than_64_branches() {
    let rig = Rig::new().await;
    let ids: Vec<String> = (1..=65).map(|n| n.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    invalid(rig.begin(begin(&ids)).await, "branches", "64");
    let xid = rig.begun(&ids[..64]).await;
    invalid(rig.register(&xid, vec![spec("65")]).await, "branches", "64");
    rig.register(&xid, vec![spec("64")]).await.unwrap();
    rig.confirm(&xid, &ids[..64]).await.unwrap();
    assert_eq!(rig.completed(&xid).await.state(), pb::TransactionState::Confirmed);
}

#[tokio::test]
async fn payloads_that_are_too_large_together() {
    let rig = Rig::new().await;
    let carried = |n: usize| pb::BranchSpec {
        payload: payload(65_536),
        carry_payload: true,
        ..spec(&n.to_string())
    };
    let request =
        |count| pb::BeginRequest { branches: (1..=count).map(carried).collect(), ..begin(&[]) };
    invalid(rig.begin(request(17)).await, "branches", "1048576");
    let xid = rig.begin(request(16)).await.unwrap().transaction.unwrap().xid;
    invalid(rig.register(&xid, vec![carried(17)]).await, "branches", "1048576");
    assert_eq!(limits::PAYLOADS_BYTES_MAX, 1_048_576);
}

#[tokio::test]
async fn what_must_be_said_and_is_not() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    let undecided = pb::DecideRequest { xid: xid.clone(), ..Default::default() };
    invalid(rig.decide(undecided).await, "decision", "CONFIRM or CANCEL");
    invalid(rig.register(&xid, Vec::new()).await, "branches", "empty");
    invalid(rig.confirm(&xid, &["1", "A"]).await, "tried_branch_ids[1]", "a-z");
    let nobody = pb::GetTransactionRequest { by: None };
    invalid(rig.services.get_transaction(Request::new(nobody)).await, "by", "xid");
    let nothing = pb::ExecuteRequest { name: "checkout".to_owned(), ..Default::default() };
    invalid(rig.services.execute(Request::new(nothing)).await, "branches", "empty");
    let unexplained = pb::ResolveBranchRequest {
        xid: xid.clone(),
        branch_id: "1".to_owned(),
        ..Default::default()
    };
    invalid(rig.services.resolve_branch(Request::new(unexplained)).await, "operator", "empty");
    let long = pb::ListTransactionsRequest { limit: 1001, ..Default::default() };
    invalid(rig.services.list_transactions(Request::new(long)).await, "limit", "1000");
    let refusal = Some(pb::Refusal { message: "x".repeat(5000), ..Default::default() });
    let wordy = pb::DecideRequest {
        xid: xid.clone(),
        decision: pb::Decision::Cancel.into(),
        refusal,
        ..Default::default()
    };
    invalid(rig.decide(wordy).await, "refusal", "4096");
    assert_eq!(rig.get(&xid).await.unwrap().state(), pb::TransactionState::Trying);
}

#[tokio::test]
async fn a_transaction_that_timed_out_says_so() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    rig.clock.advance(Duration::from_secs(30));
    assert_eq!(rig.completed(&xid).await.cancel_cause(), pb::CancelCause::TimedOut);
    let status = rig.confirm(&xid, &["1"]).await.unwrap_err();
    assert_eq!(detail(&status, reason::CANCEL_CAUSE), "TIMED_OUT");
}

#[tokio::test]
async fn a_rejected_confirm_is_never_answered_ok_however_slow_the_store_is() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    rig.store.delay(Duration::from_millis(300));
    rig.clock.advance(Duration::from_secs(31)); // timed out: cancelled, and not durable yet
    tokio::time::sleep(Duration::from_millis(50)).await;
    let answer = rig
        .decide(pb::DecideRequest {
            xid,
            decision: pb::Decision::Confirm.into(),
            tried_branch_ids: vec!["1".to_owned()],
            until: pb::Until::Completed.into(),
            wait: Some(wire_duration(Duration::from_millis(100))),
            ..Default::default()
        })
        .await;
    assert!(answer.is_err(), "{:?}", answer.map(|global| global.state()));
}

#[tokio::test]
async fn a_confirm_of_another_set_is_never_answered_ok() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1", "2"]).await;
    let answer = rig
        .decide(pb::DecideRequest {
            xid,
            decision: pb::Decision::Confirm.into(),
            tried_branch_ids: vec!["1".to_owned()],
            until: pb::Until::Completed.into(),
            wait: Some(wire_duration(Duration::ZERO)),
            ..Default::default()
        })
        .await;
    assert!(answer.is_err(), "{:?}", answer.map(|global| global.state()));
}

#[tokio::test]
async fn a_decision_is_never_refused_for_load() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    let connection = Connection::new(tokio::io::empty(), None);
    let allowance = tonic::transport::server::Connected::connect_info(&connection);
    let with = |message| {
        let mut request = Request::new(message);
        request.extensions_mut().insert(allowance.clone());
        request
    };
    let _places: Vec<_> =
        (0..512).map(|_| wait_place(&with(pb::DecideRequest::default())).unwrap()).collect();
    let decide = pb::DecideRequest {
        xid,
        decision: pb::Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        until: pb::Until::Completed.into(),
        ..Default::default()
    };
    rig.services.decide(with(decide)).await.unwrap();
}
