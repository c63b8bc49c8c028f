//! The state that all hosts of one simulation share, beside the network: what callers were told, and orders from the nemesis. In
//! reality no process sees all of this.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use handfast::{Handfast, Xid};
use handfast_coordinator::transaction::Decision;
use tokio::sync::Notify;

use crate::{
    account::Account,
    chronicle::Chronicle,
    clock::Wall,
    mix::Mix,
    network::{COORDINATORS, Network},
    store::Database,
};

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) mix: Mix,
    pub(crate) chronicle: Arc<Chronicle>,
    pub(crate) network: Arc<Network>,
    pub(crate) database: Arc<Database>,
    pub(crate) coordinators: Vec<Seat>,
    pub(crate) accounts: Vec<Arc<Account>>,
    pub(crate) participant_walls: Vec<Wall>,
    history: Mutex<History>,
    /// No new orders, no more faults.
    draining: AtomicBool,
    /// Coordinators that ended by themselves.
    exits: Mutex<Vec<usize>>,
    /// How many workers have not finished.
    busy: AtomicUsize,
    next_order: AtomicU64,
    /// Counts the starts of programs, so that no two runs draw the same random numbers.
    starts: AtomicU64,
}

/// One coordinator host.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    pub(crate) wall: Wall,
    /// The next process that starts here takes over at once.
    pub(crate) take_over: AtomicBool,
    /// Tells the process that runs here to stop in order.
    pub(crate) stop: Notify,
}

/// What callers were told.
#[derive(Debug, Default)]
struct History {
    /// Orders with a key that were begun, oldest first.
    keyed: Vec<u64>,
    /// The outcomes that callers were told, by transaction.
    told: BTreeMap<Xid, BTreeSet<Decision>>,
    /// Callers were told that these were never recorded.
    never: BTreeSet<Xid>,
    /// Transactions that initiators may ask about.
    known: Vec<Xid>,
}

impl World {
    pub(crate) fn new(seed: u64, mix: Mix, loud: bool) -> Self {
        let chronicle = Arc::new(Chronicle::new(loud));
        let walls: Vec<_> = (0..mix.participants).map(|_| Wall::default()).collect();
        let accounts = walls.iter().enumerate().map(|(n, wall)| {
            let rng = fastrand::Rng::with_seed(seed ^ (0x6163_6374 + n as u64));
            Account::new(participant(n), wall.clone(), rng)
        });
        Self {
            seed,
            network: Network::new((0..mix.coordinators).map(coordinator).collect()),
            database: Database::new(seed, mix.store, chronicle.clone()),
            coordinators: (0..mix.coordinators).map(|_| Seat::default()).collect(),
            accounts: accounts.collect(),
            participant_walls: walls,
            mix,
            chronicle,
            history: Mutex::default(),
            draining: AtomicBool::new(false),
            exits: Mutex::default(),
            busy: AtomicUsize::new(0),
            next_order: AtomicU64::new(1),
            starts: AtomicU64::new(0),
        }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("nothing panics while it is locked")
    }

    pub(crate) fn rng(&self) -> fastrand::Rng {
        let start = self.starts.fetch_add(1, Ordering::Relaxed);
        fastrand::Rng::with_seed(self.seed ^ (start << 32) ^ 0x7374_6172)
    }

    /// A client of the coordinators.
    pub(crate) fn handfast(&self) -> Handfast {
        let channel = || self.network.channel(COORDINATORS);
        let handfast = Handfast::from_channels(channel(), channel());
        if self.mix.streams { handfast } else { handfast.without_streams() }
    }

    // ---------------------------------------------------------------------------------------------------------- what goes on

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// How many of a hundred calls of phase two fail at the participant.
    pub(crate) fn failures_of_phase_two(&self) -> u32 {
        if self.is_draining() { 0 } else { self.mix.phase_two_failures }
    }

    pub(crate) fn exited(&self, coordinator: usize) {
        self.exits.lock().expect("nothing panics while it is locked").push(coordinator);
    }

    pub(crate) fn take_exits(&self) -> Vec<usize> {
        std::mem::take(&mut self.exits.lock().expect("nothing panics while it is locked"))
    }

    /// Counts as a worker that has not finished, until it is dropped.
    pub(crate) fn work(self: &Arc<Self>) -> Work {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Work(self.clone())
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn new_order(&self) -> u64 {
        self.next_order.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn has_key(&self, order: u64) {
        self.history().keyed.push(order);
    }

    /// An order with a key that was begun before.
    pub(crate) fn earlier_order(&self, rng: &mut fastrand::Rng) -> Option<u64> {
        rng.choice(&self.history().keyed).copied()
    }

    /// A transaction to ask about.
    pub(crate) fn known(&self, rng: &mut fastrand::Rng) -> Option<Xid> {
        rng.choice(&self.history().known).copied()
    }

    pub(crate) fn knows(&self, xid: Xid) {
        self.history().known.push(xid);
    }

    // --------------------------------------------------------------------------------------------------------- what was told

    /// A caller was told this decision.
    pub(crate) fn told(&self, xid: Xid, decision: Decision, whom: &str) {
        self.chronicle.note(format_args!("told {xid} {decision:?} {whom}"));
        let mut history = self.history();
        let told = history.told.entry(xid).or_default();
        told.insert(decision);
        let both = told.len() > 1;
        drop(history);
        let durable = self.database.decision(xid);
        if both {
            self.chronicle
                .violation("I4", format!("{xid}: both confirmed and cancelled were told"));
        }
        match (decision, durable) {
            (Decision::Confirm, Some(Decision::Confirm))
            | (Decision::Cancel, Some(Decision::Cancel) | None) => {}
            (Decision::Confirm, _) => {
                let text = format!("{xid}: told confirmed {whom}, and durable is {durable:?}");
                self.chronicle.violation("I11", text);
            }
            (Decision::Cancel, _) => {
                let text = format!("{xid}: told cancelled {whom}, and it is confirmed");
                self.chronicle.violation("I4", text);
            }
        }
    }

    /// A caller was told that all participants have confirmed.
    pub(crate) fn told_completed(&self, xid: Xid) {
        for account in &self.accounts {
            let books = account.books();
            for ((_, branch), effects) in books
                .effects
                .iter()
                .filter(|((of, _), effects)| *of == xid && effects.confirmed == 0)
            {
                let text =
                    format!("{xid} {branch} at {}: told completed, but {effects:?}", account.name);
                self.chronicle.violation("I6", text);
            }
        }
    }

    pub(crate) fn told_never(&self, xid: Xid) {
        self.chronicle.note(format_args!("told {xid} was never recorded"));
        self.history().never.insert(xid);
    }

    /// The outcomes that callers were told, by transaction.
    pub(crate) fn all_told(&self) -> BTreeMap<Xid, BTreeSet<Decision>> {
        self.history().told.clone()
    }

    pub(crate) fn all_never(&self) -> BTreeSet<Xid> {
        self.history().never.clone()
    }

    pub(crate) fn orders(&self) -> u64 {
        self.next_order.load(Ordering::Relaxed) - 1
    }

    pub(crate) fn keyed(&self) -> BTreeSet<u64> {
        self.history().keyed.iter().copied().collect()
    }
}

/// See [`World::work`].
pub(crate) struct Work(Arc<World>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(crate) fn coordinator(number: usize) -> String {
    format!("c{number}.test")
}

pub(crate) fn participant(number: usize) -> String {
    format!("p{number}.test")
}

pub(crate) fn initiator(number: usize) -> String {
    format!("i{number}.test")
}
