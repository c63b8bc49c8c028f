//! Old transactions are deleted, and the store remembers how far it went.

use super::*;

pub(super) async fn the_purge_takes_what_finished_and_remembers_how_far_it_went(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut xids = Vec::new();
    for n in 0..5_u8 {
        let mut global = begun(owner.xid(2), &["1"]);
        global.key = Some(Key { hash: [n; 32], digest: [n; 32] });
        if n != 1 {
            cancel(&mut global, CancelCause::TimedOut);
            call(&mut global, 0, Outcome::Done { reply: None });
            global.finished_at = Some(NOW + Duration::from_secs(n.into()));
        }
        owner.insert(&global).await;
        xids.push(global.xid);
    }
    // Transactions 0, 2 and 3 finished before the limit, 1 is open, and 4 is too young.
    let before = NOW + Duration::from_secs(4);
    let (mut deleted, mut after) = (0, None);
    loop {
        let (count, next) =
            store.purge(owner.ownership(2), before, before, after, 2).await.unwrap();
        deleted += count;
        after = next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(deleted, 3);
    for n in [1, 4] {
        assert!(matches!(owner.load(xids[n]).await.unwrap(), Lookup::Found(_)));
    }
    for n in [0, 2, 3] {
        let Lookup::Absent { purged_through, .. } = owner.load(xids[n]).await.unwrap() else {
            panic!("{n} is there")
        };
        assert_eq!(purged_through, Some(xids[3]));
    }
    let keys: Vec<_> = (0..5).map(|n| [n; 32]).collect();
    assert_eq!(
        store.find_keys(&keys, owner.known(2)).await.unwrap(),
        [None, Some(xids[1]), None, None, Some(xids[4])]
    );
    assert_eq!(
        store.purge(owner.ownership(2), before, before, None, 100).await.unwrap(),
        (0, None)
    );
    // The mark of the largest deleted xid never goes back.
    let mut old = begun(Xid { sequence: 0, ..xids[0] }, &[]);
    confirm(&mut old);
    old.finished_at = Some(NOW);
    owner.insert(&old).await;
    assert_eq!(
        store.purge(owner.ownership(2), before, before, None, 100).await.unwrap(),
        (1, None)
    );
    let Lookup::Absent { purged_through, .. } = owner.load(old.xid).await.unwrap() else {
        panic!("it is there")
    };
    assert_eq!(purged_through, Some(xids[3]));
}

pub(super) async fn only_the_owner_purges(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(2), &[]);
    confirm(&mut global);
    owner.insert(&global).await;
    let later = NOW + Duration::from_secs(60);
    let next = Owner::of(store).await;
    assert_eq!(store.purge(owner.ownership(2), later, later, None, 100).await.unwrap(), (0, None));
    assert_eq!(next.found(global.xid).await, global.recorded());
    assert_eq!(store.purge(next.ownership(2), later, later, None, 100).await.unwrap(), (1, None));
}

/// The clock was ahead for a time. Transactions that began then have future times, and must not hide old ones.
pub(super) async fn what_began_in_the_future_does_not_stop_the_purge(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let year = Duration::from_secs(365 * 24 * 3600);
    for _ in 0..5 {
        let mut ahead = begun(owner.xid(2), &[]);
        confirm(&mut ahead);
        (ahead.begun_at, ahead.finished_at) = (NOW + year, Some(NOW + year));
        owner.insert(&ahead).await;
    }
    let mut old = begun(owner.xid(2), &[]);
    confirm(&mut old);
    old.finished_at = Some(NOW);
    owner.insert(&old).await;
    let (before, now) = (NOW + Duration::from_secs(1), NOW + Duration::from_secs(3600));
    let (mut deleted, mut after, mut steps) = (0, None, 0);
    loop {
        let (count, next) = store.purge(owner.ownership(2), before, now, after, 2).await.unwrap();
        (deleted, after, steps) = (deleted + count, next, steps + 1);
        if after.is_none() || steps == 10 {
            break;
        }
    }
    assert_eq!(deleted, 1);
    assert!(matches!(owner.load(old.xid).await.unwrap(), Lookup::Absent { .. }));
}
