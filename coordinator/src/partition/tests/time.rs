//! Timeouts, backoff between attempts, and deadlines of calls.

use super::*;
use crate::store::Known;

#[tokio::test]
async fn phase_one_times_out_into_cancel() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.clock.advance(TIMEOUT - Duration::from_millis(1));
    rig.no_call().await;
    rig.clock.advance(Duration::from_millis(1));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.phase, Phase::Cancel);
    }
    let rejected = rig.confirm(xid).answer().await.unwrap_err();
    let Error::Rejected { global, .. } = rejected else { panic!("{rejected:?}") };
    assert_eq!(global.cancel, Some(CancelCause::TimedOut));
}

/// The clock was a day ahead, the machine died, and the clock is right again.
#[tokio::test]
async fn what_was_recorded_while_the_clock_was_ahead_does_not_wait_for_that_day() {
    let (right, day) = (Timestamp(1_000_000), Duration::from_secs(86_400));
    let ahead =
        Rig::start(Arc::default(), ManualClock::at(right + day), Rig::new().await.settings).await;
    let (trying, failed, decided) = (ahead.begun().await, ahead.begun().await, ahead.begun().await);
    ahead.confirm(failed).answer().await.unwrap();
    for _ in 0..2 {
        let (code, message) = ("UNAVAILABLE".to_owned(), "refused".to_owned());
        let error = AttemptError { code, message, at: ahead.clock.now() };
        let outcome = Outcome::Unknown { error, timed_out: false, hopeless: false };
        ahead.call().await.returns(outcome).await;
    }
    ahead.confirm(decided).answer().await.unwrap();
    let recorded = async {
        while ahead.stored(failed).await.unwrap().branches.iter().any(|it| it.attempts == 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), recorded).await.unwrap();

    let clock = ManualClock::at(right);
    let rig = Rig::start(ahead.store.clone(), clock, ahead.settings.clone()).await;
    let mut called = BTreeSet::new();
    for _ in 0..4 {
        let made = rig.call().await;
        called.insert((made.call.xid, made.call.phase));
        made.done().await;
    }
    let confirmed = [failed, decided].map(|xid| (xid, Phase::Confirm));
    assert_eq!(called, BTreeSet::from(confirmed));
    rig.no_call().await;
    rig.clock.advance(TIMEOUT);
    let made = rig.call().await;
    assert_eq!((made.call.xid, made.call.phase), (trying, Phase::Cancel));
}

/// The clock jumps ahead between the begin of a transaction and its next record.
#[tokio::test]
async fn what_was_begun_before_the_clock_jumped_ahead_does_not_wait_for_that_day() {
    let (right, day) = (Timestamp(1_000_000), Duration::from_secs(86_400));
    let ahead = Rig::start(Arc::default(), ManualClock::at(right), Rig::new().await.settings).await;
    let (decided, failed) = (ahead.begun().await, ahead.begun().await);
    ahead.confirm(failed).answer().await.unwrap();
    for _ in 0..2 {
        ahead.call().await.fails().await;
    }
    let_tasks_run().await;
    *ahead.script.later.lock().unwrap() = Some(Duration::from_secs(15));
    *ahead.script.busy.lock().unwrap() = true; // so the next attempt is put off, while the clock is ahead
    ahead.clock.advance(day);
    ahead.confirm(decided).answer().await.unwrap();
    ahead.until_memory_holds(0).await;

    let rig = Rig::start(ahead.store.clone(), ManualClock::at(right), ahead.settings.clone()).await;
    let mut called = BTreeMap::new();
    for _ in 0..4 {
        *called.entry(rig.call().await.call.xid).or_insert(0) += 1;
    }
    assert_eq!(called, BTreeMap::from([(decided, 2), (failed, 2)]));
    // Their rows do not wait for that day any more either.
    let known = Known { ownership: rig.ownership, position: 0 };
    let recorded = async {
        while rig.store.inner.due(right, None, 9, known).await.unwrap().transactions.len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), recorded).await.unwrap();
}

#[tokio::test]
async fn a_decide_that_is_here_in_time_comes_before_the_timer() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.clock.advance(TIMEOUT);
    let decided = rig.confirm(xid); // both are there when the partition looks
    assert_eq!(decided.answer().await.unwrap().global.state, State::Confirming);
}

#[tokio::test]
async fn no_transaction_times_out_while_the_store_is_silent() {
    let rig = Rig::new().await;
    let good = rig.begun().await;
    rig.store.hold();
    let other = rig.begin(new(&["1"]));
    let_tasks_run().await;
    rig.clock.advance(TIMEOUT); // the store is silent all the time
    let_tasks_run().await;
    let decided = rig.confirm(good);
    rig.store.release();
    assert_eq!(decided.answer().await.unwrap().global.state, State::Confirming);
    // A transaction without a decision times out a little later.
    let abandoned = other.answer().await.unwrap().global.xid;
    assert_eq!(rig.state(abandoned).await, State::Trying);
    rig.clock.advance(Duration::from_secs(10));
    let mut cancelled = rig.call().await;
    while cancelled.call.phase != Phase::Cancel {
        cancelled = rig.call().await;
    }
    assert_eq!(cancelled.call.xid, abandoned);
}

#[tokio::test]
async fn a_failed_call_is_repeated_after_its_pause_and_with_more_time_after_a_timeout() {
    let rig = Rig::new().await;
    let xid = rig.begin(new(&["1"])).answer().await.unwrap().global.xid;
    let tried = ["1".parse().unwrap()].into();
    rig.ask(xid, What::Decide(DecisionRequest::Confirm { tried, result: None }), Until::Now)
        .answer()
        .await
        .unwrap();
    let mut deadlines = Vec::new();
    for attempt in 1..=3 {
        let made = rig.call().await;
        assert_eq!(made.call.attempt, attempt);
        deadlines.push(made.call.deadline.as_secs());
        let error = AttemptError {
            code: "DEADLINE_EXCEEDED".to_owned(),
            message: String::new(),
            at: Timestamp(0),
        };
        made.returns(Outcome::Unknown { error, timed_out: true, hopeless: false }).await;
        let_tasks_run().await;
        rig.clock.advance(Duration::from_secs(2));
    }
    assert_eq!(deadlines, [5, 10, 20]);
}

#[tokio::test]
async fn a_call_that_dispatch_cannot_take_is_made_later_and_is_no_attempt() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    *rig.script.busy.lock().unwrap() = true;
    rig.confirm(xid).answer().await.unwrap();
    rig.no_call().await;
    *rig.script.busy.lock().unwrap() = false;
    rig.no_call().await;
    rig.clock.advance(Duration::from_secs(1));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.attempt, 1);
    }
}
