//! Handfast's protocol as a model, small enough that every state of it is visited.
//!
//! Four models, each a stateright [`Model`](stateright::Model):
//!
//! - [`protocol`]: one transaction through everything that can happen to it. The main one; start there, with `state.rs`.
//! - [`several`]: batches that carry several partitions, each with its own owner.
//! - [`key`]: idempotency keys: may Begin and Execute be repeated?
//! - [`open`]: what is open: does a new owner find all that it must carry on? The code does not do this yet: it has an index of what is
//!   due.
//!
//! A variant is a model with limits: how many crashes, takeovers and faults may happen in it. A variant with all rules must be
//! **clean**: no state breaks an invariant, and everything that should be possible happens in some state. (Otherwise the variant
//! proves nothing.) A variant without one guard must be **broken**: the search finds the shortest story that breaks a named
//! invariant. So every rule has a reason that can be read step by step, and the model is shown to be able to find a fault.
//!
//! The model says something about the code only as far as the code does what the model does. The names are the same in both, and
//! each file says which part of the code it stands for. Not modelled: a store that loses acknowledged changes when no owner can
//! notice, operators who decide what is lost, and lengths of time.

pub mod key;
pub mod open;
pub mod protocol;
pub mod search;
pub mod several;
mod variant;

pub use variant::{Outcome, Size, Summary, Variant, Verdict, run_all};

/// All variants of all models.
#[must_use]
pub fn all() -> Vec<Variant> {
    let mut variants = protocol::variants();
    variants.extend(several::variants());
    variants.extend(key::variants());
    variants.extend(open::variants());
    variants
}
