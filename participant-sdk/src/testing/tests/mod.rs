//! Tests of the initiator's side of the SDK, and of the test kit itself, with the real coordinator in this process.

mod at_decision;
mod deadlines;
mod initiator;
#[path = "initiator/mod.rs"]
#[allow(clippy::duplicate_mod, reason = "the same must hold whether calls share streams or not")]
mod initiator_without_streams;
mod inquiry;
mod laws;
mod memory;
mod several;
mod streams;
mod wire;

use sqlx::{Sqlite, SqlitePool};

use super::{Coordinator, Database};
use crate::{
    Action, Branch, Confirmed, Contract, Failed, Fence, Json, Outcome, Participant, Refusal,
    Remote, TransactionBuilder, TransactionError, TryError, Tx, Xid,
};

const SCHEMA: &str = "CREATE TABLE stock (free INTEGER NOT NULL, held INTEGER NOT NULL, sold INTEGER NOT NULL); \
                      INSERT INTO stock VALUES (10, 0, 0)";

/// Pieces that are free, held and sold.
type Stock = (i64, i64, i64);

struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = "inventory.deduct";
    type Args = Json<i64>;
    type Reply = Json<i64>;
}

/// A correct action.
struct Inventory;

impl Action for Inventory {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        let sql = "UPDATE stock SET free = free - ?1, held = held + ?1 WHERE free >= ?1";
        if sqlx::query(sql).bind(n).execute(&mut **tx).await?.rows_affected() == 0 {
            return Err(Refusal::new("OUT_OF_STOCK")
                .message("not enough on hand")
                .with("wanted", n)
                .into());
        }
        Ok(Json(sqlx::query_scalar("SELECT free FROM stock").fetch_one(&mut **tx).await?))
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sql = "UPDATE stock SET held = held - ?1, sold = sold + ?1";
        sqlx::query(sql).bind(n).execute(&mut **tx).await?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sql = "UPDATE stock SET held = held - ?1, free = free + ?1";
        sqlx::query(sql).bind(n).execute(&mut **tx).await?;
        Ok(())
    }
}

async fn stock(pool: &SqlitePool) -> Stock {
    sqlx::query_as("SELECT free, held, sold FROM stock").fetch_one(pool).await.unwrap()
}

/// A participant called `name` that serves `action` on its own database.
async fn participant<A: Action<Db = Sqlite>>(
    name: &'static str,
    db: &Database,
    action: A,
) -> Participant {
    let fence = Fence::new(db.pool());
    fence.create_table_if_missing().await.unwrap();
    Participant::builder(name).action(&fence, action).build()
}

/// Two inventories (east and west) with ten pieces each, and a coordinator.
struct Shop {
    coordinator: Coordinator,
    east: Database,
    west: Database,
}

impl Shop {
    async fn new(streams: bool) -> Self {
        let (east, west) = (Database::new(SCHEMA).await, Database::new(SCHEMA).await);
        let participants = [
            participant("east", &east, Inventory).await,
            participant("west", &west, Inventory).await,
        ];
        let coordinator = if streams {
            Coordinator::start(participants).await
        } else {
            Coordinator::without_streams(participants).await
        };
        Self { coordinator, east, west }
    }

    fn remotes(&self) -> (Remote, Remote) {
        (self.coordinator.remote("east"), self.coordinator.remote("west"))
    }

    fn order(&self) -> TransactionBuilder {
        self.coordinator.handfast().transaction("order").until_decided()
    }

    /// Orders three pieces from the east and `from_west` from the west.
    async fn run(
        &self,
        order: TransactionBuilder,
        from_west: i64,
    ) -> Result<Confirmed<i64>, TransactionError> {
        let (east, west) = self.remotes();
        order
            .run(async |global| {
                let (left, _) = tokio::try_join!(
                    global.call::<Deduct>(&east, Json(3)),
                    global.call::<Deduct>(&west, Json(from_west)),
                )?;
                Ok(left.0)
            })
            .await
    }

    async fn confirmed(&self, xid: Xid) {
        assert_eq!(self.coordinator.finished(xid).await, Outcome::Confirmed { completed: true });
        assert_eq!(self.stocks().await, CONFIRMED);
    }

    async fn stocks(&self) -> [Stock; 2] {
        [stock(&self.east.pool()).await, stock(&self.west.pool()).await]
    }

    /// Waits until both inventories have the expected stock, moving the clock forward meanwhile.
    async fn until(&self, expected: [Stock; 2]) {
        for _ in 0..1000 {
            if self.stocks().await == expected {
                return;
            }
            self.coordinator.advance(std::time::Duration::from_millis(500));
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("expected {expected:?}, and it stays {:?}", self.stocks().await);
    }
}

/// The stock of both after a confirmed order of three pieces from the east and two from the west.
const CONFIRMED: [Stock; 2] = [(7, 0, 3), (8, 0, 2)];

const UNTOUCHED: [Stock; 2] = [(10, 0, 0), (10, 0, 0)];
