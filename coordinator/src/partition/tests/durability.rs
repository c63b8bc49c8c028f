//! Effects wait for durability: answers, calls and departures.

use super::*;

#[tokio::test]
async fn a_begin_with_branches_is_answered_when_it_is_durable() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut begin = rig.begin(new(&["1"]));
    begin.none_yet().await;
    rig.store.release();
    let answer = begin.answer().await.unwrap();
    assert!(!answer.existed);
    assert_eq!(rig.stored(answer.global.xid).await.unwrap(), *answer.global);
}

#[tokio::test]
async fn a_begin_with_neither_branches_nor_key_is_answered_at_once() {
    let rig = Rig::new().await;
    rig.store.hold();
    let xid = rig.begin(new(&[])).answer().await.unwrap().global.xid;
    assert_eq!(rig.stored(xid).await, None);
    // Its first branch makes the transaction durable.
    let mut register = rig.ask(xid, What::Register(new(&["1"]).branches), Until::Now);
    register.none_yet().await;
    rig.store.release();
    register.answer().await.unwrap();
    assert_eq!(rig.stored(xid).await.unwrap().branches.len(), 1);
    assert_eq!(rig.store.batches().len(), 1, "one durable write for both");
}

#[tokio::test]
async fn nobody_hears_of_a_decision_and_no_call_leaves_before_it_is_durable() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.hold();
    let mut all = [
        rig.confirm(xid),                        // the decision
        rig.confirm(xid),                        // a repeat
        rig.cancel(xid),                         // the opposite, which is rejected because of it
        rig.ask(xid, What::Get, Until::Now),     // a read
        rig.ask(xid, What::Get, Until::Decided), // somebody who waits for it
    ];
    for waiting in &mut all {
        waiting.none_yet().await;
    }
    rig.no_call().await;
    rig.store.release();
    let [decided, repeated, opposite, read, watched] = all;
    for waiting in [decided, repeated, read, watched] {
        assert_eq!(
            waiting.answer().await.unwrap().global.state.decision(),
            Some(Decision::Confirm)
        );
    }
    let rejected = opposite.answer().await.unwrap_err();
    assert!(matches!(
        rejected,
        Error::Rejected { rejection: Rejection::AlreadyDecided(Decision::Confirm), .. }
    ));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.phase, Phase::Confirm);
    }
}

#[tokio::test]
async fn a_lost_answer_to_commit_is_settled_before_anybody_hears() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.fail([Fault::AnswerLost, Fault::Unreached]);
    let answer = rig.confirm(xid).answer().await.unwrap();
    assert_eq!(answer.global.state, State::Confirming);
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirming);
}

#[tokio::test]
async fn a_try_of_the_coordinator_leaves_when_its_branch_is_durable() {
    let rig = Rig::new().await;
    rig.store.hold();
    let execute = rig.send(|reply| Command::Begin {
        new: executed(&["1", "2"]),
        until: Until::Completed,
        reply,
    });
    rig.no_call().await;
    rig.store.release();
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!(made.call.phase, Phase::Try);
        let payload = made.call.spec.payload.clone().unwrap();
        assert_eq!(payload.data, made.call.spec.branch_id.as_str());
        made.returns(Outcome::Done { reply: Some(payload) }).await;
    }
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.phase, &made.call.spec.payload), (Phase::Confirm, &None));
        made.done().await;
    }
    let global = execute.answer().await.unwrap().global;
    assert_eq!(global.state, State::Confirmed);
    let replies: Vec<_> =
        global.branches.iter().map(|branch| branch.reply.clone().unwrap().data).collect();
    assert_eq!(replies, ["1", "2"]);
}

#[tokio::test]
async fn completion_is_told_without_waiting_for_its_record() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let completed = rig.ask(xid, What::Get, Until::Completed);
    rig.store.hold();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    assert_eq!(completed.answer().await.unwrap().global.state, State::Confirmed);
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirming);
}

#[tokio::test]
async fn a_smooth_transaction_is_three_writes_and_its_branches_one_each() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let rows: Vec<_> = (rig.store.batches().iter().flat_map(|batch| &batch.writes))
        .map(|write| {
            (
                write.head,
                write.global.branches.len() - write.new_branches,
                write.changed_branches.len(),
            )
        })
        .collect();
    use crate::store::Head::*;
    assert_eq!(rows, [(Insert, 2, 0), (Update, 0, 0), (Finish, 0, 0)]);
    assert_eq!(rig.store.loads(), [], "no read on the way");
    assert_eq!(rig.state(xid).await, State::Confirmed);
}

#[tokio::test]
async fn a_store_that_takes_no_more_ends_the_partition_loudly() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.fail([Fault::Refused]);
    assert!(matches!(rig.confirm(xid).answer().await.unwrap_err(), Error::Corrupt));
    assert!(matches!(rig.begin(new(&["1"])).answer().await.unwrap_err(), Error::Corrupt));
    rig.no_call().await;
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Trying);
}

#[tokio::test]
async fn an_operator_answers_for_a_branch_and_it_is_durable_before_it_is_told() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    let resolve = |branch_id: &str| {
        let branch_id: BranchId = branch_id.parse().unwrap();
        let (operator, reason) = ("ann".to_owned(), "booked by hand".to_owned());
        rig.ask(xid, What::Resolve { branch_id, operator, reason }, Until::Now)
    };
    let early = resolve("1").answer().await.unwrap_err();
    assert!(matches!(early, Error::Rejected { rejection: Rejection::NotDecided, .. }));
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    let hanging = rig.call().await;
    let_tasks_run().await;
    rig.store.hold();
    let mut resolved = resolve("2");
    resolved.none_yet().await;
    rig.store.release();
    let global = resolved.answer().await.unwrap().global;
    assert_eq!(global.state, State::Confirmed);
    assert_eq!(rig.stored(xid).await.unwrap(), global.recorded());
    // The participant's own answer comes late and changes nothing.
    hanging.fails().await;
    let_tasks_run().await;
    assert_eq!(rig.state(xid).await, State::Confirmed);
}

#[tokio::test]
async fn a_refused_try_decides_without_waiting_for_the_others() {
    let rig = Rig::new().await;
    let execute = rig.send(|reply| Command::Begin {
        new: executed(&["1", "2"]),
        until: Until::Decided,
        reply,
    });
    let (one, two) = (rig.call().await, rig.call().await);
    let refusal = Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: String::new(),
        metadata: BTreeMap::new(),
    };
    one.returns(Outcome::Refused(refusal.clone())).await;
    let global = execute.answer().await.unwrap().global;
    assert_eq!(
        global.cancel,
        Some(CancelCause::Refused { branch_id: Some("1".parse().unwrap()), refusal })
    );
    let cancel = rig.call().await;
    assert_eq!((cancel.call.phase, cancel.call.branch), (Phase::Cancel, 0));
    rig.no_call().await; // the second Try is still under way
    two.done().await;
    assert_eq!(rig.call().await.call.branch, 1);
}

/// The transaction completes as soon as it is decided. A record that says only "finished" would not contain the decision.
#[tokio::test]
async fn a_keyed_transaction_without_branches_is_recorded_with_its_decision() {
    let rig = Rig::new().await;
    let begun = rig.begin(NewTransaction { branches: Vec::new(), ..keyed(7, 1) });
    let xid = begun.answer().await.unwrap().global.xid;
    let tried = BTreeSet::new();
    let decide = What::Decide(DecisionRequest::Confirm { tried, result: None });
    let global = rig.ask(xid, decide, Until::Now).answer().await.unwrap().global;
    assert_eq!(global.state, State::Confirmed);
    let heads: Vec<_> = rig
        .store
        .batches()
        .iter()
        .flat_map(|batch| &batch.writes)
        .map(|write| write.head)
        .collect();
    use crate::store::Head::*;
    assert_eq!(heads, [Insert, Update]);
}
