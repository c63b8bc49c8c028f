//! The coordinator of Handfast: records global transactions and their branches, and drives Try, Confirm and Cancel over gRPC.
//!
//! ```text
//!  rpc (parse, ask, answer)
//!    │ command
//!    ▼
//!  partition  ── apply(event, now) ── changed transactions ──▶ journal ── one batch ──▶ store
//!    ▲   │                                            │ durable up to n
//!    │   └── plan(now): what is due ◀─────────────────┘
//!    │          │ calls whose cause is durable
//!    │          ▼
//!    └── dispatch: a lane for each action, a breaker ──▶ participants
//! ```
//!
//! Read in this order: [`transaction`] is pure and says what may happen to one transaction; [`partition`] owns those that are
//! open; [`journal`] makes their changes durable, in a [`store`]; [`dispatch`] calls participants; [`coordinator`] joins them;
//! [`rpc`] is the door; [`server`] starts and stops it all. Dependencies point one way: server → rpc, coordinator → partition →
//! transaction; store and dispatch know transaction; nothing below rpc knows it.

pub mod transaction;

pub mod partition;

pub mod journal;
pub mod store;

pub mod dispatch;

pub mod coordinator;

pub mod rpc;

pub mod clock;
pub mod config;
mod listen;
mod lobby;
pub mod server;
pub mod signals;
pub mod standby;
pub mod telemetry;
