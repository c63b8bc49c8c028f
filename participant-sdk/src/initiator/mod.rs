//! The initiator's side: it begins a global transaction, calls each Try, and asks for the decision.
//!
//! Read `transaction.rs` first: `run` is the whole life of a transaction in one function. `global.rs` makes the calls,
//! `registrar.rs` registers their branches with the coordinator, `ledger.rs` keeps what became of them, `decision.rs` asks for the
//! decision. `remembered.rs` brings the value of the first run back to a repeat.

pub(crate) mod transaction;

mod decision;

pub(crate) mod global;
pub(crate) mod ledger;
mod registrar;
mod remembered;

pub(crate) mod execute;

pub(crate) mod outcome;

pub(crate) mod propagation;

mod description;
