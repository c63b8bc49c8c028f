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
#[allow(missing_docs, reason = "the keys of the same name explain the fields")]
pub struct Config {
    pub listen: SocketAddr,
    pub insecure: bool,
    pub store: StoreUrl,
    pub store_unsafe: bool,
    pub log: LogFilter,
    pub log_format: LogFormat,
    pub log_labels: Arc<[String]>,
    pub shutdown_grace: Duration,
    pub retention: Duration,
    pub transaction_timeout: Duration,
    pub record_after: Duration,
    pub retry: RetryPolicy,
    pub stuck: StuckAfter,
    pub calls: Calls,
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
#[allow(missing_docs, reason = "the keys of the same name explain the fields")]
pub struct Limits {
    pub open: usize,
    pub open_megabytes: usize,
    pub connections: usize,
}
