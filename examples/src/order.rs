//! The order service. It stores orders and starts the global transactions. `PlaceOrder` runs one global transaction across three
//! services; the order service is itself a participant in it.

use std::time::Duration;

use handfast::{
    Action, ActionInBatches, Branch, Failed, Fence, Handfast, Json, Participant, Refusal, Remote,
    TransactionError, Tried, TryError, Tx, Xid,
};
use sqlx::{Pool, QueryBuilder};
use tonic::{Request, Response, Status, transport::Server};

use super::Db; // sqlx::Sqlite or sqlx::MySql: see sqlite.rs and mysql.rs
use crate::{
    CreateOrder, DeductStock, EarnPoints, Order, Setup, all_rows, one_row,
    v1::{
        Outcome, PlaceOrderRequest, PlaceOrderResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};

/// The service's tables.
pub const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS orders (
    id           BIGINT      NOT NULL PRIMARY KEY,
    customer     VARCHAR(64) NOT NULL,
    sku          VARCHAR(64) NOT NULL,
    quantity     BIGINT      NOT NULL CHECK (quantity > 0),
    amount_cents BIGINT      NOT NULL CHECK (amount_cents >= 0),
    status       VARCHAR(16) NOT NULL CHECK (status IN ('pending', 'placed', 'cancelled'))
)";

/// Default timeout of phase one, if the customer sets none.
const PATIENCE: Duration = Duration::from_secs(10);

/// The participant, with the action `order.create`. Try inserts the order as pending. Confirm marks it placed; Cancel marks it
/// cancelled.
struct Orders;

impl Action for Orders {
    type Contract = CreateOrder;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), TryError> {
        let inserted = sqlx::query("INSERT INTO orders VALUES (?, ?, ?, ?, ?, 'pending')")
            .bind(order.id)
            .bind(&order.customer)
            .bind(&order.sku)
            .bind(order.quantity)
            .bind(order.amount_cents)
            .execute(&mut **tx)
            .await;
        match inserted {
            Ok(_) => Ok(()),
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                Err(Refusal::new("ORDER_EXISTS").message("its number is taken").into())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), Failed> {
        let place = "UPDATE orders SET status = 'placed' WHERE id = ? AND status = 'pending'";
        let place = sqlx::query(place).bind(order.id);
        one_row(place.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(order): &Json<Order>,
    ) -> Result<(), Failed> {
        let cancel = "UPDATE orders SET status = 'cancelled' WHERE id = ? AND status = 'pending'";
        let cancel = sqlx::query(cancel).bind(order.id);
        one_row(cancel.execute(&mut **tx).await?.rows_affected())?;
        Ok(())
    }
}

/// Orders that are confirmed at the same moment share one UPDATE.
impl ActionInBatches for Orders {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Order>>],
    ) -> Result<(), Failed> {
        let place = "UPDATE orders SET status = 'placed' WHERE status = 'pending' AND id IN (";
        let mut place = QueryBuilder::<Db>::new(place);
        let mut ids = place.separated(", ");
        for Tried { args: Json(order), .. } in tried {
            ids.push_bind(order.id);
        }
        place.push(")");
        all_rows(place.build().execute(&mut **tx).await?.rows_affected(), tried.len())?;
        Ok(())
    }
}

/// The gRPC service that customers call.
struct Checkout {
    handfast: Handfast,
    orders: Remote,
    inventory: Remote,
    points: Remote,
}

/// The transaction's xid, and how many pieces are left in stock. The count is known only if this call placed the order.
type Placed = Result<(Xid, Option<i64>), TransactionError>;

impl Checkout {
    /// Calls the Try of the three services from this process, all at once. The coordinator then confirms the reservations.
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

    /// As `place`, but the coordinator calls the Trys. This process makes a single call to the coordinator.
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

/// Translates each outcome of the transaction into the answer for the customer.
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

/// Serves the order service until SIGTERM. `inventory` and `points` are the URLs of the two services that it calls.
///
/// # Errors
///
/// When the database cannot be used, or the listen address cannot be bound.
pub async fn serve(
    setup: &Setup,
    pool: Pool<Db>,
    inventory: &str,
    points: &str,
) -> anyhow::Result<()> {
    sqlx::raw_sql(SCHEMA).execute(&pool).await?;
    let fence = Fence::new(pool);
    fence.create_table_if_missing().await?;
    let handfast = Handfast::connect(&setup.coordinator)?;
    let participant = Participant::builder("order")
        .action_in_batches(&fence, Orders)
        .coordinator(&handfast)
        .build();
    let checkout = Checkout {
        handfast,
        orders: Remote::here(&participant, &setup.url()),
        inventory: Remote::connect("inventory", inventory)?,
        points: Remote::connect("points", points)?,
    };
    let service = Server::builder()
        .add_service(participant.into_service())
        .add_service(OrderServiceServer::new(checkout));
    setup.serve(service).await
}

#[cfg(test)]
mod tests {
    use handfast::testing::{World, laws_with_neighbour};

    use super::{
        super::testing::{Database, databases},
        *,
    };

    #[tokio::test]
    async fn orders_survive_anything() {
        for database in databases(SCHEMA).await {
            orders_survive_anything_on(&database).await;
        }
    }

    async fn orders_survive_anything_on(database: &Database) {
        let new_world = async || {
            let pool = database.emptied().await;
            let fence = Fence::new(pool.clone());
            fence.create_table_if_missing().await.unwrap();
            let participant =
                Participant::builder("order").action_in_batches(&fence, Orders).build();
            World::new(participant, async move || -> Vec<(i64, String)> {
                // A cancelled order keeps its row, but for customers it does not exist.
                let orders = "SELECT id, status FROM orders WHERE status <> 'cancelled'";
                sqlx::query_as(orders).fetch_all(&pool).await.unwrap()
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
