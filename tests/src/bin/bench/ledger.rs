//! Records which branches were confirmed. A transaction counts as completed once all of its branches are confirmed.
//!
//! Initiators say which confirms they expect, and participants report the confirms they serve. The order of the two does not matter.
//! Neither does the protocol that carried the Confirm.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::oneshot;

/// The ledger has many locks so that threads seldom wait for each other.
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
    /// A bit for each branch that is not confirmed. All bits are set until the initiator says how many branches there are.
    missing: u64,
    /// Notifies the initiator of the last confirm.
    completed: Option<oneshot::Sender<()>>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, completed: AtomicU64::new(0) }
    }

    /// Expects a confirm of each branch from 1 to `branches`. Some may have arrived already. The receiver fires at the last one.
    pub(crate) fn expect(&self, name: Name, branches: u16) -> oneshot::Receiver<()> {
        let (completed, receiver) = oneshot::channel();
        self.change(name, |account| {
            account.missing &= u64::MAX >> (64 - branches);
            account.completed = Some(completed);
        });
        receiver
    }

    /// Records that the branch was confirmed. Idempotent.
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
            // The initiator may have stopped waiting.
            account.completed.map(|completed| completed.send(()));
        }
    }

    /// The number of transactions whose branches are all confirmed.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    fn shard(&self, name: Name) -> MutexGuard<'_, BTreeMap<Name, Account>> {
        // The last 32 bits of an xid are a nonce that is the same for a whole partition. The shard comes from the bits before it.
        let shard = (name >> 32) % SHARDS as u128;
        let shard = usize::try_from(shard).expect("less than the number of shards");
        self.shards[shard].lock().expect("nothing panics while it is locked")
    }
}
