//! The SDK of Handfast: take part in global transactions (Try, Confirm, Cancel), with a service's own database.
//!
//! # Serving
//!
//! A service that takes part is a *participant*. It says what it does with three functions, an [`Action`], and this crate does the
//! rest: it opens the local transaction, keeps the [`fence`] in it, calls the function that must run, and answers.
//!
//! ```no_run
//! # #[cfg(feature = "sqlite")]
//! # async fn example<A: handfast::Action<Db = sqlx::Sqlite>>(inventory: A, pool: sqlx::SqlitePool) -> Result<(), Box<dyn std::error::Error>> {
//! use handfast::{Fence, Participant};
//!
//! let fence = Fence::new(pool);
//! fence.create_table_if_missing().await?;
//! let participant = Participant::builder("inventory").action(&fence, inventory).build();
//! tonic::transport::Server::builder()
//!     .add_service(participant.into_service())
//!     .serve("[::1]:7001".parse()?)
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! If many branches change the same few rows, an [`ActionInBatches`] confirms those that wait together with one statement.
//!
//! If you have a gRPC or HTTP handler already, use [`Fence::run`] in it; if you have a local transaction already,
//! [`Fence::enter`].
//!
//! # Initiating
//!
//! A program that begins a global transaction is its *initiator*. It connects to the coordinator with [`Handfast`], calls
//! participants inside a closure, and is told how the transaction ended. `Ok` of the closure confirms, `Err` cancels.
//!
//! ```no_run
//! # struct DeductStock;
//! # impl handfast::Contract for DeductStock { const NAME: &'static str = "inventory.deduct"; type Args = handfast::Json<u64>; type Reply = (); }
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use handfast::{Handfast, Json, Remote};
//!
//! let handfast = Handfast::connect("http://127.0.0.1:7420")?;
//! let inventory = Remote::connect("inventory", "http://127.0.0.1:7001")?;
//! let done = handfast
//!     .transaction("checkout")
//!     .idempotency_key("order-1042")
//!     .run(async |global| Ok(global.call::<DeductStock>(&inventory, Json(7)).await?))
//!     .await?;
//! println!("{} is confirmed", done.xid);
//! # Ok(())
//! # }
//! ```
//!
//! [`Handfast::execute`] leaves all calls to the coordinator. [`TransactionError`] says what each failure means for the user.
//!
//! # Features
//!
//! `sqlite`, `mysql` (MariaDB too) and `postgres` say where a fence can be. None is on by default. The version of sqlx is part of
//! this crate's interface: 0.9. `testing` brings the test kit, and with it the coordinator; use it in `dev-dependencies`.

mod initiator;

mod participant;

pub mod fence;

mod contract;

mod answer;
mod branch;
mod context;
mod dial;
mod error;
mod remote;
mod rpc;
mod status;

mod async_func;

#[cfg(feature = "testing")]
pub mod testing;

pub use handfast_proto::{BranchId, Xid, address::InvalidAddress};

pub use answer::Answer;
pub use async_func::AsyncFunc;
pub use branch::{Branch, InvalidBranch, Phase};
pub use context::{Context, ContextLayer, ContextService};
pub use contract::{Contract, Json, Payload, Proto};
pub use error::{BoxError, Failed, Refusal, TryError, WorkError};
pub use fence::{Fence, Tx};
pub use initiator::{
    execute::{ExecuteBuilder, Executed},
    global::Global,
    ledger::CallError,
    outcome::{Confirmed, Outcome, TransactionError, Unanswered},
    propagation::{PropagateLayer, PropagateService},
    transaction::{OpenTransaction, TransactionBuilder},
};
pub use participant::{
    Participant, ParticipantBuilder, UPKEEP_INTERVAL,
    action::Action,
    batches::{ActionInBatches, Tried},
    inquiry::{Inquiry, InquiryTask},
};
pub use remote::Remote;
pub use rpc::Handfast;
