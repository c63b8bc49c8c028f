//! Counts of injected faults, and violations that were seen.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::databases::Databases;

/// Faults that must occur on any store.
const ANYWHERE: [&str; 11] = [
    COORDINATOR_KILLED,
    COORDINATOR_CRASHED,
    COORDINATOR_STOPPED,
    SERVICE_KILLED,
    SERVICE_CRASHED,
    SERVICE_PAUSED,
    SERVICE_STOPPED,
    "network: cut",
    "network: stalled",
    "network: replies lost",
    "network: black hole",
];
/// Faults that must occur on SQLite.
const ON_SQLITE: [&str; 2] = [SECOND_REFUSED, PAUSED_AND_SECOND_REFUSED];
/// Faults that must occur if there is a database server.
const ON_SERVERS: [&str; 10] = [
    TAKEN_OVER,
    PAUSED_AND_TAKEN_OVER,
    STANDBY,
    "database link: cut",
    "database link: stalled",
    "database link: replies lost",
    "database link: black hole",
    "database link: COMMIT lost",
    "database link: OK of COMMIT lost",
    "database link: OK of COMMIT held back",
];
/// Faults that must occur if we started the server.
const ON_OUR_SERVERS: [&str; 1] = [DATABASE_KILLED];

/// Faults that must occur if the database is a group of servers.
const ON_GROUPS: [&str; 1] = [DATABASE_SWITCHED];

pub(crate) const COORDINATOR_KILLED: &str = "coordinator: killed";
pub(crate) const COORDINATOR_CRASHED: &str = "coordinator: dies at a crash point";
pub(crate) const COORDINATOR_STOPPED: &str = "coordinator: stopped in order";
pub(crate) const SECOND_REFUSED: &str = "coordinator: a second one refused";
pub(crate) const PAUSED_AND_SECOND_REFUSED: &str = "coordinator: paused, and a second one refused";
pub(crate) const TAKEN_OVER: &str = "coordinator: taken over from";
pub(crate) const PAUSED_AND_TAKEN_OVER: &str = "coordinator: paused and taken over from";
pub(crate) const STANDBY: &str = "coordinator: a standby takes over";
pub(crate) const SERVICE_KILLED: &str = "service: killed";
pub(crate) const SERVICE_CRASHED: &str = "service: dies at a crash point";
pub(crate) const SERVICE_PAUSED: &str = "service: paused";
pub(crate) const SERVICE_STOPPED: &str = "service: stopped in order";
const DATABASE_KILLED: &str = "database: killed";
pub(crate) const DATABASE_SWITCHED: &str = "database: new connections led to another server";

/// Shared by all parts that inject faults. It also says when the run is over.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    counts: Mutex<Counts>,
    over: AtomicBool,
    calm: AtomicBool,
}

/// See the module's comment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Number of faults, by kind.
    pub(crate) faults: BTreeMap<String, u64>,
    /// Processes that died at their crash point, by its name.
    pub(crate) crash_points: BTreeMap<String, u64>,
    /// SIGKILLs of coordinators and services, crash points included.
    pub(crate) process_kills: u64,
    /// SIGKILLs of the database server.
    pub(crate) database_kills: u64,
    /// Violations, as sentences.
    pub(crate) violations: Vec<String>,
    /// The longest time between the end of a coordinator and its standby serving.
    pub(crate) standby_longest: Duration,
}

impl Tally {
    /// Counts one fault of this kind.
    pub(crate) fn fault(&self, kind: impl Into<String>) {
        *self.counts().faults.entry(kind.into()).or_default() += 1;
    }

    /// Counts a process that was killed.
    pub(crate) fn kill(&self, kind: impl Into<String>) {
        self.fault(kind);
        self.counts().process_kills += 1;
    }

    /// Counts a process that died at its crash point.
    pub(crate) fn crash(&self, kind: &str, crash_point: &str) {
        self.kill(kind);
        *self.counts().crash_points.entry(crash_point.to_owned()).or_default() += 1;
    }

    /// Counts a kill of the database server.
    pub(crate) fn database_kill(&self) {
        self.fault(DATABASE_KILLED);
        self.counts().database_kills += 1;
    }

    /// Records a violation.
    pub(crate) fn violation(&self, what: String) {
        self.counts().violations.push(what);
    }

    /// Everything so far.
    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().expect("nothing panics while it is locked")
    }

    /// The kinds of faults that have not occurred yet.
    pub(crate) fn missing(&self, databases: &Databases) -> Vec<&'static str> {
        let mut kinds = ANYWHERE.to_vec();
        if databases.is_server() {
            kinds.extend(ON_SERVERS);
        } else {
            kinds.extend(ON_SQLITE);
        }
        if databases.own_server().is_some() {
            kinds.extend(ON_OUR_SERVERS);
        }
        if databases.group().is_some() {
            kinds.extend(ON_GROUPS);
        }
        kinds.retain(|kind| self.is_missing(kind));
        kinds
    }

    /// Whether this kind of fault has not occurred yet.
    pub(crate) fn is_missing(&self, kind: &str) -> bool {
        !self.counts().faults.contains_key(kind)
    }

    /// Ends the run: no further order is placed, no further fault injected.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Stops faults of the database and of the links to it, or allows them again. A standby waits while its database fails.
    pub(crate) fn calm(&self, calm: bool) {
        self.calm.store(calm, Ordering::Relaxed);
    }

    /// Whether faults of the database are stopped.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Whether the run is over.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}
