//! soon
pub mod transaction;
