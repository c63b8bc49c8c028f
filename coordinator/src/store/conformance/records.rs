//! A recorded transaction is read back unchanged.

use handfast_proto::limits;

use super::*;

pub(super) async fn what_was_appended_comes_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(3), &["1", "2"]);
    owner.insert(&global).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());

    // One more branch; the transaction's own row does not change.
    global.apply(Event::Registered(vec![spec("3")]), NOW).unwrap();
    let write = Write { head: Head::Keep, new_branches: 2, ..updated(&global, BranchSet::EMPTY) };
    owner.append(vec![write]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());

    // The decision, a failed attempt, and the completion.
    confirm(&mut global);
    owner.append(vec![updated(&global, BranchSet::EMPTY)]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
    call(&mut global, 0, Outcome::Done { reply: None });
    call(&mut global, 1, failed(true));
    owner.append(vec![updated(&global, BranchSet::only(0).union(BranchSet::only(1)))]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
    call(&mut global, 1, Outcome::Done { reply: None });
    call(&mut global, 2, Outcome::Done { reply: None });
    assert_eq!(global.state, State::Confirmed);
    owner.append(vec![updated(&global, BranchSet::only(1).union(BranchSet::only(2)))]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
}

pub(super) async fn every_kind_of_record_comes_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let refusal = Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: "only \"2\" left".to_owned(),
        metadata: BTreeMap::from([("sku".to_owned(), "7".to_owned())]),
    };
    let causes = [
        CancelCause::Requested { reason: String::new() },
        CancelCause::Requested { reason: "no longer wanted".to_owned() },
        CancelCause::Refused { branch_id: None, refusal: refusal.clone() },
        CancelCause::Refused { branch_id: Some("2.1".parse().unwrap()), refusal },
        CancelCause::TimedOut,
        CancelCause::TryUnknown {
            branch_id: "1".parse().unwrap(),
            error: "UNAVAILABLE: …".to_owned(),
        },
        CancelCause::CoordinatorRestarted,
    ];
    let mut written = Vec::new();
    for cause in causes {
        let mut global = begun(owner.xid(0), &["1"]);
        cancel(&mut global, cause);
        written.push(global);
    }
    for drive in [Drive::Coordinator { in_order: false }, Drive::Coordinator { in_order: true }] {
        written.push(GlobalTransaction { drive, ..begun(owner.xid(1), &["1"]) });
    }
    // Any text is stored unchanged, even if it has a meaning in SQL.
    for text in
        ["'", "\\", "\\'; COMMIT; --", "a'b\"c`d", "?", "{}%", "\0\n\t\x7f\x1a", "不行 🙅", "é\\"]
    {
        let mut global = begun(owner.xid(0), &["1"]);
        text.clone_into(&mut global.name);
        global.labels.insert(text.to_owned(), text.to_owned());
        let data = bytes::Bytes::copy_from_slice(text.as_bytes());
        let payload = Some(Payload { data, content_type: text.to_owned() });
        let spec = BranchSpec { payload, carry_payload: true, ..spec("2") };
        global.apply(Event::Registered(vec![spec]), NOW).unwrap();
        cancel(&mut global, CancelCause::Requested { reason: text.to_owned() });
        written.push(global);
    }
    // A transaction without branches and labels that ends the moment it begins.
    let mut empty = begun(owner.xid(15), &[]);
    empty.labels.clear();
    confirm(&mut empty);
    assert_eq!(empty.state, State::Confirmed);
    written.push(empty);
    // The largest number of branches, with payloads to carry over, one of them empty.
    let mut large = begun(owner.xid(15), &[]);
    large
        .apply(
            Event::Registered(
                (1..=64)
                    .map(|n: u8| {
                        let data = bytes::Bytes::from(vec![n; if n == 1 { 0 } else { 1000 }]);
                        let payload =
                            Some(Payload { data, content_type: "application/json".to_owned() });
                        BranchSpec { payload, carry_payload: true, ..spec(&n.to_string()) }
                    })
                    .collect(),
            ),
            NOW,
        )
        .unwrap();
    written.push(large);
    owner.append(written.iter().map(inserted).collect()).await;
    for global in written {
        assert_eq!(owner.found(global.xid).await, global.recorded());
    }
}

pub(super) async fn a_result_is_kept_as_it_was_decided(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let confirm_with = |global: &mut GlobalTransaction, data: Vec<u8>| {
        let tried = global.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
        let content_type = "application/json".to_owned();
        let result = Some(Box::new(Payload { data: data.into(), content_type }));
        let event = Event::DecisionRequested(DecisionRequest::Confirm { tried, result });
        global.apply(event, NOW + Duration::from_secs(1)).unwrap();
    };
    // In one batch: some have a result, the largest one and an empty one, and others have none.
    let mut written: Vec<_> = (0..70).map(|n| begun(owner.xid(n % 16), &["1"])).collect();
    owner.append(written.iter().map(inserted).collect()).await;
    for (n, global) in written.iter_mut().enumerate() {
        match n % 3 {
            0 => confirm(global),
            1 => confirm_with(global, vec![b'\''; limits::RESULT_BYTES_MAX]),
            _ => confirm_with(global, Vec::new()),
        }
    }
    // Begun and decided between two batches.
    for n in 0..3_u8 {
        let mut global = begun(owner.xid(1), &["1"]);
        if n > 0 {
            confirm_with(&mut global, vec![n]);
        } else {
            confirm(&mut global);
        }
        owner.insert(&global).await;
        written.push(global);
    }
    let decided = written[..70].iter().map(|global| updated(global, BranchSet::EMPTY));
    owner.append(decided.collect()).await;
    for global in &written {
        assert_eq!(owner.found(global.xid).await, global.recorded());
        assert_eq!(global.recorded().result, global.result);
    }
    // Later writes leave it as it is.
    for global in &mut written {
        call(global, 0, failed(false));
    }
    owner.append(written.iter().map(|global| updated(global, BranchSet::only(0))).collect()).await;
    for global in &mut written {
        call(global, 0, Outcome::Done { reply: None });
    }
    let finished = |global| Write { head: Head::Finish, ..updated(global, BranchSet::only(0)) };
    owner.append(written.iter().map(finished).collect()).await;
    for global in &written {
        assert_eq!(owner.found(global.xid).await, global.recorded());
    }
}

pub(super) async fn many_changes_of_one_batch_come_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut written: Vec<_> = (0..150).map(|n| begun(owner.xid(n % 16), &["1", "2"])).collect();
    owner.append(written.iter().map(inserted).collect()).await;
    // Most transactions differ only in their times, some in more.
    for (n, global) in written.iter_mut().enumerate() {
        let tried = global.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
        let request = match n % 10 {
            0 => DecisionRequest::Cancel(CancelCause::TimedOut),
            1 => DecisionRequest::Cancel(CancelCause::Requested { reason: format!("{n} of them") }),
            _ => DecisionRequest::Confirm { tried, result: None },
        };
        let at = NOW + Duration::from_millis(n as u64 / 5);
        global.apply(Event::DecisionRequested(request), at).unwrap();
        call(global, 0, failed(n % 7 == 0));
    }
    let both = BranchSet::only(0).union(BranchSet::only(1));
    owner.append(written.iter().map(|global| updated(global, both)).collect()).await;
    for global in &written {
        assert_eq!(owner.found(global.xid).await, global.recorded());
    }
    // Finishing a transaction changes only a few columns.
    for global in &mut written {
        call(global, 0, Outcome::Done { reply: None });
        call(global, 1, Outcome::Done { reply: None });
    }
    let finished = |global| Write { head: Head::Finish, ..updated(global, both) };
    owner.append(written.iter().map(finished).collect()).await;
    for global in &written {
        assert_eq!(owner.found(global.xid).await, global.recorded());
    }
}

pub(super) async fn resolved_branches_are_remembered(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(2), &["1", "2"]);
    confirm(&mut global);
    owner.insert(&global).await;
    call(&mut global, 0, Outcome::Done { reply: None });
    let resolution =
        Resolution { operator: "ann".to_owned(), reason: "booked by hand".to_owned(), at: NOW };
    let event = Event::Resolved { branch_id: "2".parse().unwrap(), resolution };
    let change = global.apply(event, NOW + Duration::from_secs(3)).unwrap();
    assert!(matches!(global.branches[1].state, BranchState::Resolved(_)));
    owner.append(vec![updated(&global, change.branches.union(BranchSet::only(0)))]).await;
    assert_eq!(owner.found(global.xid).await, global.recorded());
    let known = owner.known(global.xid.partition);
    let resolved = store.resolved(global.xid, known).await.unwrap();
    assert_eq!(resolved, [("2".parse().unwrap(), Decision::Confirm)]);
    let another = store.resolved(owner.xid(2), known).await.unwrap();
    assert_eq!(another, []);
    let newer = Known { position: known.position + 1, ..known };
    assert!(matches!(store.resolved(global.xid, newer).await, Err(Error::Old(_))));
}
