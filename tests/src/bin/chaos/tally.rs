//! What was done to the processes, and what was seen that must not be.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::databases::Databases;

/// What comes about on any store.
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
/// What comes about only on SQLite.
const ON_SQLITE: [&str; 2] = [SECOND_REFUSED, PAUSED_AND_SECOND_REFUSED];
/// What comes about only where there is a server.
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
/// What comes about only where the server is ours.
const ON_OUR_SERVERS: [&str; 1] = [DATABASE_KILLED];

/// What comes about only where the database is a group of servers.
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

/// Shared by all who break things, and by those who must know when it is over.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    counts: Mutex<Counts>,
    over: AtomicBool,
    calm: AtomicBool,
}

/// See the module's comment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// By kind.
    pub(crate) faults: BTreeMap<String, u64>,
    /// Processes that died where they were told to, by the name of the place.
    pub(crate) crash_points: BTreeMap<String, u64>,
    /// SIGKILLs of coordinators and services, crash points included.
    pub(crate) process_kills: u64,
    /// SIGKILLs of the database server.
    pub(crate) database_kills: u64,
    /// What must not be, in sentences.
    pub(crate) violations: Vec<String>,
    /// The longest that a standby took, from the end of the one before to serving.
    pub(crate) standby_longest: Duration,
}

impl Tally {
    /// One more of that kind.
    pub(crate) fn fault(&self, kind: impl Into<String>) {
        *self.counts().faults.entry(kind.into()).or_default() += 1;
    }

    /// A process was killed, as that kind of fault.
    pub(crate) fn kill(&self, kind: impl Into<String>) {
        self.fault(kind);
        self.counts().process_kills += 1;
    }

    /// A process has died where it was told to.
    pub(crate) fn crash(&self, kind: &str, crash_point: &str) {
        self.kill(kind);
        *self.counts().crash_points.entry(crash_point.to_owned()).or_default() += 1;
    }

    /// The database server was killed.
    pub(crate) fn database_kill(&self) {
        self.fault(DATABASE_KILLED);
        self.counts().database_kills += 1;
    }

    /// What must not be.
    pub(crate) fn violation(&self, what: String) {
        self.counts().violations.push(what);
    }

    /// Everything so far.
    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().expect("nothing panics while it is locked")
    }

    /// Which kinds have not come about yet.
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
        let counts = self.counts();
        kinds.retain(|kind| !counts.faults.contains_key(*kind));
        kinds
    }

    /// Nothing further is begun, nor broken.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Leaves the database and the links to it alone, or not any more: a standby is patient with a database that fails.
    pub(crate) fn calm(&self, calm: bool) {
        self.calm.store(calm, Ordering::Relaxed);
    }

    /// Whether they are left alone.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Whether it has come to that.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}
