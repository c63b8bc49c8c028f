//! Recovery is the ordinary path: a new owner reads the due transactions and continues them.

use super::*;
use crate::{
    store::{Appended, Batch, DuePage, Guard, Head, Known, Write},
    transaction::{BranchState, Rejection},
};

#[tokio::test]
async fn the_next_owner_carries_on_what_was_decided_and_waits_for_what_was_not() {
    let first = Rig::new().await;
    let (confirming, trying) = (first.begun().await, first.begun().await);
    first.confirm(confirming).answer().await.unwrap();
    let execute =
        first.send(|reply| Command::Begin { new: executed(&["1"]), until: Until::Decided, reply });
    while first.script.calls.lock().unwrap().len() < 3 {
        let_tasks_run().await; // two Confirms and a Try are under way when it dies
    }
    let executed = first.script.calls.lock().unwrap().back().unwrap().0.xid;

    let rig = first.restart().await;
    let mut phases = BTreeMap::new();
    for _ in 0..3 {
        let made = rig.call().await;
        phases.entry(made.call.xid).or_insert_with(Vec::new).push(made.call.phase);
        made.done().await;
    }
    let expected =
        BTreeMap::from([(confirming, vec![Phase::Confirm; 2]), (executed, vec![Phase::Cancel])]);
    assert_eq!(phases, expected);
    assert_eq!(rig.stored(executed).await.unwrap().cancel, Some(CancelCause::CoordinatorRestarted));
    // This one is driven by its initiator, which continues as if nothing had happened.
    assert_eq!(rig.state(trying).await, State::Trying);
    assert_eq!(rig.confirm(trying).answer().await.unwrap().global.state, State::Confirming);
    // The old owner is fenced at its next write. It answers nothing that is not durable.
    let late = first.begin(new(&["1"])).answer().await.unwrap_err();
    assert!(matches!(late, Error::Fenced), "{late:?}");
    assert!(matches!(execute.answer().await.unwrap_err(), Error::Fenced));
    // Later commands are not accepted by the old owner, so they may be sent to the new one.
    let asked = first.ask(trying, What::Get, Until::Now).answer().await.unwrap_err();
    assert!(matches!(asked, Error::NotHere(Some(xid)) if xid == trying), "{asked:?}");
}

#[tokio::test]
async fn what_times_out_while_nobody_owns_it_is_cancelled_by_the_next_owner() {
    let first = Rig::new().await;
    let xid = first.begun().await;
    let rig = first.restart().await;
    rig.no_call().await;
    rig.clock.advance(TIMEOUT);
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.xid, made.call.phase), (xid, Phase::Cancel));
        made.done().await;
    }
    assert_eq!(rig.stored(xid).await.unwrap().cancel, Some(CancelCause::TimedOut));
}

/// The store has lost batches. A transaction that it shows as undecided may have been decided, and callers may have been told.
#[tokio::test]
async fn what_may_have_lost_its_decision_is_not_decided_again() {
    let first = Rig::new().await;
    let (lost, confirming) = (first.begun().await, first.begun().await);
    first.confirm(confirming).answer().await.unwrap();
    let Ownership { partition, epoch, nonce, .. } = first.ownership;
    // Pretend that more batches had been acknowledged and are now gone.
    let guards = vec![Guard { partition, epoch, nonce, position: 20 }];
    let appended = first.store.append(&Batch { guards, writes: Vec::new() }).await.unwrap();
    assert!(matches!(appended, Appended::Damaged(_)), "{appended:?}");

    let rig = first.restart().await;
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.xid, made.call.phase), (confirming, Phase::Confirm));
        made.done().await;
    }
    for asked in [rig.confirm(lost), rig.cancel(lost), rig.ask(lost, What::Get, Until::Now)] {
        let answer = asked.answer().await.unwrap_err();
        assert!(matches!(answer, Error::Lost(xid) if xid == lost), "{answer:?}");
    }
    rig.clock.advance(TIMEOUT);
    rig.no_call().await;
    assert_eq!(rig.stored(lost).await.unwrap().state, State::Trying);
    // A transaction that begins now is not affected.
    let new = rig.begun().await;
    assert_eq!(rig.confirm(new).answer().await.unwrap().global.state, State::Confirming);
}

/// The store has lost batches of `first`, whose position is `position` as it knows.
async fn lose(first: &Rig, position: u64) {
    let Ownership { partition, epoch, nonce, .. } = first.ownership;
    let guards = vec![Guard { partition, epoch, nonce, position }];
    let appended = first.store.append(&Batch { guards, writes: Vec::new() }).await.unwrap();
    assert!(matches!(appended, Appended::Damaged(_) | Appended::Fenced(_)), "{appended:?}");
}

/// After a backup was restored, epochs have numbers that lost epochs had.
#[tokio::test]
async fn an_xid_of_a_lost_epoch_stays_lost_whatever_the_present_epoch_is() {
    let first = Rig::new().await;
    lose(&first, 20).await;
    let mut rig = first.restart().await;
    let Ownership { partition, epoch, nonce, .. } = rig.ownership;
    let gone = [first.ownership.epoch, epoch, epoch + 1, epoch + 9].map(|epoch| Xid {
        partition,
        epoch,
        sequence: 1,
        nonce: !nonce,
    });
    for _ in 0..2 {
        for xid in gone {
            let answer = rig.ask(xid, What::Get, Until::Now).answer().await.unwrap_err();
            assert!(matches!(answer, Error::Lost(lost) if lost == xid), "{answer:?}");
        }
        lose(&rig, 20).await;
        rig = rig.restart().await;
    }
}

/// A later owner is told apart from a lost epoch.
#[tokio::test]
async fn after_a_loss_an_xid_of_a_later_owner_is_not_lost() {
    let first = Rig::new().await;
    lose(&first, 20).await;
    let replaced = first.restart().await;
    let later = replaced.restart().await;
    let xid = later.begun().await;
    let answer = replaced.ask(xid, What::Get, Until::Now).answer().await.unwrap_err();
    assert!(matches!(answer, Error::Fenced | Error::NotHere(_) | Error::StoreSilent), "{answer:?}");
}

/// An old primary that is cut off from the others answers reads, and takes no batch.
#[tokio::test]
async fn an_owner_that_is_cut_off_does_not_call_the_xid_of_a_newer_owner_lost() {
    let first = Rig::new().await;
    lose(&first, 20).await;
    let cut_off = first.restart().await;
    let_tasks_run().await; // it has looked for what is due
    let old_primary = first.store.inner.copy();
    let newer = cut_off.restart().await;
    let xid = newer.begun().await;
    first.store.read_from(Some(old_primary));
    first.store.hold();
    let mut answer = cut_off.ask(xid, What::Get, Until::Now);
    answer.none_yet().await;
    first.store.release();
    let answer = answer.answer().await.unwrap_err();
    assert!(matches!(answer, Error::Fenced), "{answer:?}");
}

/// A batch that was sent before the read proves nothing: it may have landed before the owner was cut off.
#[tokio::test]
async fn lost_is_told_after_a_batch_that_was_sent_after_the_read() {
    let first = Rig::new().await;
    lose(&first, 20).await;
    let rig = first.restart().await;
    let known = rig.begun().await;
    rig.store.hold();
    let mut decided = rig.confirm(known); // its batch is under way
    decided.none_yet().await;
    let lost = Xid { sequence: 1000, ..known };
    let lost = Xid { epoch: first.ownership.epoch, nonce: first.ownership.nonce, ..lost };
    let before = rig.store.batches().len();
    let mut asked: Vec<_> = (0..2).map(|_| rig.ask(lost, What::Get, Until::Now)).collect();
    asked[0].none_yet().await;
    assert_eq!(rig.store.batches().len(), before);
    rig.store.release();
    for asked in asked {
        let answer = asked.answer().await.unwrap_err();
        assert!(matches!(answer, Error::Lost(xid) if xid == lost), "{answer:?}");
        assert!(rig.store.batches().len() > before);
    }
    decided.answer().await.unwrap();
}

/// While no batch lands, callers wait; no more of them than for anything else.
#[tokio::test]
async fn callers_that_wait_for_such_a_batch_are_limited() {
    let first = Rig::new().await;
    lose(&first, 20).await;
    let rig = first.restart().await;
    let Ownership { partition, epoch, nonce, .. } = first.ownership;
    let lost = |n: usize| Xid { partition, epoch, sequence: n as u64 + 1, nonce };
    rig.store.hold();
    let ask = |n: usize| rig.ask(lost(n), What::Get, Until::Now);
    let waiting = rig.fill(ask).await;
    let refused = ask(WAITING_MAX).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyCalls), "{refused:?}");
    drop(waiting);
    rig.clock.advance(Duration::from_secs(1));
    let mut asked = ask(WAITING_MAX);
    asked.none_yet().await;
    rig.store.release();
    let answer = asked.answer().await.unwrap_err();
    assert!(matches!(answer, Error::Lost(_)), "{answer:?}");
}

/// A standby has taken over and read an undecided transaction. Only then the replaced owner finds that its last batches, with
/// the decision, are lost.
#[tokio::test]
async fn a_loss_that_is_noticed_after_the_takeover_ends_the_ownership() {
    let first = Rig::new().await;
    let lost = first.begun().await;
    let standby = first.restart().await;
    assert_eq!(standby.state(lost).await, State::Trying);
    lose(&first, 20).await;
    // Its timeout passes in the memory of the standby.
    standby.clock.advance(TIMEOUT);
    standby.no_call().await;
    let answer = standby.cancel(lost).answer().await.unwrap_err();
    assert!(matches!(answer, Error::Fenced | Error::NotHere(_)), "{answer:?}");
    assert_eq!(standby.stored(lost).await.unwrap().state, State::Trying);
    let next = standby.restart().await;
    let answer = next.cancel(lost).answer().await.unwrap_err();
    assert!(matches!(answer, Error::Lost(xid) if xid == lost), "{answer:?}");
    next.no_call().await;
}

#[tokio::test]
async fn an_operator_decides_what_may_have_lost_its_decision() {
    let first = Rig::new().await;
    let (kept, other) = (first.begun().await, first.begun().await);
    let key = first.begin(keyed(7, 7)).answer().await.unwrap().global.xid;
    lose(&first, 20).await;
    let rig = first.restart().await;
    let resolve = |xid, decision| {
        let (operator, reason) = ("ann".to_owned(), "inventory has confirmed".to_owned());
        rig.ask(xid, What::ResolveTransaction { decision, operator, reason }, Until::Now)
    };
    // The key leads to a transaction of that time.
    let again = rig.begin(keyed(7, 7)).answer().await.unwrap_err();
    assert!(matches!(again, Error::Lost(xid) if xid == key), "{again:?}");
    // Due for long, they are not read again and again.
    rig.clock.advance(TIMEOUT);
    rig.no_call().await;
    let known = Known { ownership: rig.ownership, position: 0 };
    let page = rig.store.due(rig.clock.now(), None, 10, known).await.unwrap();
    assert_eq!(page, DuePage::default(), "what is lost is not looked at again");

    let confirmed = resolve(kept, Decision::Confirm).answer().await.unwrap();
    assert_eq!(confirmed.global.state, State::Confirming);
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.xid, made.call.phase), (kept, Phase::Confirm));
        made.done().await;
    }
    // A decision is final, an operator's too.
    resolve(kept, Decision::Confirm).answer().await.unwrap();
    let opposite = resolve(kept, Decision::Cancel).answer().await.unwrap_err();
    let Error::Rejected { rejection, .. } = opposite else { panic!("{opposite:?}") };
    assert_eq!(rejection, Rejection::AlreadyDecided(Decision::Confirm));
    let cancelled = resolve(other, Decision::Cancel).answer().await.unwrap();
    assert_eq!(cancelled.global.state, State::Cancelling);
    let cause = cancelled.global.cancel.as_ref().unwrap().to_string();
    assert!(cause.contains("ann, an operator: inventory has confirmed"), "{cause}");
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    // Others are decided by their initiators.
    let new = rig.begun().await;
    let answer = resolve(new, Decision::Confirm).answer().await.unwrap_err();
    let Error::Rejected { rejection: Rejection::NotLost, .. } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(rig.state(new).await, State::Trying);
}

#[tokio::test]
async fn everything_that_is_due_comes_back_page_by_page() {
    let first = Rig::new().await;
    let count = 600;
    for _ in 0..count {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
    }
    let rig = first.restart().await;
    let mut finished = BTreeMap::new();
    for _ in 0..2 * count {
        let made = rig.call().await;
        *finished.entry(made.call.xid).or_insert(0) += 1;
        made.done().await;
    }
    assert_eq!(finished.len(), count);
    assert!(finished.values().all(|calls| *calls == 2), "each branch once");
    rig.until_memory_holds(0).await;
    rig.no_call().await;
}

/// Changes of due transactions would otherwise be ahead of those of new transactions in the journal's queue.
#[tokio::test]
async fn what_is_due_comes_back_no_faster_than_it_is_done_and_new_ones_do_not_count() {
    let first = Rig::new().await;
    for _ in 0..600 {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
    }
    let rig = first.restart().await;
    rig.until_memory_holds(256).await;
    let_tasks_run().await;
    assert_eq!(rig.held.transactions(), 256);
    for _ in 0..2 * 127 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(129).await;
    for _ in 0..400 {
        rig.begun().await;
    }
    assert_eq!(rig.held.transactions(), 529);
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(528 + 128).await;
}

/// Somebody has changed the rows of its branches. There is no call left to make.
#[tokio::test]
async fn a_decided_transaction_without_an_open_branch_is_finished_by_the_next_owner() {
    for (decision, end) in
        [(Decision::Confirm, State::Confirmed), (Decision::Cancel, State::Cancelled)]
    {
        let first = Rig::new().await;
        let xid = first.begun().await;
        let decided = match decision {
            Decision::Confirm => first.confirm(xid),
            Decision::Cancel => first.cancel(xid),
        };
        let mut global = (*decided.answer().await.unwrap().global).clone();
        for branch in &mut global.branches {
            branch.state = BranchState::Acknowledged;
        }
        let mut batch = first.store.batches().last().unwrap().clone();
        batch.guards[0].position += 1;
        batch.writes = vec![Write {
            before: Some(global.state),
            new_branches: global.branches.len(),
            changed_branches: BranchSet::only(0).union(BranchSet::only(1)),
            head: Head::Update,
            global: Arc::new(global),
        }];
        assert_eq!(first.store.append(&batch).await.unwrap(), Appended::Durable);

        let rig = first.restart().await;
        let finished = async {
            while rig.stored(xid).await.unwrap().state != end {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap();
        rig.until_memory_holds(0).await;
        rig.no_call().await;
    }
}

/// Retries leave memory at once when memory is short. They come back by scans, and all that are due come with the same one.
#[tokio::test]
async fn scans_for_what_has_left_memory_are_a_pause_apart() {
    let usual = Rig::new().await.settings;
    let second = Duration::from_secs(1);
    let retry = RetryPolicy { initial: second / 10, max: second / 10 };
    let rig = Rig::with(Settings { open_max: 2, retry, ..usual }).await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.fails().await;
    }
    rig.until_memory_holds(0).await;
    let scans = rig.store.dues();
    for _ in 0..9 {
        rig.clock.advance(second / 10);
        rig.no_call().await;
    }
    assert_eq!(rig.store.dues(), scans);
    rig.clock.advance(second / 10);
    rig.call().await;
}

#[tokio::test]
async fn an_orderly_end_records_what_was_waiting_for_company() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    let_tasks_run().await;
    rig.stop.cancel();
    rig.tasks.close();
    rig.tasks.wait().await;
    let stored = rig.stored(xid).await.unwrap();
    assert_eq!(stored.branches.iter().filter(|branch| branch.is_open()).count(), 1);
    let next = rig.restart().await;
    next.call().await.done().await;
    next.until_memory_holds(0).await;
    next.no_call().await;
}

#[tokio::test]
async fn what_comes_with_the_end_begins_at_the_end_and_not_when_somebody_was_last_here() {
    let rig = Rig::new().await;
    let_tasks_run().await;
    rig.clock.advance(Duration::from_secs(3600));
    let _begun = rig.begin(new(&["1", "2"]));
    rig.stop.cancel(); // both are there when the partition looks
    rig.tasks.close();
    rig.tasks.wait().await;
    let Ownership { partition, epoch, nonce, .. } = rig.ownership;
    let stored = rig.stored(Xid { partition, epoch, sequence: 1, nonce }).await.unwrap();
    assert_eq!(stored.begun_at, rig.clock.now());
}

#[tokio::test]
async fn what_leaves_during_a_look_of_several_pages_is_found_again() {
    let first = Rig::new().await;
    let count = 600;
    let mut xids = Vec::new();
    for _ in 0..count {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
        xids.push(xid);
    }
    // The next owner. Its first page has been read, and the answer is in flight.
    first.store.hold_dues(true);
    let rig = first.restart().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(15));
    *rig.script.busy.lock().unwrap() = true;
    let seen = rig.store.dues();
    while rig.store.dues() == seen {
        let_tasks_run().await;
    }
    // A caller asks for a transaction of that page. It enters memory, its participant is briefly unreachable, and it leaves
    // memory.
    rig.ask(xids[0], What::Get, Until::Now).answer().await.unwrap();
    rig.until_memory_holds(0).await;
    *rig.script.busy.lock().unwrap() = false;
    first.store.hold_dues(false);
    for _ in 0..2 * (count - 1) {
        rig.call().await.done().await;
    }
    let_tasks_run().await;
    rig.clock.advance(Duration::from_secs(16));
    let_tasks_run().await;
    rig.clock.advance(Duration::from_secs(3600 * 24));
    let_tasks_run().await;
    assert_eq!(rig.call().await.call.xid, xids[0], "nobody looks at it any more");
}

/// Retries of a dead participant are always close here, so its transactions would stay in memory for ever.
#[tokio::test]
async fn a_dead_participant_does_not_keep_the_others_out_of_memory() {
    let first = Rig::new().await;
    let mut healthy = BTreeSet::new();
    for n in 0..640 {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
        if n >= 600 {
            healthy.insert(xid);
        }
    }
    let rig = first.restart().await;
    let mut dead_calls = 0;
    for _ in 0..200 {
        let_tasks_run().await;
        let calls: Vec<_> = rig.script.calls.lock().unwrap().drain(..).collect();
        for (call, returned) in calls {
            let made = MadeCall { call, returned };
            if healthy.contains(&made.call.xid) {
                if made.call.branch == 1 {
                    healthy.remove(&made.call.xid);
                }
                made.done().await;
            } else {
                dead_calls += 1;
                made.fails().await;
            }
        }
        if healthy.is_empty() {
            break;
        }
        rig.clock.advance(Duration::from_millis(200));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(healthy.is_empty(), "{dead_calls} calls to the dead one; {} left", healthy.len());
    assert!(rig.held.transactions() <= 256);
}
