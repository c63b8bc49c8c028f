//! Transactions that are recorded with their decision: callers are answered from memory, and a record has all or nothing.

use std::sync::atomic::Ordering;

use super::*;

/// A transaction with these branches, whose participants all ask about their reservations.
fn at_decision(branches: &[&str]) -> NewTransaction {
    let mut new = NewTransaction { at_decision: true, ..new(branches) };
    for spec in &mut new.branches {
        spec.inquires = true;
    }
    new
}

impl Rig {
    fn register(&self, xid: Xid, branches: Vec<BranchSpec>) -> Waiting {
        self.ask(xid, What::Register(branches), Until::Now)
    }

    /// Begins such a transaction with branch 1 while the store answers nothing.
    async fn unrecorded(&self) -> Xid {
        self.store.hold();
        let xid = self.begin(at_decision(&["1"])).answer().await.unwrap().global.xid;
        assert!(self.store.batches().is_empty());
        xid
    }

    /// How many branches the transaction has in the store, and its state there.
    async fn row(&self, xid: Xid) -> Option<(usize, State)> {
        self.stored(xid).await.map(|global| (global.branches.len(), global.state))
    }

    /// The journal has its time to write what nothing waits for.
    async fn recorded_lazily(&self, xid: Xid) {
        let recorded = async {
            while self.stored(xid).await.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), recorded).await.expect("in time");
    }
}

#[tokio::test]
async fn registrations_are_answered_from_memory_and_the_first_write_is_the_decision() {
    for confirm in [true, false] {
        let rig = Rig::new().await;
        let xid = rig.unrecorded().await;
        let second = rig.register(xid, at_decision(&["2"]).branches).answer().await.unwrap();
        assert!(second.global.at_decision, "Trys must say so");
        let_tasks_run().await;
        assert!(rig.store.batches().is_empty(), "nothing was written");
        let mut decided = if confirm { rig.confirm(xid) } else { rig.cancel(xid) };
        decided.none_yet().await;
        rig.no_call().await;
        rig.store.release();
        let state = decided.answer().await.unwrap().global.state;
        assert_eq!(rig.row(xid).await, Some((2, state)));
        assert_eq!(rig.store.batches().len(), 1, "one write for all of it");
        assert_eq!(rig.store.batches()[0].writes[0].before, None);
        for _ in 0..2 {
            rig.call().await.done().await;
        }
        rig.until_memory_holds(0).await;
        assert!(rig.stored(xid).await.unwrap().state.is_final());
    }
}

#[tokio::test]
async fn what_has_no_record_is_lost_as_a_whole_and_is_never_decided() {
    let rig = Rig::new().await;
    let xid = rig.begin(at_decision(&["1", "2"])).answer().await.unwrap().global.xid;
    let next = rig.restart().await;
    for lost in [next.confirm(xid), next.cancel(xid), next.ask(xid, What::Get, Until::Now)] {
        assert!(matches!(lost.answer().await, Err(Error::NeverRecorded(_))));
    }
    let register = next.register(xid, at_decision(&["3"]).branches);
    assert!(matches!(register.answer().await, Err(Error::NeverRecorded(_))));
    assert_eq!(next.stored(xid).await, None);
}

#[tokio::test]
async fn what_is_open_for_a_moment_is_recorded_and_further_branches_wait() {
    let rig = Rig::new().await;
    let xid = rig.begin(at_decision(&["1"])).answer().await.unwrap().global.xid;
    rig.clock.advance(rig.settings.record_after - Duration::from_millis(1));
    rig.register(xid, at_decision(&["2"]).branches).answer().await.unwrap();
    assert_eq!(rig.stored(xid).await, None);
    rig.clock.advance(Duration::from_millis(1));
    rig.recorded_lazily(xid).await;
    assert_eq!(rig.row(xid).await, Some((2, State::Trying)));

    rig.store.hold();
    let mut third = rig.register(xid, at_decision(&["3"]).branches);
    third.none_yet().await;
    rig.store.release();
    third.answer().await.unwrap();
    assert_eq!(rig.row(xid).await, Some((3, State::Trying)));
}

#[tokio::test]
async fn a_branch_waits_once_the_record_is_handed_to_the_journal() {
    let rig = Rig::new().await;
    let xid = rig.unrecorded().await;
    rig.clock.advance(rig.settings.record_after);
    let_tasks_run().await;
    let mut second = rig.register(xid, at_decision(&["2"]).branches);
    second.none_yet().await;
    rig.store.release();
    second.answer().await.unwrap();
    assert_eq!(rig.row(xid).await, Some((2, State::Trying)));
}

#[tokio::test]
async fn a_transaction_that_was_read_from_the_store_is_an_ordinary_one() {
    let rig = Rig::new().await;
    let xid = rig.begin(at_decision(&["1"])).answer().await.unwrap().global.xid;
    rig.clock.advance(rig.settings.record_after);
    rig.recorded_lazily(xid).await;
    let next = rig.restart().await;
    next.store.hold();
    let mut second = next.register(xid, at_decision(&["2"]).branches);
    second.none_yet().await;
    next.store.release();
    assert!(!second.answer().await.unwrap().global.at_decision);
}

#[tokio::test]
async fn a_branch_whose_participant_does_not_ask_makes_all_durable_first() {
    let rig = Rig::new().await;
    let xid = rig.unrecorded().await;
    let mut silent = rig.register(xid, new(&["2"]).branches);
    silent.none_yet().await;
    rig.store.release();
    silent.answer().await.unwrap();
    assert_eq!(rig.row(xid).await, Some((2, State::Trying)));

    rig.store.hold();
    let mut mixed = at_decision(&["1", "2"]);
    mixed.branches[1].inquires = false;
    let mut begin = rig.begin(mixed);
    begin.none_yet().await;
    rig.store.release();
    assert!(!begin.answer().await.unwrap().global.at_decision);
}

#[tokio::test]
async fn execute_is_recorded_first() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut new = NewTransaction { at_decision: true, ..executed(&["1"]) };
    new.branches[0].inquires = true;
    let execute = rig.send(|reply| Command::Begin { new, until: Until::Decided, reply });
    rig.no_call().await;
    rig.store.release();
    rig.call().await.done().await;
    execute.answer().await.unwrap();
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_waited_for() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut recorded = rig.begin(new(&["1"]));
    recorded.none_yet().await;
    // For a second the store may just be slow.
    rig.begin(at_decision(&["1"])).answer().await.unwrap();
    let early = rig.begin(at_decision(&["1"])).answer().await.unwrap().global.xid;
    rig.clock.advance(Duration::from_millis(1001));
    let mut late = rig.begin(at_decision(&["1"]));
    late.none_yet().await;
    let mut second = rig.register(early, at_decision(&["2"]).branches);
    second.none_yet().await;
    rig.store.release();
    for waiting in [recorded, late, second] {
        waiting.answer().await.unwrap();
    }
}

/// It may have been replaced, and would make reservations that only their participants end.
#[tokio::test]
async fn an_owner_whose_heartbeats_do_not_land_answers_nothing_from_memory() {
    let rig = Rig::new().await;
    rig.store.beats.store(true, Ordering::SeqCst);
    let mut first = rig.begin(at_decision(&["1"]));
    assert!(first.0.try_recv().is_err(), "no batch has landed yet");
    first.answer().await.unwrap();
    assert_eq!(rig.store.batches().len(), 1);
    rig.store.hold();
    rig.begin(at_decision(&["1"])).answer().await.unwrap();
    rig.clock.advance(ALIVE_WITHIN + Duration::from_millis(1));
    let mut late = rig.begin(at_decision(&["1"]));
    late.none_yet().await;
    rig.store.release();
    late.answer().await.unwrap();
}

#[tokio::test]
async fn a_partition_that_is_handed_back_records_what_has_no_record() {
    let rig = Rig::new().await;
    let xid = rig.begin(at_decision(&["1"])).answer().await.unwrap().global.xid;
    rig.register(xid, at_decision(&["2"]).branches).answer().await.unwrap();
    rig.stop.cancel();
    rig.tasks.close();
    rig.tasks.wait().await;
    assert_eq!(rig.row(xid).await, Some((2, State::Trying)));
}

#[tokio::test]
async fn what_has_no_record_counts_for_the_limits() {
    let mut rig = Rig::new().await;
    rig.settings.open_max = 2;
    let rig = rig.restart().await;
    for _ in 0..2 {
        rig.begin(at_decision(&["1"])).answer().await.unwrap();
    }
    let full = rig.begin(at_decision(&["1"])).answer().await;
    assert!(matches!(full, Err(Error::TooManyOpen { open_max: 2 })));
}

#[tokio::test]
async fn a_key_finds_a_transaction_that_has_no_record() {
    let rig = Rig::new().await;
    let new = NewTransaction { key: keyed(7, 1).key, ..at_decision(&["1"]) };
    let begun = rig.begin(new.clone()).answer().await.unwrap();
    let again = rig.begin(new).answer().await.unwrap();
    assert_eq!((again.existed, again.global.xid), (true, begun.global.xid));
    assert_eq!(rig.stored(begun.global.xid).await, None);
}

#[tokio::test]
async fn time_that_runs_out_is_a_recorded_cancel() {
    let rig = Rig::new().await;
    let new = NewTransaction { timeout: Duration::from_millis(100), ..at_decision(&["1"]) };
    let xid = rig.begin(new).answer().await.unwrap().global.xid;
    // After a start, nothing expires for a moment.
    rig.clock.advance(Duration::from_secs(3));
    assert_eq!(rig.call().await.call.phase, Phase::Cancel);
    assert_eq!(rig.row(xid).await, Some((1, State::Cancelling)));
}

#[tokio::test]
async fn a_resolved_branch_is_told_so_also_when_its_transaction_is_deleted() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let [one, two]: [BranchId; 2] = ["1", "2"].map(|id| id.parse().unwrap());
    let (operator, reason) = ("ana".to_owned(), "by hand".to_owned());
    let resolve = What::Resolve { branch_id: one.clone(), operator, reason };
    rig.ask(xid, resolve, Until::Now).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let deleted = rig.store.purge(rig.ownership, Timestamp(i64::MAX), Timestamp(i64::MAX), None, 9);
    assert_eq!(deleted.await.unwrap().0, 1);
    let inquire = async |branch_id: &BranchId| {
        rig.ask(xid, What::Inquire(branch_id.clone()), Until::Now).answer().await.unwrap_err()
    };
    assert!(matches!(inquire(&one).await, Error::ForgottenAfterResolving(_, Decision::Confirm)));
    assert!(matches!(inquire(&two).await, Error::Forgotten(_)));
    let get = rig.ask(xid, What::Get, Until::Now).answer().await;
    assert!(matches!(get, Err(Error::Forgotten(_))));
}
