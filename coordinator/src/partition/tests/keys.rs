//! One idempotency key, one transaction.

use super::*;

#[tokio::test]
async fn two_begins_with_one_key_are_one_transaction() {
    let rig = Rig::new().await;
    let (one, two) = (rig.begin(keyed(7, 1)), rig.begin(keyed(7, 1)));
    let (one, two) = (one.answer().await.unwrap(), two.answer().await.unwrap());
    assert_eq!(one.global.xid, two.global.xid);
    assert_eq!((one.existed, two.existed), (false, true));
    assert_eq!(rig.store.key_looks(), [1], "asked for once, and known from then on");
    // The same key with different content.
    let other = rig.begin(keyed(7, 2)).answer().await.unwrap_err();
    assert!(matches!(other, Error::KeyTaken(xid) if xid == one.global.xid), "{other:?}");
    assert_eq!(rig.store.key_looks(), [1]);
}

#[tokio::test]
async fn a_key_is_remembered_when_its_transaction_has_left_memory_and_after_a_restart() {
    let first = Rig::new().await;
    let xid = first.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    first.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        first.call().await.done().await;
    }
    first.until_memory_holds(0).await;
    let mut rig = first;
    for _ in 0..2 {
        let again = rig.begin(keyed(7, 1)).answer().await.unwrap();
        assert_eq!(
            (again.global.xid, again.global.state, again.existed),
            (xid, State::Cancelled, true)
        );
        let other = rig.begin(keyed(7, 2)).answer().await.unwrap_err();
        assert!(matches!(other, Error::KeyTaken(taken) if taken == xid), "{other:?}");
        let found =
            rig.send(|reply| Command::FindKey { hash: [7; 32], reply }).answer().await.unwrap();
        assert_eq!(found.global.xid, xid);
        let none =
            rig.send(|reply| Command::FindKey { hash: [8; 32], reply }).answer().await.unwrap_err();
        assert!(matches!(none, Error::KeyUnknown));
        rig = rig.restart().await;
    }
}

#[tokio::test]
async fn keys_that_come_together_are_looked_up_together() {
    let rig = Rig::new().await;
    let begins: Vec<_> = (0..100).map(|n| rig.begin(keyed(n, 1))).collect();
    let mut xids = BTreeSet::new();
    for begin in begins {
        xids.insert(begin.answer().await.unwrap().global.xid);
    }
    assert_eq!(xids.len(), 100);
    assert!(rig.store.key_looks().len() <= 2, "{:?}", rig.store.key_looks());
}

#[tokio::test]
async fn a_keyed_begin_is_answered_when_it_is_durable_also_without_branches() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut begin = rig.begin(NewTransaction { branches: Vec::new(), ..keyed(7, 1) });
    begin.none_yet().await;
    rig.store.release();
    let xid = begin.answer().await.unwrap().global.xid;
    assert!(rig.stored(xid).await.is_some());
}

#[tokio::test]
async fn an_old_row_does_not_take_its_key_back() {
    let rig = Rig::new().await;
    let old = rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    rig.cancel(old).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    // A caller asks for the old transaction, and its row is read. Before the row arrives, the old transaction is purged and a
    // new one begins with its key.
    rig.store.hold_loads(true);
    let asked = rig.ask(old, What::Get, Until::Now);
    while rig.store.loads().is_empty() {
        let_tasks_run().await;
    }
    rig.store
        .purge(rig.ownership, Timestamp(i64::MAX), Timestamp(i64::MAX), None, 100)
        .await
        .unwrap();
    rig.store.hold();
    let first = rig.begin(keyed(7, 1));
    let_tasks_run().await;
    rig.store.hold_loads(false);
    asked.answer().await.unwrap();
    let_tasks_run().await;
    let second = rig.begin(keyed(7, 1));
    let_tasks_run().await;
    rig.store.release();
    assert_eq!(
        first.answer().await.unwrap().global.xid,
        second.answer().await.unwrap().global.xid,
        "one key, two transactions"
    );
}

impl Rig {
    /// Waits until so many reads of keys have begun.
    async fn until_key_looks(&self, count: usize) {
        while self.store.key_looks().len() < count {
            tokio::task::yield_now().await;
        }
    }

    /// Begins a transaction with this key, and cancels it. It has left memory then.
    async fn finished(&self, key: u8) -> Xid {
        let xid = self.begin(keyed(key, 1)).answer().await.unwrap().global.xid;
        self.cancel(xid).answer().await.unwrap();
        for _ in 0..2 {
            self.call().await.done().await;
        }
        self.until_memory_holds(0).await;
        xid
    }

    async fn purge(&self) {
        let end = Timestamp(i64::MAX);
        self.store.purge(self.ownership, end, end, None, 100).await.unwrap();
    }
}

/// Two reads of one key at a time could give an outdated answer: the key's transaction may begin and end between them.
#[tokio::test]
async fn a_key_whose_caller_gave_up_is_not_read_twice_at_a_time() {
    let rig = Rig::new().await;
    rig.store.hold_key_looks_from(Some(0));
    let given_up = rig.begin(keyed(7, 1));
    rig.until_key_looks(1).await;
    drop(given_up);
    // So many callers wait that those who gave up are forgotten.
    rig.store.hold_loads(true);
    let waiting = rig.fill(|n| rig.ask(rig.unknown(n), What::Get, Until::Now)).await;
    rig.clock.advance(Duration::from_secs(1));
    drop(rig.begin(keyed(8, 1)));
    let_tasks_run().await;
    drop(waiting);
    rig.clock.advance(Duration::from_secs(1));
    // The first read answers the next caller with this key. A second read would not see the transaction that begins now.
    rig.store.hold();
    let first = rig.begin(keyed(7, 1));
    let_tasks_run().await;
    rig.store.hold_key_looks_from(Some(1));
    let_tasks_run().await;
    rig.store.release();
    rig.store.hold_loads(false);
    let first = first.answer().await.unwrap();
    rig.cancel(first.global.xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let second = rig.begin(keyed(7, 1));
    let_tasks_run().await;
    rig.store.hold_key_looks_from(None);
    let second = second.answer().await.unwrap();
    assert_eq!((second.global.xid, second.existed), (first.global.xid, true));
}

/// The purge deletes a transaction and its key together. After that the key is free, and nothing is known of it.
#[tokio::test]
async fn a_key_whose_transaction_is_purged_after_the_key_was_read_is_read_again() {
    let rig = Rig::new().await;
    let purged = rig.finished(7).await;
    let looks = rig.store.key_looks().len();
    rig.store.hold_key_looks_from(Some(looks));
    let begin = rig.begin(keyed(7, 2));
    rig.until_key_looks(looks + 1).await;
    rig.purge().await;
    rig.store.hold_key_looks_from(None);
    let begun = begin.answer().await.unwrap();
    assert!(!begun.existed && begun.global.xid != purged);

    rig.cancel(begun.global.xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let looks = rig.store.key_looks().len();
    rig.store.hold_key_looks_from(Some(looks));
    let find = rig.send(|reply| Command::FindKey { hash: [7; 32], reply });
    rig.until_key_looks(looks + 1).await;
    rig.purge().await;
    rig.store.hold_key_looks_from(None);
    let found = find.answer().await.unwrap_err();
    assert!(matches!(found, Error::KeyUnknown), "{found:?}");
}
