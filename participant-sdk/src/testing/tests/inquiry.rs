//! A participant asks the coordinator about overdue reservations.

use std::time::Duration;

use super::*;
use crate::{Answer, Outcome, Phase, Xid};

/// Makes all fence rows look as if phase one had ended this long ago.
async fn age(db: &Database, by: Duration) {
    let sql =
        "UPDATE handfast_fence SET expires_at = CAST(unixepoch('subsec') * 1000 AS INTEGER) - ?";
    sqlx::query(sql)
        .bind(i64::try_from(by.as_millis()).unwrap())
        .execute(&db.pool())
        .await
        .unwrap();
}

async fn reserve(participant: &Participant, xid: Xid) {
    let branch = Branch::new(xid, "1".parse().unwrap(), Deduct::NAME, Phase::Try);
    assert!(matches!(participant.handle(&branch, b"3").await, Answer::Done(_)));
}

#[tokio::test]
async fn what_was_cancelled_or_never_recorded_is_given_back_and_the_rest_is_left_alone() {
    let db = Database::new(SCHEMA).await;
    let inventory = participant("inventory", &db, Inventory).await;
    let coordinator = Coordinator::start([inventory.clone()]).await;
    let handfast = coordinator.handfast();

    // A transaction that the store does not know, as if the store had lost its last commits.
    let open = handfast.transaction("order").begin().await.unwrap();
    let known = open.xid().await.unwrap();
    let lost = Xid { sequence: known.sequence + 7, ..known };
    reserve(&inventory, lost).await;
    age(&db, Duration::from_secs(3500)).await;
    assert_eq!(inventory.inquire(&handfast).await.unwrap().cancelled, 0, "too early");
    age(&db, Duration::from_secs(3700)).await;
    let inquiry = inventory.inquire(&handfast).await.unwrap();
    assert_eq!((inquiry.cancelled, inquiry.reported), (1, 0));
    assert_eq!(stock(&db.pool()).await, (10, 0, 0));

    // A cancelled transaction whose Cancel never reached this participant.
    open.cancel("no longer wanted").await.unwrap();
    assert!(matches!(coordinator.finished(known).await, Outcome::Cancelled { .. }));
    reserve(&inventory, known).await;
    age(&db, Duration::from_secs(3700)).await;
    assert_eq!(inventory.inquire(&handfast).await.unwrap().cancelled, 1);
    assert_eq!(stock(&db.pool()).await, (10, 0, 0));

    // Confirmed, undecided and forgotten transactions: the participant must leave their branches alone.
    let confirmed = handfast.transaction("order").run(async |_| Ok(())).await.unwrap();
    let undecided = handfast.transaction("order").begin().await.unwrap();
    let forgotten = Xid { nonce: !known.nonce, ..known };
    for xid in [confirmed.xid, undecided.xid().await.unwrap(), forgotten] {
        reserve(&inventory, xid).await;
    }
    age(&db, Duration::from_secs(3700)).await;
    let inquiry = inventory.inquire(&handfast).await.unwrap();
    assert_eq!((inquiry.cancelled, inquiry.reported), (0, 3));
    assert_eq!(stock(&db.pool()).await, (1, 9, 0));
}

#[tokio::test]
async fn a_branch_that_nobody_can_answer_for_does_not_stand_in_the_way_of_others() {
    let db = Database::new(SCHEMA).await;
    let inventory = participant("inventory", &db, Inventory).await;
    let coordinator = Coordinator::start([inventory.clone()]).await;
    let handfast = coordinator.handfast();
    let open = handfast.transaction("order").begin().await.unwrap();
    let known = open.xid().await.unwrap();
    // The coordinator's store is new, so its epochs start from the beginning.
    reserve(&inventory, Xid { epoch: known.epoch + 7, ..known }).await;
    age(&db, Duration::from_secs(3700)).await;
    reserve(&inventory, Xid { sequence: known.sequence + 7, ..known }).await;
    age(&db, Duration::from_secs(3700)).await;
    inventory.inquire(&handfast).await.unwrap_err();
    assert_eq!(stock(&db.pool()).await, (7, 3, 0));
}
