//! What the initiator learns, and what remains in the participants' databases, whatever fails in between.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use super::{super::Fault, *};
use crate::{CallError, Phase};

mod execute;
mod keys;
mod values;

/// Whether calls share streams. This file is compiled twice, once for each value.
fn streams() -> bool {
    !module_path!().contains("without_streams")
}

#[tokio::test]
async fn an_order_that_succeeds() {
    let shop = Shop::new(streams()).await;
    let order = shop.coordinator.handfast().transaction("order").label("customer", "ann");
    let done = shop.run(order, 2).await.unwrap();
    assert_eq!((done.value, done.completed), (Some(7), true));
    assert_eq!(shop.stocks().await, CONFIRMED);
    assert_eq!(
        shop.coordinator.handfast().outcome(done.xid).await.unwrap(),
        Outcome::Confirmed { completed: true }
    );
}

#[tokio::test]
async fn a_refusal_reaches_the_initiator_as_it_was_written_and_everything_is_given_back() {
    let shop = Shop::new(streams()).await;
    let error = shop.run(shop.order(), 11).await.unwrap_err();
    let TransactionError::Refused { xid, branch_id, refusal } = error else { panic!("{error:?}") };
    assert_eq!(branch_id.unwrap().as_str(), "2");
    assert_eq!((refusal.reason.as_str(), refusal.domain.as_str()), ("OUT_OF_STOCK", "west"));
    assert_eq!(
        (refusal.message.as_str(), refusal.metadata["wanted"].as_str()),
        ("not enough on hand", "11")
    );
    let Outcome::Cancelled { reason, .. } = shop.coordinator.finished(xid).await else {
        panic!("not cancelled")
    };
    assert!(reason.contains("OUT_OF_STOCK"), "{reason}");
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn a_swallowed_refusal_still_cancels() {
    let shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        let swallowed = global.call::<Deduct>(&west, Json(11)).await;
        assert!(matches!(swallowed, Err(CallError::Refused { .. })));
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error, TransactionError::Refused { .. }), "{error:?}");
    shop.coordinator.finished(error.xid().unwrap()).await;
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn a_swallowed_unknown_still_cancels() {
    let shop = Shop::new(streams()).await;
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::None, Fault::Garbage]);
    let (east, west) = shop.remotes();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        let swallowed = global.call::<Deduct>(&west, Json(2)).await;
        assert!(matches!(swallowed, Err(CallError::Unknown { .. })), "{swallowed:?}");
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error, TransactionError::Cancelled { .. }), "{error:?}");
    assert!(error.to_string().contains("garbage"), "{error}");
    shop.coordinator.finished(error.xid().unwrap()).await;
    assert_eq!(
        shop.stocks().await,
        UNTOUCHED,
        "the Try had taken effect, and its answer was garbage"
    );
}

#[tokio::test]
async fn an_error_of_the_closure_cancels() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        Err::<(), _>("the customer is\nunderage".into())
    });
    let error = run.await.unwrap_err();
    assert!(
        matches!(&error, TransactionError::Cancelled { cause, .. } if cause.to_string().contains("underage"))
    );
    let Outcome::Cancelled { reason, .. } = shop.coordinator.finished(error.xid().unwrap()).await
    else {
        panic!()
    };
    assert_eq!(reason, "requested: the customer is underage");
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn a_call_that_is_given_up_cancels() {
    let shop = Shop::new(streams()).await;
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::None, Fault::Silence]);
    let (east, west) = shop.remotes();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        let hasty =
            tokio::time::timeout(Duration::from_millis(100), global.call::<Deduct>(&west, Json(2)))
                .await;
        assert!(hasty.is_err());
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(error.to_string().contains("abandoned"), "{error}");
    shop.coordinator.finished(error.xid().unwrap()).await;
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn phase_one_that_takes_too_long_is_cancelled() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let run = shop.order().timeout(Duration::from_millis(300)).run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        std::future::pending::<()>().await;
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error, TransactionError::TimedOut { .. }), "{error:?}");
    shop.coordinator.finished(error.xid().unwrap()).await;
    assert_eq!(shop.stocks().await, UNTOUCHED);
    // The deadline is by the coordinator's clock, not by this process's clock.
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        shop.coordinator.advance(Duration::from_secs(31));
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error, TransactionError::TimedOut { .. }), "{error:?}");
    shop.coordinator.finished(error.xid().unwrap()).await;
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn a_future_that_is_dropped_before_the_decision_cancels() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let (tried, mut xid) = tokio::sync::oneshot::channel();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        tried.send(global.xid().await?).unwrap();
        std::future::pending::<()>().await;
        Ok(())
    });
    let xid = tokio::select! {
        _ = run => panic!("it never ends"),
        xid = &mut xid => xid.unwrap(),
    };
    shop.until(UNTOUCHED).await;
    let Outcome::Cancelled { reason, .. } = shop.coordinator.finished(xid).await else { panic!() };
    assert!(
        reason.contains("gave up"),
        "its time has run out, and nobody has cancelled it: {reason}"
    );
    // The initiator is dropped while Begin is in flight.
    let run = shop.run(shop.order(), 2);
    assert!(tokio::time::timeout(Duration::ZERO, run).await.is_err());
    tokio::time::sleep(Duration::from_millis(50)).await;
    shop.until(UNTOUCHED).await;
}

#[tokio::test]
async fn a_lost_answer_to_a_try_is_asked_for_again() {
    let shop = Shop::new(streams()).await;
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::AnswerLost, Fault::Unavailable]);
    let done = shop.run(shop.order(), 2).await.unwrap();
    assert_eq!(done.value, Some(7), "the stored reply of the first Try, whose answer was lost");
    shop.confirmed(done.xid).await;
}

#[tokio::test]
async fn a_participant_that_fails_its_confirm_is_asked_until_it_does_not() {
    let shop = Shop::new(streams()).await;
    let faults =
        [Fault::Unavailable, Fault::AnswerLost, Fault::Silence, Fault::Garbage, Fault::Unavailable];
    shop.coordinator.script(Deduct::NAME, Phase::Confirm, faults);
    let order = shop.coordinator.handfast().transaction("order");
    let done = shop.run(order, 2).await.unwrap();
    assert!(!done.completed, "decided, and still on its way");
    shop.confirmed(done.xid).await;
}

#[tokio::test]
async fn a_coordinator_that_is_killed_after_the_decision_carries_it_out_when_it_is_back() {
    let mut shop = Shop::new(streams()).await;
    shop.coordinator.script(Deduct::NAME, Phase::Confirm, [Fault::Unavailable; 4]);
    let done = shop.run(shop.order(), 2).await.unwrap();
    shop.coordinator.restart().await;
    shop.confirmed(done.xid).await;
}

#[tokio::test]
async fn a_coordinator_that_is_killed_in_phase_one_does_not_disturb_the_initiator() {
    let mut shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    shop.coordinator.restart().await;
    open.call::<Deduct>(&west, Json(2)).await.unwrap();
    shop.coordinator.restart().await;
    let done = open.confirm().await.unwrap();
    shop.confirmed(done.xid).await;
}

#[tokio::test]
async fn a_coordinator_that_stays_away_leaves_the_initiator_with_an_xid_to_ask_about() {
    let mut shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let open = shop.order().patience(Duration::from_millis(300)).begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    open.call::<Deduct>(&west, Json(2)).await.unwrap();
    shop.coordinator.kill();
    let error = open.confirm().await.unwrap_err();
    let TransactionError::Unknown { xid, .. } = error else { panic!("{error:?}") };
    let xid = xid.unwrap();
    // After the restart the coordinator has no decision, because it never received one. So the transaction times out.
    shop.coordinator.restart().await;
    assert_eq!(shop.coordinator.handfast().outcome(xid).await.unwrap(), Outcome::Undecided);
    assert!(matches!(shop.coordinator.finished(xid).await, Outcome::Cancelled { .. }));
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn without_a_coordinator_nothing_is_tried() {
    let mut shop = Shop::new(streams()).await;
    shop.coordinator.kill();
    let order =
        shop.order().timeout(Duration::from_millis(300)).patience(Duration::from_millis(300));
    let error = shop.run(order, 2).await.unwrap_err();
    assert!(matches!(error, TransactionError::NotBegun { .. }), "{error:?}");
    assert_eq!(shop.stocks().await, UNTOUCHED);
}

#[tokio::test]
async fn begin_and_decide_in_different_places() {
    let shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    open.cancel("no longer wanted").await.unwrap();
    shop.until(UNTOUCHED).await;

    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    drop(open); // somebody forgot it
    shop.until(UNTOUCHED).await;

    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    open.call::<Deduct>(&west, Json(11)).await.unwrap_err();
    let error = open.confirm().await.unwrap_err();
    assert!(
        matches!(error, TransactionError::Refused { .. }),
        "confirm does not confirm what was refused: {error:?}"
    );
    shop.until(UNTOUCHED).await;
}

#[tokio::test]
async fn whoever_calls_nobody_confirms_nothing() {
    let shop = Shop::new(streams()).await;
    let done = shop.order().run(async |_| Ok("nothing to do")).await.unwrap();
    assert_eq!(done.value, Some("nothing to do"));
    assert_eq!(shop.coordinator.finished(done.xid).await, Outcome::Confirmed { completed: true });
}

#[tokio::test]
async fn what_the_coordinator_does_not_take_is_told() {
    let shop = Shop::new(streams()).await;
    let (east, _) = shop.remotes();
    let long = shop.order().idempotency_key("x".repeat(129));
    let error = long.run(async |_| Ok(())).await.unwrap_err();
    assert!(
        matches!(error, TransactionError::NotBegun { .. }) && error.to_string().contains("128"),
        "{error}"
    );
    let elsewhere = Remote::connect("east", "http://10.1.2.3:1").unwrap();
    let error = shop
        .order()
        .run(async |global| Ok(global.call::<Deduct>(&elsewhere, Json(1)).await?))
        .await;
    let error = error.unwrap_err();
    assert!(error.to_string().contains("not allowed"), "{error}");
    // The key is already used by another operation.
    let keyed = || shop.order().idempotency_key("a");
    keyed().run(async |global| Ok(global.call::<Deduct>(&east, Json(1)).await?)).await.unwrap();
    let other = shop
        .coordinator
        .handfast()
        .transaction("refund")
        .idempotency_key("a")
        .begin()
        .await
        .unwrap_err();
    assert!(other.to_string().contains("another operation"), "{other}");
    assert!(Remote::connect("east", "inventory:7001").unwrap_err().to_string().contains("http://"));
}

#[tokio::test]
async fn what_is_cancelled_is_not_told_confirmed_however_slow_the_store_is() {
    let shop = Shop::new(streams()).await;
    let (east, west) = shop.remotes();
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&east, Json(3)).await.unwrap();
    open.call::<Deduct>(&west, Json(2)).await.unwrap();
    // The transaction times out. The decision becomes durable only after callers have stopped waiting for completion.
    shop.coordinator.delay_store(Duration::from_secs(3));
    shop.coordinator.advance(Duration::from_secs(31));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let told = open.confirm().await;
    shop.coordinator.delay_store(Duration::ZERO);
    assert!(matches!(told, Err(TransactionError::TimedOut { .. })), "{told:?}");
}

#[tokio::test]
async fn endless_patience_is_no_reason_to_panic() {
    let shop = Shop::new(streams()).await;
    shop.run(shop.order().patience(Duration::MAX), 2).await.unwrap();
}

#[tokio::test]
async fn little_patience_beside_the_wait_for_acknowledgements_is_not_unknown() {
    let shop = Shop::new(streams()).await;
    // No participant acknowledges while `run` waits: the backoff between attempts uses the clock that stands still.
    shop.coordinator.script(Deduct::NAME, Phase::Confirm, [Fault::Unavailable; 4]);
    for patience in [300, 1000, 1500] {
        let order = shop.coordinator.handfast().transaction("order");
        let done = shop.run(order.patience(Duration::from_millis(patience)), 1).await.unwrap();
        assert!(!done.completed);
        shop.coordinator.finished(done.xid).await;
        shop.coordinator.script(Deduct::NAME, Phase::Confirm, [Fault::Unavailable; 4]);
    }
}

#[tokio::test]
async fn patience_covers_the_first_question_about_a_key() {
    let mut shop = Shop::new(streams()).await;
    shop.coordinator.kill();
    let began = std::time::Instant::now();
    let order = shop.order().idempotency_key("a").patience(Duration::from_millis(300));
    let error = shop.run(order, 2).await.unwrap_err();
    assert!(matches!(error, TransactionError::Unknown { xid: None, .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_try_without_a_clear_answer_is_recorded_with_its_branch_participant_and_cause() {
    let shop = Shop::new(streams()).await;
    shop.coordinator.script(Deduct::NAME, Phase::Try, [Fault::None, Fault::Garbage]);
    let (east, west) = shop.remotes();
    let run = shop.order().run(async |global| {
        global.call::<Deduct>(&east, Json(3)).await?;
        Ok(global.call::<Deduct>(&west, Json(2)).await?.0)
    });
    let error = run.await.unwrap_err();
    let text =
        "inventory.deduct had no clear answer from west: DATA_LOSS: the script says: garbage";
    assert!(error.to_string().ends_with(text), "{error}");
    let Outcome::Cancelled { reason, .. } = shop.coordinator.finished(error.xid().unwrap()).await
    else {
        panic!("not cancelled")
    };
    assert_eq!(
        reason,
        "the Try of branch 2 had no clear answer: inventory.deduct at west: DATA_LOSS: the script says: garbage"
    );
}

#[tokio::test]
async fn the_time_for_one_try_is_the_contracts_or_the_calls_and_the_error_names_it() {
    let db = Database::new(SCHEMA).await;
    let warehouse = participant("warehouse", &db, Counting(Duration::from_millis(5500))).await;
    let coordinator = Coordinator::start([warehouse]).await;
    let (handfast, remote) = (coordinator.handfast(), coordinator.remote("warehouse"));
    let inventory = || handfast.transaction("inventory").until_decided();
    let patient = inventory().run(async |global| Ok(global.call::<Slow>(&remote, ()).await?));
    let hasty = inventory().run(async |global| {
        Ok(global.call_within::<Slow>(&remote, (), Duration::from_millis(200)).await?)
    });
    let (patient, hasty) = tokio::join!(patient, hasty);
    patient.unwrap();
    let error = hasty.unwrap_err().to_string();
    assert!(error.contains("DEADLINE_EXCEEDED: no answer within 200ms"), "{error}");
}

/// Its contract allows its Try longer than the usual five seconds.
struct Slow;

impl Contract for Slow {
    const NAME: &'static str = "warehouse.count";
    type Args = ();
    type Reply = ();
    const TRY_TIMEOUT: Duration = Duration::from_secs(7);
}

/// An action that takes this long.
struct Counting(Duration);

impl Action for Counting {
    type Contract = Slow;
    type Db = Sqlite;

    async fn on_try(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &()) -> Result<(), TryError> {
        tokio::time::sleep(self.0).await;
        Ok(())
    }

    async fn on_confirm(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &()) -> Result<(), Failed> {
        Ok(())
    }

    async fn on_cancel(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &()) -> Result<(), Failed> {
        Ok(())
    }
}
