//! Test support for participants and initiators. It has the real coordinator in this process, without a port and on a clock that
//! the test moves. It has participants that fail on demand, the laws that every action must obey, and an in-memory fence.
//!
//! ```
//! # #[cfg(feature = "sqlite")]
//! # mod example {
//! use handfast::testing::{Database, World, laws};
//! # use handfast::{Action, Branch, Contract, Failed, Fence, Json, Participant, Refusal, TryError, Tx};
//! # use sqlx::Sqlite;
//! # pub struct DeductStock;
//! # impl Contract for DeductStock { const NAME: &'static str = "inventory.deduct"; type Args = Json<i64>; type Reply = (); }
//! # pub struct Inventory;
//! # impl Action for Inventory {
//! #     type Contract = DeductStock;
//! #     type Db = Sqlite;
//! #     async fn on_try(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(n): &Json<i64>) -> Result<(), TryError> {
//! #         let done = sqlx::query("UPDATE stock SET free = free - ?1, held = held + ?1 WHERE free >= ?1").bind(n).execute(&mut **tx).await?;
//! #         if done.rows_affected() == 0 { return Err(Refusal::new("OUT_OF_STOCK").into()) }
//! #         Ok(())
//! #     }
//! #     async fn on_confirm(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(n): &Json<i64>) -> Result<(), Failed> {
//! #         sqlx::query("UPDATE stock SET held = held - ?1, sold = sold + ?1").bind(n).execute(&mut **tx).await?;
//! #         Ok(())
//! #     }
//! #     async fn on_cancel(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(n): &Json<i64>) -> Result<(), Failed> {
//! #         sqlx::query("UPDATE stock SET held = held - ?1, free = free + ?1").bind(n).execute(&mut **tx).await?;
//! #         Ok(())
//! #     }
//! # }
//!
//! #[tokio::test]
//! async fn the_stock_survives_anything() {
//!     let new_world = async || {
//!         let db = Database::new("CREATE TABLE stock (free INTEGER, held INTEGER, sold INTEGER); INSERT INTO stock VALUES (10, 0, 0)").await;
//!         let fence = Fence::new(db.pool());
//!         fence.create_table_if_missing().await.unwrap();
//!         let participant = Participant::builder("inventory").action(&fence, Inventory).build();
//!         World::new(participant, async move || -> (i64, i64, i64) {
//!             sqlx::query_as("SELECT free, held, sold FROM stock").fetch_one(&db.pool()).await.unwrap()
//!         })
//!     };
//!     let nothing_is_lost = |(free, held, sold): &(i64, i64, i64)| free + held + sold == 10;
//!     laws::<DeductStock, _>(Json(2), new_world, nothing_is_lost).await.unwrap();
//! }
//! # }
//! ```

mod coordinator;
#[cfg(feature = "sqlite")]
mod database;
mod laws;
mod memory;
mod network;
#[cfg(test)]
#[cfg(feature = "sqlite")]
mod tests;

use tonic::transport::Endpoint;

use crate::InvalidAddress;

pub use coordinator::{Coordinator, Fault};
#[cfg(feature = "sqlite")]
pub use database::Database;
pub use laws::{BrokenLaw, Report, World, laws, laws_with_neighbour};
pub use memory::{MemoryAction, MemoryFence};

/// A connection to `url` with the SDK's settings, to be made over a network of your own.
///
/// # Errors
///
/// When that is no address.
pub fn endpoint(url: &str) -> Result<Endpoint, InvalidAddress> {
    Ok(handfast_proto::connection::endpoint(&url.parse()?))
}
