//! Callers in other languages set their own deadlines. If a call's deadline is shorter than its wait, it is answered before the
//! deadline.

use std::time::Duration;

use handfast_proto::{
    calls::ToCoordinator,
    stream::Line,
    time::wire_duration,
    v1::{
        self as pb, call_stream_request::Call, call_stream_response::Answer,
        coordinator_service_client::CoordinatorServiceClient,
    },
};
use tonic::{Code, Request};

use super::{super::Fault, *};
use crate::Phase;

const DEADLINE: Duration = Duration::from_secs(1);

fn until_completed(xid: Xid) -> pb::DecideRequest {
    pb::DecideRequest {
        xid: xid.to_string(),
        decision: pb::Decision::Confirm.into(),
        tried_branch_ids: vec!["1".to_owned()],
        until: pb::Until::Completed.into(),
        wait: Some(wire_duration(Duration::from_secs(10))),
        ..Default::default()
    }
}

fn within<T>(call: T) -> Request<T> {
    let mut request = Request::new(call);
    request.set_timeout(DEADLINE);
    request
}

#[tokio::test]
async fn a_decision_is_told_before_the_callers_deadline_and_no_answer_reads_like_an_outcome() {
    let shop = Shop::new(true).await;
    let channel = shop.coordinator.channel();
    let mut client = CoordinatorServiceClient::new(channel.clone());
    shop.coordinator.script(Deduct::NAME, Phase::Confirm, [Fault::Silence; 20]);
    let (east, _) = shop.remotes();
    let mut told = 0;
    for _ in 0..6 {
        let open = shop.order().begin().await.unwrap();
        open.call::<Deduct>(&east, Json(1)).await.unwrap();
        let xid = open.xid().await.unwrap();
        std::mem::forget(open);
        // No participant acknowledges, so both calls wait as long as they may.
        let alone = client.decide(within(until_completed(xid))).await;
        let alone = alone.map(|decided| decided.into_inner().transaction.unwrap().decision());
        let line: Line<ToCoordinator> = Line::new(channel.clone());
        let shared = line.call(Call::Decide(until_completed(xid)), DEADLINE).await;
        let shared = shared.map(|answer| match answer {
            Answer::Decide(decided) => decided.transaction.unwrap().decision(),
            Answer::Failure(_)
            | Answer::Begin(_)
            | Answer::RegisterBranch(_)
            | Answer::Execute(_)
            | Answer::GetTransaction(_)
            | Answer::WaitTransaction(_)
            | Answer::InquireBranches(_) => panic!("another answer"),
        });
        for answer in [alone, shared] {
            match answer {
                Ok(decision) => {
                    assert_eq!(decision, pb::Decision::Confirm);
                    told += 1;
                }
                // A busy machine may fail to answer within the margin.
                Err(status) => assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}"),
            }
        }
    }
    assert!(told >= 6, "{told} of 12 were told the decision");
    // There is no outcome to return yet.
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::Silence]);
    let target = east.target().to_owned();
    let branch = pb::BranchSpec {
        branch_id: "1".to_owned(),
        action: Deduct::NAME.to_owned(),
        participant: "east".to_owned(),
        target,
        payload: Some(pb::Payload { data: "1".into(), content_type: String::new() }),
        ..Default::default()
    };
    let execute = pb::ExecuteRequest {
        name: "order".to_owned(),
        idempotency_key: "a".to_owned(),
        branches: vec![branch],
        ..Default::default()
    };
    let status = client.execute(within(execute)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
}
