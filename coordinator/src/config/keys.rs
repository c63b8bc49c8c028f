//! The keys of the configuration: their names, defaults and meanings, and the checks between them. `handfast config` prints the
//! comments of this file.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use handfast_proto::limits::{TIMEOUT_MAX, TIMEOUT_MIN};
use humantime::format_duration as print;

use super::{Config, LogFilter, LogFormat, StoreUrl, value};
use crate::{
    dispatch::{
        self,
        address::{Addresses, AllowList},
    },
    transaction::{StuckAfter, retry::RetryPolicy},
};

/// Shortest retention: a repeated Decide must still find the transaction.
const RETENTION_MIN: Duration = Duration::from_secs(1);
/// Shortest and longest time until a transaction is recorded that is to be recorded with its decision. Below it, most would be
/// recorded twice. Above it, too many would be lost in a crash.
const RECORD_AFTER: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(60)];
/// Shortest pause between attempts, and shortest deadline of a call. Without a pause, retries would overload the participant.
const PAUSE_MIN: Duration = Duration::from_millis(1);

/// Configuration of the Handfast coordinator: handfast serve --config FILE
///
/// A flag overrides an environment variable, a variable overrides this file, and this file overrides the defaults shown here.
/// The variable for `listen` is HANDFAST_LISTEN; the variable for `timeout` in `[calls]` is HANDFAST_CALLS_TIMEOUT.
/// Durations have a unit: 500ms, 20s, 2m, 7d.
#[derive(confique::Config)]
pub(super) struct Keys {
    /// The address to listen on. An address that other machines can reach also needs `insecure`.
    /// Flag: --listen
    #[config(env = "HANDFAST_LISTEN", default = "127.0.0.1:7420", deserialize_with = value::listen)]
    pub(super) listen: SocketAddr,

    /// Listen beyond this machine although there is no authentication yet. Use it only in a network where everyone who
    /// can connect may do everything.
    /// Flag: --insecure
    #[config(env = "HANDFAST_INSECURE", default = false, deserialize_with = value::yes_or_no)]
    pub(super) insecure: bool,

    /// Where to record transactions: a file, sqlite:PATH, or a server, mysql://user:password@host:3306/database. The servers of a
    /// group are named with commas: mysql://user:password@db1,db2:3307,db3/database. No default.
    /// Flag: --store
    #[config(env = "HANDFAST_STORE", deserialize_with = value::parsed)]
    pub(super) store: StoreUrl,

    /// Allow a MySQL server that can lose acknowledged commits (innodb_flush_log_at_trx_commit, sync_binlog), or the store
    /// `memory:`, which loses every decision when the coordinator stops. For experiments and benchmarks only.
    #[config(env = "HANDFAST_STORE_UNSAFE", default = false, deserialize_with = value::yes_or_no)]
    pub(super) store_unsafe: bool,

    /// The log level (error, warn, info, debug, trace), and other levels for parts of the program:
    /// "info,handfast_coordinator::dispatch=debug".
    /// Flag: --log
    #[config(env = "HANDFAST_LOG", default = "info", deserialize_with = value::parsed)]
    pub(super) log: LogFilter,

    /// text: for people, on stderr. json: one object per line, on stdout. auto: text if stdout is a terminal, otherwise json.
    /// Flag: --log-format
    #[config(env = "HANDFAST_LOG_FORMAT", default = "auto", deserialize_with = value::parsed)]
    pub(super) log_format: LogFormat,

    /// Labels that the log lines of a transaction show, by their keys: ["order", "customer"]. Labels may hold personal data, so none is
    /// shown unless it is named here. In the environment, separate them with commas.
    #[config(env = "HANDFAST_LOG_LABELS", default = [], deserialize_with = value::label_keys)]
    pub(super) log_labels: Arc<[String]>,

    /// Longest time for an orderly shutdown, from the signal on. Keep it below the time after which the supervisor kills
    /// (Kubernetes: 30s).
    /// Flag: --shutdown-grace
    #[config(env = "HANDFAST_SHUTDOWN_GRACE", default = "20s", deserialize_with = value::length)]
    pub(super) shutdown_grace: Duration,

    /// How long finished transactions and their idempotency keys are kept. At least 1s.
    #[config(env = "HANDFAST_RETENTION", default = "7d", deserialize_with = value::length)]
    pub(super) retention: Duration,

    /// Addresses of participants, by name. They override the address that was registered with a branch, at every call, so that
    /// a service can move. Best as a table `[participants]` at the end of this file, with lines such as:
    /// inventory = "http://127.0.0.1:7001"
    /// Separate several addresses of one participant with spaces. All of them, and all IP addresses of a name, are called in turn. A
    /// server that does not answer is skipped while another one does.
    /// In the environment: inventory=http://127.0.0.1:7001,points=http://127.0.0.1:7002
    #[config(env = "HANDFAST_PARTICIPANTS", default = {}, deserialize_with = value::participants)]
    pub(super) participants: BTreeMap<String, Addresses>,

    /// Global transactions.
    #[config(nested)]
    pub(super) transaction: Transaction,

    /// Retries of Confirm and Cancel: exponential backoff with full jitter, without end.
    #[config(nested)]
    pub(super) retry: Retry,

    /// When a transaction is reported as stuck: whichever comes first. It is retried all the same.
    #[config(nested)]
    pub(super) stuck: Stuck,

    /// Calls to participants.
    #[config(nested)]
    pub(super) calls: Calls,

    /// Upper bounds.
    #[config(nested)]
    pub(super) limits: Limits,

    /// Addresses that the coordinator may call when a branch was registered with one. The coordinator calls from inside your
    /// network, so this list is a protection.
    #[config(nested)]
    pub(super) targets: Targets,
}

#[derive(confique::Config)]
pub(super) struct Transaction {
    /// How long phase one may take if the initiator sets no timeout: 1ms to 1h. After that the transaction is cancelled.
    #[config(env = "HANDFAST_TRANSACTION_TIMEOUT", default = "30s", deserialize_with = value::length)]
    pub(super) timeout: Duration,

    /// A transaction that is recorded with its decision is recorded earlier when it has been open for this long, so that operators
    /// see it and a restart finds it: 10ms to 1m. After a crash, transactions that were younger are lost as a whole, and their
    /// participants give back what they reserved.
    #[config(env = "HANDFAST_TRANSACTION_RECORD_AFTER", default = "500ms", deserialize_with = value::length)]
    pub(super) record_after: Duration,
}

#[derive(confique::Config)]
pub(super) struct Retry {
    /// Longest pause after the first attempt. It doubles with each further attempt.
    #[config(env = "HANDFAST_RETRY_INITIAL", default = "200ms", deserialize_with = value::length)]
    pub(super) initial: Duration,

    /// The pause never exceeds this.
    #[config(env = "HANDFAST_RETRY_MAX", default = "60s", deserialize_with = value::length)]
    pub(super) max: Duration,
}

#[derive(confique::Config)]
pub(super) struct Stuck {
    /// After this many failed attempts of one branch.
    #[config(env = "HANDFAST_STUCK_AFTER_ATTEMPTS", default = 8, deserialize_with = value::count)]
    pub(super) after_attempts: u32,

    /// When a branch has not acknowledged this long after the decision.
    #[config(env = "HANDFAST_STUCK_AFTER", default = "2m", deserialize_with = value::length)]
    pub(super) after: Duration,
}

#[derive(confique::Config)]
pub(super) struct Calls {
    /// The deadline of one call. It doubles after each call that ran into it.
    #[config(env = "HANDFAST_CALLS_TIMEOUT", default = "5s", deserialize_with = value::length)]
    pub(super) timeout: Duration,

    /// The deadline never exceeds this.
    #[config(env = "HANDFAST_CALLS_TIMEOUT_MAX", default = "60s", deserialize_with = value::length)]
    pub(super) timeout_max: Duration,

    /// Calls in flight to one participant. Further calls wait. One action uses three quarters of them at most, so that an action that
    /// hangs does not hold up the others; and each action may always have one call in flight.
    #[config(env = "HANDFAST_CALLS_PER_PARTICIPANT", default = 64, deserialize_with = value::count)]
    pub(super) per_participant: usize,

    /// Send all calls to one server on one stream, if it supports streams. A call then costs a fraction. Set it to false if a load
    /// balancer is to spread the calls over several instances.
    #[config(env = "HANDFAST_CALLS_STREAMS", default = true, deserialize_with = value::yes_or_no)]
    pub(super) streams: bool,
}

#[derive(confique::Config)]
pub(super) struct Limits {
    /// Open transactions in memory. Above this, Begin and Execute answer RESOURCE_EXHAUSTED.
    #[config(env = "HANDFAST_LIMITS_OPEN", default = 100_000, deserialize_with = value::count)]
    pub(super) open: usize,

    /// Memory for open transactions with their payloads, in megabytes. Above this, Begin, RegisterBranch and Execute answer
    /// RESOURCE_EXHAUSTED.
    #[config(env = "HANDFAST_LIMITS_OPEN_MEGABYTES", default = 1000, deserialize_with = value::count)]
    pub(super) open_megabytes: usize,

    /// Connections from callers. Above this, new connections are closed.
    #[config(env = "HANDFAST_LIMITS_CONNECTIONS", default = 10_000, deserialize_with = value::count)]
    pub(super) connections: usize,
}

#[derive(confique::Config)]
pub(super) struct Targets {
    /// "loopback" is this machine. Others are "host:port": "inventory:7001", "*.shop.internal:7001", "10.0.0.5:*".
    /// In the environment, separate them with commas. Addresses in `participants` are always allowed.
    #[config(env = "HANDFAST_TARGETS_ALLOW", default = ["loopback"], deserialize_with = value::allow_list)]
    pub(super) allow: AllowList,
}

/// Values that are wrong, or that contradict each other.
pub(super) struct Problem {
    /// The keys concerned. The first one that was set is where the error points.
    pub(super) keys: &'static [&'static str],
    pub(super) what: String,
    pub(super) hint: &'static str,
}

impl Keys {
    /// Checks the values against each other, and makes the configuration from them.
    pub(super) fn check(self) -> Result<Config, Problem> {
        if let Some(problem) = self.problem() {
            return Err(problem);
        }
        Ok(Config {
            listen: self.listen,
            insecure: self.insecure,
            store: self.store,
            store_unsafe: self.store_unsafe,
            log: self.log,
            log_format: self.log_format,
            log_labels: self.log_labels,
            shutdown_grace: self.shutdown_grace,
            retention: self.retention,
            transaction_timeout: self.transaction.timeout,
            record_after: self.transaction.record_after,
            retry: RetryPolicy { initial: self.retry.initial, max: self.retry.max },
            stuck: StuckAfter { attempts: self.stuck.after_attempts, time: self.stuck.after },
            calls: super::Calls {
                timeout: self.calls.timeout,
                timeout_max: self.calls.timeout_max,
            },
            limits: super::Limits {
                open: self.limits.open,
                open_megabytes: self.limits.open_megabytes,
                connections: self.limits.connections,
            },
            targets: dispatch::Targets {
                participants: self.participants,
                allow: self.targets.allow,
                calls_max: self.calls.per_participant,
                streams: self.calls.streams,
            },
        })
    }

    fn problem(&self) -> Option<Problem> {
        let Self {
            listen,
            insecure,
            store,
            store_unsafe,
            retention,
            transaction,
            retry,
            calls,
            ..
        } = self;
        if !listen.ip().is_loopback() && !insecure {
            return Some(Problem {
                keys: &["listen"],
                what: format!(
                    "other machines can connect to {listen}, and there is no authentication yet"
                ),
                hint: "listen on 127.0.0.1; or, where everybody who can connect may do everything, set `insecure = true` \
                       (--insecure, HANDFAST_INSECURE=true)",
            });
        }
        if *store == StoreUrl::Memory && !store_unsafe {
            return Some(Problem {
                keys: &["store"],
                what: "\"memory:\" forgets every decision when the coordinator stops; it is for tests and benchmarks only"
                    .to_owned(),
                hint: "such as: HANDFAST_STORE=sqlite:handfast.db",
            });
        }
        let ranges: [(&'static [&'static str], Duration, [Duration; 2], &'static str); 5] = [
            (
                &["retention"],
                *retention,
                [RETENTION_MIN, value::LENGTH_MAX],
                "the default is 7d; repeated calls are answered from kept records, so keep them long enough",
            ),
            (
                &["transaction.timeout"],
                transaction.timeout,
                [TIMEOUT_MIN, TIMEOUT_MAX],
                "the default is 30s and the maximum is 1h; do not hold reservations longer",
            ),
            (
                &["transaction.record_after"],
                transaction.record_after,
                RECORD_AFTER,
                "the default is 500ms; what is open for longer than that should be seen",
            ),
            (
                &["retry.initial", "retry.max"],
                retry.initial,
                [PAUSE_MIN, retry.max],
                "the defaults are 200ms and 60s",
            ),
            (
                &["calls.timeout", "calls.timeout_max"],
                calls.timeout,
                [PAUSE_MIN, calls.timeout_max],
                "the defaults are 5s and 60s",
            ),
        ];
        let wrong =
            ranges.into_iter().find(|(_, length, [min, max], _)| length < min || length > max);
        wrong.map(|(keys, length, [min, max], hint)| {
            let bound = match keys {
                [_, max_key] if length > max => {
                    format!("at most `{max_key}`, which is {}", print(max))
                }
                _ if length > max => format!("at most {}", print(max)),
                _ => format!("at least {}", print(min)),
            };
            Problem {
                keys,
                what: format!("`{}` is {}; it must be {bound}", keys[0], print(length)),
                hint,
            }
        })
    }
}
