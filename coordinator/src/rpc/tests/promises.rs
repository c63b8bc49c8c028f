//! The guarantees of the calls.

use handfast_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use tonic::transport::server::TcpIncoming;

use super::*;
use crate::server;

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
    // Repeats give the same answer.
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
    // With a fingerprint, only the fingerprint is compared.
    let printed = |fingerprint: &[u8], ids: &[&str]| pb::BeginRequest {
        idempotency_key: "order-2000".to_owned(),
        fingerprint: fingerprint.to_vec(),
        ..begin(ids)
    };
    let first = rig.begin(printed(b"two pieces", &["1"])).await.unwrap();
    assert!(rig.begin(printed(b"two pieces", &[])).await.unwrap().existed);
    for other in [printed(b"three pieces", &["1"]), printed(b"", &["1"])] {
        let status = rig.begin(other).await.unwrap_err();
        assert_eq!(reason(&status), reason::KEY_TAKEN);
    }
    let find = |fingerprint: &[u8]| pb::GetTransactionRequest {
        by: Some(pb::get_transaction_request::By::IdempotencyKey("order-2000".to_owned())),
        fingerprint: fingerprint.to_vec(),
    };
    for fingerprint in [&b"two pieces"[..], b""] {
        let found = rig.services.get_transaction(Request::new(find(fingerprint))).await.unwrap();
        assert_eq!(
            found.into_inner().transaction.unwrap().xid,
            first.transaction.as_ref().unwrap().xid
        );
    }
    let other = rig.services.get_transaction(Request::new(find(b"three pieces"))).await;
    assert_eq!(reason(&other.unwrap_err()), reason::KEY_TAKEN);
    let by = |key: &str| {
        let by = Some(pb::get_transaction_request::By::IdempotencyKey(key.to_owned()));
        rig.services
            .get_transaction(Request::new(pb::GetTransactionRequest { by, ..Default::default() }))
    };
    assert_eq!(by("order-1042").await.unwrap().into_inner().transaction.unwrap().xid, xid);
    let status = by("order-1043").await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, reason::KEY_UNKNOWN));
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
    let _permits: Vec<_> =
        (0..512).map(|_| waiting_permit(&with(pb::DecideRequest::default())).unwrap()).collect();
    let decide = pb::DecideRequest {
        xid,
        decision: pb::Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        until: pb::Until::Completed.into(),
        ..Default::default()
    };
    rig.services.decide(with(decide)).await.unwrap();
}

#[tokio::test]
async fn a_try_without_a_clear_answer_is_recorded_as_such() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1", "2"]).await;
    let request = pb::DecideRequest {
        xid: xid.clone(),
        decision: pb::Decision::Cancel.into(),
        reason: "UNAVAILABLE: connection refused".to_owned(),
        unknown_branch_id: "2".to_owned(),
        ..Default::default()
    };
    rig.decide(request.clone()).await.unwrap();
    let cancelled = rig.completed(&xid).await;
    assert_eq!(cancelled.cancel_cause(), pb::CancelCause::TryUnknown);
    let reason = &cancelled.cancel_reason;
    assert!(reason.contains("branch 2") && reason.contains("connection refused"), "{reason}");
    let bad = pb::DecideRequest { unknown_branch_id: "A B".to_owned(), ..request };
    invalid(rig.decide(bad).await, "unknown_branch_id", "a-z");
}

#[tokio::test]
async fn the_result_of_the_first_confirm_is_kept_and_told_to_every_repeat() {
    let rig = Rig::new().await;
    let first = pb::BeginRequest { idempotency_key: "order-1042".to_owned(), ..begin(&["1"]) };
    let xid = rig.begin(first.clone()).await.unwrap().transaction.unwrap().xid;
    let payload = |bytes: usize, content_type: &str| {
        Some(pb::Payload { data: vec![7; bytes].into(), content_type: content_type.to_owned() })
    };
    let confirm = |result| pb::DecideRequest {
        xid: xid.clone(),
        decision: pb::Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        result,
        ..Default::default()
    };
    // What is too large is refused, and nothing is decided.
    invalid(rig.decide(confirm(payload(4097, ""))).await, "result.data", "may have 4096");
    let long = "x".repeat(129);
    invalid(rig.decide(confirm(payload(1, &long))).await, "result.content_type", "128");
    assert_eq!(rig.get(&xid).await.unwrap().state(), pb::TransactionState::Trying);
    let kept = payload(4096, "application/json");
    assert_eq!(rig.decide(confirm(kept.clone())).await.unwrap().result, kept);
    // A repeat with another one, or with none, is told the first one.
    for other in [payload(1, "application/json"), None] {
        assert_eq!(rig.decide(confirm(other)).await.unwrap().result, kept);
    }
    rig.completed(&xid).await;
    assert_eq!(rig.get(&xid).await.unwrap().result, kept);
    let again = rig.begin(first).await.unwrap();
    assert_eq!((again.existed, again.transaction.unwrap().result), (true, kept));
    let listed = pb::ListTransactionsRequest::default();
    let listed = rig.services.list_transactions(Request::new(listed)).await.unwrap().into_inner();
    assert!(listed.transactions.iter().all(|listed| listed.result.is_none()), "{listed:?}");
    // With Cancel it is ignored, too large or not.
    let xid = rig.begun(&["1"]).await;
    let decision = pb::Decision::Cancel.into();
    let cancel = pb::DecideRequest { xid, decision, ..confirm(payload(4097, "")) };
    assert_eq!(rig.decide(cancel).await.unwrap().result, None);
}

/// tonic answers CANCELLED when a call reaches its deadline, which could be mistaken for an outcome.
#[tokio::test]
async fn a_call_with_a_deadline_is_answered_before_it() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    // The transaction is never decided, so the wait would last ten seconds. The deadline ends it, and the answer is the present
    // state.
    let until = pb::Until::Decided.into();
    let mut wait = Request::new(pb::WaitTransactionRequest { xid: xid.clone(), until, wait: None });
    wait.set_timeout(Duration::from_millis(500));
    let asked =
        tokio::time::timeout(Duration::from_millis(500), rig.services.wait_transaction(wait));
    let told = asked.await.expect("before its deadline").unwrap().into_inner();
    assert_eq!(told.transaction.unwrap().state(), pb::TransactionState::Trying);
}

/// A list of large transactions would not fit into one response.
#[tokio::test]
async fn a_list_of_large_transactions_comes_in_pages() {
    use prost::Message as _;
    let rig = Rig::new().await;
    let labels: BTreeMap<_, _> = (0..16)
        .map(|n| (format!("label {n}"), "x".repeat(limits::LABEL_VALUE_BYTES_MAX)))
        .collect();
    let branches: Vec<_> = (0..64)
        .map(|n| pb::BranchSpec {
            action: "x".repeat(limits::ACTION_BYTES_MAX),
            ..spec(&n.to_string())
        })
        .collect();
    let count = 700;
    for _ in 0..count {
        let request =
            pb::BeginRequest { labels: labels.clone(), branches: branches.clone(), ..begin(&[]) };
        rig.begin(request).await.unwrap();
    }
    let (mut seen, mut pages, mut page) = (std::collections::BTreeSet::new(), 0, String::new());
    loop {
        let request = pb::ListTransactionsRequest { limit: 1000, page, ..Default::default() };
        let answer =
            rig.services.list_transactions(Request::new(request)).await.unwrap().into_inner();
        assert!(answer.encoded_len() <= limits::RESPONSE_BYTES_MAX);
        assert_eq!(answer.more, !answer.next_page.is_empty());
        seen.extend(answer.transactions.into_iter().map(|global| global.xid));
        pages += 1;
        page = answer.next_page;
        if page.is_empty() {
            break;
        }
    }
    assert_eq!((seen.len(), pages > 1), (count, true), "{pages} pages");
    let bad = pb::ListTransactionsRequest { page: "2".to_owned(), ..Default::default() };
    invalid(rig.services.list_transactions(Request::new(bad)).await, "page", "next_page");
}

/// A process that was suspended finds many calls that their callers have cancelled meanwhile.
#[tokio::test]
async fn calls_that_were_given_up_do_not_end_the_connection() {
    let rig = Rig::new().await;
    let xid = rig.begun(&["1"]).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    listener.set_nonblocking(true).unwrap();
    let (router, _health) = server::router(&rig.services);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let (go_on, stays_stopped) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            tokio::spawn(router.serve_with_incoming(TcpIncoming::from(listener)));
            let told: Result<(), _> = stopped.await;
            told.unwrap();
            stays_stopped.recv().unwrap(); // the one thread stands still
            std::future::pending::<()>().await;
        });
    });
    let channel = tonic::transport::Endpoint::from_shared(url).unwrap().connect_lazy();
    let mut client = CoordinatorServiceClient::new(channel);
    let by = Some(pb::get_transaction_request::By::Xid(xid.clone()));
    client
        .get_transaction(pb::GetTransactionRequest { by: by.clone(), ..Default::default() })
        .await
        .unwrap();

    stop.send(()).unwrap();
    let until = pb::Until::Decided.into();
    let waits = pb::WaitTransactionRequest { xid: xid.clone(), until, wait: None };
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.wait_transaction(waits).await }
    });
    for _ in 0..200 {
        let asked = client
            .get_transaction(pb::GetTransactionRequest { by: by.clone(), ..Default::default() });
        tokio::time::timeout(Duration::from_millis(1), asked).await.unwrap_err();
    }
    go_on.send(()).unwrap();
    rig.confirm(&xid, &["1"]).await.unwrap();
    let answer = waiting.await.unwrap().unwrap().into_inner().transaction.unwrap();
    assert_eq!(answer.decision(), pb::Decision::Confirm);
}

#[tokio::test]
async fn a_reason_with_a_line_break_cancels_and_is_made_one_line() {
    let rig = Rig::new().await;
    let request = |xid| pb::DecideRequest {
        xid,
        decision: pb::Decision::Cancel.into(),
        reason: "first\nsecond\tthird".to_owned(),
        ..Default::default()
    };
    let requested = rig.decide(request(rig.begun(&["1"]).await)).await.unwrap();
    assert_eq!(requested.cancel_reason, "requested: first second third");
    let refusal = pb::Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        metadata: BTreeMap::from([("sku".to_owned(), "1\n2\u{202e}".to_owned())]),
        ..Default::default()
    };
    let xid = rig.begun(&["1"]).await;
    let refused = pb::DecideRequest { refusal: Some(refusal), ..request(xid) };
    let refused = rig.decide(refused).await.unwrap();
    assert_eq!(refused.refusal.unwrap().metadata["sku"], "1 2 ");
}
