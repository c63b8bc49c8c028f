//! A repeat gets the first run's value back, if the program has asked for it.

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Receipt {
    number: u64,
    left: i64,
}

/// Deducts three pieces and returns a receipt.
async fn order(shop: &Shop, number: u64) -> Result<Confirmed<Receipt>, TransactionError> {
    let (east, _) = shop.remotes();
    let order = shop.order().idempotency_key("a");
    order
        .run_and_remember(async |global| {
            let left = global.call::<Deduct>(&east, Json(3)).await?.0;
            Ok(Receipt { number, left })
        })
        .await
}

#[tokio::test]
async fn a_repeat_gets_the_value_of_the_first_run() {
    let mut shop = Shop::new(streams()).await;
    let first = order(&shop, 1).await.unwrap();
    assert_eq!(first.value, Some(Receipt { number: 1, left: 7 }));
    assert_eq!(order(&shop, 2).await.unwrap().value, first.value);
    shop.coordinator.finished(first.xid).await;
    shop.coordinator.restart().await;
    let again = order(&shop, 3).await.unwrap();
    assert_eq!((again.xid, again.value), (first.xid, first.value));
    // A run that does not ask for it gets the outcome only.
    let plain = shop.order().idempotency_key("a").run(async |_| Ok(0)).await.unwrap();
    assert_eq!((plain.xid, plain.value), (first.xid, None));
}

#[tokio::test]
async fn of_two_runs_at_the_same_time_both_get_the_same_value() {
    for _ in 0..8 {
        let shop = Shop::new(streams()).await;
        let (one, two) = tokio::join!(order(&shop, 1), order(&shop, 2));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!(one.xid, two.xid);
        assert!(one.value.is_some());
        assert_eq!(one.value, two.value);
    }
}

#[tokio::test]
async fn a_run_whose_answer_was_lost_gets_its_value_with_the_repeat() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let patience = Duration::from_millis(300);
    let run = shop.order().idempotency_key("a").patience(patience);
    let error = run
        .run_and_remember(async |global| {
            let left = global.call::<Deduct>(&east, Json(3)).await?.0;
            shop.coordinator.delay_store(Duration::from_secs(1));
            Ok(Receipt { number: 1, left })
        })
        .await
        .unwrap_err();
    let TransactionError::Unknown { xid: Some(xid), .. } = error else { panic!("{error:?}") };
    shop.coordinator.delay_store(Duration::ZERO);
    assert_eq!(shop.coordinator.finished(xid).await, Outcome::Confirmed { completed: true });
    let again = order(&shop, 2).await.unwrap();
    assert_eq!((again.xid, again.value), (xid, Some(Receipt { number: 1, left: 7 })));
}

#[tokio::test]
async fn a_value_that_cannot_be_kept_cancels_before_the_decision() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    // As JSON, it has two quotation marks more.
    let long = |bytes: usize| {
        let order = shop.order().idempotency_key(format!("{bytes} bytes"));
        let east = &east;
        order.run_and_remember(async move |global| {
            global.call::<Deduct>(east, Json(3)).await?;
            Ok("x".repeat(bytes))
        })
    };
    let error = long(4095).await.unwrap_err();
    let TransactionError::Cancelled { xid, .. } = &error else { panic!("{error:?}") };
    assert!(error.to_string().contains("has 4097 bytes as JSON, and may have 4096"), "{error}");
    let Outcome::Cancelled { reason, .. } = shop.coordinator.finished(*xid).await else {
        panic!("not cancelled")
    };
    assert!(reason.contains("4097 bytes"), "{reason}");
    assert_eq!(shop.stocks().await, UNTOUCHED);
    // JSON has no float that is no number, and a map's keys are texts there.
    let nan = shop.order().idempotency_key("nan").run_and_remember(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        Ok(f64::NAN)
    });
    let pairs = shop.order().idempotency_key("pairs").run_and_remember(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        Ok(std::collections::BTreeMap::from([((1, 2), 3)]))
    });
    for error in [nan.await.unwrap_err(), pairs.await.unwrap_err()] {
        assert!(matches!(error, TransactionError::Cancelled { .. }), "{error:?}");
        assert!(error.to_string().contains("its value cannot be kept"), "{error}");
    }
    // The largest one is kept.
    assert_eq!(long(4094).await.unwrap().value.unwrap().len(), 4094);
    assert_eq!(long(4094).await.unwrap().value.unwrap().len(), 4094);
}

#[tokio::test]
async fn a_kept_value_of_another_type_is_confirmed_and_told_as_unreadable() {
    let shop = Shop::new(streams()).await;
    let first = order(&shop, 1).await.unwrap();
    let key = || shop.order().idempotency_key("a");
    let again = key().run_and_remember(async |_| Ok(0_u8)).await.unwrap();
    assert_eq!((again.xid, again.value), (first.xid, None));
    let unreadable = again.unreadable.unwrap();
    assert!(unreadable.contains("cannot be read back"), "{unreadable}");
    // A run that has kept none is told apart.
    let plain = shop.order().idempotency_key("b").run(async |_| Ok(0)).await.unwrap();
    let again = shop.order().idempotency_key("b").run_and_remember(async |_| Ok(0)).await.unwrap();
    assert_eq!((again.xid, again.value, again.unreadable), (plain.xid, None, None));
}

#[tokio::test]
async fn without_a_key_nothing_is_kept() {
    let shop = Shop::new(streams()).await;
    let run = shop.order().run_and_remember(async |_| Ok("x".repeat(5000))).await.unwrap();
    assert_eq!(run.value.unwrap().len(), 5000);
}
