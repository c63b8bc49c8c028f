//! Memory is a cache with one writer. Shows what enters it, what leaves it, and the answer for a transaction that is neither in
//! memory nor in the store.

use super::*;

/// The longest time before a retry. With full jitter it is below five seconds once in six million runs.
const LATE: Duration = Duration::from_secs(3600 * 24 * 365);

/// A partition whose retries are so late that a transaction which waits for one has no reason to stay in memory.
async fn with_late_retries() -> Rig {
    let mut rig = Rig::new().await;
    rig.settings.retry = RetryPolicy { initial: LATE, max: LATE };
    rig.restart().await
}

#[tokio::test]
async fn what_is_finished_leaves_memory_and_one_read_serves_all_who_ask() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    rig.store.hold_loads(true);
    let asked: Vec<_> = (0..5).map(|_| rig.ask(xid, What::Get, Until::Completed)).collect();
    let repeat = rig.cancel(xid);
    let_tasks_run().await;
    rig.store.hold_loads(false);
    for waiting in asked.into_iter().chain([repeat]) {
        assert_eq!(waiting.answer().await.unwrap().global.state, State::Cancelled);
    }
    assert_eq!(rig.store.loads(), [xid]);
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn a_row_that_was_read_before_memory_changed_it_is_dropped() {
    let first = Rig::new().await;
    let xid = first.begun().await;
    first.confirm(xid).answer().await.unwrap();
    // The next owner: a caller asks for the transaction, and the read sees `confirming`. While its answer is in flight, the
    // scan for due transactions loads the transaction. It finishes, is recorded, and leaves memory.
    first.store.hold_loads(true);
    let rig = first.restart().await;
    let mut asked = rig.ask(xid, What::Get, Until::Now);
    while rig.store.loads().is_empty() {
        let_tasks_run().await;
    }
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    let finished = async {
        while rig.held.transactions() != 0
            || rig.stored(xid).await.unwrap().state != State::Confirmed
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap();
    asked.none_yet().await;
    rig.store.hold_loads(false);
    assert_eq!(asked.answer().await.unwrap().global.state, State::Confirmed, "the past was told");
    assert_eq!(rig.store.loads(), [xid, xid]);
    rig.no_call().await;
}

#[tokio::test]
async fn a_transaction_whose_next_attempt_is_far_away_leaves_memory_and_comes_back() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    rig.call().await.fails().await;
    rig.until_memory_holds(0).await;
    let stored = rig.stored(xid).await.unwrap();
    assert_eq!(stored.state, State::Confirming);
    assert_eq!(
        stored.branches.iter().filter(|branch| branch.is_open()).count(),
        1,
        "the acknowledgement is recorded"
    );
    rig.clock.advance(LATE);
    let made = rig.call().await;
    assert_eq!((made.call.phase, made.call.attempt), (Phase::Confirm, 2));
    made.done().await;
    rig.until_memory_holds(0).await;
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirmed);
}

#[tokio::test]
async fn an_operator_hurries_a_transaction_that_has_left_memory() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    rig.call().await.fails().await;
    rig.until_memory_holds(0).await;
    rig.ask(xid, What::Retry, Until::Now).answer().await.unwrap();
    assert_eq!(rig.call().await.call.attempt, 2);
}

#[tokio::test]
async fn unknown_xids_are_told_apart() {
    let rig = Rig::new().await;
    let Ownership { partition, epoch, nonce, .. } = rig.ownership;
    let ask =
        async |rig: &Rig, xid| rig.ask(xid, What::Get, Until::Now).answer().await.unwrap_err();
    let never = Xid { partition, epoch, sequence: 99, nonce };
    assert!(matches!(ask(&rig, never).await, Error::NeverRecorded(xid) if xid == never));
    let newer = Xid { epoch: epoch + 1, ..never };
    assert!(matches!(ask(&rig, newer).await, Error::NotHere(Some(_))));
    let restored = Xid { nonce: nonce.wrapping_add(1), ..never };
    assert!(matches!(ask(&rig, restored).await, Error::Lost(_)), "of another life of this store");
    // A decision or a new branch for a missing transaction is refused in the same way: absence from memory proves nothing.
    assert!(matches!(rig.confirm(never).answer().await.unwrap_err(), Error::NeverRecorded(_)));
    let register = rig.ask(never, What::Register(new(&["1"]).branches), Until::Now);
    assert!(matches!(register.answer().await.unwrap_err(), Error::NeverRecorded(_)));
    // A transaction that was deleted after its retention.
    let xid = rig.begun().await;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let (deleted, _) = rig
        .store
        .purge(rig.ownership, Timestamp(i64::MAX), Timestamp(i64::MAX), None, 100)
        .await
        .unwrap();
    assert_eq!(deleted, 1);
    assert!(matches!(ask(&rig, xid).await, Error::Forgotten(_)));
    // The same holds for an xid of an older epoch.
    let next = rig.restart().await;
    assert!(matches!(ask(&next, never).await, Error::NeverRecorded(_)));
    assert!(matches!(ask(&next, xid).await, Error::Forgotten(_)));
}

#[tokio::test]
async fn a_new_transaction_is_refused_when_too_many_are_open_and_a_decision_is_not() {
    let mut rig = Rig::new().await;
    rig.settings.open_max = 2;
    let rig = rig.restart().await;
    let (xid, _) = (rig.begun().await, rig.begun().await);
    let refused = rig.begin(new(&["1"])).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyOpen { open_max: 2 }));
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(1).await;
    rig.begun().await;
}

#[tokio::test]
async fn a_caller_who_gave_up_does_not_keep_a_transaction_in_memory() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    let tried = ["1", "2"].map(|id| id.parse().unwrap()).into();
    let waiting = rig.ask(
        xid,
        What::Decide(DecisionRequest::Confirm { tried, result: None }),
        Until::Completed,
    );
    rig.call().await.done().await;
    let second = rig.call().await;
    drop(waiting); // the SDK waits for two seconds
    second.fails().await;
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn what_the_breaker_postpones_leaves_memory_too() {
    let rig = Rig::new().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(3));
    *rig.script.busy.lock().unwrap() = true;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let_tasks_run().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(15));
    for _ in 0..10 {
        rig.clock.advance(Duration::from_secs(15));
        let_tasks_run().await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn a_branch_that_was_resolved_while_its_call_was_under_way_keeps_nothing_in_memory() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let (one, two) = (rig.call().await, rig.call().await);
    let branch_id: BranchId = "1".parse().unwrap();
    let (operator, reason) = ("ann".to_owned(), "by hand".to_owned());
    rig.ask(xid, What::Resolve { branch_id, operator, reason }, Until::Now).answer().await.unwrap();
    one.fails().await;
    two.fails().await;
    rig.until_memory_holds(0).await;
}

/// A failed read proves nothing: neither that a key is free, nor that a transaction was never recorded.
#[tokio::test]
async fn what_cannot_be_read_is_not_taken_for_absent() {
    let rig = Rig::new().await;
    let xid = rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    rig.store.fail_reads(true);
    let again = rig.begin(keyed(7, 1)).answer().await;
    assert!(matches!(again, Err(Error::StoreSilent)), "{again:?}");
    let asked = rig.ask(xid, What::Get, Until::Now).answer().await;
    assert!(matches!(asked, Err(Error::StoreSilent)), "{asked:?}");
    rig.store.fail_reads(false);
    assert_eq!(rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid, xid);
}

/// Reads go to a server that is not updated: a lagging replica, or the old primary after a switch-over.
#[tokio::test]
async fn a_read_that_is_older_than_what_was_told_is_not_believed() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    let replica = rig.store.inner.copy(); // where it is trying
    rig.confirm(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.fails().await;
    }
    rig.until_memory_holds(0).await;
    let keyed_xid = rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    rig.cancel(keyed_xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;

    rig.store.read_from(Some(replica));
    let cancelled = rig.cancel(xid).answer().await;
    assert!(matches!(cancelled, Err(Error::StoreSilent)), "{cancelled:?}");
    let absent = rig.ask(keyed_xid, What::Get, Until::Now).answer().await;
    assert!(matches!(absent, Err(Error::StoreSilent)), "{absent:?}");
    let again = rig.begin(keyed(7, 1)).answer().await;
    assert!(matches!(again, Err(Error::StoreSilent)), "{again:?}");
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirming);

    rig.store.read_from(None);
    assert_eq!(rig.state(xid).await, State::Confirming);
    assert_eq!(rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid, keyed_xid);
}

/// Between two heartbeats an owner does not notice by itself that it was replaced.
#[tokio::test]
async fn a_read_that_shows_another_owner_lets_the_journal_find_out() {
    let old = Rig::new().await;
    let xid = old.begun().await;
    old.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        old.call().await.done().await;
    }
    old.until_memory_holds(0).await;
    let _new = old.restart().await;
    let first = old.ask(xid, What::Get, Until::Now).answer().await;
    assert!(matches!(first, Err(Error::StoreSilent)), "the read itself proves nothing: {first:?}");
    let ended = async {
        while !matches!(
            old.ask(xid, What::Get, Until::Now).answer().await,
            Err(Error::Fenced | Error::NotHere(_))
        ) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap();
}

/// A transaction that leaves memory during a read is remembered until that read has ended, even if a later read ends first.
#[tokio::test]
async fn a_read_that_ends_does_not_make_an_older_one_believe_its_old_rows() {
    let first = Rig::new().await;
    let xid = first.begun().await;
    first.confirm(xid).answer().await.unwrap();
    // The next owner. Its page of due transactions has been read, and shows this transaction as confirming.
    first.store.hold_dues(true);
    let rig = first.restart().await;
    let seen = rig.store.dues();
    while rig.store.dues() == seen {
        let_tasks_run().await;
    }
    // Meanwhile the transaction enters memory, finishes and leaves.
    rig.ask(xid, What::Get, Until::Now).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    // A read that began later ends before the page arrives.
    let Ownership { partition, epoch, nonce, .. } = rig.ownership;
    let unknown = Xid { partition, epoch, sequence: 99, nonce };
    rig.ask(unknown, What::Get, Until::Now).answer().await.unwrap_err();
    first.store.hold_dues(false);
    rig.no_call().await;
    assert_eq!(rig.held.transactions(), 0);
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirmed);
}

/// Rule 16: a transaction whose latest change is not durable stays in memory. A read would return its state before that change.
#[tokio::test]
async fn a_transaction_leaves_memory_only_when_its_latest_change_is_durable() {
    let rig = with_late_retries().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let (one, two) = (rig.call().await, rig.call().await);
    // One failed call is in a batch in flight. The other one waits for the next batch, which does not reach the store.
    let batches = rig.store.batches().len();
    rig.store.hold();
    one.fails().await;
    while rig.store.batches().len() == batches {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    two.fails().await;
    let_tasks_run().await;
    rig.store.fail([Fault::Nothing].into_iter().chain([Fault::Unreached; 6]));
    rig.store.release();
    while rig.store.batches().len() < batches + 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(rig.held.transactions(), 1, "it has left with a change that is not durable");
    let told = rig.ask(xid, What::Get, Until::Now).answer().await.unwrap().global;
    assert!(told.branches.iter().all(|branch| branch.attempts == 1), "{:?}", told.branches);
    assert_eq!(rig.store.loads(), [], "it was read");
    rig.until_memory_holds(0).await;
}
