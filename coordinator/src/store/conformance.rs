//! What every store must do. Each test runs on each store; a store that passes can be trusted by the journal and by the
//! partitions. `fresh` makes an empty store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::*;
use crate::transaction::{
    AttemptError, BranchSpec, BranchState, CancelCause, DecisionRequest, Drive, Event, Key,
    NewTransaction, Outcome, Payload, Phase, Refusal, Resolution, State,
};

pub(super) const NOW: Timestamp = Timestamp(1_700_000_000_000);
const STUCK_AFTER: StuckAfter = StuckAfter { attempts: 3, time: Duration::from_secs(120) };

/// One suite, all stores.
macro_rules! on_every_store {
    ($($(#[$doc:meta])* $name:ident)*) => {
        mod memory {
            $($(#[$doc])* #[tokio::test] async fn $name() { super::$name(&super::super::memory::MemoryStore::default()).await; })*
        }
        mod sqlite {
            $($(#[$doc])* #[tokio::test] async fn $name() {
                let folder = tempfile::tempdir().unwrap();
                let store = super::super::sqlite::SqliteStore::open(&folder.path().join("store.db")).await.unwrap();
                super::$name(&store).await;
            })*
        }
        mod mysql {
            $($(#[$doc])* #[tokio::test] async fn $name() {
                for server in super::super::mysql::fixture::servers() {
                    let database = super::super::mysql::fixture::Database::new(&server).await;
                    super::$name(&database.store().await).await;
                    database.drop().await;
                }
            })*
        }
    };
}

on_every_store! {
    what_was_appended_comes_back
    every_kind_of_record_comes_back
    many_changes_of_one_batch_come_back
    batches_that_may_come_at_a_time_are_not_in_each_others_way
    a_batch_is_applied_once_however_often_it_is_appended
    an_owner_that_was_replaced_changes_nothing
    one_fenced_partition_stops_the_whole_batch
    a_batch_that_does_not_follow_is_an_alarm
    an_update_of_what_is_not_there_is_an_alarm
    every_takeover_has_a_larger_epoch_and_a_nonce_of_its_own
    a_takeover_takes_the_partitions_that_it_names
    keys_lead_to_their_transactions
    what_is_due_comes_in_pages_and_in_order
    the_list_shows_the_newest_that_fit
    the_summary_counts
    the_purge_takes_what_finished_and_remembers_how_far_it_went
    resolved_branches_are_remembered
}

/// An owner of all partitions, who numbers its batches.
pub(super) struct Owner<'a> {
    store: &'a dyn Store,
    pub(super) ownerships: Vec<Ownership>,
    positions: BTreeMap<u16, u64>,
    sequence: u64,
}

impl<'a> Owner<'a> {
    pub(super) async fn of(store: &'a dyn Store) -> Self {
        let ownerships = store.acquire(&ALL_PARTITIONS, "test", NOW).await.unwrap();
        Self { store, ownerships, positions: BTreeMap::new(), sequence: 0 }
    }

    fn ownership(&self, partition: u16) -> Ownership {
        *self.ownerships.iter().find(|ownership| ownership.partition == partition).unwrap()
    }

    pub(super) fn xid(&mut self, partition: u16) -> Xid {
        let Ownership { epoch, nonce, .. } = self.ownership(partition);
        self.sequence += 1;
        Xid { partition, epoch, sequence: self.sequence, nonce }
    }

    /// The next batch of all partitions that `writes` touches.
    pub(super) fn batch(&mut self, writes: Vec<Write>) -> Batch {
        let partitions: std::collections::BTreeSet<_> =
            writes.iter().map(|write| write.global.xid.partition).collect();
        let guards = partitions.into_iter().map(|partition| {
            let position = self.positions.entry(partition).or_default();
            *position += 1;
            Guard {
                partition,
                epoch: self.ownerships[usize::from(partition)].epoch,
                position: *position,
            }
        });
        Batch { guards: guards.collect(), writes }
    }

    pub(super) async fn append(&mut self, writes: Vec<Write>) {
        let batch = self.batch(writes);
        assert_eq!(self.store.append(&batch).await.unwrap(), Appended::Durable);
    }

    pub(super) async fn insert(&mut self, global: &GlobalTransaction) {
        self.append(vec![inserted(global)]).await;
    }
}

pub(super) fn inserted(global: &GlobalTransaction) -> Write {
    Write {
        global: Arc::new(global.clone()),
        head: Head::Insert,
        new_branches: 0,
        changed_branches: BranchSet::EMPTY,
    }
}

pub(super) fn updated(global: &GlobalTransaction, changed_branches: BranchSet) -> Write {
    let new_branches = global.branches.len();
    Write { global: Arc::new(global.clone()), head: Head::Update, new_branches, changed_branches }
}

fn spec(branch_id: &str) -> BranchSpec {
    BranchSpec {
        branch_id: branch_id.parse().unwrap(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        target: "http://127.0.0.1:7001".to_owned(),
        payload: None,
        carry_payload: false,
    }
}

pub(super) fn begun(xid: Xid, branches: &[&str]) -> GlobalTransaction {
    let new = NewTransaction {
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
    let event = Event::DecisionRequested(DecisionRequest::Confirm { tried });
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

async fn found(store: &dyn Store, xid: Xid) -> GlobalTransaction {
    match store.load(xid).await.unwrap() {
        Lookup::Found(global) => *global,
        absent @ Lookup::Absent { .. } => panic!("{xid} is not there: {absent:?}"),
    }
}

async fn what_was_appended_comes_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(3), &["1", "2"]);
    owner.insert(&global).await;
    assert_eq!(found(store, global.xid).await, global.recorded());

    // A branch more, the head untouched.
    global.apply(Event::Registered(vec![spec("3")]), NOW).unwrap();
    let write = Write { head: Head::Keep, new_branches: 2, ..updated(&global, BranchSet::EMPTY) };
    owner.append(vec![write]).await;
    assert_eq!(found(store, global.xid).await, global.recorded());

    // The decision, a failed attempt, the end.
    confirm(&mut global);
    owner.append(vec![updated(&global, BranchSet::EMPTY)]).await;
    assert_eq!(found(store, global.xid).await, global.recorded());
    call(&mut global, 0, Outcome::Done { reply: None });
    call(&mut global, 1, failed(true));
    owner.append(vec![updated(&global, BranchSet::only(0).union(BranchSet::only(1)))]).await;
    assert_eq!(found(store, global.xid).await, global.recorded());
    call(&mut global, 1, Outcome::Done { reply: None });
    call(&mut global, 2, Outcome::Done { reply: None });
    assert_eq!(global.state, State::Confirmed);
    owner.append(vec![updated(&global, BranchSet::only(1).union(BranchSet::only(2)))]).await;
    assert_eq!(found(store, global.xid).await, global.recorded());
}

async fn every_kind_of_record_comes_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let refusal = Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: "only \"2\" left".to_owned(),
        metadata: BTreeMap::from([("sku".to_owned(), "7".to_owned())]),
    };
    let causes = [
        CancelCause::Requested { reason: String::new() },
        CancelCause::Requested { reason: "no longer wanted".to_owned() },
        CancelCause::Refused { branch_id: None, refusal: refusal.clone() },
        CancelCause::Refused { branch_id: Some("2.1".parse().unwrap()), refusal },
        CancelCause::TimedOut,
        CancelCause::TryUnknown {
            branch_id: "1".parse().unwrap(),
            error: "UNAVAILABLE: …".to_owned(),
        },
        CancelCause::CoordinatorRestarted,
    ];
    let mut written = Vec::new();
    for cause in causes {
        let mut global = begun(owner.xid(0), &["1"]);
        cancel(&mut global, cause);
        written.push(global);
    }
    for drive in [Drive::Coordinator { in_order: false }, Drive::Coordinator { in_order: true }] {
        written.push(GlobalTransaction { drive, ..begun(owner.xid(1), &["1"]) });
    }
    // Text is text, whatever it would mean in a statement.
    for text in
        ["'", "\\", "\\'; COMMIT; --", "a'b\"c`d", "?", "{}%", "\0\n\t\x7f\x1a", "不行 🙅", "é\\"]
    {
        let mut global = begun(owner.xid(0), &["1"]);
        text.clone_into(&mut global.name);
        global.labels.insert(text.to_owned(), text.to_owned());
        let data = bytes::Bytes::copy_from_slice(text.as_bytes());
        let payload = Some(Payload { data, content_type: text.to_owned() });
        let spec = BranchSpec { payload, carry_payload: true, ..spec("2") };
        global.apply(Event::Registered(vec![spec]), NOW).unwrap();
        cancel(&mut global, CancelCause::Requested { reason: text.to_owned() });
        written.push(global);
    }
    // No branches, no labels, no time between begin and end.
    let mut empty = begun(owner.xid(15), &[]);
    empty.labels.clear();
    confirm(&mut empty);
    assert_eq!(empty.state, State::Confirmed);
    written.push(empty);
    // As many branches as there can be, with payloads to carry, one of them empty.
    let mut large = begun(owner.xid(15), &[]);
    large
        .apply(
            Event::Registered(
                (1..=64)
                    .map(|n: u8| {
                        let data = bytes::Bytes::from(vec![n; if n == 1 { 0 } else { 1000 }]);
                        let payload =
                            Some(Payload { data, content_type: "application/json".to_owned() });
                        BranchSpec { payload, carry_payload: true, ..spec(&n.to_string()) }
                    })
                    .collect(),
            ),
            NOW,
        )
        .unwrap();
    written.push(large);
    owner.append(written.iter().map(inserted).collect()).await;
    for global in written {
        assert_eq!(found(store, global.xid).await, global.recorded());
    }
}

async fn many_changes_of_one_batch_come_back(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut written: Vec<_> = (0..150).map(|n| begun(owner.xid(n % 16), &["1", "2"])).collect();
    owner.append(written.iter().map(inserted).collect()).await;
    // Most are alike but for the moment, some are not.
    for (n, global) in written.iter_mut().enumerate() {
        let tried = global.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
        let request = match n % 10 {
            0 => DecisionRequest::Cancel(CancelCause::TimedOut),
            1 => DecisionRequest::Cancel(CancelCause::Requested { reason: format!("{n} of them") }),
            _ => DecisionRequest::Confirm { tried },
        };
        let at = NOW + Duration::from_millis(n as u64 / 5);
        global.apply(Event::DecisionRequested(request), at).unwrap();
        call(global, 0, failed(n % 7 == 0));
    }
    let both = BranchSet::only(0).union(BranchSet::only(1));
    owner.append(written.iter().map(|global| updated(global, both)).collect()).await;
    for global in &written {
        assert_eq!(found(store, global.xid).await, global.recorded());
    }
    // What is finished is told by a few columns.
    for global in &mut written {
        call(global, 0, Outcome::Done { reply: None });
        call(global, 1, Outcome::Done { reply: None });
    }
    let finished = |global| Write { head: Head::Finish, ..updated(global, both) };
    owner.append(written.iter().map(finished).collect()).await;
    for global in &written {
        assert_eq!(found(store, global.xid).await, global.recorded());
    }
}

async fn batches_that_may_come_at_a_time_are_not_in_each_others_way(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let at_a_time = store.batches_at_a_time();
    for _ in 0..20 {
        let mut written: Vec<Vec<_>> = (0..at_a_time)
            .map(|remainder| {
                let partitions = (0..PARTITIONS).filter(|n| n % at_a_time == remainder);
                let keyed = partitions.map(|partition| {
                    let mut global = begun(owner.xid(partition), &["1", "2"]);
                    global.key = Some(Key { hash: rand::random(), digest: [8; 32] });
                    global
                });
                keyed.collect()
            })
            .collect();
        for round in 0..2 {
            let batches: Vec<_> = (written.iter())
                .map(|globals| {
                    let write = |global| match round {
                        0 => inserted(global),
                        _ => updated(global, BranchSet::EMPTY),
                    };
                    owner.batch(globals.iter().map(write).collect())
                })
                .collect();
            let appended = batches.iter().map(|batch| store.append(batch));
            for appended in futures_util::future::join_all(appended).await {
                assert_eq!(appended.unwrap(), Appended::Durable);
            }
            for global in written.iter_mut().flatten() {
                assert_eq!(found(store, global.xid).await, global.recorded());
                if round == 0 {
                    confirm(global);
                }
            }
        }
    }
}

async fn a_batch_is_applied_once_however_often_it_is_appended(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (one, two) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    // The answer to COMMIT is lost: the same batch again, until there is one.
    let batch = owner.batch(vec![inserted(&one), inserted(&two)]);
    for _ in 0..3 {
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
    }
    let mut one = one;
    confirm(&mut one);
    owner.append(vec![updated(&one, BranchSet::EMPTY)]).await;
    assert_eq!(found(store, one.xid).await, one.recorded());
    // Late, when it was followed by another one, it changes nothing and is noticed.
    assert!(matches!(store.append(&batch).await, Err(Error::Corrupt(_))));
    assert_eq!(found(store, one.xid).await, one.recorded());
}

async fn an_owner_that_was_replaced_changes_nothing(store: &dyn Store) {
    let mut old = Owner::of(store).await;
    let mut global = begun(old.xid(4), &["1"]);
    old.insert(&global).await;
    let mut new = Owner::of(store).await;
    // It had decided, and its batch was on its way.
    let mut theirs = global.clone();
    confirm(&mut theirs);
    let late = old.batch(vec![updated(&theirs, BranchSet::EMPTY)]);
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![4]));
    assert_eq!(found(store, global.xid).await, global.recorded());
    // The new owner decides otherwise, and the late one comes again.
    cancel(&mut global, CancelCause::TimedOut);
    new.append(vec![updated(&global, BranchSet::EMPTY)]).await;
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![4]));
    assert_eq!(found(store, global.xid).await, global.recorded());
}

async fn one_fenced_partition_stops_the_whole_batch(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (one, two) = (begun(owner.xid(1), &["1"]), begun(owner.xid(2), &["1"]));
    // As if partition 2 had been taken over: all are, and the owner hears of the new epoch of partition 1 alone.
    let newer = Owner::of(store).await;
    owner.ownerships[1] = newer.ownership(1);
    let batch = owner.batch(vec![inserted(&one), inserted(&two)]);
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Fenced(vec![2]));
    assert!(
        matches!(store.load(one.xid).await.unwrap(), Lookup::Absent { .. }),
        "half of it was applied"
    );
    // The rest of it, with the same number, is applied.
    let rest = Batch { guards: vec![batch.guards[0]], writes: vec![batch.writes[0].clone()] };
    assert_eq!(store.append(&rest).await.unwrap(), Appended::Durable);
    assert_eq!(found(store, one.xid).await, one.recorded());
}

async fn a_batch_that_does_not_follow_is_an_alarm(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let global = begun(owner.xid(1), &["1"]);
    let mut batch = owner.batch(vec![inserted(&global)]);
    batch.guards[0].position = 2; // number 1 was given up
    assert!(matches!(store.append(&batch).await, Err(Error::Corrupt(_))));
    batch.guards[0].position = 1;
    batch.guards[0].epoch += 1; // nobody has taken over yet
    assert!(matches!(store.append(&batch).await, Err(Error::Corrupt(_))));
    assert!(matches!(store.load(global.xid).await.unwrap(), Lookup::Absent { .. }));
}

async fn an_update_of_what_is_not_there_is_an_alarm(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let (known, mut unknown) = (begun(owner.xid(1), &["1"]), begun(owner.xid(1), &["1"]));
    confirm(&mut unknown);
    let batch = owner.batch(vec![inserted(&known), updated(&unknown, BranchSet::EMPTY)]);
    assert!(matches!(store.append(&batch).await, Err(Error::Corrupt(_))));
    assert!(
        matches!(store.load(known.xid).await.unwrap(), Lookup::Absent { .. }),
        "half of it was applied"
    );
}

async fn every_takeover_has_a_larger_epoch_and_a_nonce_of_its_own(store: &dyn Store) {
    let (first, second) = (Owner::of(store).await, Owner::of(store).await);
    assert_eq!(first.ownerships.len(), usize::from(PARTITIONS));
    let mut nonces = std::collections::BTreeSet::new();
    for partition in 0..PARTITIONS {
        assert_eq!(first.ownership(partition).epoch + 1, second.ownership(partition).epoch);
        nonces.extend([first.ownership(partition).nonce, second.ownership(partition).nonce]);
    }
    assert!(nonces.len() > 30, "32 random numbers, {} of them different", nonces.len());
    // The nonces of both epochs are known, so that an xid of a store that was deleted can be told from ours.
    for owner in [&first, &second] {
        let Ownership { partition, epoch, nonce } = owner.ownership(7);
        let absent = store.load(Xid { partition, epoch, sequence: 1, nonce }).await.unwrap();
        assert_eq!(absent, Lookup::Absent { purged_through: None, nonce: Some(nonce) });
    }
    let absent = store.load(Xid { partition: 7, epoch: 99, sequence: 1, nonce: 0 }).await.unwrap();
    assert_eq!(absent, Lookup::Absent { purged_through: None, nonce: None });
    store.release(&second.ownerships).await.unwrap();
    let third = Owner::of(store).await;
    assert_eq!(second.ownership(0).epoch + 1, third.ownership(0).epoch);
}

async fn a_takeover_takes_the_partitions_that_it_names(store: &dyn Store) {
    let mut first = Owner::of(store).await;
    let taken = store.acquire(&[3, 1], "other", NOW).await.unwrap();
    let named: Vec<_> = taken.iter().map(|ownership| ownership.partition).collect();
    assert_eq!(named, [3, 1], "in the order in which they were named");
    for ownership in &taken {
        assert_eq!(ownership.epoch, first.ownership(ownership.partition).epoch + 1);
    }
    // The owner of the others goes on with those.
    let (lost, kept) = (begun(first.xid(1), &["1"]), begun(first.xid(2), &["1"]));
    let late = first.batch(vec![inserted(&lost)]);
    assert_eq!(store.append(&late).await.unwrap(), Appended::Fenced(vec![1]));
    first.insert(&kept).await;
    assert_eq!(found(store, kept.xid).await, kept.recorded());

    // So does handing back: it hands back what it names, and only from the epoch that it names.
    store.release(&[taken[0], first.ownership(1)]).await.unwrap();
    for seat in store.seats().await.unwrap() {
        let owner = match seat.partition {
            3 => None,
            1 => Some("other".to_owned()),
            _ => Some("test".to_owned()),
        };
        assert_eq!(seat.owner, owner, "{seat:?}");
    }

    // None of them is taken when one is none.
    let before = store.seats().await.unwrap();
    let error = store.acquire(&[0, PARTITIONS], "other", NOW).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
    assert_eq!(store.seats().await.unwrap(), before);
    assert_eq!(store.acquire(&[], "other", NOW).await.unwrap(), []);
    assert_eq!(store.seats().await.unwrap(), before);
    let taken = store.acquire(&[0], "other", NOW).await.unwrap();
    assert_eq!(taken[0].epoch, first.ownership(0).epoch + 1);
}

async fn keys_lead_to_their_transactions(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(9), &["1"]);
    global.key = Some(Key { hash: [7; 32], digest: [8; 32] });
    owner.insert(&global).await;
    assert_eq!(found(store, global.xid).await, global.recorded());
    assert_eq!(store.find_keys(&[[0; 32], [7; 32]]).await.unwrap(), [None, Some(global.xid)]);
    assert_eq!(store.find_keys(&[]).await.unwrap(), []);
}

async fn what_is_due_comes_in_pages_and_in_order(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut expected = Vec::new();
    for n in 0..10 {
        let mut global = begun(owner.xid(5), &["1"]);
        global.expires_at = NOW + Duration::from_secs(10 - n % 5); // five moments, two of each
        expected.push((global.expires_at, global.xid));
        owner.insert(&global).await;
    }
    // Of another partition, and final: neither is due.
    let other = begun(owner.xid(6), &["1"]);
    owner.insert(&other).await;
    let mut done = begun(owner.xid(5), &[]);
    confirm(&mut done);
    owner.insert(&done).await;
    expected.sort();

    let until = NOW + Duration::from_secs(9);
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.due(5, until, after, 3).await.unwrap();
        assert!(page.transactions.len() <= 3);
        seen.extend(page.transactions.iter().map(|global| (global.due_at().unwrap(), global.xid)));
        after = page.next;
        if after.is_none() {
            assert_eq!(page.next_due_at, Some(NOW + Duration::from_secs(10)));
            break;
        }
    }
    assert_eq!(seen, expected[..8]);
    assert_eq!(
        store.due(5, NOW, None, 3).await.unwrap().next_due_at,
        Some(NOW + Duration::from_secs(6))
    );
    assert_eq!(store.due(0, until, None, 3).await.unwrap(), DuePage::default());
}

async fn the_list_shows_the_newest_that_fit(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut written = Vec::new();
    for n in 0..6_u16 {
        let mut global = begun(owner.xid(n % 3), &["1"]);
        global.begun_at = NOW + Duration::from_secs(n.into());
        if n % 2 == 0 {
            global.name = "refund".to_owned();
        }
        match n {
            0 => confirm(&mut global),
            1 => {
                confirm(&mut global);
                call(&mut global, 0, failed(true));
            }
            2 => {
                confirm(&mut global);
                call(&mut global, 0, Outcome::Done { reply: None });
            }
            _ => {}
        }
        owner.insert(&global).await;
        written.push(global);
    }
    let list = async |show, name: Option<&str>, limit| -> Vec<usize> {
        let filter = ListFilter { show, name: name.map(str::to_owned) };
        let found = store.list(&filter, limit).await.unwrap();
        found
            .iter()
            .map(|global| {
                let n = written.iter().position(|written| written.xid == global.xid).unwrap();
                assert_eq!(*global, written[n].recorded());
                n
            })
            .collect()
    };
    assert_eq!(list(Show::All, None, 10).await, [5, 4, 3, 2, 1, 0]);
    assert_eq!(list(Show::All, None, 2).await, [5, 4]);
    assert_eq!(list(Show::All, Some("refund"), 2).await, [4, 2]);
    assert_eq!(list(Show::Open, None, 10).await, [5, 4, 3, 1, 0]);
    assert_eq!(list(Show::Open, Some("checkout"), 10).await, [5, 3, 1]);
    assert_eq!(list(Show::Stuck(NOW, STUCK_AFTER), None, 10).await, [1]);
    let later = NOW + Duration::from_secs(200);
    assert_eq!(list(Show::Stuck(later, STUCK_AFTER), None, 10).await, [1, 0]);
    for show in [Show::Stuck(NOW, STUCK_AFTER), Show::Stuck(later, STUCK_AFTER)] {
        let Show::Stuck(now, after) = show else { unreachable!() };
        let stuck: Vec<_> = (0..6).rev().filter(|n| written[*n].is_stuck(now, after)).collect();
        assert_eq!(
            list(show, None, 10).await,
            stuck,
            "the store and the machine agree on what is stuck"
        );
    }
}

async fn the_summary_counts(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    assert_eq!(store.summary(NOW, STUCK_AFTER).await.unwrap(), Summary::default());
    for attempts in 0..4 {
        let mut global = begun(owner.xid(0), &["1", "2"]);
        confirm(&mut global);
        call(&mut global, 1, Outcome::Done { reply: None });
        for _ in 0..attempts {
            call(&mut global, 0, failed(false));
        }
        owner.insert(&global).await;
    }
    let mut done = begun(owner.xid(0), &[]);
    confirm(&mut done);
    owner.insert(&done).await;
    let summary = Summary { open: 4, stuck: 1, oldest: Some(NOW) };
    assert_eq!(store.summary(NOW, STUCK_AFTER).await.unwrap(), summary);
}

async fn the_purge_takes_what_finished_and_remembers_how_far_it_went(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut xids = Vec::new();
    for n in 0..5_u8 {
        let mut global = begun(owner.xid(2), &["1"]);
        global.key = Some(Key { hash: [n; 32], digest: [n; 32] });
        if n != 1 {
            cancel(&mut global, CancelCause::TimedOut);
            call(&mut global, 0, Outcome::Done { reply: None });
            global.finished_at = Some(NOW + Duration::from_secs(n.into()));
        }
        owner.insert(&global).await;
        xids.push(global.xid);
    }
    // 0, 2 and 3 finished before; 1 is open; 4 is too young.
    let before = NOW + Duration::from_secs(4);
    let (mut deleted, mut after) = (0, None);
    loop {
        let (count, next) = store.purge(2, before, after, 2).await.unwrap();
        deleted += count;
        after = next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(deleted, 3);
    for n in [1, 4] {
        assert!(matches!(store.load(xids[n]).await.unwrap(), Lookup::Found(_)));
    }
    for n in [0, 2, 3] {
        let Lookup::Absent { purged_through, .. } = store.load(xids[n]).await.unwrap() else {
            panic!("{n} is there")
        };
        assert_eq!(purged_through, Some(xids[3]));
    }
    let keys: Vec<_> = (0..5).map(|n| [n; 32]).collect();
    assert_eq!(
        store.find_keys(&keys).await.unwrap(),
        [None, Some(xids[1]), None, None, Some(xids[4])]
    );
    assert_eq!(store.purge(2, before, None, 100).await.unwrap(), (0, None));
    // The mark never goes back.
    let mut old = begun(Xid { sequence: 0, ..xids[0] }, &[]);
    confirm(&mut old);
    old.finished_at = Some(NOW);
    owner.insert(&old).await;
    assert_eq!(store.purge(2, before, None, 100).await.unwrap(), (1, None));
    let Lookup::Absent { purged_through, .. } = store.load(old.xid).await.unwrap() else {
        panic!("it is there")
    };
    assert_eq!(purged_through, Some(xids[3]));
}

async fn resolved_branches_are_remembered(store: &dyn Store) {
    let mut owner = Owner::of(store).await;
    let mut global = begun(owner.xid(2), &["1", "2"]);
    confirm(&mut global);
    owner.insert(&global).await;
    call(&mut global, 0, Outcome::Done { reply: None });
    let resolution =
        Resolution { operator: "ann".to_owned(), reason: "booked by hand".to_owned(), at: NOW };
    let event = Event::Resolved { branch_id: "2".parse().unwrap(), resolution };
    let change = global.apply(event, NOW + Duration::from_secs(3)).unwrap();
    assert!(matches!(global.branches[1].state, BranchState::Resolved(_)));
    owner.append(vec![updated(&global, change.branches.union(BranchSet::only(0)))]).await;
    assert_eq!(found(store, global.xid).await, global.recorded());
}
