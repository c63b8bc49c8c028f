//! The life of one global transaction, and nothing else: no database, network, clock, task or random number.
//!
//! ```text
//!            Decide(Confirm)                 every branch confirmed
//!   Trying ───────────────────▶ Confirming ───────────────────────────▶ Confirmed
//!     │
//!     │ Decide(Cancel), a refused Try, time ran out    every branch cancelled
//!     └───────────────────────▶ Cancelling ───────────────────────────▶ Cancelled
//! ```
//!
//! There are two functions. [`GlobalTransaction::apply`] takes an event and is the only code that changes a state.
//! [`GlobalTransaction::plan`] says, from the state alone, which calls are due and when to look again. Recovery is the same code:
//! a restart loads the open transactions and asks `plan`.
//!
//! While **Trying**:
//!
//! - New branches are added. A branch that is registered again changes nothing.
//! - A request to confirm exactly the registered branches leads to Confirming, a request to cancel to Cancelling.
//! - When the time passes `expires_at`, the transaction is Cancelling.
//! - Calls return only if the coordinator drives. OK: the branch is tried, and when all are tried the transaction is Confirming.
//!   Refused: it is Cancelling. Unknown: the Try is retried; after half of the timeout, the transaction is Cancelling.
//!
//! While **Confirming** or **Cancelling**:
//!
//! - New branches are rejected. Time changes nothing.
//! - The same decision again changes nothing. The opposite decision is rejected.
//! - A call that returns OK acknowledges its branch. When all branches have acknowledged, the transaction is Confirmed or
//!   Cancelled. Every other call is retried without end.
//!
//! When **Confirmed** or **Cancelled**, the same holds for branches, decisions and time, and a call that returns changes nothing.
//!
//! `tests/explorer.rs` visits every reachable state and checks these invariants:
//!
//! - a decision never changes, and no branch joins after it;
//! - Try is planned only while Trying, Confirm only while Confirming, Cancel only while Cancelling;
//! - a branch has at most one call in flight;
//! - in a final state every branch is acknowledged or resolved;
//! - an event that is rejected or repeated changes nothing.

mod apply;
mod branch_damage;
mod branch_set;
mod model;
mod plan;
mod rejection;
pub mod retry;
#[cfg(test)]
mod tests;

pub use handfast_proto::time::Timestamp;

pub use apply::{Change, DecisionRequest, Event, Outcome, Weight};
pub use branch_damage::BranchDamage;
pub use branch_set::BranchSet;
pub use model::{
    AttemptError, Branch, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
    GlobalTransaction, Key, NewTransaction, Payload, Phase, Refusal, Resolution, State, StuckAfter,
};
pub use plan::{DueCall, Plan};
pub use rejection::Rejection;
