//! Idempotency keys: one key is one transaction, however often and by whichever process it is run.

use super::*;

#[tokio::test]
async fn without_a_coordinator_nobody_knows_what_a_key_led_to() {
    let mut shop = Shop::new(streams()).await;
    let done = shop.run(shop.order().idempotency_key("a"), 2).await.unwrap();
    let handfast = shop.coordinator.handfast();
    shop.coordinator.kill();
    let patience = Duration::from_secs(5);
    let order =
        || handfast.transaction("order").idempotency_key("a").until_decided().patience(patience);
    let error = shop.run(order(), 2).await.unwrap_err();
    let TransactionError::Unknown { xid: None, idempotency_key, .. } = &error else {
        panic!("a customer would be told that what was confirmed is not: {error:?}")
    };
    assert_eq!(idempotency_key.as_deref(), Some("a"));
    shop.coordinator.restart().await;
    assert_eq!(shop.run(order(), 2).await.unwrap().xid, done.xid);
}

#[tokio::test]
async fn a_begin_without_an_answer_may_have_begun_what_its_key_leads_to() {
    let mut shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let order = shop.order().idempotency_key("a").timeout(Duration::from_millis(300));
    let error = order
        .run(async |global| {
            // The key has already been looked up. From now on, the coordinator does not respond.
            shop.coordinator.kill();
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(global.call::<Deduct>(&east, Json(3)).await?)
        })
        .await
        .unwrap_err();
    assert!(matches!(error, TransactionError::Unknown { .. }), "{error:?}");
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn the_same_key_runs_once() {
    let mut shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let runs = AtomicUsize::new(0);
    let order = |key: &str, n: i64| {
        let (runs, east) = (&runs, &east);
        shop.order().idempotency_key(key).run(async move |global| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok(global.call::<Deduct>(east, Json(n)).await?.0)
        })
    };
    let first = order("a", 3).await.unwrap();
    let again = order("a", 3).await.unwrap();
    assert_eq!((first.xid, first.value, again.value), (again.xid, Some(7), None));
    assert_eq!(runs.load(Ordering::Relaxed), 1, "the closure ran again");
    // A refusal is final too, and a repeat reports it again.
    for _ in 0..2 {
        let error = order("b", 11).await.unwrap_err();
        let TransactionError::Refused { refusal, .. } = &error else { panic!("{error:?}") };
        assert_eq!(refusal.reason, "OUT_OF_STOCK");
    }
    assert_eq!(runs.load(Ordering::Relaxed), 2);
    let handfast = shop.coordinator.handfast();
    assert!(matches!(handfast.outcome_of_key("a").await.unwrap(), Outcome::Confirmed { .. }));
    assert!(matches!(handfast.outcome_of_key("b").await.unwrap(), Outcome::Cancelled { .. }));
    // Also after a restart of the coordinator.
    drop(handfast);
    shop.coordinator.restart().await;
    assert_eq!(
        shop.order().idempotency_key("a").run(async |_| Ok(0)).await.unwrap().xid,
        first.xid
    );
}

#[tokio::test]
async fn two_runs_of_one_key_at_the_same_time_are_one_order() {
    let shop = Shop::new(streams()).await;
    let order = || shop.run(shop.order().idempotency_key("a"), 2);
    let (one, two) = tokio::join!(order(), order());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.xid, two.xid);
    shop.confirmed(one.xid).await;
}

#[tokio::test]
async fn a_run_that_was_cut_off_is_taken_up_by_the_next_one_with_its_key() {
    let shop = Shop::new(streams()).await;
    // The first initiator dies after its Trys. Forgetting the transaction simulates that.
    let (east, west) = shop.remotes();
    let open = shop.order().idempotency_key("a").begin().await.unwrap();
    let (one, two) =
        tokio::join!(open.call::<Deduct>(&east, Json(3)), open.call::<Deduct>(&west, Json(2)));
    one.unwrap();
    two.unwrap();
    let xid = open.xid().await.unwrap();
    std::mem::forget(open);
    let done = shop.order().idempotency_key("a").run(async |global| {
        let (one, two) = tokio::join!(
            global.call::<Deduct>(&east, Json(3)),
            global.call::<Deduct>(&west, Json(2))
        );
        Ok((one?.0, two?.0))
    });
    let done = done.await.unwrap();
    assert_eq!(
        (done.xid, done.value),
        (xid, Some((7, 8))),
        "the same transaction, the replies of its first Trys"
    );
    shop.confirmed(xid).await;
}

#[tokio::test]
async fn a_key_of_another_operation_is_not_told_confirmed() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let handfast = shop.coordinator.handfast();
    let run = async |name: &str| {
        let operation = handfast.transaction(name).idempotency_key("1042");
        operation.run(async |global| Ok(global.call::<Deduct>(&east, Json(1)).await?)).await
    };
    run("order").await.unwrap();
    let error = run("refund").await.unwrap_err();
    assert!(matches!(error, TransactionError::NotBegun { .. }), "{error:?}");
    assert!(error.to_string().contains("another operation: order"), "{error}");
}

#[tokio::test]
async fn an_impatient_second_run_that_is_dropped_leaves_the_first_alone() {
    let shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let first = shop.order().idempotency_key("a").begin().await.unwrap();
    first.call::<Deduct>(&east, Json(3)).await.unwrap();
    let tried = tokio::sync::Notify::new();
    let second = shop.order().idempotency_key("a").run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        tried.notify_one();
        std::future::pending::<()>().await;
        Ok(())
    });
    tokio::select! {
        _ = second => panic!("it never ends"),
        () = tried.notified() => {}
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.call::<Deduct>(&west, Json(2)).await.unwrap();
    first.confirm().await.unwrap();
}

#[tokio::test]
async fn what_was_executed_under_a_key_is_told_to_a_run_with_it() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let handfast = shop.coordinator.handfast();
    let executed = handfast.execute("order").idempotency_key("a").call::<Deduct>(&east, &Json(3));
    let executed = executed.run().await.unwrap();
    let order = handfast.transaction("order").idempotency_key("a");
    let told = order.run(async |global| Ok(global.call::<Deduct>(&east, Json(3)).await?)).await;
    assert_eq!(told.unwrap().xid, executed.xid, "the customer is told that nothing has happened");
}

#[tokio::test]
async fn a_key_with_other_arguments_is_told_so_before_anything_is_tried() {
    let shop = Shop::new(streams()).await;
    let order = |pieces: i64| {
        let order = shop.order().idempotency_key("a").fingerprint(&("ann", pieces));
        shop.run(order, pieces)
    };
    let first = order(2).await.unwrap();
    let again = order(2).await.unwrap();
    assert_eq!((again.xid, again.value), (first.xid, None));
    let error = order(3).await.unwrap_err();
    assert!(matches!(error, TransactionError::NotBegun { .. }), "{error:?}");
    assert!(error.to_string().contains("another fingerprint"), "{error}");
    shop.confirmed(first.xid).await;
    // The same holds for a transaction that the coordinator runs.
    let (east, _) = shop.remotes();
    let execute = |pieces: i64| {
        let execute = shop.coordinator.handfast().execute("order").idempotency_key("b");
        execute.fingerprint(&pieces).call::<Deduct>(&east, &Json(pieces)).run()
    };
    let xid = execute(1).await.unwrap().xid;
    assert_eq!(execute(1).await.unwrap().xid, xid);
    let error = execute(2).await.unwrap_err();
    assert!(matches!(error, TransactionError::NotBegun { .. }), "{error:?}");
}

#[tokio::test]
async fn of_two_orders_with_one_key_side_by_side_one_is_confirmed_and_the_other_is_told_nothing_was_tried()
 {
    for _ in 0..8 {
        let shop = Shop::new(streams()).await;
        let order = |pieces: i64| {
            let order = shop.order().idempotency_key("a").fingerprint(&pieces);
            shop.run(order, pieces)
        };
        let (one, two) = tokio::join!(order(2), order(3));
        let (done, other) = match (one, two) {
            (Ok(done), Err(other)) | (Err(other), Ok(done)) => (done, other),
            both => panic!("{both:?}"),
        };
        assert!(matches!(other, TransactionError::NotBegun { .. }), "{other:?}");
        let finished = shop.coordinator.finished(done.xid).await;
        assert_eq!(finished, Outcome::Confirmed { completed: true });
    }
}

#[tokio::test]
async fn a_key_that_no_transaction_has_is_told_apart() {
    let shop = Shop::new(streams()).await;
    let outcome = shop.coordinator.handfast().outcome_of_key("never").await.unwrap();
    assert_eq!(outcome, Outcome::KeyUnknown);
}
