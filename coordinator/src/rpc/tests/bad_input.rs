//! Bad input gets one clear error that names the field and the limit, and changes nothing.

use super::*;

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
        (handfast_proto::Xid { nonce: !known.nonce, ..known }, Code::NotFound, reason::LOST),
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
    // Both branches in one request.
    let xid = rig.begun(&["1", "1"]).await;
    assert_eq!(rig.get(&xid).await.unwrap().branches.len(), 1);
    let twice = pb::BeginRequest { branches: vec![spec("1"), other.clone()], ..begin(&[]) };
    invalid(rig.begin(twice).await, "branches[1].branch_id", "1 is there twice");
    // The branches in two requests.
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
    let nobody = pb::GetTransactionRequest::default();
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
async fn a_way_of_recording_that_is_not_known_or_not_possible_is_refused() {
    let rig = Rig::new().await;
    let recorded = |record: i32| pb::BeginRequest { record, ..begin(&["1"]) };
    let unknown = rig.begin(recorded(7)).await.unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    assert!(unknown.message().starts_with("record: "), "{unknown:?}");
    // Its retention is an hour.
    let refused = rig.begin(recorded(pb::Record::AtDecision.into())).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("`retention` is 3600s"), "{refused:?}");
    rig.begin(recorded(pb::Record::AtBegin.into())).await.unwrap();
}

#[tokio::test]
async fn an_inquiry_names_1_to_256_branches() {
    let rig = Rig::new().await;
    let inquire = async |branches: Vec<pb::InquiredBranch>| {
        let request = Request::new(pb::InquireBranchesRequest { branches });
        rig.services.inquire_branches(request).await
    };
    let branch = |xid: &str, branch_id: &str| pb::InquiredBranch {
        xid: xid.to_owned(),
        branch_id: branch_id.to_owned(),
    };
    let well = branch("3-1-1-00000000", "1");
    for (branches, field) in [
        (vec![], "branches: "),
        (vec![well.clone(); 257], "branches: "),
        (vec![well.clone(), branch("x", "1")], "branches[1].xid: "),
        (vec![branch("3-1-1-00000000", "!")], "branches[0].branch_id: "),
    ] {
        let refused = inquire(branches).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with(field), "{refused:?}");
    }
    assert_eq!(inquire(vec![well; 256]).await.unwrap().into_inner().answers.len(), 256);
}
