//! The points service. Customers earn one point for each 100 cents, once their order is placed.
//!
//! Its one action is `points.earn`. Try records the points as pending. Confirm adds them to the balance. Cancel deletes them.
//! Pending points cannot be spent, so a cancelled order never takes back points that were spent.

use std::collections::BTreeMap;

use handfast::{
    Action, ActionInBatches, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, Tried,
    TryError, Tx,
};
use sqlx::{Pool, QueryBuilder};
use tonic::transport::Server;

use super::Db; // sqlx::Sqlite or sqlx::MySql: see sqlite.rs and mysql.rs
use crate::{Earn, EarnPoints, Setup, all_rows, one_row};

/// The service's tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS account (
    customer VARCHAR(64) NOT NULL PRIMARY KEY,
    balance  BIGINT      NOT NULL DEFAULT 0 CHECK (balance >= 0),
    pending  BIGINT      NOT NULL DEFAULT 0 CHECK (pending >= 0)   -- of orders that are being placed
);
CREATE TABLE IF NOT EXISTS booking (
    order_id BIGINT      NOT NULL PRIMARY KEY,
    customer VARCHAR(64) NOT NULL REFERENCES account (customer),
    points   BIGINT      NOT NULL CHECK (points >= 0),
    state    VARCHAR(16) NOT NULL CHECK (state IN ('pending', 'booked')) -- what was taken back has no row
)";

struct Points;

impl Action for Points {
    type Contract = EarnPoints;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(earn): &Json<Earn>,
    ) -> Result<(), TryError> {
        let Earn { order_id, customer, points } = earn;
        let note = "UPDATE account SET pending = pending + ? WHERE customer = ?";
        let noted = sqlx::query(note).bind(points).bind(customer).execute(&mut **tx).await?;
        if noted.rows_affected() == 0 {
            return Err(Refusal::new("NO_ACCOUNT").message("no such customer").into());
        }
        sqlx::query("INSERT INTO booking VALUES (?, ?, ?, 'pending')")
            .bind(order_id)
            .bind(customer)
            .bind(points)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(earn): &Json<Earn>,
    ) -> Result<(), Failed> {
        let Earn { order_id, customer, points } = earn;
        let add =
            "UPDATE account SET pending = pending - ?, balance = balance + ? WHERE customer = ?";
        let add = sqlx::query(add).bind(points).bind(points).bind(customer);
        one_row(add.execute(&mut **tx).await?.rows_affected())?;
        let note = "UPDATE booking SET state = 'booked' WHERE order_id = ? AND state = 'pending'";
        let note = sqlx::query(note).bind(order_id);
        one_row(note.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(earn): &Json<Earn>,
    ) -> Result<(), Failed> {
        let Earn { order_id, customer, points } = earn;
        let forget = "UPDATE account SET pending = pending - ? WHERE customer = ?";
        let forget = sqlx::query(forget).bind(points).bind(customer);
        one_row(forget.execute(&mut **tx).await?.rows_affected())?;
        let note = "DELETE FROM booking WHERE order_id = ? AND state = 'pending'";
        let note = sqlx::query(note).bind(order_id);
        one_row(note.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }
}

/// Orders that are confirmed at the same moment share one UPDATE per customer.
impl ActionInBatches for Points {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Earn>>],
    ) -> Result<(), Failed> {
        for (customer, points) in earned(tried) {
            let add = "UPDATE account SET pending = pending - ?, balance = balance + ? WHERE customer = ?";
            let add = sqlx::query(add).bind(points).bind(points).bind(customer);
            one_row(add.execute(&mut **tx).await?.rows_affected())?;
        }
        note(tx, "UPDATE booking SET state = 'booked'", tried).await?;
        Ok(())
    }

    async fn on_cancel_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Earn>>],
    ) -> Result<(), Failed> {
        for (customer, points) in earned(tried) {
            let forget = "UPDATE account SET pending = pending - ? WHERE customer = ?";
            let forget = sqlx::query(forget).bind(points).bind(customer);
            one_row(forget.execute(&mut **tx).await?.rows_affected())?;
        }
        note(tx, "DELETE FROM booking", tried).await?;
        Ok(())
    }
}

/// The points that each customer earned in these branches. Sorted by customer, so that all batches lock rows in the same order.
fn earned(tried: &[Tried<Json<Earn>>]) -> BTreeMap<&str, i64> {
    let mut earned = BTreeMap::new();
    for Tried { args: Json(earn), .. } in tried {
        *earned.entry(earn.customer.as_str()).or_insert(0) += earn.points;
    }
    earned
}

/// Updates the state of these orders' bookings. All of them must be pending.
async fn note(
    tx: &mut Tx<Db>,
    change: &'static str,
    tried: &[Tried<Json<Earn>>],
) -> sqlx::Result<()> {
    let mut note = QueryBuilder::<Db>::new(change);
    let mut orders = note.push(" WHERE state = 'pending' AND order_id IN (").separated(", ");
    for Tried { args: Json(earn), .. } in tried {
        orders.push_bind(earn.order_id);
    }
    note.push(")");
    all_rows(note.build().execute(&mut **tx).await?.rows_affected(), tried.len())
}

/// Serves the points service until SIGTERM.
///
/// # Errors
///
/// When the database cannot be used, or the listen address cannot be bound.
pub async fn serve(setup: &Setup, pool: Pool<Db>) -> anyhow::Result<()> {
    sqlx::raw_sql(SCHEMA).execute(&pool).await?;
    let fence = Fence::new(pool);
    fence.create_table_if_missing().await?;
    let handfast = Handfast::connect(&setup.coordinator)?;
    let participant = Participant::builder("points")
        .action_in_batches(&fence, Points)
        .coordinator(&handfast)
        .build();
    setup.serve(Server::builder().add_service(participant.into_service())).await
}

#[cfg(test)]
mod tests {
    use handfast::testing::{World, laws_with_neighbour};

    use super::{
        super::testing::{Database, databases},
        *,
    };

    /// Points (balance, pending), and the bookings.
    type State = ((i64, i64), Vec<(i64, i64, String)>);

    #[tokio::test]
    async fn points_survive_anything() {
        for database in databases(SCHEMA).await {
            points_survive_anything_on(&database).await;
        }
    }

    async fn points_survive_anything_on(database: &Database) {
        let new_world = async || {
            let pool = database.emptied().await;
            let customer = sqlx::query("INSERT INTO account (customer) VALUES ('ada')");
            customer.execute(&pool).await.unwrap();
            let fence = Fence::new(pool.clone());
            fence.create_table_if_missing().await.unwrap();
            let participant =
                Participant::builder("points").action_in_batches(&fence, Points).build();
            World::new(participant, async move || -> State {
                let account = "SELECT balance, pending FROM account";
                let bookings = "SELECT order_id, points, state FROM booking";
                (
                    sqlx::query_as(account).fetch_one(&pool).await.unwrap(),
                    sqlx::query_as(bookings).fetch_all(&pool).await.unwrap(),
                )
            })
        };
        let every_point_has_an_order = |((balance, pending), bookings): &State| {
            let of = |wanted| bookings.iter().filter(move |(.., state)| state == wanted);
            *balance == of("booked").map(|row| row.1).sum::<i64>()
                && *pending == of("pending").map(|row| row.1).sum::<i64>()
        };
        let order = |order_id| Json(Earn { order_id, customer: "ada".to_owned(), points: 7 });
        laws_with_neighbour::<EarnPoints, _>(
            order(1),
            order(2),
            new_world,
            every_point_has_an_order,
        )
        .await
        .unwrap();
    }
}
