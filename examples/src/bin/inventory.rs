//! The inventory service: how many pieces are on the shelf, and for whom they are kept.
//!
//! Its one action, `inventory.deduct`: Try moves pieces from available to frozen, Confirm from frozen to sold, Cancel back to
//! available. That each of them counts once, whatever the network does, is not its business: the fence sees to it.

use std::time::Duration;

use clap::Parser;
use handfast::{Action, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, TryError, Tx};
use handfast_shop::{Deduct, DeductStock, Setup, log_to_stdout, one_row};
use sqlx::Sqlite;
use tonic::transport::Server;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS stock (
    sku       TEXT    PRIMARY KEY,
    available INTEGER NOT NULL CHECK (available >= 0),           -- on the shelf
    frozen    INTEGER NOT NULL DEFAULT 0 CHECK (frozen >= 0),    -- kept for orders that are being placed
    sold      INTEGER NOT NULL DEFAULT 0 CHECK (sold >= 0)
) STRICT;
CREATE TABLE IF NOT EXISTS deduction (
    order_id  INTEGER PRIMARY KEY,
    sku       TEXT    NOT NULL REFERENCES stock,
    quantity  INTEGER NOT NULL CHECK (quantity > 0),
    state     TEXT    NOT NULL CHECK (state IN ('frozen', 'sold')) -- what was given back has no row
) STRICT";

const HOUR: Duration = Duration::from_secs(3600);

struct Inventory;

impl Action for Inventory {
    type Contract = DeductStock;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<Json<i64>, TryError> {
        let Deduct { order_id, sku, quantity } = deduct;
        let freeze = "UPDATE stock SET available = available - ?1, frozen = frozen + ?1
                      WHERE sku = ?2 AND available >= ?1 RETURNING available";
        let left: Option<i64> =
            sqlx::query_scalar(freeze).bind(quantity).bind(sku).fetch_optional(&mut **tx).await?;
        let Some(left) = left else {
            let available = "SELECT available FROM stock WHERE sku = ?";
            let available: Option<i64> =
                sqlx::query_scalar(available).bind(sku).fetch_optional(&mut **tx).await?;
            let message = format!("{quantity} × {sku} wanted, {} there", available.unwrap_or(0));
            return Err(Refusal::new("OUT_OF_STOCK").message(message).with("sku", sku).into());
        };
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
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<(), Failed> {
        let Deduct { order_id, sku, quantity } = deduct;
        let sell = "UPDATE stock SET frozen = frozen - ?1, sold = sold + ?1 WHERE sku = ?2";
        one_row(&sqlx::query(sell).bind(quantity).bind(sku).execute(&mut **tx).await?)?;
        let note = "UPDATE deduction SET state = 'sold' WHERE order_id = ? AND state = 'frozen'";
        one_row(&sqlx::query(note).bind(order_id).execute(&mut **tx).await?)?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(deduct): &Json<Deduct>,
    ) -> Result<(), Failed> {
        let Deduct { order_id, sku, quantity } = deduct;
        let thaw =
            "UPDATE stock SET frozen = frozen - ?1, available = available + ?1 WHERE sku = ?2";
        one_row(&sqlx::query(thaw).bind(quantity).bind(sku).execute(&mut **tx).await?)?;
        let note = "DELETE FROM deduction WHERE order_id = ? AND state = 'frozen'";
        one_row(&sqlx::query(note).bind(order_id).execute(&mut **tx).await?)?;
        Ok(())
    }
}

/// Keeps the stock.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    setup: Setup,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Flags { setup } = Flags::parse();
    log_to_stdout();
    let fence = Fence::new(setup.open(SCHEMA).await?);
    fence.create_table_if_missing().await?;
    let participant = Participant::builder("inventory").action(&fence, Inventory).build();
    // Nothing stays for ever: neither what the fence remembers, nor a reservation that nobody asks for any more.
    let _clean_up = fence.clean_up_every(HOUR);
    let _inquiries = participant.inquire_every(HOUR, &Handfast::connect(&setup.coordinator)?);
    setup.serve(Server::builder().add_service(participant.into_service())).await
}

#[cfg(test)]
mod tests {
    use handfast::testing::{Database, World, laws_with_neighbour};

    use super::*;

    /// Available, frozen, sold; and the deductions.
    type State = ((i64, i64, i64), Vec<(i64, i64, String)>);

    #[tokio::test]
    async fn the_stock_survives_anything() {
        let new_world = async || {
            let db = Database::new(SCHEMA).await;
            sqlx::query("INSERT INTO stock (sku, available) VALUES ('mouse', 10)")
                .execute(&db.pool())
                .await
                .unwrap();
            let fence = Fence::new(db.pool());
            fence.create_table_if_missing().await.unwrap();
            let participant = Participant::builder("inventory").action(&fence, Inventory).build();
            World::new(participant, async move || -> State {
                let stock = "SELECT available, frozen, sold FROM stock";
                let deductions = "SELECT order_id, quantity, state FROM deduction";
                (
                    sqlx::query_as(stock).fetch_one(&db.pool()).await.unwrap(),
                    sqlx::query_as(deductions).fetch_all(&db.pool()).await.unwrap(),
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
