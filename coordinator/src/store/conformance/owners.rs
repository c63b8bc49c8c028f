//! Takeovers: which owner may write, and which one may not any more.

use super::*;

pub(super) async fn an_owner_that_was_replaced_changes_nothing(store: &dyn Store) {
    let mut old = Owner::of(store).await;
    let mut global = begun(old.xid(4), &["1"]);
    old.insert(&global).await;
    let mut new = Owner::of(store).await;
    // The old owner had decided to confirm, and its batch was in flight.
    let mut theirs = global.clone();
    confirm(&mut theirs);
    let late = old.batch(vec![updated(&theirs, BranchSet::EMPTY)]);
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![4]));
    assert_eq!(new.found(global.xid).await, global.recorded());
    // The new owner decides otherwise. Then the late batch arrives again.
    cancel(&mut global, CancelCause::TimedOut);
    new.append(vec![updated(&global, BranchSet::EMPTY)]).await;
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![4]));
    assert_eq!(new.found(global.xid).await, global.recorded());
}

pub(super) async fn one_fenced_partition_stops_the_whole_batch(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (one, two) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    // Only partition 2 should look taken over. All are taken over here, but the owner learns the new epoch of partition 1.
    let newer = Owner::of(store).await;
    owner.ownerships[1] = newer.ownership(1);
    let batch = owner.batch(vec![inserted(&one), inserted(&two)]);
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Fenced(vec![2]));
    assert!(
        matches!(owner.load(one.xid).await.unwrap(), Lookup::Absent { .. }),
        "half of it was applied"
    );
    // The rest of the batch, with the same number, is applied.
    let rest = Batch { guards: vec![batch.guards[0]], writes: vec![batch.writes[0].clone()] };
    assert_eq!(store.append(&rest).await.unwrap(), Appended::Durable);
    assert_eq!(owner.found(one.xid).await, one.recorded());
}

pub(super) async fn every_takeover_has_a_larger_epoch_and_a_nonce_of_its_own(store: &dyn Store) {
    let (first, second) = (Owner::of(store).await, Owner::of(store).await);
    assert_eq!(first.ownerships.len(), usize::from(PARTITIONS));
    let mut nonces = std::collections::BTreeSet::new();
    for partition in 0..PARTITIONS {
        assert_eq!(first.ownership(partition).epoch + 1, second.ownership(partition).epoch);
        nonces.extend([first.ownership(partition).nonce, second.ownership(partition).nonce]);
    }
    assert!(nonces.len() > 30, "32 random numbers, {} of them different", nonces.len());
    // The nonces of both epochs are known, so an xid from a deleted store can be told from one of this store.
    for owner in [&first, &second] {
        let Ownership { partition, epoch, nonce, .. } = owner.ownership(7);
        let absent = second.load(Xid { partition, epoch, sequence: 1, nonce }).await.unwrap();
        assert_eq!(
            absent,
            Lookup::Absent { purged_through: None, nonce: Some(nonce), lost: false }
        );
    }
    let absent = second.load(Xid { partition: 7, epoch: 99, sequence: 1, nonce: 0 }).await.unwrap();
    assert_eq!(absent, Lookup::Absent { purged_through: None, nonce: None, lost: false });
    store.release(&second.ownerships).await.unwrap();
    let third = Owner::of(store).await;
    assert_eq!(second.ownership(0).epoch + 1, third.ownership(0).epoch);
}

pub(super) async fn a_takeover_takes_the_partitions_that_it_names(store: &dyn Store) {
    let mut first = Owner::of(store).await;
    let taken = store.acquire(&[3, 1], "other", NOW).await.unwrap();
    let named: Vec<_> = taken.iter().map(|ownership| ownership.partition).collect();
    assert_eq!(named, [3, 1], "in the order in which they were named");
    for ownership in &taken {
        assert_eq!(ownership.epoch, first.ownership(ownership.partition).epoch + 1);
    }
    // The owner of the other partitions continues with them.
    let (lost, kept) = (begun(first.xid(1), &["1"]), begun(first.xid(2), &["1"]));
    let late = first.batch(vec![inserted(&lost)]);
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![1]));
    first.insert(&kept).await;
    assert_eq!(first.found(kept.xid).await, kept.recorded());

    // A release affects only the partitions that it names, and only with the named epoch and nonce.
    let other_history = Ownership { nonce: taken[1].nonce.wrapping_add(1), ..taken[1] };
    store.release(&[taken[0], first.ownership(1), other_history]).await.unwrap();
    for seat in store.seats().await.unwrap() {
        let owner = match seat.partition {
            3 => None,
            1 => Some("other".to_owned()),
            _ => Some("test".to_owned()),
        };
        assert_eq!(seat.owner, owner, "{seat:?}");
    }

    // If one of the partitions does not exist, none is taken over.
    let before = store.seats().await.unwrap();
    let error = store.acquire(&[0, PARTITIONS], "other", NOW).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
    assert_eq!(store.seats().await.unwrap(), before);
    assert_eq!(store.acquire(&[], "other", NOW).await.unwrap(), []);
    assert_eq!(store.seats().await.unwrap(), before);
    let taken = store.acquire(&[0], "other", NOW).await.unwrap();
    assert_eq!(taken[0].epoch, first.ownership(0).epoch + 1);
}

/// The next owner took over on a server that lacked the last batches. Only the previous owner can know about them.
pub(super) async fn a_loss_before_a_takeover_is_found_by_the_owner_before(store: &dyn Store) {
    let mut old = Owner::of(store).await;
    let undecided = begun(old.xid(1), &["1"]);
    old.insert(&undecided).await;
    let (gone, kept) = (begun(old.xid(1), &["1"]), begun(old.xid(2), &["1"]));
    let mut batch = old.batch(vec![inserted(&gone), inserted(&kept)]);
    batch.guards[0].position = 4; // numbers 2 and 3 of partition 1 were acknowledged, and are gone
    let mut new = Owner::of(store).await;
    assert_eq!(new.ownership(1).lost_through, None);
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Fenced(vec![1, 2]));
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Fenced(vec![1, 2]));
    // The new owner has taken over without knowing. It must not decide what it has read, so its ownership has ended.
    for seat in store.seats().await.unwrap() {
        let (ended, owner) = if seat.partition == 1 { (1, None) } else { (0, Some("test")) };
        let epoch = new.ownership(seat.partition).epoch + ended;
        assert_eq!((seat.epoch, seat.owner.as_deref()), (epoch, owner));
    }
    let late = begun(new.xid(1), &["1"]);
    let late = new.batch(vec![inserted(&late)]);
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![1]));
    assert!(matches!(new.load(gone.xid).await.unwrap_err(), Error::Replaced(_)));
    assert!(matches!(new.load(kept.xid).await.unwrap(), Lookup::Absent { lost: false, .. }));
    let next = begun(new.xid(2), &["1"]);
    new.insert(&next).await;
    assert_eq!(new.found(next.xid).await, next.recorded());

    let mut knows = Owner::of(store).await;
    assert_eq!(knows.ownership(1).lost_through, Some(old.ownership(1).epoch));
    assert_eq!(knows.ownership(1).lost_from, Some(old.ownership(1).epoch));
    assert!(matches!(knows.load(gone.xid).await.unwrap(), Lookup::Absent { lost: true, .. }));
    // What was undecided at that time is not due any more, and is listed for operators.
    let lost = ListFilter::of(Show::Lost);
    let due = store.due(undecided.expires_at, None, 10, knows.known(1)).await.unwrap();
    assert_eq!(due, DuePage::default());
    let found = store.list(&lost, 10).await.unwrap().transactions;
    assert_eq!(found, [undecided.recorded()]);
    let mut decided = undecided.clone();
    let by = Resolution { operator: "ann".to_owned(), reason: "by the fences".to_owned(), at: NOW };
    decided.apply(Event::TransactionResolved { decision: Decision::Confirm, by }, NOW).unwrap();
    knows.append(vec![updated(&decided, BranchSet::EMPTY)]).await;
    call(&mut decided, 0, failed(false));
    knows.append(vec![updated(&decided, BranchSet::only(0))]).await;
    assert_eq!(knows.found(undecided.xid).await, decided.recorded());
    assert_eq!(store.list(&lost, 10).await.unwrap().transactions, []);
}
