//! A participant asks the coordinator about overdue reservations.

use std::{
    future,
    iter::repeat_n,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::v1::{ResolveBranchRequest, admin_service_client::AdminServiceClient};
use tokio::sync::Notify;

use super::*;
use crate::{Answer, Outcome, Phase, Xid, testing::Fault};

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
    coordinator.script(Deduct::NAME, Phase::Confirm, repeat_n(Fault::Unavailable, 1000));
    let confirmed = handfast.transaction("order").until_decided().begin().await.unwrap();
    confirmed.call::<Deduct>(&coordinator.remote("inventory"), Json(3)).await.unwrap();
    confirmed.confirm().await.unwrap();
    let undecided = handfast.transaction("order").begin().await.unwrap();
    let forgotten = Xid { nonce: !known.nonce, ..known };
    for xid in [undecided.xid().await.unwrap(), forgotten] {
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

#[tokio::test]
async fn many_branches_that_are_only_reported_do_not_hide_others() {
    let db = Database::new(SCHEMA).await;
    let inventory = participant("inventory", &db, Inventory).await;
    let coordinator = Coordinator::start([inventory.clone()]).await;
    let handfast = coordinator.handfast();
    let known = handfast.transaction("order").begin().await.unwrap().xid().await.unwrap();
    let forgotten = Xid { nonce: !known.nonce, ..known };
    reserve(&inventory, forgotten).await;
    age(&db, Duration::from_secs(7200)).await;
    let copy = "INSERT INTO handfast_fence SELECT ?, branch_id, state, action, payload, reply, digest, expires_at, created_at, \
                changed_at, seen, asks FROM handfast_fence WHERE xid = ?";
    for n in 1..=1000 {
        let xid = Xid { sequence: forgotten.sequence + n, ..forgotten }.to_bytes();
        let copy = sqlx::query(copy).bind(&xid[..]).bind(forgotten.to_bytes().to_vec());
        copy.execute(&db.pool()).await.unwrap();
    }
    let lost = Xid { sequence: known.sequence + 2000, ..known };
    reserve(&inventory, lost).await;
    let late = "UPDATE handfast_fence SET expires_at = expires_at - 1 WHERE expires_at IS NOT NULL";
    sqlx::query(late).execute(&db.pool()).await.unwrap();
    let expired = "UPDATE handfast_fence SET expires_at = (SELECT max(expires_at) FROM handfast_fence) + 1 WHERE expires_at IS NULL";
    sqlx::query(expired).execute(&db.pool()).await.unwrap();
    let inquiry = inventory.inquire(&handfast).await.unwrap();
    assert_eq!((inquiry.cancelled, inquiry.reported), (1, 1001));
    assert_eq!(stock(&db.pool()).await, (7, 3, 0));
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    Panics,
    Waits,
}

/// An action whose first Cancel panics or waits for ever.
struct Troubled {
    trouble: Trouble,
    cancels: AtomicUsize,
    cancel_begun: Arc<Notify>,
}

impl Troubled {
    fn new(trouble: Trouble) -> Self {
        Self { trouble, cancels: AtomicUsize::new(0), cancel_begun: Arc::default() }
    }
}

impl Action for Troubled {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        n: &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        Inventory.on_try(tx, branch, n).await
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        n: &Json<i64>,
    ) -> Result<(), Failed> {
        Inventory.on_confirm(tx, branch, n).await
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        n: &Json<i64>,
    ) -> Result<(), Failed> {
        Inventory.on_cancel(tx, branch, n).await?;
        if self.cancels.fetch_add(1, Ordering::Relaxed) == 0 {
            self.cancel_begun.notify_one();
            match self.trouble {
                Trouble::Panics => panic!("a row is missing"),
                Trouble::Waits => future::pending::<()>().await,
            }
        }
        Ok(())
    }
}

#[tokio::test]
async fn an_action_that_panics_or_never_ends_does_not_stand_in_the_way_of_others() {
    for trouble in [Trouble::Panics, Trouble::Waits] {
        let db = Database::new(SCHEMA).await;
        let troubled = Troubled::new(trouble);
        let cancel_begun = troubled.cancel_begun.clone();
        let inventory = participant("inventory", &db, troubled).await;
        let coordinator = Coordinator::start([inventory.clone()]).await;
        let handfast = coordinator.handfast();
        let known = handfast.transaction("order").begin().await.unwrap().xid().await.unwrap();
        for n in [7, 8] {
            reserve(&inventory, Xid { sequence: known.sequence + n, ..known }).await;
        }
        age(&db, Duration::from_secs(3700)).await;
        let patience = async {
            cancel_begun.notified().await;
            if trouble == Trouble::Waits {
                tokio::time::pause();
                tokio::time::advance(Duration::from_secs(31)).await;
                tokio::time::resume();
            }
        };
        let inquiry = async {
            let limit = Duration::from_secs(60);
            tokio::time::timeout(limit, inventory.inquire(&handfast)).await.expect("it ends")
        };
        let (inquiry, ()) = tokio::join!(inquiry, patience);
        let inquiry = inquiry.unwrap();
        assert_eq!((inquiry.cancelled, inquiry.reported), (1, 1), "{trouble:?}");
        assert_eq!(stock(&db.pool()).await, (7, 3, 0), "{trouble:?}");
        assert_eq!(inventory.inquire(&handfast).await.unwrap().cancelled, 1, "{trouble:?}");
        assert_eq!(stock(&db.pool()).await, (10, 0, 0), "{trouble:?}");
    }
}

/// The operator has done by hand what the participant would have done.
#[tokio::test]
async fn what_an_operator_has_resolved_is_closed_and_not_done_again() {
    for confirm in [false, true] {
        let db = Database::new(SCHEMA).await;
        let inventory = participant("inventory", &db, Inventory).await;
        let coordinator = Coordinator::start([inventory.clone()]).await;
        let handfast = coordinator.handfast();
        for phase in [Phase::Confirm, Phase::Cancel] {
            coordinator.script(Deduct::NAME, phase, repeat_n(Fault::Unavailable, 1000));
        }
        let open = handfast.transaction("order").until_decided().begin().await.unwrap();
        let xid = open.xid().await.unwrap();
        open.call::<Deduct>(&coordinator.remote("inventory"), Json(3)).await.unwrap();
        let by_hand = if confirm {
            open.confirm().await.unwrap();
            "UPDATE stock SET held = held - 3, sold = sold + 3"
        } else {
            open.cancel("no longer wanted").await.unwrap();
            "UPDATE stock SET held = held - 3, free = free + 3"
        };
        sqlx::query(by_hand).execute(&db.pool()).await.unwrap();
        let settled = stock(&db.pool()).await;
        let mut operator = AdminServiceClient::new(coordinator.channel());
        let resolve = ResolveBranchRequest {
            xid: xid.to_string(),
            branch_id: "1".to_owned(),
            reason: "corrected by hand".to_owned(),
            operator: "ana".to_owned(),
        };
        operator.resolve_branch(resolve).await.unwrap();

        age(&db, Duration::from_secs(3700)).await;
        let inquiry = inventory.inquire(&handfast).await.unwrap();
        assert_eq!(stock(&db.pool()).await, settled);
        assert_eq!((inquiry.cancelled, inquiry.closed, inquiry.reported), (0, 1, 0));
        let state: String = sqlx::query_scalar("SELECT state FROM handfast_fence_readable")
            .fetch_one(&db.pool())
            .await
            .unwrap();
        assert_eq!(state, if confirm { "confirmed" } else { "cancelled" });
        assert_eq!(inventory.inquire(&handfast).await.unwrap(), crate::Inquiry::default());
    }
}

#[tokio::test]
async fn a_served_participant_that_knows_its_coordinator_looks_after_its_fence() {
    let db = Database::new(SCHEMA).await;
    let fence = Fence::new(db.pool()).retention(Duration::ZERO);
    fence.create_table_if_missing().await.unwrap();
    let coordinator = Coordinator::start([]).await;
    let handfast = coordinator.handfast();
    let inventory = Participant::builder("inventory")
        .action(&fence, Inventory)
        .coordinator(&handfast)
        .upkeep_every(Duration::ZERO)
        .build();
    let known = handfast.transaction("order").begin().await.unwrap().xid().await.unwrap();
    let lost = Xid { sequence: known.sequence + 7, ..known };
    reserve(&inventory, lost).await;
    age(&db, Duration::from_secs(3700)).await;
    let rows = async || {
        let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM handfast_fence");
        count.fetch_one(&db.pool()).await.unwrap()
    };
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!((stock(&db.pool()).await, rows().await), ((7, 3, 0), 1), "it is not served yet");

    // The reservation is given back, and then its row is deleted.
    let service = inventory.clone().into_service();
    for _ in 0..500 {
        if rows().await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((stock(&db.pool()).await, rows().await), ((10, 0, 0), 0));

    drop(service);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let lost = Xid { sequence: known.sequence + 8, ..known };
    reserve(&inventory, lost).await;
    age(&db, Duration::from_secs(3700)).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!((stock(&db.pool()).await, rows().await), ((7, 3, 0), 1));
}
