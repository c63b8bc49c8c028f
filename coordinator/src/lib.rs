//! soon
pub mod clock;
pub mod dispatch;
pub mod journal;
pub mod partition;
pub mod store;
pub mod transaction;
