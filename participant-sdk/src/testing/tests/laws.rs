//! A correct action passes the laws, and the laws find typical bugs.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{
    super::{BrokenLaw, Report, World, laws},
    *,
};
use crate::{ActionInBatches, Tried};

/// The one bug of an otherwise correct action.
enum Bug {
    CancelGivesBackTooLittle,
    CancelGivesBackWhatItDoesNotHold,
    /// It records outside the database that it ran. So after a rollback, a retry does nothing.
    ConfirmIsNotRepeatable(AtomicBool),
    /// It writes through another connection, so the write stays when `tx` is rolled back.
    TryWritesOutsideOfTx(SqlitePool),
    /// Its Confirm removes the held pieces and does not count them as sold, so they disappear.
    ConfirmLosesPieces,
    ConfirmAlwaysFails,
    CancelWaitsForever,
}

struct Buggy(Bug);

#[allow(clippy::wildcard_enum_match_arm, reason = "each bug is in one of them")]
impl Action for Buggy {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        if let Bug::TryWritesOutsideOfTx(elsewhere) = &self.0 {
            sqlx::query("UPDATE audit SET tries = tries + 1").execute(elsewhere).await?;
        }
        Inventory.on_try(tx, branch, args).await
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<(), Failed> {
        match &self.0 {
            Bug::ConfirmIsNotRepeatable(done) if done.swap(true, Ordering::Relaxed) => Ok(()),
            Bug::ConfirmLosesPieces => {
                sqlx::query("UPDATE stock SET held = held - ?")
                    .bind(args.0)
                    .execute(&mut **tx)
                    .await?;
                Ok(())
            }
            Bug::ConfirmAlwaysFails => Err(std::io::Error::other("no"))?,
            _ => Inventory.on_confirm(tx, branch, args).await,
        }
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<(), Failed> {
        match &self.0 {
            Bug::CancelGivesBackTooLittle => {
                Inventory.on_cancel(tx, branch, &Json(args.0 - 1)).await
            }
            Bug::CancelGivesBackWhatItDoesNotHold => {
                // It releases all held pieces, not only this branch's. With a single branch this looks right.
                sqlx::query("UPDATE stock SET free = free + held, held = 0")
                    .execute(&mut **tx)
                    .await?;
                Ok(())
            }
            Bug::CancelWaitsForever => std::future::pending().await,
            _ => Inventory.on_cancel(tx, branch, args).await,
        }
    }
}

fn nothing_is_lost((free, held, sold): &Stock) -> bool {
    free + held + sold == 10
}

async fn check<A: Action<Contract = Deduct, Db = Sqlite>>(
    action: impl Fn() -> A,
) -> Result<Report, BrokenLaw> {
    let new_world = async || {
        let db = Database::new(SCHEMA).await;
        let participant = participant("inventory", &db, action()).await;
        World::new(participant, async move || stock(&db.pool()).await)
    };
    laws::<Deduct, _>(Json(2), new_world, nothing_is_lost).await
}

#[tokio::test]
async fn an_action_as_it_should_be_keeps_them() {
    let report = check(|| Inventory).await.unwrap();
    assert!(report.stories > 80 && report.deliveries > 150, "{report:?}");
    assert!(report.given_up > 25, "each call was given up at each of its suspensions: {report:?}");
}

/// An action whose batches are confirmed by one statement.
struct Batches(InBatches);

enum InBatches {
    AsTheyShouldBe,
    /// It treats all branches as if they were like the first one.
    OfOneOnly,
    /// It records outside the database that it ran.
    NotRepeatable(AtomicBool),
}

impl Action for Batches {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        Inventory.on_try(tx, branch, args).await
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<(), Failed> {
        if let InBatches::NotRepeatable(done) = &self.0
            && done.load(Ordering::Relaxed)
        {
            return Ok(());
        }
        Inventory.on_confirm(tx, branch, args).await
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<i64>,
    ) -> Result<(), Failed> {
        Inventory.on_cancel(tx, branch, args).await
    }
}

impl ActionInBatches for Batches {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Sqlite>,
        tried: &[Tried<Json<i64>>],
    ) -> Result<(), Failed> {
        let pieces = match &self.0 {
            InBatches::NotRepeatable(done) if done.swap(true, Ordering::Relaxed) => return Ok(()),
            InBatches::OfOneOnly => tried[0].args.0,
            InBatches::AsTheyShouldBe | InBatches::NotRepeatable(_) => {
                tried.iter().map(|branch| branch.args.0).sum()
            }
        };
        Inventory.on_confirm(tx, &tried[0].branch, &Json(pieces)).await
    }
}

async fn check_batches(batches: impl Fn() -> InBatches) -> Result<Report, BrokenLaw> {
    let new_world = async || {
        let db = Database::new(SCHEMA).await;
        let fence = Fence::new(db.pool());
        fence.create_table_if_missing().await.unwrap();
        let builder = Participant::builder("inventory");
        let participant = builder.action_in_batches(&fence, Batches(batches())).build();
        World::new(participant, async move || stock(&db.pool()).await)
    };
    laws::<Deduct, _>(Json(2), new_world, nothing_is_lost).await
}

#[tokio::test]
async fn batches_as_they_should_be_keep_them() {
    check_batches(|| InBatches::AsTheyShouldBe).await.unwrap();
}

#[tokio::test]
async fn a_batch_that_forgets_a_branch_is_found() {
    let broken = check_batches(|| InBatches::OfOneOnly).await.unwrap_err();
    assert!(broken.story.contains("confirm of both branches together"), "{broken}");
    assert_eq!(
        (broken.expected.as_str(), broken.found.as_str()),
        ("(6, 0, 4)", "(6, 2, 2)"),
        "{broken}"
    );
}

#[tokio::test]
async fn a_batch_that_is_not_repeatable_is_found() {
    let broken =
        check_batches(|| InBatches::NotRepeatable(AtomicBool::new(false))).await.unwrap_err();
    assert!(broken.story.contains("together given up at its"), "{broken}");
}

#[tokio::test]
async fn a_cancel_that_gives_back_too_little_is_found() {
    let broken = check(|| Buggy(Bug::CancelGivesBackTooLittle)).await.unwrap_err();
    assert_eq!(
        (broken.story.as_str(), broken.found.as_str()),
        ("try, cancel", "(9, 1, 0)"),
        "{broken}"
    );
    assert!(broken.to_string().contains("expected: (10, 0, 0)"), "{broken}");
}

#[tokio::test]
async fn a_confirm_that_is_not_repeatable_is_found() {
    let broken =
        check(|| Buggy(Bug::ConfirmIsNotRepeatable(AtomicBool::new(false)))).await.unwrap_err();
    assert!(broken.story.contains("confirm given up at its"), "{broken}");
    assert_eq!(
        (broken.expected.as_str(), broken.found.as_str()),
        ("(8, 0, 2)", "(8, 2, 0)"),
        "{broken}"
    );
}

#[tokio::test]
async fn code_that_writes_outside_the_given_transaction_is_found() {
    // The action writes its number of tries into another database, which no lock protects. The number is part of the state.
    let new_world = async || {
        let db = Database::new(SCHEMA).await;
        let elsewhere =
            Database::new("CREATE TABLE audit (tries INTEGER); INSERT INTO audit VALUES (0)").await;
        let participant =
            participant("inventory", &db, Buggy(Bug::TryWritesOutsideOfTx(elsewhere.pool()))).await;
        World::new(participant, async move || {
            let sql = "SELECT tries FROM audit";
            let tries: i64 = sqlx::query_scalar(sql).fetch_one(&elsewhere.pool()).await.unwrap();
            // Counting is no bug in itself. Counting work that was rolled back is.
            let (free, ..) = stock(&db.pool()).await;
            (free, if free == 10 { tries } else { 0 })
        })
    };
    let broken = laws::<Deduct, _>(Json(2), new_world, |_| true).await.unwrap_err();
    assert_eq!(broken.law, "a cancelled branch leaves no trace", "{broken}");
}

#[tokio::test]
async fn code_that_writes_to_the_same_database_outside_the_transaction_is_found() {
    let new_world = async || {
        let schema = "CREATE TABLE stock (free INTEGER NOT NULL, held INTEGER NOT NULL, sold INTEGER NOT NULL); \
                      INSERT INTO stock VALUES (10, 0, 0); PRAGMA busy_timeout = 10; \
                      CREATE TABLE audit (tries INTEGER); INSERT INTO audit VALUES (0)";
        let db = Database::new(schema).await;
        let options = (*db.pool().connect_options())
            .clone()
            .busy_timeout(std::time::Duration::from_millis(10));
        let outside = SqlitePool::connect_lazy_with(options);
        let participant =
            participant("inventory", &db, Buggy(Bug::TryWritesOutsideOfTx(outside))).await;
        World::new(participant, async move || stock(&db.pool()).await)
    };
    // SQLite allows one writer, and `tx` is that writer. So the other connection's write times out.
    let broken = laws::<Deduct, _>(Json(2), new_world, nothing_is_lost).await.unwrap_err();
    assert!(broken.found.contains("locked"), "{broken}");
}

#[tokio::test]
async fn a_cancel_that_takes_its_neighbours_part_is_found() {
    let broken = check(|| Buggy(Bug::CancelGivesBackWhatItDoesNotHold)).await.unwrap_err();
    assert_eq!(broken.law, "what one branch does leaves its neighbour alone", "{broken}");
}

#[tokio::test]
async fn the_authors_invariant_is_checked_in_every_state() {
    let broken = check(|| Buggy(Bug::ConfirmLosesPieces)).await.unwrap_err();
    assert_eq!(broken.law, "the invariant holds in every state", "{broken}");
    assert_eq!(broken.story, "try, confirm");
}

#[tokio::test]
async fn a_confirm_that_never_succeeds_is_found() {
    let broken = check(|| Buggy(Bug::ConfirmAlwaysFails)).await.unwrap_err();
    assert!(broken.law.contains("succeed"), "{broken}");
    assert!(broken.found.contains("no"), "{broken}");
}

#[tokio::test]
async fn a_call_that_never_ends_is_found() {
    let broken = check(|| Buggy(Bug::CancelWaitsForever)).await.unwrap_err();
    assert!(broken.law.contains("succeed"), "{broken}");
    assert!(broken.found.contains("within"), "{broken}");
}

#[tokio::test]
async fn arguments_that_change_nothing_check_nothing() {
    let new_world = async || {
        let db = Database::new(SCHEMA).await;
        let participant = participant("inventory", &db, Inventory).await;
        World::new(participant, async move || stock(&db.pool()).await)
    };
    let vacuous = laws::<Deduct, _>(Json(0), new_world, nothing_is_lost).await.unwrap_err();
    assert!(vacuous.law.contains("nothing can be checked"), "{vacuous}");
    let refused = laws::<Deduct, _>(Json(11), new_world, nothing_is_lost).await.unwrap_err();
    assert!(refused.found.contains("OUT_OF_STOCK"), "{refused}");
}
