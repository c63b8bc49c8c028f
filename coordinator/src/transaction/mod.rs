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
//! Two questions only. [`GlobalTransaction::apply`] takes in an event and is the only code that changes a state.
//! [`GlobalTransaction::plan`] says, from the state alone, which calls are due and when to look again. A restart loads what
//! is open and asks `plan`, like every other time.
//!
//! | | branches registered | decision asked for | time passed | call returned |
//! |---|---|---|---|---|
//! | **Trying** | added; a repeat: nothing | Confirm of exactly the registered ones: → Confirming. Cancel: → Cancelling | past `expires_at`: → Cancelling | coordinator-driven only: OK notes it, the last one: → Confirming. Refused: → Cancelling. Unknown: again later, or → Cancelling after half of the timeout |
//! | **Confirming, Cancelling** | rejected | the same: nothing. The other: rejected | nothing | OK: acknowledged, the last one: → Confirmed, Cancelled. Else: again later, for ever |
//! | **Confirmed, Cancelled** | rejected | the same: nothing. The other: rejected | nothing | nothing |
//!
//! What must always hold is checked in every reachable state by `tests/explorer.rs`:
//! a decision never changes; no branch joins after it; Confirm is planned only while Confirming, Cancel only while
//! Cancelling, Try only while Trying; a branch has one call at a time; a final state has no branch that is still open; an
//! event that is rejected, and a repeat, change nothing.

mod apply;
mod model;
mod plan;
pub mod retry;
#[cfg(test)]
mod tests;

pub use handfast_proto::time::Timestamp;

pub use apply::{Change, DecisionRequest, Event, Outcome, Rejection, Weight};
pub use model::{
    AttemptError, Branch, BranchSet, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
    GlobalTransaction, Key, NewTransaction, Payload, Phase, Refusal, Resolution, State, StuckAfter,
};
pub use plan::{DueCall, Plan};
