//! A second server that follows the first one and lags. It answers some of the reads, and it takes over when the first one fails: then
//! batches that were acknowledged are lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use handfast_coordinator::store::{ListFilter, Seat, Show, Store as _, memory::MemoryStore};
use handfast_proto::Xid;

use super::{Database, State, at_once};

/// A server whose state is that of an earlier moment.
pub(super) struct Replica {
    tables: Arc<MemoryStore>,
    /// When it has caught up with the first server again.
    catches_up_at: Duration,
}

/// What failovers depend on, and what they have lost.
#[derive(Default)]
pub(super) struct Failovers {
    /// Processes that use the store and do not stop, by number.
    living: BTreeSet<u64>,
    /// Those of them that are taking over.
    taking_over: BTreeSet<u64>,
    /// The process that has taken each partition.
    owners: BTreeMap<u16, u64>,
    /// Transactions of which a failover has lost a change, or may have lost a decision. A person must look at them.
    lost: BTreeSet<Xid>,
    /// A failover has lost batches. They may have been heartbeats, which no transaction shows.
    has_lost_batches: bool,
}

impl Database {
    /// From time to time the replica catches up.
    pub(super) fn replicate(&self) {
        let mut state = self.state();
        let caught_up = state.replica.as_ref().is_none_or(|it| it.catches_up_at <= state.now);
        if state.mix.replica_lag > 0 && caught_up {
            state.follow(self.tables());
        }
    }

    /// The replica, if it answers this read.
    pub(super) fn reader(&self) -> Option<Arc<MemoryStore>> {
        let mut state = self.state();
        let odds = state.mix.reads_of_replica;
        let on_replica = odds > 0 && state.rng.u32(..10_000) < odds;
        let replica = state.replica.as_ref().filter(|_| on_replica)?;
        let tables = replica.tables.clone();
        drop(state);
        self.chronicle.count("store: read on the replica");
        Some(tables)
    }

    /// A process begins to use the store. Returns its number.
    pub(super) fn begins(&self) -> u64 {
        let mut state = self.state();
        state.serial += 1;
        let process = state.serial;
        state.failovers.living.insert(process);
        process
    }

    pub(super) fn ends(&self, process: u64) {
        let mut state = self.state();
        state.failovers.living.remove(&process);
        state.failovers.taking_over.remove(&process);
    }

    pub(super) fn takes_over(&self, process: u64) {
        self.state().failovers.taking_over.insert(process);
    }

    pub(super) fn has_taken_over(&self, process: u64) {
        self.state().failovers.taking_over.remove(&process);
    }

    /// The process has taken over these partitions.
    pub(super) fn owns(&self, process: u64, partitions: &[u16]) {
        let owners = partitions.iter().map(|partition| (*partition, process));
        self.state().failovers.owners.extend(owners);
    }

    /// Whether every partition has an owner that is alive.
    pub(crate) fn has_living_owners(&self) -> bool {
        let state = self.state();
        let Failovers { living, owners, .. } = &state.failovers;
        !owners.is_empty() && owners.values().all(|owner| living.contains(owner))
    }

    pub(crate) fn is_lost(&self, xid: Xid) -> bool {
        self.state().failovers.lost.contains(&xid)
    }

    pub(crate) fn has_lost_batches(&self) -> bool {
        self.state().failovers.has_lost_batches
    }

    /// The first server fails, and the replica takes its place, so that changes are lost which the replica does not have. This is done
    /// only when the owners will notice: they are alive and reach the store, and no other process is taking over. Returns whether it was
    /// done, and whether changes were lost.
    pub(crate) fn fail_over(&self) -> Option<bool> {
        let undisturbed = {
            let state = self.state();
            state.cut.is_empty()
                && state.down_until <= state.now
                && state.slowness == 1
                && state.failovers.taking_over.is_empty()
        };
        if !undisturbed || !self.has_living_owners() {
            return None;
        }
        let (first, second) = (self.tables(), self.state().replica.as_ref()?.tables.clone());
        let seats = |tables: &MemoryStore| at_once(tables.seats()).expect("memory answers");
        let (before, after) = (seats(&first), seats(&second));
        let owner = |seat: &Seat| (seat.partition, seat.epoch, seat.nonce);
        if !before.iter().map(owner).eq(after.iter().map(owner)) {
            return None; // a takeover would be lost, too
        }
        let behind: BTreeSet<_> = (before.iter().zip(&after))
            .filter(|(before, after)| before.position > after.position)
            .map(|(seat, _)| seat.partition)
            .collect();
        let lost = lost(&first, &second, &behind);
        let mut state = self.state();
        state.jobs.clear(); // every connection breaks
        state.failovers.lost.extend(lost);
        state.failovers.has_lost_batches |= !behind.is_empty();
        // The first server may go on to answer reads.
        let catches_up_at = state.now + Duration::from_millis(state.mix.replica_lag);
        state.replica = Some(Replica { tables: first, catches_up_at });
        drop(state);
        self.set_tables(second);
        Some(!behind.is_empty())
    }
}

/// The transactions that differ on the two servers, and those that are undecided on the second one in a partition that is behind.
fn lost(first: &MemoryStore, second: &MemoryStore, behind: &BTreeSet<u16>) -> Vec<Xid> {
    let all = |tables: &MemoryStore| {
        let filter = ListFilter::of(Show::All);
        at_once(tables.list(&filter, usize::MAX)).expect("memory answers").transactions
    };
    let (first, second) = (all(first), all(second));
    let differ = first.iter().filter(|global| !second.contains(global));
    let gone = second.iter().filter(|global| !first.contains(global));
    let open = second.iter().filter(|global| {
        global.state.decision().is_none() && behind.contains(&global.xid.partition)
    });
    differ.chain(gone).chain(open).map(|global| global.xid).collect()
}

impl State {
    /// A replica of these tables as they are now.
    fn follow(&mut self, tables: Arc<MemoryStore>) {
        let lag = self.mix.replica_lag;
        let catches_up_at = self.now + Duration::from_millis(self.rng.u64(lag / 10..=lag));
        self.replica = Some(Replica { tables: Arc::new(tables.copy()), catches_up_at });
    }
}
