//! Which branches were confirmed, of which transactions: a transaction counts when all of its confirms came.
//!
//! Initiators say what they expect, participants what they confirm, in whatever order and over whatever it has come.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::oneshot;

/// Locks, so that several cores seldom wait for each other.
const SHARDS: usize = 64;

/// A transaction's name in the ledger: the bytes of an xid, as a number.
pub(crate) type Name = u128;

#[derive(Debug)]
pub(crate) struct Ledger {
    shards: Vec<Mutex<BTreeMap<Name, Account>>>,
    completed: AtomicU64,
}

#[derive(Debug)]
struct Account {
    /// A bit for each branch that is not confirmed. All of them, until it is known how many there are.
    missing: u64,
    /// Who waits for the last one.
    completed: Option<oneshot::Sender<()>>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, completed: AtomicU64::new(0) }
    }

    /// Expects a confirm of each branch from 1 to `branches`, of which some may have come. The receiver hears of the last one.
    pub(crate) fn expect(&self, name: Name, branches: u16) -> oneshot::Receiver<()> {
        let (completed, receiver) = oneshot::channel();
        self.change(name, |account| {
            account.missing &= u64::MAX >> (64 - branches);
            account.completed = Some(completed);
        });
        receiver
    }

    /// The branch was confirmed. Said twice it counts once.
    pub(crate) fn confirmed(&self, name: Name, branch: u16) {
        self.change(name, |account| account.missing &= !(1 << (branch - 1)));
    }

    fn change(&self, name: Name, change: impl FnOnce(&mut Account)) {
        let mut shard = self.shard(name);
        let account = shard.entry(name).or_insert(Account { missing: u64::MAX, completed: None });
        change(account);
        if account.missing == 0 {
            let account = shard.remove(&name).expect("it is there");
            drop(shard);
            self.completed.fetch_add(1, Ordering::Relaxed);
            // Whoever waited may have given up.
            account.completed.map(|completed| completed.send(()));
        }
    }

    /// Transactions whose confirms have all come.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    fn shard(&self, name: Name) -> MutexGuard<'_, BTreeMap<Name, Account>> {
        // An xid ends in a nonce, which all of a partition share; what is before that counts.
        let shard = (name >> 32) % SHARDS as u128;
        let shard = usize::try_from(shard).expect("less than the number of shards");
        self.shards[shard].lock().expect("nothing panics while it is locked")
    }
}
