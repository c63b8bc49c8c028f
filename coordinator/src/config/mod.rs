//! The configuration. `keys` has the keys, their defaults and their meanings; `load` reads the values from flags, environment and
//! file. A [`Config`] is always valid: everything is checked before a port is opened, and an error names its place and an example.

mod keys;
mod load;
#[cfg(test)]
mod tests;
mod value;

use std::{net::SocketAddr, sync::Arc, time::Duration};

pub use self::{
    load::{Invalid, Sources},
    value::{LogFilter, LogFormat, MySqlUrl, StoreUrl},
};
use crate::{
    dispatch::Targets,
    transaction::{StuckAfter, retry::RetryPolicy},
};

/// The checked configuration. `keys` explains each key, and `handfast config` prints that.
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
    /// `log_labels`
    pub log_labels: Arc<[String]>,
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

/// Deadlines of calls to participants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// `calls.timeout`
    pub timeout: Duration,
    /// `calls.timeout_max`; not shorter.
    pub timeout_max: Duration,
}

/// Upper bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `limits.open`
    pub open: usize,
    /// `limits.open_megabytes`
    pub open_megabytes: usize,
    /// `limits.connections`
    pub connections: usize,
}
