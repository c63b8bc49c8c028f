//! A store in memory, for tests and benchmarks only: its content is lost when the process ends. It is also the shortest
//! description of what the other stores do.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use handfast_proto::{BranchId, Xid};

use super::{
    Appended, Batch, Damage, DuePage, Epoch, Error, Guard, Head, Known, ListFilter, Listed,
    Listing, Lookup, Ownership, PARTITIONS, PartitionRow, Row, Seat, Show, Store, Summary, Write,
    XidBytes, judge, loss, xids_of,
};
use crate::transaction::{BranchState, Decision, GlobalTransaction, State, StuckAfter, Timestamp};

/// See the module's comment.
#[derive(Debug, Default)]
pub struct MemoryStore {
    tables: Mutex<Tables>,
    /// How long each batch takes.
    delay: Mutex<Duration>,
}

#[derive(Debug, Clone, Default)]
struct Tables {
    partitions: BTreeMap<u16, PartitionRow>,
    /// The owner of each partition.
    owners: BTreeMap<u16, String>,
    /// Nonces, by partition and epoch.
    nonces: BTreeMap<(u16, u32), u32>,
    /// How many batches each epoch had when the next owner took over.
    ended: BTreeMap<(u16, u32), u64>,
    /// Epochs that have lost batches.
    lost: BTreeSet<(u16, u32)>,
    transactions: BTreeMap<Xid, GlobalTransaction>,
    /// When somebody must look at each open transaction, as its latest write said.
    due: BTreeMap<Xid, Timestamp>,
    keys: BTreeMap<[u8; 32], Xid>,
    purged_through: BTreeMap<u16, Xid>,
    /// Branches that operators have resolved. Kept for ever.
    resolved: BTreeMap<(Xid, BranchId), Decision>,
}

impl MemoryStore {
    /// Makes each batch take this long from now on.
    ///
    /// # Panics
    ///
    /// Never: no code panics while the lock is held.
    pub fn delay(&self, each: Duration) {
        *self.delay.lock().expect("nothing panics while it is locked") = each;
    }

    /// A separate store with the present content, such as a replica that is never updated.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { tables: Mutex::new(self.tables().clone()), delay: Mutex::default() }
    }

    /// Restores the content of `backup`, like a failover to a replica that lacks the last batches.
    pub fn go_back_to(&self, backup: &Self) {
        let backup = backup.tables().clone();
        *self.tables() = backup;
    }

    /// The recorded state of a transaction, for tests.
    #[must_use]
    pub fn get(&self, xid: Xid) -> Option<GlobalTransaction> {
        self.tables().transactions.get(&xid).cloned()
    }

    /// The content, if it is new enough for a read with `known`.
    fn tables_for(&self, known: Known) -> Result<MutexGuard<'_, Tables>, Error> {
        let tables = self.tables();
        let recorded = tables.partitions.get(&known.ownership.partition);
        known.check(recorded.copied().unwrap_or_default())?;
        Ok(tables)
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().expect("nothing panics while it is locked")
    }
}

impl Tables {
    /// Begins the next epoch of a partition. `owner`: `None` only ends the present ownership.
    fn take_over(&mut self, partition: u16, owner: Option<&str>) -> Ownership {
        let nonce = fastrand::u32(..);
        let recorded = self.partitions.entry(partition).or_default();
        let (earlier, epoch) = (*recorded, recorded.epoch + 1);
        *recorded = PartitionRow { epoch, nonce, position: 0 };
        self.ended.insert((partition, earlier.epoch), earlier.position);
        self.nonces.insert((partition, epoch), nonce);
        match owner {
            Some(owner) => drop(self.owners.insert(partition, owner.to_owned())),
            None => drop(self.owners.remove(&partition)),
        }
        let mut lossy =
            self.lost.range((partition, 0)..=(partition, u32::MAX)).map(|(_, epoch)| *epoch);
        let lost_from = lossy.clone().next();
        let lost_through = lossy.next_back();
        Ownership { partition, epoch, nonce, lost_from, lost_through }
    }

    /// Marks what is lost of this batch's owner in these partitions.
    fn note_losses(&mut self, batch: &Batch, partitions: &[u16]) {
        for guard in batch.guards.iter().filter(|guard| partitions.contains(&guard.partition)) {
            let Guard { partition, .. } = *guard;
            let epochs = self.nonces.range((partition, 0)..=(partition, guard.epoch)).rev();
            let epoch = |(&(_, epoch), &nonce): (&(u16, u32), &u32)| {
                let present = || self.partitions.get(&partition).map_or(0, |it| it.position);
                let ended = self.ended.get(&(partition, epoch)).copied();
                let batches = ended.unwrap_or_else(present);
                Epoch { epoch, nonce, batches, lost: self.lost.contains(&(partition, epoch)) }
            };
            let epochs: Vec<_> = epochs.map(epoch).collect();
            if let Some((epoch, _)) = loss(*guard, &epochs) {
                self.lost.insert((partition, epoch));
                self.take_over(partition, None);
            }
        }
    }

    fn may_have_lost_the_decision_of(&self, global: &GlobalTransaction) -> bool {
        let partition = global.xid.partition;
        let lossy = self.lost.range((partition, global.xid.epoch)..=(partition, u32::MAX));
        global.state == State::Trying && lossy.last().is_some()
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn seats(&self) -> Result<Vec<Seat>, Error> {
        let tables = self.tables();
        let seat = |(partition, recorded): (&u16, &PartitionRow)| Seat {
            partition: *partition,
            epoch: recorded.epoch,
            nonce: recorded.nonce,
            position: recorded.position,
            owner: tables.owners.get(partition).cloned(),
        };
        Ok(tables.partitions.iter().map(seat).collect())
    }

    async fn acquire(
        &self,
        partitions: &[u16],
        owner: &str,
        _now: Timestamp,
    ) -> Result<Vec<Ownership>, Error> {
        if let Some(partition) = partitions.iter().find(|partition| **partition >= PARTITIONS) {
            return Err(Error::Corrupt(format!("the store has no row for partition {partition}")));
        }
        let mut tables = self.tables();
        Ok((partitions.iter().copied())
            .map(|partition| tables.take_over(partition, Some(owner)))
            .collect())
    }

    async fn append(&self, batch: &Batch) -> Result<Appended, Error> {
        let delay = *self.delay.lock().expect("nothing panics while it is locked");
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut tables = self.tables();
        if let Some(appended) = judge(batch, |partition| tables.partitions.get(&partition).copied())
        {
            match &appended {
                Appended::Fenced(fenced) => tables.note_losses(batch, fenced),
                Appended::Damaged(damaged) => {
                    let damaged: Vec<_> = damaged.iter().map(|damage| damage.partition).collect();
                    tables.note_losses(batch, &damaged);
                }
                Appended::Durable => {}
            }
            return Ok(appended);
        }
        let misfit = |write: &Write| {
            let row = |recorded: &GlobalTransaction| Row {
                state: recorded.state,
                branches: Some(recorded.branches.len()),
            };
            let xid = write.global.xid;
            let key = write.global.key.filter(|_| write.head == Head::Insert);
            let misfit = match write.misfit(tables.transactions.get(&xid).map(row)) {
                Some(misfit) => misfit,
                None => {
                    let other = tables.keys.get(&key?.hash)?;
                    format!("the key of transaction {xid} belongs to {other} in the store")
                }
            };
            Some((xid.partition, misfit))
        };
        let misfits: Vec<_> = batch.writes.iter().filter_map(misfit).collect();
        if !misfits.is_empty() {
            return Ok(Appended::Damaged(Damage::of_rows(misfits)));
        }
        for guard in &batch.guards {
            let Guard { partition, epoch, nonce, position } = *guard;
            let recorded = tables.partitions.entry(partition).or_default();
            if epoch >= recorded.epoch {
                *recorded = PartitionRow { epoch, nonce, position };
            }
        }
        for write in &batch.writes {
            let recorded = write.global.recorded();
            if let (Head::Insert, Some(key)) = (write.head, recorded.key) {
                tables.keys.insert(key.hash, recorded.xid);
            }
            for branch in &recorded.branches {
                if let (BranchState::Resolved(_), Some(decision)) =
                    (&branch.state, recorded.state.decision())
                {
                    let branch_id = branch.spec.branch_id.clone();
                    tables.resolved.insert((recorded.xid, branch_id), decision);
                }
            }
            if write.head != Head::Keep {
                tables.due.remove(&recorded.xid);
                tables.due.extend(write.global.due_at().map(|at| (recorded.xid, at)));
            }
            tables.transactions.insert(recorded.xid, recorded);
        }
        Ok(Appended::Durable)
    }

    async fn load(&self, xid: Xid, known: Known) -> Result<Lookup, Error> {
        let tables = self.tables_for(known)?;
        Ok(match tables.transactions.get(&xid) {
            Some(global) => Lookup::Found(Box::new(global.clone())),
            None => Lookup::Absent {
                purged_through: tables.purged_through.get(&xid.partition).copied(),
                nonce: tables.nonces.get(&(xid.partition, xid.epoch)).copied(),
                lost: tables.lost.contains(&(xid.partition, xid.epoch)),
            },
        })
    }

    async fn resolved(&self, xid: Xid, known: Known) -> Result<Vec<(BranchId, Decision)>, Error> {
        let tables = self.tables_for(known)?;
        let of_transaction = tables.resolved.iter().filter(|((of, _), _)| *of == xid);
        Ok(of_transaction
            .map(|((_, branch_id), decision)| (branch_id.clone(), *decision))
            .collect())
    }

    async fn find_keys(
        &self,
        hashes: &[[u8; 32]],
        known: Known,
    ) -> Result<Vec<Option<Xid>>, Error> {
        let tables = self.tables_for(known)?;
        Ok(hashes.iter().map(|hash| tables.keys.get(hash).copied()).collect())
    }

    async fn due(
        &self,
        until: Timestamp,
        after: Option<(Timestamp, XidBytes)>,
        limit: usize,
        known: Known,
    ) -> Result<DuePage, Error> {
        let tables = self.tables_for(known)?;
        let (first, last) = xids_of(known.ownership.partition);
        let of_partition = tables.transactions.range(first..=last).map(|(_, global)| global);
        let mut due: Vec<_> = of_partition
            .filter(|global| !known.ownership.may_have_lost_the_decision_of(global))
            .filter_map(|global| Some((*tables.due.get(&global.xid)?, global.xid, global)))
            .collect();
        due.sort_by_key(|(due_at, xid, _)| (*due_at, *xid));
        let later = due.iter().map(|(due_at, ..)| *due_at).find(|due_at| *due_at > until);
        let mut page: Vec<_> = (due.into_iter())
            .filter(|(due_at, xid, _)| {
                let place = (*due_at, xid.to_bytes().to_vec());
                *due_at <= until && after.as_ref().is_none_or(|after| place > *after)
            })
            .take(limit + 1)
            .collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let next =
            page.last().filter(|_| more).map(|(due_at, xid, _)| (*due_at, xid.to_bytes().to_vec()));
        Ok(DuePage {
            transactions: page.into_iter().map(|(.., global)| global.clone()).collect(),
            next,
            next_due_at: if more { None } else { later },
        })
    }

    async fn list(&self, filter: &ListFilter, limit: usize) -> Result<Listing, Error> {
        let tables = self.tables();
        let mut fitting: Vec<_> = (tables.transactions.values())
            .filter(|global| match filter.show {
                Show::All => true,
                Show::Open => !global.state.is_final(),
                Show::Stuck(now, after) => global.is_stuck(now, after),
                Show::Lost => tables.may_have_lost_the_decision_of(global),
            })
            .filter(|global| filter.after.is_none_or(|after| Listed::of(global) < after))
            .collect();
        fitting.sort_by_key(|global| std::cmp::Reverse(Listed::of(global)));
        let mut looked_to = None;
        if filter.searches() && fitting.len() > filter.looked_max {
            fitting.truncate(filter.looked_max);
            looked_to = fitting.last().map(|last| Listed::of(last));
        }
        let named = |global: &GlobalTransaction| {
            filter.name.as_ref().is_none_or(|name| global.name == *name)
                && filter.matches_labels(global)
        };
        let found = fitting.into_iter().filter(|global| named(global)).take(limit).cloned();
        Ok(Listing { transactions: found.collect(), looked_to })
    }

    async fn summary(&self, now: Timestamp, stuck: StuckAfter) -> Result<Summary, Error> {
        let tables = self.tables();
        let mut summary = Summary::default();
        for global in tables.transactions.values().filter(|global| !global.state.is_final()) {
            summary.open += 1;
            summary.stuck += u64::from(global.is_stuck(now, stuck));
            summary.oldest =
                Some(summary.oldest.map_or(global.begun_at, |at| at.min(global.begun_at)));
        }
        Ok(summary)
    }

    async fn purge(
        &self,
        Ownership { partition, epoch, nonce, .. }: Ownership,
        finished_before: Timestamp,
        now: Timestamp,
        after: Option<XidBytes>,
        limit: usize,
    ) -> Result<(u64, Option<XidBytes>), Error> {
        let mut tables = self.tables();
        let owner = tables.partitions.get(&partition);
        if owner.is_none_or(|owner| (owner.epoch, owner.nonce) != (epoch, nonce)) {
            return Ok((0, None));
        }
        let (first, last) = xids_of(partition);
        let seen: Vec<_> = (tables.transactions.range(first..=last))
            .filter(|(xid, _)| after.as_deref().is_none_or(|after| &xid.to_bytes()[..] > after))
            .take(limit)
            .map(|(xid, global)| (*xid, global.begun_at, global.finished_at))
            .collect();
        let mut deleted = 0;
        for (xid, ..) in seen
            .iter()
            .filter(|(.., finished_at)| finished_at.is_some_and(|at| at < finished_before))
        {
            if let Some(key) = tables.transactions.remove(xid).and_then(|global| global.key) {
                tables.keys.remove(&key.hash);
            }
            let through = tables.purged_through.entry(partition).or_insert(*xid);
            *through = (*through).max(*xid);
            deleted += 1;
        }
        let more = |begun_at: &Timestamp| {
            seen.len() == limit && (*begun_at < finished_before || *begun_at > now)
        };
        let next = seen.last().filter(|(_, begun_at, _)| more(begun_at));
        Ok((deleted, next.map(|(xid, ..)| xid.to_bytes().to_vec())))
    }

    async fn release(&self, ownerships: &[Ownership]) -> Result<(), Error> {
        let mut tables = self.tables();
        for Ownership { partition, epoch, nonce, .. } in ownerships {
            let owner = tables.partitions.get(partition);
            if owner.is_some_and(|owner| (owner.epoch, owner.nonce) == (*epoch, *nonce)) {
                tables.owners.remove(partition);
            }
        }
        Ok(())
    }
}
