//! What reads of the store return.

use super::*;

pub(super) async fn keys_lead_to_their_transactions(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(9), &["1"]);
    global.key = Some(Key { hash: [7; 32], digest: [8; 32] });
    owner.insert(&global).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
    assert_eq!(
        store.find_keys(&[[0; 32], [7; 32]], owner.known(9)).await.unwrap(),
        [None, Some(global.xid)]
    );
    assert_eq!(store.find_keys(&[], owner.known(9)).await.unwrap(), []);
}

pub(super) async fn what_is_due_comes_in_pages_and_in_order(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut expected = Vec::new();
    for n in 0..10 {
        let mut global = begun(owner.xid(5), &["1"]);
        global.expires_at = NOW + Duration::from_secs(10 - n % 5); // five moments, two of each
        expected.push((global.expires_at, global.xid));
        owner.insert(&global).await;
    }
    // One transaction of another partition, and one that is final. Neither is due.
    let other = begun(owner.xid(6), &["1"]);
    owner.insert(&other).await;
    let mut done = begun(owner.xid(5), &[]);
    confirm(&mut done);
    owner.insert(&done).await;
    expected.sort();

    let until = NOW + Duration::from_secs(9);
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.due(until, after, 3, owner.known(5)).await.unwrap();
        assert!(page.transactions.len() <= 3);
        seen.extend(page.transactions.iter().map(|global| (global.due_at().unwrap(), global.xid)));
        after = page.next;
        if after.is_none() {
            assert_eq!(page.next_due_at, Some(NOW + Duration::from_secs(10)));
            break;
        }
    }
    assert_eq!(seen, expected[..8]);
    assert_eq!(
        store.due(NOW, None, 3, owner.known(5)).await.unwrap().next_due_at,
        Some(NOW + Duration::from_secs(6))
    );
    assert_eq!(store.due(until, None, 3, owner.known(0)).await.unwrap(), DuePage::default());
}

/// A search that may not look at everything at once says how far it came, and goes on from there.
pub(super) async fn the_list_finds_labels(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut written = Vec::new();
    let labels = [
        ("order", "1042"),
        ("order", "10421"),
        ("order", "1042\",\"order\":\"7"),
        ("Order", "1042"),
        ("the order", "7"),
        ("order", "7"),
        ("say \"order\"", "\\7\\"),
        ("a\"order", "7"), // its text has that of another label at its end
        ("订单", "7%_"),
    ];
    for (n, (key, value)) in labels.into_iter().enumerate() {
        let n = u16::try_from(n).unwrap();
        let mut global = begun(owner.xid(n % 3), &["1"]);
        global.begun_at = NOW + Duration::from_secs(n.into());
        global.labels = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        global.labels.insert("customer".to_owned(), "ann".to_owned());
        owner.insert(&global).await;
        written.push(global);
    }
    let search = async |show, labels: &[(&str, &str)], looked_max| {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let labels: BTreeMap<_, _> = labels.iter().map(own).collect();
        let (mut found, mut after, mut searches) = (Vec::new(), None, 0);
        loop {
            searches += 1;
            assert!(searches < 20);
            let labels = labels.clone();
            let filter = ListFilter { labels, after, looked_max, ..ListFilter::of(show) };
            let listing = store.list(&filter, 10).await.unwrap();
            let place = |global: &GlobalTransaction| {
                written.iter().position(|written| written.xid == global.xid).unwrap()
            };
            found.extend(listing.transactions.iter().map(place));
            after = listing.looked_to;
            if after.is_none() {
                return (found, searches);
            }
        }
    };
    for (n, label) in labels.into_iter().enumerate() {
        for show in [Show::All, Show::Open] {
            assert_eq!(search(show, &[label], 100).await, (vec![n], 1), "{label:?}");
        }
        let (found, searches) = search(Show::All, &[label, ("customer", "ann")], 1).await;
        assert_eq!(found, [n], "{label:?}");
        assert!(searches > 2, "{searches}");
    }
    assert_eq!(search(Show::All, &[("customer", "ann")], 2).await.0, [8, 7, 6, 5, 4, 3, 2, 1, 0]);
    // A page that is full of what does not fit after all is not the last one.
    let label = [("order".to_owned(), "7".to_owned())];
    let mut filter = ListFilter { labels: BTreeMap::from(label), ..ListFilter::of(Show::Open) };
    let mut found = Vec::new();
    while found.is_empty() {
        let listing = store.list(&filter, 1).await.unwrap();
        found = listing.transactions;
        assert!(!found.is_empty() || listing.looked_to.is_some());
        filter.after = listing.looked_to;
    }
    assert_eq!(found[0].xid, written[5].xid);
    let none = [("order", "1042"), ("customer", "bob")];
    assert_eq!(search(Show::All, &none, 100).await, (vec![], 1));
}

pub(super) async fn the_list_shows_the_newest_that_fit(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut written = Vec::new();
    for n in 0..6_u16 {
        let mut global = begun(owner.xid(n % 3), &["1"]);
        global.begun_at = NOW + Duration::from_secs(n.into());
        if n % 2 == 0 {
            global.name = "refund".to_owned();
        }
        match n {
            0 => confirm(&mut global),
            1 => {
                confirm(&mut global);
                call(&mut global, 0, failed(true));
            }
            2 => {
                confirm(&mut global);
                call(&mut global, 0, Outcome::Done { reply: None });
            }
            _ => {}
        }
        owner.insert(&global).await;
        written.push(global);
    }
    let list = async |show, name: Option<&str>, limit| -> Vec<usize> {
        let filter = ListFilter { name: name.map(str::to_owned), ..ListFilter::of(show) };
        let found = store.list(&filter, limit).await.unwrap().transactions;
        found
            .iter()
            .map(|global| {
                let n = written.iter().position(|written| written.xid == global.xid).unwrap();
                assert_eq!(*global, written[n].recorded());
                n
            })
            .collect()
    };
    assert_eq!(list(Show::All, None, 10).await, [5, 4, 3, 2, 1, 0]);
    assert_eq!(list(Show::All, None, 2).await, [5, 4]);
    assert_eq!(list(Show::All, Some("refund"), 2).await, [4, 2]);
    assert_eq!(list(Show::Open, None, 10).await, [5, 4, 3, 1, 0]);
    // Read the list page by page.
    for (show, all) in [(Show::All, vec![5, 4, 3, 2, 1, 0]), (Show::Open, vec![5, 4, 3, 1, 0])] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let filter = ListFilter { after, ..ListFilter::of(show) };
            let mut listing = store.list(&filter, 1).await.unwrap();
            let Some(global) = listing.transactions.pop() else { break };
            after = Some(Listed::of(&global));
            seen.push(written.iter().position(|written| written.xid == global.xid).unwrap());
        }
        assert_eq!(seen, all);
    }
    assert_eq!(list(Show::Open, Some("checkout"), 10).await, [5, 3, 1]);
    assert_eq!(list(Show::Stuck(NOW, STUCK_AFTER), None, 10).await, [1]);
    let later = NOW + Duration::from_secs(200);
    assert_eq!(list(Show::Stuck(later, STUCK_AFTER), None, 10).await, [1, 0]);
    for show in [Show::Stuck(NOW, STUCK_AFTER), Show::Stuck(later, STUCK_AFTER)] {
        let Show::Stuck(now, after) = show else { unreachable!() };
        let stuck: Vec<_> = (0..6).rev().filter(|n| written[*n].is_stuck(now, after)).collect();
        assert_eq!(
            list(show, None, 10).await,
            stuck,
            "the store and the machine agree on what is stuck"
        );
    }
}

pub(super) async fn the_summary_counts(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    assert_eq!(store.summary(NOW, STUCK_AFTER).await.unwrap(), Summary::default());
    for attempts in 0..4 {
        let mut global = begun(owner.xid(0), &["1", "2"]);
        confirm(&mut global);
        call(&mut global, 1, Outcome::Done { reply: None });
        for _ in 0..attempts {
            call(&mut global, 0, failed(false));
        }
        owner.insert(&global).await;
    }
    let mut done = begun(owner.xid(0), &[]);
    confirm(&mut done);
    owner.insert(&done).await;
    let summary = Summary { open: 4, stuck: 1, oldest: Some(NOW) };
    assert_eq!(store.summary(NOW, STUCK_AFTER).await.unwrap(), summary);
}

pub(super) async fn a_read_that_is_older_than_what_is_known_is_not_believed(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(5), &["1"]);
    global.key = Some(Key { hash: [7; 32], digest: [8; 32] });
    owner.insert(&global).await;
    let until = NOW + Duration::from_secs(60);
    let unknown = Xid { sequence: 99, ..global.xid };
    let read_all = async |known: Known| {
        [
            store.load(global.xid, known).await.map(drop),
            store.load(unknown, known).await.map(drop),
            store.find_keys(&[[7; 32]], known).await.map(drop),
            store.find_keys(&[[0; 32]], known).await.map(drop),
            store.due(until, None, 3, known).await.map(drop),
            store.due(NOW, None, 3, known).await.map(drop),
        ]
    };
    let known = owner.known(5);
    for read in read_all(known).await {
        read.unwrap();
    }
    // The reader knows of one more batch than the store has, so the store is behind.
    for read in read_all(Known { position: known.position + 1, ..known }).await {
        assert!(matches!(read, Err(Error::Old(_))), "{read:?}");
    }
    // The store has not heard of our takeover yet, or shows another owner.
    for ownership in [
        Ownership { epoch: known.ownership.epoch + 1, ..known.ownership },
        Ownership { nonce: !known.ownership.nonce, ..known.ownership },
    ] {
        for read in read_all(Known { ownership, position: 0 }).await {
            assert!(matches!(read, Err(Error::Old(_))), "{read:?}");
        }
    }
    let next = Owner::of(store).await;
    for read in read_all(known).await {
        assert!(matches!(read, Err(Error::Replaced(_))), "{read:?}");
    }
    for read in read_all(next.known(5)).await {
        read.unwrap();
    }
}
