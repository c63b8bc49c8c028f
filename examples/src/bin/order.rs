//! The order service. It keeps the orders, and here an order begins: `PlaceOrder` runs one global transaction across three
//! services, this one among them.

use std::time::Duration;

use clap::Parser;
use handfast::{
    Action, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, Remote, TransactionError,
    TryError, Tx, Xid,
};
use handfast_shop::{
    CreateOrder, DeductStock, EarnPoints, Order, Setup, log_to_stdout, one_row,
    v1::{
        Outcome, PlaceOrderRequest, PlaceOrderResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};
use sqlx::Sqlite;
use tonic::{Request, Response, Status, transport::Server};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS orders (
    id           INTEGER PRIMARY KEY,
    customer     TEXT    NOT NULL,
    sku          TEXT    NOT NULL,
    quantity     INTEGER NOT NULL CHECK (quantity > 0),
    amount_cents INTEGER NOT NULL CHECK (amount_cents >= 0),
    status       TEXT    NOT NULL CHECK (status IN ('pending', 'placed', 'cancelled'))
) STRICT";

const HOUR: Duration = Duration::from_secs(3600);
/// How long it may take to reserve everything, if the customer does not say.
const PATIENCE: Duration = Duration::from_secs(10);

/// What takes part: `order.create`. Try writes the order down as pending; it is placed or cancelled later.
struct Orders;

impl Action for Orders {
    type Contract = CreateOrder;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), TryError> {
        let insert = "INSERT INTO orders VALUES (?, ?, ?, ?, ?, 'pending') ON CONFLICT DO NOTHING";
        let inserted = sqlx::query(insert)
            .bind(order.id)
            .bind(&order.customer)
            .bind(&order.sku)
            .bind(order.quantity)
            .bind(order.amount_cents)
            .execute(&mut **tx)
            .await?;
        if inserted.rows_affected() == 0 {
            return Err(Refusal::new("ORDER_EXISTS").message("its number is taken").into());
        }
        Ok(())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), Failed> {
        let place = "UPDATE orders SET status = 'placed' WHERE id = ? AND status = 'pending'";
        one_row(&sqlx::query(place).bind(order.id).execute(&mut **tx).await?)?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), Failed> {
        let cancel = "UPDATE orders SET status = 'cancelled' WHERE id = ? AND status = 'pending'";
        one_row(&sqlx::query(cancel).bind(order.id).execute(&mut **tx).await?)?;
        Ok(())
    }
}

/// What customers talk to.
struct Checkout {
    handfast: Handfast,
    orders: Remote,
    inventory: Remote,
    points: Remote,
}

/// Its global transaction, and what is left in stock, if this call placed it.
type Placed = Result<(Xid, Option<i64>), TransactionError>;

impl Checkout {
    /// Calls the three services from here, all at once, and has the coordinator confirm what they reserved.
    async fn place(&self, order: Order, patience: Duration) -> Placed {
        let confirmed = self
            .handfast
            .transaction("checkout")
            .idempotency_key(order.key())
            .label("order", order.id)
            .timeout(patience)
            .run(async |global| {
                let (stock, points) = (order.stock(), order.points());
                let ((), Json(left), ()) = tokio::try_join!(
                    global.call::<CreateOrder>(&self.orders, Json(order)),
                    global.call::<DeductStock>(&self.inventory, Json(stock)),
                    global.call::<EarnPoints>(&self.points, Json(points)),
                )?;
                Ok(left)
            })
            .await?;
        Ok((confirmed.xid, confirmed.value))
    }

    /// The same, but the coordinator calls the three services: one call from here, and it is on its way.
    async fn execute(&self, order: Order, patience: Duration) -> Placed {
        let (stock, points) = (order.stock(), order.points());
        let executed = self
            .handfast
            .execute("checkout")
            .idempotency_key(order.key())
            .label("order", order.id)
            .timeout(patience)
            .call::<CreateOrder>(&self.orders, &Json(order))
            .call::<DeductStock>(&self.inventory, &Json(stock))
            .call::<EarnPoints>(&self.points, &Json(points))
            .run()
            .await?;
        let left = executed.reply::<DeductStock>(1).ok().flatten();
        Ok((executed.xid, left.map(|Json(left)| left)))
    }
}

#[tonic::async_trait]
impl OrderService for Checkout {
    async fn place_order(
        &self,
        request: Request<PlaceOrderRequest>,
    ) -> Result<Response<PlaceOrderResponse>, Status> {
        let PlaceOrderRequest {
            order_id,
            customer,
            sku,
            quantity,
            amount_cents,
            patience_ms,
            execute,
        } = request.into_inner();
        if order_id < 1 || quantity < 1 || amount_cents < 0 {
            return Err(Status::invalid_argument("an order has a number, pieces, and no debts"));
        }
        let order = Order { id: order_id, customer, sku, quantity, amount_cents };
        let patience = match u64::try_from(patience_ms) {
            Ok(0) | Err(_) => PATIENCE,
            Ok(millis) => Duration::from_millis(millis),
        };
        let placed = if execute {
            self.execute(order, patience).await
        } else {
            self.place(order, patience).await
        };
        Ok(Response::new(answer(placed)))
    }
}

/// Each way that it can end means something else to the customer.
fn answer(placed: Placed) -> PlaceOrderResponse {
    let error = match placed {
        Ok((xid, left)) => {
            let (outcome, xid) = (Outcome::Placed.into(), xid.to_string());
            return PlaceOrderResponse { outcome, xid, left, ..PlaceOrderResponse::default() };
        }
        Err(error) => error,
    };
    let xid = error.xid().map(|xid| xid.to_string()).unwrap_or_default();
    let (outcome, reason, message) = match error {
        TransactionError::Refused { refusal, .. } => {
            (Outcome::Refused, refusal.reason, refusal.message)
        }
        TransactionError::Cancelled { .. }
        | TransactionError::TimedOut { .. }
        | TransactionError::NotBegun { .. } => {
            (Outcome::Cancelled, String::new(), error.to_string())
        }
        TransactionError::Unknown { .. } | _ => {
            (Outcome::Unknown, String::new(), error.to_string())
        }
    };
    PlaceOrderResponse { outcome: outcome.into(), xid, reason, message, left: None }
}

/// Keeps the orders, and places them.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    setup: Setup,
    /// Where the inventory service is
    #[arg(long, value_name = "URL")]
    inventory: String,
    /// Where the points service is
    #[arg(long, value_name = "URL")]
    points: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Flags { setup, inventory, points } = Flags::parse();
    log_to_stdout();
    let fence = Fence::new(setup.open(SCHEMA).await?);
    fence.create_table_if_missing().await?;
    let participant = Participant::builder("order").action(&fence, Orders).build();
    let handfast = Handfast::connect(&setup.coordinator)?;
    let _clean_up = fence.clean_up_every(HOUR);
    let _inquiries = participant.inquire_every(HOUR, &handfast);
    let checkout = Checkout {
        handfast,
        orders: Remote::here(&participant, &setup.url()),
        inventory: Remote::connect("inventory", &inventory)?,
        points: Remote::connect("points", &points)?,
    };
    let service = Server::builder()
        .add_service(participant.into_service())
        .add_service(OrderServiceServer::new(checkout));
    setup.serve(service).await
}

#[cfg(test)]
mod tests {
    use handfast::testing::{Database, World, laws_with_neighbour};

    use super::*;

    #[tokio::test]
    async fn orders_survive_anything() {
        let new_world = async || {
            let db = Database::new(SCHEMA).await;
            let fence = Fence::new(db.pool());
            fence.create_table_if_missing().await.unwrap();
            let participant = Participant::builder("order").action(&fence, Orders).build();
            World::new(participant, async move || -> Vec<(i64, String)> {
                // That an order was cancelled is remembered; to everybody else it is as if it had never been.
                let orders = "SELECT id, status FROM orders WHERE status <> 'cancelled'";
                sqlx::query_as(orders).fetch_all(&db.pool()).await.unwrap()
            })
        };
        let order = |id| {
            let (customer, sku) = ("ada".to_owned(), "mouse".to_owned());
            Json(Order { id, customer, sku, quantity: 1, amount_cents: 2900 })
        };
        laws_with_neighbour::<CreateOrder, _>(order(1), order(2), new_world, |_| true)
            .await
            .unwrap();
    }
}
