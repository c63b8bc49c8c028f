//! Transactions whose Trys are called by the coordinator.

use super::*;

#[tokio::test]
async fn the_coordinator_can_run_it_all() {
    let shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let handfast = shop.coordinator.handfast();
    let execute = |key: &str, from_west: i64| {
        let builder = handfast.execute("order").idempotency_key(key).in_order();
        builder.call::<Deduct>(&east, &Json(3)).call::<Deduct>(&west, &Json(from_west)).run()
    };
    let done = execute("a", 2).await.unwrap();
    assert!(done.completed);
    assert_eq!(done.reply::<Deduct>(0).unwrap(), Some(Json(7)));
    assert_eq!(done.reply::<Deduct>(1).unwrap(), Some(Json(8)));
    assert_eq!(shop.stocks().await, CONFIRMED);
    // A repeat does not run again, and returns no replies.
    let again = execute("a", 2).await.unwrap();
    assert_eq!((again.xid, again.reply::<Deduct>(0).unwrap()), (done.xid, None));
    assert_eq!(shop.stocks().await, CONFIRMED);
    // The same key with other arguments is a different order, and is refused.
    let other = execute("a", 1).await.unwrap_err();
    assert!(matches!(other, TransactionError::NotBegun { .. }), "{other:?}");
    // A participant refuses.
    let error = execute("b", 9).await.unwrap_err();
    let TransactionError::Refused { branch_id, refusal, .. } = error else { panic!("{error:?}") };
    assert_eq!((branch_id.unwrap().as_str(), refusal.reason.as_str()), ("2", "OUT_OF_STOCK"));
    shop.until(CONFIRMED).await;
}

#[tokio::test]
async fn what_the_coordinator_runs_survives_lost_answers_and_not_its_own_death() {
    let mut shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let handfast = shop.coordinator.handfast();
    let execute = |key: &str| {
        let builder = handfast.execute("order").idempotency_key(key);
        builder.call::<Deduct>(&east, &Json(3)).call::<Deduct>(&west, &Json(2))
    };
    // Trys whose answers were lost are retried once the clock has moved.
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::AnswerLost, Fault::Unavailable]);
    let running = tokio::spawn(execute("a").run());
    while !running.is_finished() {
        shop.coordinator.advance(Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let done = running.await.unwrap().unwrap();
    shop.confirmed(done.xid).await;
    // A coordinator that was killed in phase one cancels after its restart. A repeated call gets that outcome.
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::None, Fault::Silence]);
    let running = tokio::spawn(execute("b").run());
    while shop.stocks().await == CONFIRMED {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    shop.coordinator.restart().await;
    let error = running.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("restarted"), "{error}");
    shop.until(CONFIRMED).await;
}

#[tokio::test]
async fn the_coordinator_gives_a_try_the_time_that_its_contract_says() {
    let db = Database::new(SCHEMA).await;
    // Longer than this coordinator's default call timeout; the contract sets a longer one.
    let warehouse = participant("warehouse", &db, Counting(Duration::from_secs(1))).await;
    let coordinator = Coordinator::start([warehouse]).await;
    let execute = coordinator.handfast().execute("inventory").until_decided();
    execute.call::<Slow>(&coordinator.remote("warehouse"), &()).run().await.unwrap();
}
