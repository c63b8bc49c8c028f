//! Execute: the coordinator makes all calls.

use super::*;
use crate::{
    store::{ALL_PARTITIONS, ListFilter, Show, Store as _},
    transaction::{Decision, Phase},
};

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
        // The answer was lost. A repeat gets the outcome, without replies.
        let again = rig.services.execute(Request::new(request)).await.unwrap().into_inner();
        assert_eq!((again.existed, again.replies.len()), (true, 0));
        assert_eq!(again.transaction.unwrap().state(), pb::TransactionState::Confirmed);
    }
}

/// Participants that accept every Try, and never answer a Confirm.
#[derive(Debug)]
struct Slow;

impl Dispatch for Slow {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        match call.phase {
            Phase::Try => Willing.submit(call, returned),
            Phase::Confirm | Phase::Cancel => Ok(()),
        }
    }
}

/// The wait for completion ends with an error that reads as if nothing had been done.
#[tokio::test]
async fn a_decision_that_stands_is_answered_when_the_wait_for_completion_fails() {
    let rig = Rig::with(Arc::new(Slow)).await;
    let request = pb::ExecuteRequest {
        name: "checkout".to_owned(),
        branches: vec![pb::BranchSpec { payload: payload(1), ..spec("1") }],
        until: pb::Until::Completed.into(),
        ..Default::default()
    };
    let services = rig.services.clone();
    let executing = tokio::spawn(async move { services.execute(Request::new(request)).await });
    let all = ListFilter::of(Show::All);
    let decided = async || {
        let recorded = rig.store.list(&all, 1).await.unwrap().transactions.pop();
        recorded.and_then(|global| global.state.decision())
    };
    while decided().await != Some(Decision::Confirm) {
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await; // now it waits for completion
    }
    // Another coordinator takes over, and the next batch of the partition shows it.
    rig.store.acquire(&ALL_PARTITIONS, "other", Timestamp(0)).await.unwrap();
    rig.begin(begin(&["1"])).await.unwrap_err();
    let answer = executing.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.transaction.unwrap().decision(), pb::Decision::Confirm);
    assert_eq!(answer.replies[0].reply, payload(1));
}
