//! soon
pub mod clock;
pub mod store;
pub mod transaction;
