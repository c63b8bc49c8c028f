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
//! | | branches registered | decision requested | time passed | call returned |
//! |---|---|---|---|---|
//! | **Trying** | added; a repeat: no change | Confirm of exactly the registered branches: → Confirming. Cancel: → Cancelling | past `expires_at`: → Cancelling | coordinator-driven only. OK: the branch is tried; when all are: → Confirming. Refused: → Cancelling. Unknown: retried, or → Cancelling after half of the timeout |
//! | **Confirming, Cancelling** | rejected | the same decision: no change. The opposite: rejected | no change | OK: acknowledged; when all branches are: → Confirmed or Cancelled. Otherwise: retried without end |
//! | **Confirmed, Cancelled** | rejected | the same decision: no change. The opposite: rejected | no change | no change |
//!
//! `tests/explorer.rs` visits every reachable state and checks these invariants:
//!
//! - a decision never changes, and no branch joins after it;
//! - Try is planned only while Trying, Confirm only while Confirming, Cancel only while Cancelling;
//! - a branch has at most one call in flight;
//! - in a final state every branch is acknowledged or resolved;
//! - an event that is rejected or repeated changes nothing.

mod apply;
mod branch_set;
mod model;
mod plan;
pub mod retry;
#[cfg(test)]
mod tests;

pub use handfast_proto::time::Timestamp;

pub use apply::{Change, DecisionRequest, Event, Outcome, Rejection, Weight};
pub use branch_set::BranchSet;
pub use model::{
    AttemptError, Branch, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
    GlobalTransaction, Key, NewTransaction, Payload, Phase, Refusal, Resolution, State, StuckAfter,
};
pub use plan::{DueCall, Plan};
