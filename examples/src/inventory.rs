//! The inventory service. It keeps the stock, and reserves pieces for orders.
//!
//! Its one action is `inventory.deduct`. Try moves pieces from available to frozen. Confirm moves them from frozen to sold.
//! Cancel moves them back to available. The fence makes each call idempotent, so this file does not have to.

use std::collections::BTreeMap;

use handfast::{
    Action, ActionInBatches, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, Tried,
    TryError, Tx,
};
use sqlx::{Pool, QueryBuilder};
use tonic::transport::Server;

use super::Db; // sqlx::Sqlite or sqlx::MySql: see sqlite.rs and mysql.rs
use crate::{Deduct, DeductStock, Setup, all_rows, one_row};

/// The service's tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS stock (
    sku       VARCHAR(64) NOT NULL PRIMARY KEY,
    available BIGINT      NOT NULL CHECK (available >= 0),           -- on the shelf
    frozen    BIGINT      NOT NULL DEFAULT 0 CHECK (frozen >= 0),    -- kept for orders that are being placed
    sold      BIGINT      NOT NULL DEFAULT 0 CHECK (sold >= 0)
);
CREATE TABLE IF NOT EXISTS deduction (
    order_id  BIGINT      NOT NULL PRIMARY KEY,
    sku       VARCHAR(64) NOT NULL REFERENCES stock (sku),
    quantity  BIGINT      NOT NULL CHECK (quantity > 0),
    state     VARCHAR(16) NOT NULL CHECK (state IN ('frozen', 'sold')) -- what was given back has no row
)";

struct Inventory;

impl Action for Inventory {
    type Contract = DeductStock;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<Json<i64>, TryError> {
        let Deduct { order_id, sku, quantity } = deduct;
        let freeze = "UPDATE stock SET available = available - ?, frozen = frozen + ?
                      WHERE sku = ? AND available >= ?";
        let freeze = sqlx::query(freeze).bind(quantity).bind(quantity).bind(sku).bind(quantity);
        let frozen = freeze.execute(&mut **tx).await?.rows_affected() == 1;
        let left = sqlx::query_scalar("SELECT available FROM stock WHERE sku = ?").bind(sku);
        let left: i64 = left.fetch_optional(&mut **tx).await?.unwrap_or(0);
        if !frozen {
            let message = format!("{quantity} × {sku} wanted, {left} there");
            return Err(Refusal::new("OUT_OF_STOCK").message(message).with("sku", sku).into());
        }
        sqlx::query("INSERT INTO deduction VALUES (?, ?, ?, 'frozen')")
            .bind(order_id)
            .bind(sku)
            .bind(quantity)
            .execute(&mut **tx)
            .await?;
        Ok(Json(left))
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<(), Failed> {
        let Deduct { order_id, sku, quantity } = deduct;
        let sell = "UPDATE stock SET frozen = frozen - ?, sold = sold + ? WHERE sku = ?";
        let sell = sqlx::query(sell).bind(quantity).bind(quantity).bind(sku);
        one_row(sell.execute(&mut **tx).await?.rows_affected())?;
        let note = "UPDATE deduction SET state = 'sold' WHERE order_id = ? AND state = 'frozen'";
        let note = sqlx::query(note).bind(order_id);
        one_row(note.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<(), Failed> {
        let Deduct { order_id, sku, quantity } = deduct;
        let thaw = "UPDATE stock SET frozen = frozen - ?, available = available + ? WHERE sku = ?";
        let thaw = sqlx::query(thaw).bind(quantity).bind(quantity).bind(sku);
        one_row(thaw.execute(&mut **tx).await?.rows_affected())?;
        let note = "DELETE FROM deduction WHERE order_id = ? AND state = 'frozen'";
        let note = sqlx::query(note).bind(order_id);
        one_row(note.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }
}

/// Many orders buy the same product. Orders that are confirmed at the same moment share one UPDATE of its stock row.
impl ActionInBatches for Inventory {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Deduct>>],
    ) -> Result<(), Failed> {
        for (sku, quantity) in pieces(tried) {
            let sell = "UPDATE stock SET frozen = frozen - ?, sold = sold + ? WHERE sku = ?";
            let sell = sqlx::query(sell).bind(quantity).bind(quantity).bind(sku);
            one_row(sell.execute(&mut **tx).await?.rows_affected())?;
        }
        note(tx, "UPDATE deduction SET state = 'sold'", tried).await?;
        Ok(())
    }

    async fn on_cancel_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Deduct>>],
    ) -> Result<(), Failed> {
        for (sku, quantity) in pieces(tried) {
            let thaw =
                "UPDATE stock SET frozen = frozen - ?, available = available + ? WHERE sku = ?";
            let thaw = sqlx::query(thaw).bind(quantity).bind(quantity).bind(sku);
            one_row(thaw.execute(&mut **tx).await?.rows_affected())?;
        }
        note(tx, "DELETE FROM deduction", tried).await?;
        Ok(())
    }
}

/// How many pieces of each SKU these branches took. Sorted by SKU, so that all batches lock rows in the same order.
fn pieces(tried: &[Tried<Json<Deduct>>]) -> BTreeMap<&str, i64> {
    let mut pieces = BTreeMap::new();
    for Tried { args: Json(deduct), .. } in tried {
        *pieces.entry(deduct.sku.as_str()).or_insert(0) += deduct.quantity;
    }
    pieces
}

/// Updates the state of these orders' deductions. All of them must be frozen.
async fn note(
    tx: &mut Tx<Db>,
    change: &'static str,
    tried: &[Tried<Json<Deduct>>],
) -> sqlx::Result<()> {
    let mut note = QueryBuilder::<Db>::new(change);
    let mut orders = note.push(" WHERE state = 'frozen' AND order_id IN (").separated(", ");
    for Tried { args: Json(deduct), .. } in tried {
        orders.push_bind(deduct.order_id);
    }
    note.push(")");
    all_rows(note.build().execute(&mut **tx).await?.rows_affected(), tried.len())
}

/// Serves the inventory service until SIGTERM.
///
/// # Errors
///
/// When the database cannot be used, or the listen address cannot be bound.
pub async fn serve(setup: &Setup, pool: Pool<Db>) -> anyhow::Result<()> {
    sqlx::raw_sql(SCHEMA).execute(&pool).await?;
    let fence = Fence::new(pool);
    fence.create_table_if_missing().await?;
    let handfast = Handfast::connect(&setup.coordinator)?;
    let participant = Participant::builder("inventory")
        .action_in_batches(&fence, Inventory)
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

    /// Stock (available, frozen, sold), and the deductions.
    type State = ((i64, i64, i64), Vec<(i64, i64, String)>);

    #[tokio::test]
    async fn the_stock_survives_anything() {
        for database in databases(SCHEMA).await {
            the_stock_survives_anything_on(&database).await;
        }
    }

    async fn the_stock_survives_anything_on(database: &Database) {
        let new_world = async || {
            let pool = database.emptied().await;
            let goods = sqlx::query("INSERT INTO stock (sku, available) VALUES ('mouse', 10)");
            goods.execute(&pool).await.unwrap();
            let fence = Fence::new(pool.clone());
            fence.create_table_if_missing().await.unwrap();
            let participant =
                Participant::builder("inventory").action_in_batches(&fence, Inventory).build();
            World::new(participant, async move || -> State {
                let stock = "SELECT available, frozen, sold FROM stock";
                let deductions = "SELECT order_id, quantity, state FROM deduction";
                (
                    sqlx::query_as(stock).fetch_one(&pool).await.unwrap(),
                    sqlx::query_as(deductions).fetch_all(&pool).await.unwrap(),
                )
            })
        };
        let nothing_is_lost = |((available, frozen, sold), deductions): &State| {
            let of = |wanted| deductions.iter().filter(move |(.., state)| state == wanted);
            available + frozen + sold == 10
                && *frozen == of("frozen").map(|row| row.1).sum::<i64>()
                && *sold == of("sold").map(|row| row.1).sum::<i64>()
        };
        let order = |order_id| Json(Deduct { order_id, sku: "mouse".to_owned(), quantity: 2 });
        laws_with_neighbour::<DeductStock, _>(order(1), order(2), new_world, nothing_is_lost)
            .await
            .unwrap();
    }
}
