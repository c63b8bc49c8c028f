//! The points service: what customers have earned. One point for each 100 cents, theirs once the order is placed.
//!
//! Its one action, `points.earn`: Try notes points as pending, Confirm adds them to the balance, Cancel forgets them. Pending
//! points cannot be spent, so nobody spends what an order takes back.

use std::time::Duration;

use clap::Parser;
use handfast::{Action, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, TryError, Tx};
use handfast_shop::{Earn, EarnPoints, Setup, log_to_stdout, one_row};
use sqlx::Sqlite;
use tonic::transport::Server;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS account (
    customer TEXT    PRIMARY KEY,
    balance  INTEGER NOT NULL DEFAULT 0 CHECK (balance >= 0),
    pending  INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0)   -- of orders that are being placed
) STRICT;
CREATE TABLE IF NOT EXISTS booking (
    order_id INTEGER PRIMARY KEY,
    customer TEXT    NOT NULL REFERENCES account,
    points   INTEGER NOT NULL CHECK (points >= 0),
    state    TEXT    NOT NULL CHECK (state IN ('pending', 'booked')) -- what was taken back has no row
) STRICT";

const HOUR: Duration = Duration::from_secs(3600);

struct Points;

impl Action for Points {
    type Contract = EarnPoints;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
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
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(earn): &Json<Earn>,
    ) -> Result<(), Failed> {
        let Earn { order_id, customer, points } = earn;
        let add =
            "UPDATE account SET pending = pending - ?1, balance = balance + ?1 WHERE customer = ?2";
        one_row(&sqlx::query(add).bind(points).bind(customer).execute(&mut **tx).await?)?;
        let note = "UPDATE booking SET state = 'booked' WHERE order_id = ? AND state = 'pending'";
        one_row(&sqlx::query(note).bind(order_id).execute(&mut **tx).await?)?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(earn): &Json<Earn>,
    ) -> Result<(), Failed> {
        let Earn { order_id, customer, points } = earn;
        let forget = "UPDATE account SET pending = pending - ? WHERE customer = ?";
        one_row(&sqlx::query(forget).bind(points).bind(customer).execute(&mut **tx).await?)?;
        let note = "DELETE FROM booking WHERE order_id = ? AND state = 'pending'";
        one_row(&sqlx::query(note).bind(order_id).execute(&mut **tx).await?)?;
        Ok(())
    }
}

/// Keeps the customers' points.
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
    let participant = Participant::builder("points").action(&fence, Points).build();
    let _clean_up = fence.clean_up_every(HOUR);
    let _inquiries = participant.inquire_every(HOUR, &Handfast::connect(&setup.coordinator)?);
    setup.serve(Server::builder().add_service(participant.into_service())).await
}

#[cfg(test)]
mod tests {
    use handfast::testing::{Database, World, laws_with_neighbour};

    use super::*;

    /// Balance and pending; and the bookings.
    type State = ((i64, i64), Vec<(i64, i64, String)>);

    #[tokio::test]
    async fn points_survive_anything() {
        let new_world = async || {
            let db = Database::new(SCHEMA).await;
            sqlx::query("INSERT INTO account (customer) VALUES ('ada')")
                .execute(&db.pool())
                .await
                .unwrap();
            let fence = Fence::new(db.pool());
            fence.create_table_if_missing().await.unwrap();
            let participant = Participant::builder("points").action(&fence, Points).build();
            World::new(participant, async move || -> State {
                let account = "SELECT balance, pending FROM account";
                let bookings = "SELECT order_id, points, state FROM booking";
                (
                    sqlx::query_as(account).fetch_one(&db.pool()).await.unwrap(),
                    sqlx::query_as(bookings).fetch_all(&db.pool()).await.unwrap(),
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
