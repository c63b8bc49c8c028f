//! Callers cannot make anything grow without a limit: neither the number of waiting callers nor the bytes in memory.

use super::*;

fn registered(id: &str, bytes: usize) -> BranchSpec {
    let payload = Payload { data: Bytes::from(vec![7; bytes]), content_type: String::new() };
    let mut spec = new(&[id]).branches.remove(0);
    (spec.payload, spec.carry_payload) = (Some(payload), true);
    spec
}

#[tokio::test]
async fn a_new_transaction_is_refused_when_the_open_ones_have_too_many_bytes() {
    let mut rig = Rig::new().await;
    rig.settings.open_bytes_max = 100_000;
    let rig = rig.restart().await;
    let large = NewTransaction { branches: vec![registered("1", 60_000)], ..new(&[]) };
    let one = rig.begin(large.clone()).answer().await.unwrap().global.xid;
    let two = rig.begin(large.clone()).answer().await.unwrap().global.xid;
    let refused = rig.begin(new(&[])).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyBytes { open_bytes_max: 100_000 }), "{refused:?}");
    let register = rig.ask(one, What::Register(vec![registered("2", 1)]), Until::Now);
    let refused = register.answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyBytes { .. }), "{refused:?}");
    // A decision is not refused, and frees the memory.
    rig.cancel(two).answer().await.unwrap();
    rig.call().await.done().await;
    rig.until_memory_holds(1).await;
    rig.begin(new(&[])).answer().await.unwrap();
}

#[tokio::test]
async fn bytes_in_memory_are_those_of_the_transactions_in_memory() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    let before = rig.held.bytes();
    rig.ask(xid, What::Register(vec![registered("3", 5_000)]), Until::Now).answer().await.unwrap();
    let grown = rig.held.bytes() - before;
    assert!((5_000..6_000).contains(&grown), "{grown}");
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..3 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    assert_eq!(rig.held.bytes(), 0);
}

/// While the store does not answer reads, further callers are refused above a limit. A decision is still accepted.
#[tokio::test]
async fn callers_that_wait_for_a_read_are_limited() {
    let rig = Rig::new().await;
    rig.store.hold_loads(true);
    let mut waiting = rig.fill(|n| rig.ask(rig.unknown(n), What::Get, Until::Now)).await;
    let refused =
        rig.ask(rig.unknown(WAITING_MAX), What::Get, Until::Now).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyCalls), "{refused:?}");
    let begun = rig.begin(keyed(7, 1)).answer().await.unwrap_err();
    assert!(matches!(begun, Error::TooManyCalls), "{begun:?}");
    rig.confirm(rig.unknown(1)).none_yet().await;
    // Callers that give up make room for others.
    waiting.truncate(WAITING_MAX / 2);
    rig.clock.advance(Duration::from_secs(1));
    rig.begin(keyed(7, 1)).answer().await.unwrap();
    rig.ask(rig.unknown(WAITING_MAX), What::Get, Until::Now).none_yet().await;
    rig.store.hold_loads(false);
    for waiting in waiting {
        assert!(matches!(waiting.answer().await, Err(Error::NeverRecorded(_))));
    }
}

/// The same, while the store does not answer batches.
#[tokio::test]
async fn callers_that_wait_for_durability_are_limited() {
    let mut rig = Rig::new().await;
    rig.settings.open_max = 10 * WAITING_MAX;
    let rig = rig.restart().await;
    let xid = rig.begun().await;
    rig.store.hold();
    let mut waiting = vec![rig.confirm(xid)];
    for n in 1..WAITING_MAX {
        waiting.push(rig.ask(xid, What::Get, Until::Now));
        if n % 1000 == 0 {
            let_tasks_run().await;
        }
    }
    let_tasks_run().await;
    let refused = rig.begin(keyed(7, 1)).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyCalls), "{refused:?}");
    rig.confirm(xid).none_yet().await;
    rig.store.release();
    for waiting in waiting {
        assert_eq!(waiting.answer().await.unwrap().global.state, State::Confirming);
    }
    rig.begin(keyed(7, 1)).answer().await.unwrap();
}

/// The store answers reads, but no batches. Callers whose answer needs no batch are answered, however many decisions wait.
#[tokio::test]
async fn callers_that_wait_for_durability_do_not_keep_reads_from_being_answered() {
    let rig = Rig::new().await;
    let finished = rig.begun().await;
    rig.cancel(finished).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let (known, decided) = (rig.begun().await, rig.begun().await);
    rig.store.hold();
    let waiting = rig.fill(|_| rig.confirm(decided)).await;
    let refused = rig.begin(new(&["1"])).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyCalls), "{refused:?}");
    // The answer would have to wait for the batch, too.
    let refused = rig.ask(decided, What::Get, Until::Now).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyCalls), "{refused:?}");
    assert_eq!(rig.state(known).await, State::Trying, "it is in memory, and durable");
    assert_eq!(rig.state(finished).await, State::Cancelled, "it is in the store");
    let find = rig.send(|reply| Command::FindKey { hash: [7; 32], reply });
    assert!(matches!(find.answer().await, Err(Error::KeyUnknown)));
    rig.store.release();
    for waiting in waiting {
        assert_eq!(waiting.answer().await.unwrap().global.state, State::Confirming);
    }
}

/// The reverse: the store answers batches, but no reads.
#[tokio::test]
async fn a_transaction_in_memory_is_answered_however_many_callers_wait_for_reads() {
    let rig = Rig::new().await;
    let known = rig.begun().await;
    rig.store.hold_loads(true);
    let _waiting = rig.fill(|n| rig.ask(rig.unknown(n), What::Get, Until::Now)).await;
    assert_eq!(rig.state(known).await, State::Trying);
    let register = rig.ask(known, What::Register(vec![registered("3", 1)]), Until::Now);
    register.answer().await.unwrap();
    rig.begun().await;
}
