//! A batch is applied exactly once, as a whole, or not at all.

use super::*;

pub(super) async fn batches_that_may_come_at_a_time_are_not_in_each_others_way(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let at_a_time = store.batches_at_a_time();
    for _ in 0..20 {
        let mut written: Vec<Vec<_>> = (0..at_a_time)
            .map(|remainder| {
                let partitions = (0..PARTITIONS).filter(|n| n % at_a_time == remainder);
                let keyed = partitions.map(|partition| {
                    let mut global = begun(owner.xid(partition), &["1", "2"]);
                    global.key = Some(Key { hash: rand::random(), digest: [8; 32] });
                    global
                });
                keyed.collect()
            })
            .collect();
        for round in 0..2 {
            let batches: Vec<_> = (written.iter())
                .map(|globals| {
                    let write = |global| match round {
                        0 => inserted(global),
                        _ => updated(global, BranchSet::EMPTY),
                    };
                    owner.batch(globals.iter().map(write).collect())
                })
                .collect();
            let appended = batches.iter().map(|batch| store.append(batch));
            for appended in futures_util::future::join_all(appended).await {
                assert_eq!(appended.unwrap(), Appended::Durable);
            }
            for global in written.iter_mut().flatten() {
                assert_eq!(owner.found(global.xid).await, global.recorded());
                if round == 0 {
                    confirm(global);
                }
            }
        }
    }
}

pub(super) async fn a_batch_is_applied_once_however_often_it_is_appended(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (one, two) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    // The answer to COMMIT is lost: append the same batch again until there is an answer.
    let batch = owner.batch(vec![inserted(&one), inserted(&two)]);
    for _ in 0..3 {
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
    }
    let mut one = one;
    confirm(&mut one);
    owner.append(vec![updated(&one, BranchSet::EMPTY)]).await;
    assert_eq!(owner.found(one.xid).await, one.recorded());
    // A late repeat, after the next batch, changes nothing and is reported.
    assert!(matches!(store.append(&batch).await, Ok(Appended::Damaged(_))));
    assert_eq!(owner.found(one.xid).await, one.recorded());
}

pub(super) async fn a_batch_that_does_not_follow_is_an_alarm(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (global, other) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    let mut batch = owner.batch(vec![inserted(&global), inserted(&other)]);
    let damaged = async |batch: &Batch| match store.append(batch).await.unwrap() {
        Appended::Damaged(damaged) => damaged,
        applied @ (Appended::Durable | Appended::Fenced(_)) => panic!("{applied:?}"),
    };
    let only = |damaged: &[Damage]| {
        assert_eq!(damaged.len(), 1, "{damaged:?}");
        assert_eq!(damaged[0].partition, 1);
        damaged[0].clone()
    };
    let fitting = batch.guards[0];
    batch.guards[0] = Guard { nonce: !fitting.nonce, ..fitting }; // somebody else has, elsewhere
    let damage = only(&damaged(&batch).await);
    assert!(damage.what.contains("another history"), "{damage:?}");
    assert_eq!(damage.lost, 0);
    batch.guards[0] = fitting;
    assert!(matches!(owner.load(global.xid).await.unwrap(), Lookup::Absent { lost: false, .. }));

    batch.guards[0] = Guard { position: 3, ..fitting }; // numbers 1 and 2 were acknowledged, and are gone
    let damage = only(&damaged(&batch).await);
    assert_eq!(damage.lost, 2);
    assert!(damage.what.contains("lost 2 batches"), "{damage:?}");
    assert!(matches!(owner.load(other.xid).await.unwrap(), Lookup::Absent { lost: false, .. }));
    // The other partition's part of the batch can still be applied.
    let rest = Batch { guards: vec![batch.guards[1]], writes: vec![batch.writes[1].clone()] };
    assert_eq!(store.append(&rest).await.unwrap(), Appended::Durable);
    // From now on, a missing transaction of that epoch is no longer reported as never recorded, whoever the owner is. One of
    // the next epoch still is.
    let mut next = Owner::of(store).await;
    assert!(matches!(next.load(global.xid).await.unwrap(), Lookup::Absent { lost: true, .. }));
    let unknown = next.xid(1);
    assert!(matches!(next.load(unknown).await.unwrap(), Lookup::Absent { lost: false, .. }));
    // The next owner also knows that decisions of that epoch may be lost.
    assert_eq!(next.ownership(1).lost_through, Some(owner.ownership(1).epoch));
    assert_eq!(next.ownership(2).lost_through, None);
    // A later loss leaves the oldest lossy epoch as it is.
    let mut batch = next.batch(vec![inserted(&begun(unknown, &["1"]))]);
    batch.guards[0].position += 2;
    assert!(matches!(store.append(&batch).await.unwrap(), Appended::Damaged(_)));
    let last = Owner::of(store).await.ownership(1);
    assert_eq!(last.lost_from, Some(owner.ownership(1).epoch));
    assert_eq!(last.lost_through, Some(next.ownership(1).epoch));
}

pub(super) async fn a_takeover_that_is_missing_is_a_loss_too(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let global = begun(owner.xid(1), &["1"]);
    let mut batch = owner.batch(vec![inserted(&global)]);
    // A later owner has recorded two batches on a server that is gone. This server has never heard of its takeover.
    let Guard { epoch, nonce, .. } = batch.guards[0];
    batch.guards[0] = Guard { partition: 1, epoch: epoch + 1, nonce: !nonce, position: 3 };
    assert!(matches!(store.append(&batch).await.unwrap(), Appended::Damaged(_)));
    let next = Owner::of(store).await;
    assert_eq!(next.ownership(1).lost_through, Some(epoch));
    assert!(matches!(next.load(global.xid).await.unwrap(), Lookup::Absent { lost: true, .. }));
    // Even if that owner has recorded nothing: its takeover came after batches of the owner before, which may be gone as well.
    let Ownership { epoch, nonce, .. } = next.ownership(2);
    let guards = vec![Guard { partition: 2, epoch: epoch + 1, nonce: !nonce, position: 1 }];
    let appended = store.append(&Batch { guards, writes: Vec::new() }).await.unwrap();
    let Appended::Damaged(damaged) = appended else { panic!("{appended:?}") };
    assert_eq!(damaged[0].lost, 1, "{damaged:?}");
    assert_eq!(Owner::of(store).await.ownership(2).lost_through, Some(epoch));
}

/// A second line of defence: whatever an owner believes, it cannot change one decision into the other.
/// A batch is recorded as a whole or not at all.
pub(super) async fn half_of_a_batch_is_an_alarm(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (global, other) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    let batch = owner.batch(vec![inserted(&global), inserted(&other)]);
    let half =
        |n: usize| Batch { guards: vec![batch.guards[n]], writes: vec![batch.writes[n].clone()] };
    assert_eq!(store.append(&half(0)).await.unwrap(), Appended::Durable);
    let Ok(Appended::Damaged(damaged)) = store.append(&batch).await else {
        panic!("both partitions were to be named")
    };
    let partitions: Vec<_> = damaged.iter().map(|damage| damage.partition).collect();
    assert_eq!(partitions, [1, 2], "nobody can say which one is wrong");
    assert!(damaged[0].what.contains("half of the batch is recorded"), "{damaged:?}");
    assert_eq!(store.append(&half(1)).await.unwrap(), Appended::Durable, "nothing was changed");
}

pub(super) async fn a_change_of_what_is_not_as_it_is_said_to_be_is_an_alarm(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let key = |first: u8| Some(Key { hash: [first; 32], digest: [0; 32] });
    let mut recorded = begun(owner.xid(1), &["1", "2"]);
    recorded.key = key(1);
    confirm(&mut recorded);
    owner.insert(&recorded).await;
    let trying = GlobalTransaction { key: key(1), ..begun(recorded.xid, &["1", "2"]) };
    let mut cancelled = trying.clone();
    cancel(&mut cancelled, CancelCause::TimedOut);
    let mut registered = trying.clone();
    registered.apply(Event::Registered(vec![spec("3")]), NOW).unwrap();
    let mut failed_once = recorded.clone();
    call(&mut failed_once, 0, failed(false));
    let with_one =
        GlobalTransaction { branches: failed_once.branches[..1].to_vec(), ..failed_once.clone() };
    let mut unknown = begun(owner.xid(1), &["1"]);
    confirm(&mut unknown);
    let again = GlobalTransaction { key: None, ..trying.clone() };
    let same_key = GlobalTransaction { key: key(1), ..begun(owner.xid(1), &["1"]) };
    let before = |state: State, write: Write| Write { before: Some(state), ..write };
    let keep = |write: Write| Write { head: Head::Keep, new_branches: 2, ..write };
    let none = BranchSet::EMPTY;
    let writes = [
        ("a decision over the other one", before(State::Trying, updated(&cancelled, none))),
        (
            "a registration after the decision",
            before(State::Trying, keep(updated(&registered, none))),
        ),
        (
            "a failed attempt of the other decision",
            before(State::Cancelling, updated(&failed_once, BranchSet::only(0))),
        ),
        (
            "one with fewer branches",
            before(State::Confirming, updated(&with_one, BranchSet::only(0))),
        ),
        ("one that is not recorded", before(State::Trying, updated(&unknown, none))),
        ("one that is new, and recorded", inserted(&again)),
        ("a key that is taken", inserted(&same_key)),
    ];
    for (what, write) in writes {
        let other = begun(owner.xid(2), &["1"]);
        let batch = owner.batch(vec![inserted(&other), write.clone()]);
        let Appended::Damaged(damaged) = store.append(&batch).await.unwrap() else {
            panic!("{what}")
        };
        let [Damage { partition: 1, what: told, lost: 0 }] = &damaged[..] else {
            panic!("{damaged:?}")
        };
        assert!(told.contains(&write.global.xid.to_string()), "{what}: {told}");
        assert_eq!(owner.found(recorded.xid).await, recorded.recorded(), "{what}");
        // The other transaction's partition is not blamed, and the transaction was not written either.
        assert!(matches!(owner.load(other.xid).await.unwrap(), Lookup::Absent { .. }), "{what}");
        let of_2 = |guard: &&Guard| guard.partition == 2;
        let guards = batch.guards.iter().filter(of_2).copied().collect();
        let rest = Batch { guards, writes: vec![inserted(&other)] };
        assert_eq!(store.append(&rest).await.unwrap(), Appended::Durable, "{what}");
        owner.give_up(1);
    }
}

pub(super) async fn several_changes_that_are_written_as_one_go_by_the_first(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(1), &["1"]);
    owner.insert(&global).await;
    // Registered, decided and finished in a single write.
    global.apply(Event::Registered(vec![spec("2")]), NOW).unwrap();
    confirm(&mut global);
    call(&mut global, 0, Outcome::Done { reply: None });
    call(&mut global, 1, Outcome::Done { reply: None });
    let write = Write { new_branches: 1, ..updated(&global, BranchSet::EMPTY) };
    owner.append(vec![write]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
}

/// Polls `call` this many times, then drops it.
async fn given_up_after(polls: usize, call: impl Future) {
    let (mut call, mut left) = (std::pin::pin!(call), polls);
    std::future::poll_fn(|context| {
        left -= 1;
        let ended = call.as_mut().poll(context).is_ready() || left == 0;
        if ended { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// The caller may go away at any moment, because its deadline passed or its client was killed.
pub(super) async fn calls_that_are_given_up_leave_the_store_working(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut globals = Vec::new();
    let all = ListFilter::of(Show::All);
    for polls in 1..=30 {
        let global = begun(owner.xid(1), &["1"]);
        let batch = owner.batch(vec![inserted(&global)]);
        given_up_after(polls, store.append(&batch)).await;
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable, "{polls} polls");
        given_up_after(polls, owner.load(global.xid)).await;
        given_up_after(polls, store.list(&all, 10)).await;
        given_up_after(polls, store.find_keys(&[[0; 32], [1; 32]], owner.known(1))).await;
        given_up_after(polls, store.purge(owner.ownership(1), NOW, NOW, None, 10)).await;
        globals.push(global);
    }
    let reads = globals.iter().map(|global| owner.found(global.xid));
    let found = futures_util::future::join_all(reads).await;
    assert_eq!(found, globals.iter().map(GlobalTransaction::recorded).collect::<Vec<_>>());
}
