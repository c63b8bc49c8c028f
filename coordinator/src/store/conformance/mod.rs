//! The requirements for every store. Each test runs on each store. The journal and the partitions can rely on a store that
//! passes.

mod batches;
mod owners;
mod purge;
mod reads;
mod records;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{memory::MemoryStore, mysql::fixture, sqlite::SqliteStore, *};
use crate::transaction::{
    AttemptError, BranchSpec, BranchState, CancelCause, Decision, DecisionRequest, Drive, Event,
    Key, NewTransaction, Outcome, Payload, Phase, Refusal, Resolution, State,
};

pub(super) const NOW: Timestamp = Timestamp(1_700_000_000_000);
const STUCK_AFTER: StuckAfter = StuckAfter { attempts: 3, time: Duration::from_secs(120) };

/// Runs one suite on all stores.
macro_rules! on_every_store {
    ($($subject:ident { $($name:ident)* })*) => {
        mod in_memory {
            $($(#[tokio::test] async fn $name() {
                super::$subject::$name(&super::MemoryStore::default()).await;
            })*)*
        }
        mod in_sqlite {
            $($(#[tokio::test] async fn $name() {
                let folder = tempfile::tempdir().unwrap();
                let store = super::SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
                super::$subject::$name(&store).await;
            })*)*
        }
        mod in_mysql {
            $($(#[tokio::test] async fn $name() {
                for server in super::fixture::servers() {
                    let database = super::fixture::Database::new(&server).await;
                    super::$subject::$name(&database.store().await).await;
                    database.drop().await;
                }
            })*)*
        }
    };
}

on_every_store! {
    records {
        what_was_appended_comes_back
        every_kind_of_record_comes_back
        a_result_is_kept_as_it_was_decided
        many_changes_of_one_batch_come_back
        resolved_branches_are_remembered
    }
    batches {
        batches_that_may_come_at_a_time_are_not_in_each_others_way
        a_batch_is_applied_once_however_often_it_is_appended
        a_batch_that_does_not_follow_is_an_alarm
        a_change_of_what_is_not_as_it_is_said_to_be_is_an_alarm
        half_of_a_batch_is_an_alarm
        several_changes_that_are_written_as_one_go_by_the_first
        a_takeover_that_is_missing_is_a_loss_too
        calls_that_are_given_up_leave_the_store_working
    }
    owners {
        an_owner_that_was_replaced_changes_nothing
        one_fenced_partition_stops_the_whole_batch
        every_takeover_has_a_larger_epoch_and_a_nonce_of_its_own
        a_takeover_takes_the_partitions_that_it_names
        a_loss_before_a_takeover_is_found_by_the_owner_before
    }
    reads {
        keys_lead_to_their_transactions
        what_is_due_comes_in_pages_and_in_order
        a_read_that_is_older_than_what_is_known_is_not_believed
        the_list_shows_the_newest_that_fit
        the_list_finds_labels
        the_summary_counts
    }
    purge {
        the_purge_takes_what_finished_and_remembers_how_far_it_went
        only_the_owner_purges
        what_began_in_the_future_does_not_stop_the_purge
    }
}

/// An owner of all partitions that numbers its batches.
pub(super) struct Owner<'a> {
    store: &'a dyn Store,
    pub(super) ownerships: Vec<Ownership>,
    positions: BTreeMap<u16, u64>,
    /// The latest position of each partition that is known to be durable.
    durable: BTreeMap<u16, u64>,
    /// The recorded states of the transactions that it has written.
    states: BTreeMap<Xid, State>,
    sequence: u64,
}

impl<'a> Owner<'a> {
    pub(super) async fn of(store: &'a dyn Store) -> Self {
        let ownerships = store.acquire(&ALL_PARTITIONS, "test", NOW).await.unwrap();
        Self {
            store,
            ownerships,
            positions: BTreeMap::new(),
            durable: BTreeMap::new(),
            states: BTreeMap::new(),
            sequence: 0,
        }
    }

    pub(super) fn ownership(&self, partition: u16) -> Ownership {
        *self.ownerships.iter().find(|ownership| ownership.partition == partition).unwrap()
    }

    pub(super) fn xid(&mut self, partition: u16) -> Xid {
        let Ownership { epoch, nonce, .. } = self.ownership(partition);
        self.sequence += 1;
        Xid { partition, epoch, sequence: self.sequence, nonce }
    }

    /// The next batch, for all partitions that `writes` touches.
    pub(super) fn batch(&mut self, mut writes: Vec<Write>) -> Batch {
        for write in &mut writes {
            let xid = write.global.xid;
            let before = self.states.get(&xid).copied().unwrap_or(State::Trying);
            if write.head != Head::Insert {
                write.before.get_or_insert(before);
            }
            if write.head != Head::Keep {
                self.states.insert(xid, write.global.state);
            }
        }
        let partitions: std::collections::BTreeSet<_> =
            writes.iter().map(|write| write.global.xid.partition).collect();
        let guards = partitions.into_iter().map(|partition| {
            let position = self.positions.entry(partition).or_default();
            *position += 1;
            let Ownership { epoch, nonce, .. } = self.ownerships[usize::from(partition)];
            Guard { partition, epoch, nonce, position: *position }
        });
        Batch { guards: guards.collect(), writes }
    }

    pub(super) async fn append(&mut self, writes: Vec<Write>) {
        let batch = self.batch(writes);
        let mut appended = self.store.append(&batch).await;
        while let Err(Error::Unavailable(_)) = appended {
            appended = self.store.append(&batch).await; // a machine that is busy may be silent for too long
        }
        assert_eq!(appended.unwrap(), Appended::Durable);
        self.durable.extend(batch.guards.iter().map(|guard| (guard.partition, guard.position)));
    }

    pub(super) fn known(&self, partition: u16) -> Known {
        let position = self.durable.get(&partition).copied().unwrap_or(0);
        Known { ownership: self.ownership(partition), position }
    }

    async fn load(&self, xid: Xid) -> Result<Lookup, Error> {
        self.store.load(xid, self.known(xid.partition)).await
    }

    pub(super) async fn found(&self, xid: Xid) -> GlobalTransaction {
        match self.load(xid).await.unwrap() {
            Lookup::Found(global) => *global,
            absent @ Lookup::Absent { .. } => panic!("{xid} is not there: {absent:?}"),
        }
    }

    /// Takes back the number of this partition's latest batch, which was not applied.
    fn give_up(&mut self, partition: u16) {
        self.positions.entry(partition).and_modify(|position| *position -= 1);
    }

    pub(super) async fn insert(&mut self, global: &GlobalTransaction) {
        self.append(vec![inserted(global)]).await;
    }
}

pub(super) fn inserted(global: &GlobalTransaction) -> Write {
    Write {
        global: Arc::new(global.clone()),
        head: Head::Insert,
        before: None,
        new_branches: 0,
        changed_branches: BranchSet::EMPTY,
    }
}

pub(super) fn updated(global: &GlobalTransaction, changed_branches: BranchSet) -> Write {
    let new_branches = global.branches.len();
    let global = Arc::new(global.clone());
    Write { global, head: Head::Update, before: None, new_branches, changed_branches }
}

fn spec(branch_id: &str) -> BranchSpec {
    BranchSpec {
        branch_id: branch_id.parse().unwrap(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        target: "http://127.0.0.1:7001".to_owned(),
        payload: None,
        carry_payload: false,
        try_timeout: None,
        inquires: false,
        damage: None,
    }
}

pub(super) fn begun(xid: Xid, branches: &[&str]) -> GlobalTransaction {
    let new = NewTransaction {
        at_decision: false,
        name: "checkout".to_owned(),
        drive: Drive::Initiator,
        timeout: Duration::from_secs(30),
        labels: BTreeMap::from([("order".to_owned(), "1042 “é”".to_owned())]),
        key: None,
        branches: branches.iter().map(|id| spec(id)).collect(),
    };
    GlobalTransaction::begin(xid, new, NOW)
}

pub(super) fn cancel(global: &mut GlobalTransaction, cause: CancelCause) {
    global
        .apply(
            Event::DecisionRequested(DecisionRequest::Cancel(cause)),
            NOW + Duration::from_secs(1),
        )
        .unwrap();
}

pub(super) fn confirm(global: &mut GlobalTransaction) {
    let tried = global.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
    let event = Event::DecisionRequested(DecisionRequest::Confirm { tried, result: None });
    global.apply(event, NOW + Duration::from_secs(1)).unwrap();
}

pub(super) fn call(global: &mut GlobalTransaction, branch: usize, outcome: Outcome) {
    let phase = if global.state == State::Confirming { Phase::Confirm } else { Phase::Cancel };
    let at = NOW + Duration::from_secs(2);
    global.apply(Event::CallStarted { branch, phase }, at).unwrap();
    let retry_in = Duration::from_secs(10);
    global.apply(Event::CallReturned { branch, phase, outcome, retry_in }, at).unwrap();
}

pub(super) fn failed(hopeless: bool) -> Outcome {
    let error = AttemptError {
        code: "UNAVAILABLE".to_owned(),
        message: "connection refused".to_owned(),
        at: NOW + Duration::from_secs(2),
    };
    Outcome::Unknown { error, timed_out: false, hopeless }
}
