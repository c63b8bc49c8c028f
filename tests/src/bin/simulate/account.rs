//! What a participant has in its database, and counters of every effect. The audit trusts these counters and nothing else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use handfast::{BranchId, Xid, testing::MemoryFence};

use crate::clock::Wall;

/// The amount in each account at the start. A run cannot use it up.
const FUNDS: i64 = 1_000_000;

/// The effects of one branch. Each must happen at most once, and never both Confirm and Cancel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    pub(crate) order: u64,
    /// The transaction is recorded with its decision.
    pub(crate) at_decision: bool,
    pub(crate) reserved: u32,
    pub(crate) confirmed: u32,
    pub(crate) released: u32,
}

/// One participant's database.
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) fence: MemoryFence,
    books: Mutex<Books>,
}

#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) effects: BTreeMap<(Xid, BranchId), Effects>,
    pub(crate) free: i64,
    pub(crate) held: i64,
    pub(crate) used: i64,
    /// Decides which calls fail.
    pub(crate) rng: fastrand::Rng,
}

impl Account {
    pub(crate) fn new(name: String, wall: Wall, rng: fastrand::Rng) -> Arc<Self> {
        let (effects, free, held, used) = (BTreeMap::new(), FUNDS, 0, 0);
        Arc::new(Self {
            name,
            fence: MemoryFence::with_clock(Arc::new(wall)),
            books: Mutex::new(Books { effects, free, held, used, rng }),
        })
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it is locked")
    }
}

impl Books {
    pub(crate) fn is_conserved(&self) -> bool {
        self.free + self.held + self.used == FUNDS
    }
}
