//! soon
pub mod clock;
pub mod coordinator;
pub mod dispatch;
pub mod journal;
pub mod partition;
pub mod rpc;
pub mod store;
pub mod transaction;
