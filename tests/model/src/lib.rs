//! Handfast's protocol as a model, small enough that every state of it is visited.
//!
//! Three models, each a stateright [`Model`](stateright::Model):
//!
//! - [`protocol`]: one transaction through everything that can happen to it. The main one; start there, with `state.rs`.
//! - [`several`]: batches that carry several partitions, each with its own owner.
//! - [`key`]: idempotency keys: may Begin and Execute be repeated?
//!
//! A variant is a model and how much may happen in it. With all rules in place a variant must be **clean**: no invariant is broken
//! in any state, and everything that should be possible happens in some state (or the variant proves nothing). With one guard
//! taken away it must be **broken**: the search finds the shortest story that breaks a named invariant. So each rule is there
//! for a reason that can be read, step by step, and the model is shown to be able to find it.
//!
//! What the model says of the code rests on the code doing what the model does; the names are the same, and each file says whose
//! part it plays. Not modelled: a store that loses what it has acknowledged when no owner can notice, operators, and lengths of time.

pub mod key;
pub mod protocol;
pub mod search;
pub mod several;
mod variant;

pub use variant::{Outcome, Size, Summary, Variant, Verdict, all, run_all};
