//! What can be configured. `keys` has the keys with their defaults and what they mean, `load` says where values come from. A
//! [`Config`] that exists is valid: everything is checked before a port is opened, and whatever is wrong is told with its place
//! and an example.

mod keys;
mod load;
#[cfg(test)]
mod tests;
mod value;

use std::{net::SocketAddr, time::Duration};

pub use self::{
    load::{Invalid, Sources},
    value::{LogFilter, LogFormat, MySqlUrl, StoreUrl},
};
use crate::{
    dispatch::Targets,
    transaction::{StuckAfter, retry::RetryPolicy},
};

/// What the coordinator needs to know, checked. The keys are explained in `keys`, which is what `handfast config` prints.
#[derive(Debug, Clone)]
pub struct Config {
    /// `listen`
    pub listen: SocketAddr,
    /// `insecure`
    pub insecure: bool,
    /// `store`
    pub store: StoreUrl,
    /// `store_unsafe`
    pub store_unsafe: bool,
    /// `log`
    pub log: LogFilter,
    /// `log_format`
    pub log_format: LogFormat,
    /// `shutdown_grace`
    pub shutdown_grace: Duration,
    /// `retention`
    pub retention: Duration,
    /// `transaction.timeout`
    pub transaction_timeout: Duration,
    /// `retry`
    pub retry: RetryPolicy,
    /// `stuck`
    pub stuck: StuckAfter,
    /// `calls`
    pub calls: Calls,
    /// `limits`
    pub limits: Limits,
    /// `participants`, `targets`, `calls.per_participant` and `calls.streams`
    pub targets: Targets,
}

/// How long calls to participants may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// `calls.timeout`
    pub timeout: Duration,
    /// `calls.timeout_max`; not shorter.
    pub timeout_max: Duration,
}

/// How much is taken at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `limits.open`
    pub open: usize,
    /// `limits.connections`
    pub connections: usize,
}
