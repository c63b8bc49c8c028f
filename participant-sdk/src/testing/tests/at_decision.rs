//! Transactions that are recorded with their decision, from the initiator to the fence.

use std::time::Duration;

use super::*;
use crate::Phase;

/// An inventory that asks about its reservations, and its coordinator.
struct Asking {
    db: Database,
    coordinator: Coordinator,
    participant: Participant,
}

impl Asking {
    async fn new() -> Self {
        let db = Database::new(SCHEMA).await;
        let served = participant("inventory", &db, Inventory).await;
        let coordinator = Coordinator::start([served]).await;
        let participant = Participant::builder("inventory")
            .action(&Fence::new(db.pool()), Inventory)
            .asks(&coordinator.handfast())
            .build();
        Self { db, coordinator, participant }
    }

    /// The coordinator calls the participant over its network. The initiator calls it in this process.
    fn remote(&self) -> Remote {
        Remote::here(&self.participant, "http://inventory.test:1")
    }

    fn order(&self) -> TransactionBuilder {
        self.coordinator.handfast().transaction("order").record_at_decision()
    }

    async fn stock(&self) -> Stock {
        stock(&self.db.pool()).await
    }

    /// What the fence's row says of the first branch: whether it asks.
    async fn asks(&self) -> Option<i64> {
        let asks = sqlx::query_scalar("SELECT asks FROM handfast_fence LIMIT 1");
        asks.fetch_one(&self.db.pool()).await.unwrap()
    }

    async fn ask(&self) -> usize {
        self.participant.ask(&self.coordinator.handfast()).await.unwrap()
    }

    async fn phase_one_is_over(&self) {
        let over = "UPDATE handfast_fence SET expires_at = CAST(unixepoch('subsec') * 1000 AS INTEGER) - 1";
        sqlx::query(over).execute(&self.db.pool()).await.unwrap();
    }

    async fn until_free(&self) {
        for _ in 0..500 {
            if self.stock().await == (10, 0, 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the reservation stays: {:?}", self.stock().await);
    }
}

#[tokio::test]
async fn it_is_confirmed_and_cancelled_like_any_other() {
    let shop = Asking::new().await;
    let remote = shop.remote();
    let done = shop.order().run(async |global| Ok(global.call::<Deduct>(&remote, Json(3)).await?));
    let done = done.await.unwrap();
    assert!(matches!(shop.coordinator.finished(done.xid).await, Outcome::Confirmed { .. }));
    assert_eq!((shop.stock().await, shop.asks().await), ((7, 0, 3), Some(1)));

    let failed = shop.order().run(async |global| {
        global.call::<Deduct>(&remote, Json(3)).await?;
        Err::<(), _>("changed my mind".into())
    });
    let Err(TransactionError::Cancelled { xid, .. }) = failed.await else { panic!() };
    assert!(matches!(shop.coordinator.finished(xid).await, Outcome::Cancelled { .. }));
    assert_eq!(shop.stock().await, (7, 0, 3));
}

#[tokio::test]
async fn what_the_coordinator_lost_is_given_back_when_phase_one_is_over() {
    let mut shop = Asking::new().await;
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&shop.remote(), Json(3)).await.unwrap();
    let xid = open.xid().await.unwrap();
    std::mem::forget(open); // the initiator dies too
    assert_eq!(shop.ask().await, 0);
    shop.phase_one_is_over().await;
    assert_eq!(shop.ask().await, 0, "the coordinator knows it, and it is not decided");
    shop.coordinator.restart().await;
    assert_eq!(shop.coordinator.handfast().outcome(xid).await.unwrap(), Outcome::NeverRecorded);
    assert_eq!(shop.stock().await, (7, 3, 0));
    assert_eq!(shop.ask().await, 1);
    assert_eq!((shop.stock().await, shop.ask().await), ((10, 0, 0), 0));
}

#[tokio::test]
async fn an_initiator_that_hears_of_the_loss_makes_its_participants_ask() {
    for confirm in [true, false] {
        let mut shop = Asking::new().await;
        let open = shop.order().begin().await.unwrap();
        open.call::<Deduct>(&shop.remote(), Json(3)).await.unwrap();
        shop.coordinator.restart().await;
        if confirm {
            let lost = open.confirm().await.unwrap_err();
            assert!(matches!(lost, TransactionError::Cancelled { .. }), "{lost:?}");
        } else {
            open.cancel("changed my mind").await.unwrap();
        }
        shop.until_free().await;
    }
}

#[tokio::test]
async fn a_nudge_that_is_wrong_changes_nothing() {
    let shop = Asking::new().await;
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&shop.remote(), Json(3)).await.unwrap();
    let xid = open.xid().await.unwrap();
    shop.remote().nudge(xid, &"1".parse().unwrap()).await;
    shop.remote().nudge(xid, &"2".parse().unwrap()).await;
    assert_eq!(shop.stock().await, (7, 3, 0));
    open.confirm().await.unwrap();
    assert!(matches!(shop.coordinator.finished(xid).await, Outcome::Confirmed { .. }));
    assert_eq!(shop.stock().await, (7, 0, 3));
}

#[tokio::test]
async fn what_is_open_for_long_survives_a_crash() {
    let mut shop = Asking::new().await;
    let open = shop.order().begin().await.unwrap();
    open.call::<Deduct>(&shop.remote(), Json(3)).await.unwrap();
    shop.coordinator.advance(Duration::from_millis(500));
    // It is recorded within a tenth of a second.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    shop.coordinator.restart().await;
    let done = open.confirm().await.unwrap();
    assert!(matches!(shop.coordinator.finished(done.xid).await, Outcome::Confirmed { .. }));
    assert_eq!(shop.stock().await, (7, 0, 3));
}

#[tokio::test]
async fn a_participant_that_does_not_ask_makes_it_durable_first() {
    let mut shop = Asking::new().await;
    let open = shop.order().begin().await.unwrap();
    // Over the network is the same participant, without a coordinator.
    open.call::<Deduct>(&shop.coordinator.remote("inventory"), Json(3)).await.unwrap();
    assert_eq!(shop.asks().await, None);
    shop.coordinator.restart().await;
    let done = open.confirm().await.unwrap();
    assert!(matches!(shop.coordinator.finished(done.xid).await, Outcome::Confirmed { .. }));
}

/// Branches are fixed with the decision.
#[tokio::test]
async fn a_branch_that_its_confirmed_transaction_does_not_have_is_given_back() {
    let shop = Asking::new().await;
    let confirmed = shop.coordinator.handfast().transaction("order").run(async |_| Ok(()));
    let xid = confirmed.await.unwrap().xid;
    for at_decision in [true, false] {
        let mut branch = Branch::new(xid, "7".parse().unwrap(), Deduct::NAME, Phase::Try);
        (branch.at_decision, branch.expires_at) = (at_decision, Some(i64::MAX / 2));
        if !at_decision {
            branch.branch_id = "8".parse().unwrap();
        }
        shop.participant.handle(&branch, b"3").await;
        assert_eq!(shop.stock().await, (7, 3, 0));
        if at_decision {
            shop.phase_one_is_over().await;
            assert_eq!(shop.ask().await, 1);
        } else {
            let overdue = "UPDATE handfast_fence SET expires_at = 1";
            sqlx::query(overdue).execute(&shop.db.pool()).await.unwrap();
            let inquiry = shop.participant.inquire(&shop.coordinator.handfast()).await.unwrap();
            assert_eq!((inquiry.cancelled, inquiry.reported), (1, 0));
        }
        assert_eq!(shop.stock().await, (10, 0, 0));
    }
}
