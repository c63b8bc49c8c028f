//! One partition with its journal, against a store and participants that do what the test says, on a clock that it moves.

use std::{collections::VecDeque, sync::Mutex};

use bytes::Bytes;
use handfast_proto::BranchId;

use super::*;
use crate::{
    clock::ManualClock,
    journal::Journal,
    store::{
        ALL_PARTITIONS, Lookup,
        scripted::{Fault, ScriptedStore},
    },
    transaction::{AttemptError, CancelCause, Drive, Key, Payload, Refusal, State},
};

const PARTITION: u16 = 3;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Participants that answer when the test says so.
#[derive(Debug, Default)]
struct Script {
    calls: Mutex<VecDeque<(CallRequest, mpsc::Sender<Returned>)>>,
    busy: Mutex<bool>,
    /// How long whoever is turned away is to wait; `None`: a second.
    later: Mutex<Option<Duration>>,
    submitted: tokio::sync::Notify,
}

impl Dispatch for Script {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        if *self.busy.lock().unwrap() {
            return Err(Later(self.later.lock().unwrap().unwrap_or(Duration::from_secs(1))));
        }
        self.calls.lock().unwrap().push_back((call, returned.clone()));
        self.submitted.notify_one();
        Ok(())
    }
}

/// A coordinator of one partition.
struct Rig {
    store: Arc<ScriptedStore>,
    clock: ManualClock,
    script: Arc<Script>,
    settings: Settings,
    ownership: Ownership,
    commands: mpsc::Sender<Command>,
    open: Arc<AtomicUsize>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Rig {
    async fn new() -> Self {
        let retry = RetryPolicy { initial: Duration::from_secs(2), max: Duration::from_secs(2) };
        Self::with(Settings {
            retry,
            call_timeout: Duration::from_secs(5),
            call_timeout_max: Duration::from_secs(60),
            open_max: 1000,
            stuck_after: StuckAfter { attempts: 3, time: Duration::from_secs(120) },
        })
        .await
    }

    async fn with(settings: Settings) -> Self {
        let store = Arc::new(ScriptedStore::default());
        Self::start(store, ManualClock::at(Timestamp(1_000_000)), settings).await
    }

    /// Another process takes over, on the same store. The one before is left as it is: paused, or dead.
    async fn restart(&self) -> Self {
        Self::start(self.store.clone(), self.clock.clone(), self.settings).await
    }

    async fn start(store: Arc<ScriptedStore>, clock: ManualClock, settings: Settings) -> Self {
        let ownership = store.acquire(&ALL_PARTITIONS, "test", clock.now()).await.unwrap()
            [usize::from(PARTITION)];
        let (journal, outboxes, health) =
            Journal::new(store.clone(), Arc::new(clock.clone()), &[ownership]);
        let (script, open, tasks) =
            (Arc::new(Script::default()), Arc::<AtomicUsize>::default(), TaskTracker::new());
        let parts = Parts {
            store: store.clone(),
            dispatch: script.clone(),
            clock: Arc::new(clock.clone()),
            health,
            open: open.clone(),
            tasks: tasks.clone(),
            settings,
        };
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let (stop, journal_stop) = (CancellationToken::new(), CancellationToken::new());
        let journal = tasks.spawn(journal.run(journal_stop.clone()));
        let partition = Partition::new(ownership, parts, outboxes[0].clone());
        let stopping = stop.clone();
        tasks.spawn(async move {
            partition.run(receiver, stopping).await;
            journal_stop.cancel();
            journal.await.unwrap();
        });
        Self { store, clock, script, settings, ownership, commands, open, stop, tasks }
    }

    fn send(&self, command: impl FnOnce(Reply) -> Command) -> Waiting {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).unwrap();
        Waiting(answer)
    }

    fn ask(&self, xid: Xid, what: What, until: Until) -> Waiting {
        self.send(|reply| Command::Ask(Ask { xid, what, until, reply }))
    }

    fn begin(&self, new: NewTransaction) -> Waiting {
        self.send(|reply| Command::Begin { new, until: Until::Now, reply })
    }

    /// Begins one with two branches and waits for the answer.
    async fn begun(&self) -> Xid {
        self.begin(new(&["1", "2"])).answer().await.unwrap().global.xid
    }

    fn confirm(&self, xid: Xid) -> Waiting {
        let tried = ["1", "2"].map(|id| id.parse().unwrap()).into();
        self.ask(xid, What::Decide(DecisionRequest::Confirm { tried }), Until::Now)
    }

    fn cancel(&self, xid: Xid) -> Waiting {
        let cause = CancelCause::Requested { reason: String::new() };
        self.ask(xid, What::Decide(DecisionRequest::Cancel(cause)), Until::Now)
    }

    async fn state(&self, xid: Xid) -> State {
        self.ask(xid, What::Get, Until::Now).answer().await.unwrap().global.state
    }

    /// The next call that leaves.
    async fn call(&self) -> MadeCall {
        let made = async {
            loop {
                if let Some((call, returned)) = self.script.calls.lock().unwrap().pop_front() {
                    return MadeCall { call, returned };
                }
                self.script.submitted.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), made).await.expect("a call leaves")
    }

    /// No call leaves, though everything has had its chance to run.
    async fn no_call(&self) {
        settle().await;
        if let Some((call, _)) = self.script.calls.lock().unwrap().front() {
            panic!("{:?} of {} left", call.phase, call.spec.branch_id);
        }
    }

    async fn stored(&self, xid: Xid) -> Option<GlobalTransaction> {
        match self.store.inner.load(xid).await.unwrap() {
            Lookup::Found(global) => Some(*global),
            Lookup::Absent { .. } => None,
        }
    }

    async fn until_memory_holds(&self, count: usize) {
        let holds = async {
            while self.open.load(Ordering::Relaxed) != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), holds).await.expect("in time");
    }
}

struct Waiting(oneshot::Receiver<Result<Answer, Error>>);

impl Waiting {
    async fn answer(self) -> Result<Answer, Error> {
        tokio::time::timeout(Duration::from_secs(10), self.0)
            .await
            .expect("in time")
            .expect("the partition lives")
    }

    /// There is no answer yet, though everything has had its chance to run.
    async fn none_yet(&mut self) {
        settle().await;
        assert!(self.0.try_recv().is_err(), "answered too early");
    }
}

struct MadeCall {
    call: CallRequest,
    returned: mpsc::Sender<Returned>,
}

impl MadeCall {
    async fn returns(self, outcome: Outcome) {
        let CallRequest { xid, branch, phase, .. } = self.call;
        self.returned.send(Returned { xid, branch, phase, outcome }).await.unwrap();
    }

    async fn done(self) {
        self.returns(Outcome::Done { reply: None }).await;
    }

    async fn fails(self) {
        let error = AttemptError {
            code: "UNAVAILABLE".to_owned(),
            message: "refused".to_owned(),
            at: Timestamp(0),
        };
        self.returns(Outcome::Unknown { error, timed_out: false, hopeless: false }).await;
    }
}

/// Lets every task run until none has anything to do. (Tests run on one thread.)
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

fn new(branches: &[&str]) -> NewTransaction {
    let spec = |id: &&str| BranchSpec {
        branch_id: id.parse().unwrap(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        target: String::new(),
        payload: None,
        carry_payload: false,
    };
    NewTransaction {
        name: "checkout".to_owned(),
        drive: Drive::Initiator,
        timeout: TIMEOUT,
        labels: BTreeMap::new(),
        key: None,
        branches: branches.iter().map(spec).collect(),
    }
}

fn keyed(key: u8, digest: u8) -> NewTransaction {
    NewTransaction { key: Some(Key { hash: [key; 32], digest: [digest; 32] }), ..new(&["1", "2"]) }
}

fn executed(branches: &[&str]) -> NewTransaction {
    let mut new = NewTransaction { drive: Drive::Coordinator { in_order: false }, ..new(branches) };
    for branch in &mut new.branches {
        let data = Bytes::from(branch.branch_id.to_string());
        branch.payload = Some(Payload { data, content_type: "text/plain".to_owned() });
    }
    new
}

// ---- Effects wait for durability.

#[tokio::test]
async fn a_begin_with_branches_is_answered_when_it_is_durable() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut begin = rig.begin(new(&["1"]));
    begin.none_yet().await;
    rig.store.release();
    let answer = begin.answer().await.unwrap();
    assert!(!answer.existed);
    assert_eq!(rig.stored(answer.global.xid).await.unwrap(), *answer.global);
}

#[tokio::test]
async fn a_begin_with_neither_branches_nor_key_is_answered_at_once() {
    let rig = Rig::new().await;
    rig.store.hold();
    let xid = rig.begin(new(&[])).answer().await.unwrap().global.xid;
    assert_eq!(rig.stored(xid).await, None);
    // Its first branch makes it durable.
    let mut register = rig.ask(xid, What::Register(new(&["1"]).branches), Until::Now);
    register.none_yet().await;
    rig.store.release();
    register.answer().await.unwrap();
    assert_eq!(rig.stored(xid).await.unwrap().branches.len(), 1);
    assert_eq!(rig.store.batches().len(), 1, "one durable write for both");
}

#[tokio::test]
async fn nobody_hears_of_a_decision_and_no_call_leaves_before_it_is_durable() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.hold();
    let mut all = [
        rig.confirm(xid),                        // the decision
        rig.confirm(xid),                        // a repeat
        rig.cancel(xid),                         // the opposite, which is rejected because of it
        rig.ask(xid, What::Get, Until::Now),     // a read
        rig.ask(xid, What::Get, Until::Decided), // somebody who waits for it
    ];
    for waiting in &mut all {
        waiting.none_yet().await;
    }
    rig.no_call().await;
    rig.store.release();
    let [decided, repeated, opposite, read, watched] = all;
    for waiting in [decided, repeated, read, watched] {
        assert_eq!(
            waiting.answer().await.unwrap().global.state.decision(),
            Some(Decision::Confirm)
        );
    }
    let rejected = opposite.answer().await.unwrap_err();
    assert!(matches!(
        rejected,
        Error::Rejected { rejection: Rejection::AlreadyDecided(Decision::Confirm), .. }
    ));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.phase, Phase::Confirm);
    }
}

#[tokio::test]
async fn a_lost_answer_to_commit_is_settled_before_anybody_hears() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.fail([Fault::AnswerLost, Fault::Unreached]);
    let answer = rig.confirm(xid).answer().await.unwrap();
    assert_eq!(answer.global.state, State::Confirming);
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirming);
}

#[tokio::test]
async fn a_try_of_the_coordinator_leaves_when_its_branch_is_durable() {
    let rig = Rig::new().await;
    rig.store.hold();
    let execute = rig.send(|reply| Command::Begin {
        new: executed(&["1", "2"]),
        until: Until::Completed,
        reply,
    });
    rig.no_call().await;
    rig.store.release();
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!(made.call.phase, Phase::Try);
        let payload = made.call.spec.payload.clone().unwrap();
        assert_eq!(payload.data, made.call.spec.branch_id.as_str());
        made.returns(Outcome::Done { reply: Some(payload) }).await;
    }
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.phase, &made.call.spec.payload), (Phase::Confirm, &None));
        made.done().await;
    }
    let global = execute.answer().await.unwrap().global;
    assert_eq!(global.state, State::Confirmed);
    let replies: Vec<_> =
        global.branches.iter().map(|branch| branch.reply.clone().unwrap().data).collect();
    assert_eq!(replies, ["1", "2"]);
}

#[tokio::test]
async fn completion_is_told_without_waiting_for_its_record() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let completed = rig.ask(xid, What::Get, Until::Completed);
    rig.store.hold();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    assert_eq!(completed.answer().await.unwrap().global.state, State::Confirmed);
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirming);
}

#[tokio::test]
async fn a_smooth_transaction_is_three_writes_and_its_branches_one_each() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let rows: Vec<_> = (rig.store.batches().iter().flat_map(|batch| &batch.writes))
        .map(|write| {
            (
                write.head,
                write.global.branches.len() - write.new_branches,
                write.changed_branches.len(),
            )
        })
        .collect();
    use crate::store::Head::*;
    assert_eq!(rows, [(Insert, 2, 0), (Update, 0, 0), (Finish, 0, 0)]);
    assert_eq!(rig.store.loads(), [], "no read on the way");
    assert_eq!(rig.state(xid).await, State::Confirmed);
}

// ---- Memory is a cache with one writer.

#[tokio::test]
async fn what_is_finished_leaves_memory_and_one_read_serves_all_who_ask() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    rig.store.hold_loads(true);
    let asked: Vec<_> = (0..5).map(|_| rig.ask(xid, What::Get, Until::Completed)).collect();
    let repeat = rig.cancel(xid);
    settle().await;
    rig.store.hold_loads(false);
    for waiting in asked.into_iter().chain([repeat]) {
        assert_eq!(waiting.answer().await.unwrap().global.state, State::Cancelled);
    }
    assert_eq!(rig.store.loads(), [xid]);
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn a_row_that_was_read_before_memory_changed_it_is_dropped() {
    let first = Rig::new().await;
    let xid = first.begun().await;
    first.confirm(xid).answer().await.unwrap();
    // The next owner: somebody asks for it, and the read sees `confirming`. While its answer is on the way, the look for what
    // is due brings the transaction in; it finishes, is recorded, and leaves.
    first.store.hold_loads(true);
    let rig = first.restart().await;
    let mut asked = rig.ask(xid, What::Get, Until::Now);
    while rig.store.loads().is_empty() {
        settle().await;
    }
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    let finished = async {
        while rig.open.load(Ordering::Relaxed) != 0
            || rig.stored(xid).await.unwrap().state != State::Confirmed
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap();
    asked.none_yet().await;
    rig.store.hold_loads(false);
    assert_eq!(asked.answer().await.unwrap().global.state, State::Confirmed, "the past was told");
    assert_eq!(rig.store.loads(), [xid, xid]);
    rig.no_call().await;
}

#[tokio::test]
async fn a_transaction_whose_next_attempt_is_far_away_leaves_memory_and_comes_back() {
    let far = Duration::from_secs(3600 * 24 * 365); // full jitter: below five seconds once in six million runs
    let mut rig = Rig::new().await;
    rig.settings.retry = RetryPolicy { initial: far, max: far };
    let rig = rig.restart().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    rig.call().await.fails().await;
    rig.until_memory_holds(0).await;
    let stored = rig.stored(xid).await.unwrap();
    assert_eq!(stored.state, State::Confirming);
    assert_eq!(
        stored.branches.iter().filter(|branch| branch.is_open()).count(),
        1,
        "the acknowledgement is recorded"
    );
    rig.clock.advance(far);
    let made = rig.call().await;
    assert_eq!((made.call.phase, made.call.attempt), (Phase::Confirm, 2));
    made.done().await;
    rig.until_memory_holds(0).await;
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Confirmed);
}

#[tokio::test]
async fn an_operator_hurries_a_transaction_that_has_left_memory() {
    let far = Duration::from_secs(3600 * 24 * 365);
    let mut rig = Rig::new().await;
    rig.settings.retry = RetryPolicy { initial: far, max: far };
    let rig = rig.restart().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    rig.call().await.fails().await;
    rig.until_memory_holds(0).await;
    rig.ask(xid, What::Retry, Until::Now).answer().await.unwrap();
    assert_eq!(rig.call().await.call.attempt, 2);
}

// ---- Recovery is the ordinary path.

#[tokio::test]
async fn the_next_owner_carries_on_what_was_decided_and_waits_for_what_was_not() {
    let first = Rig::new().await;
    let (confirming, trying) = (first.begun().await, first.begun().await);
    first.confirm(confirming).answer().await.unwrap();
    let execute =
        first.send(|reply| Command::Begin { new: executed(&["1"]), until: Until::Decided, reply });
    while first.script.calls.lock().unwrap().len() < 3 {
        settle().await; // two Confirms and a Try are under way when it dies
    }
    let executed = first.script.calls.lock().unwrap().back().unwrap().0.xid;

    let rig = first.restart().await;
    let mut phases = BTreeMap::new();
    for _ in 0..3 {
        let made = rig.call().await;
        phases.entry(made.call.xid).or_insert_with(Vec::new).push(made.call.phase);
        made.done().await;
    }
    let expected =
        BTreeMap::from([(confirming, vec![Phase::Confirm; 2]), (executed, vec![Phase::Cancel])]);
    assert_eq!(phases, expected);
    assert_eq!(rig.stored(executed).await.unwrap().cancel, Some(CancelCause::CoordinatorRestarted));
    // Initiator-driven: its initiator goes on as if nothing had happened.
    assert_eq!(rig.state(trying).await, State::Trying);
    assert_eq!(rig.confirm(trying).answer().await.unwrap().global.state, State::Confirming);
    // The old one is fenced when it writes next, and answers nothing that was not durable.
    let late = first.begin(new(&["1"])).answer().await.unwrap_err();
    assert!(matches!(late, Error::Fenced), "{late:?}");
    assert!(matches!(execute.answer().await.unwrap_err(), Error::Fenced));
    assert!(matches!(
        first.ask(trying, What::Get, Until::Now).answer().await.unwrap_err(),
        Error::Fenced
    ));
}

#[tokio::test]
async fn what_times_out_while_nobody_owns_it_is_cancelled_by_the_next_owner() {
    let first = Rig::new().await;
    let xid = first.begun().await;
    let rig = first.restart().await;
    rig.no_call().await;
    rig.clock.advance(TIMEOUT);
    for _ in 0..2 {
        let made = rig.call().await;
        assert_eq!((made.call.xid, made.call.phase), (xid, Phase::Cancel));
        made.done().await;
    }
    assert_eq!(rig.stored(xid).await.unwrap().cancel, Some(CancelCause::TimedOut));
}

#[tokio::test]
async fn everything_that_is_due_comes_back_page_by_page() {
    let first = Rig::new().await;
    let count = 600;
    for _ in 0..count {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
    }
    let rig = first.restart().await;
    let mut finished = BTreeMap::new();
    for _ in 0..2 * count {
        let made = rig.call().await;
        *finished.entry(made.call.xid).or_insert(0) += 1;
        made.done().await;
    }
    assert_eq!(finished.len(), count);
    assert!(finished.values().all(|calls| *calls == 2), "each branch once");
    rig.until_memory_holds(0).await;
    rig.no_call().await;
}

/// What changes they make would stand in the journal's queue before those of new ones.
#[tokio::test]
async fn what_is_due_comes_back_no_faster_than_it_is_done_and_new_ones_do_not_count() {
    let first = Rig::new().await;
    for _ in 0..600 {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
    }
    let rig = first.restart().await;
    rig.until_memory_holds(256).await;
    settle().await;
    assert_eq!(rig.open.load(Ordering::Relaxed), 256);
    for _ in 0..2 * 127 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(129).await;
    for _ in 0..400 {
        rig.begun().await;
    }
    assert_eq!(rig.open.load(Ordering::Relaxed), 529);
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(528 + 128).await;
}

#[tokio::test]
async fn an_orderly_end_records_what_was_waiting_for_company() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    settle().await;
    rig.stop.cancel();
    rig.tasks.close();
    rig.tasks.wait().await;
    let stored = rig.stored(xid).await.unwrap();
    assert_eq!(stored.branches.iter().filter(|branch| branch.is_open()).count(), 1);
    let next = rig.restart().await;
    next.call().await.done().await;
    next.until_memory_holds(0).await;
    next.no_call().await;
}

#[tokio::test]
async fn what_comes_with_the_end_begins_at_the_end_and_not_when_somebody_was_last_here() {
    let rig = Rig::new().await;
    settle().await;
    rig.clock.advance(Duration::from_secs(3600));
    let _begun = rig.begin(new(&["1", "2"]));
    rig.stop.cancel(); // both are there when the partition looks
    rig.tasks.close();
    rig.tasks.wait().await;
    let Ownership { partition, epoch, nonce } = rig.ownership;
    let stored = rig.stored(Xid { partition, epoch, sequence: 1, nonce }).await.unwrap();
    assert_eq!(stored.begun_at, rig.clock.now());
}

// ---- Time.

#[tokio::test]
async fn phase_one_times_out_into_cancel() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.clock.advance(TIMEOUT - Duration::from_millis(1));
    rig.no_call().await;
    rig.clock.advance(Duration::from_millis(1));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.phase, Phase::Cancel);
    }
    let rejected = rig.confirm(xid).answer().await.unwrap_err();
    let Error::Rejected { global, .. } = rejected else { panic!("{rejected:?}") };
    assert_eq!(global.cancel, Some(CancelCause::TimedOut));
}

#[tokio::test]
async fn a_decide_that_is_here_in_time_comes_before_the_timer() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.clock.advance(TIMEOUT);
    let decided = rig.confirm(xid); // both are there when the partition looks
    assert_eq!(decided.answer().await.unwrap().global.state, State::Confirming);
}

#[tokio::test]
async fn no_transaction_times_out_while_the_store_is_silent() {
    let rig = Rig::new().await;
    let good = rig.begun().await;
    rig.store.hold();
    let other = rig.begin(new(&["1"]));
    settle().await;
    rig.clock.advance(TIMEOUT); // the store is silent all the time
    settle().await;
    let decided = rig.confirm(good);
    rig.store.release();
    assert_eq!(decided.answer().await.unwrap().global.state, State::Confirming);
    // What was not decided ends a little later.
    let abandoned = other.answer().await.unwrap().global.xid;
    assert_eq!(rig.state(abandoned).await, State::Trying);
    rig.clock.advance(Duration::from_secs(10));
    let mut cancelled = rig.call().await;
    while cancelled.call.phase != Phase::Cancel {
        cancelled = rig.call().await;
    }
    assert_eq!(cancelled.call.xid, abandoned);
}

#[tokio::test]
async fn a_failed_call_is_repeated_after_its_pause_and_with_more_time_after_a_timeout() {
    let rig = Rig::new().await;
    let xid = rig.begin(new(&["1"])).answer().await.unwrap().global.xid;
    let tried = ["1".parse().unwrap()].into();
    rig.ask(xid, What::Decide(DecisionRequest::Confirm { tried }), Until::Now)
        .answer()
        .await
        .unwrap();
    let mut deadlines = Vec::new();
    for attempt in 1..=3 {
        let made = rig.call().await;
        assert_eq!(made.call.attempt, attempt);
        deadlines.push(made.call.deadline.as_secs());
        let error = AttemptError {
            code: "DEADLINE_EXCEEDED".to_owned(),
            message: String::new(),
            at: Timestamp(0),
        };
        made.returns(Outcome::Unknown { error, timed_out: true, hopeless: false }).await;
        settle().await;
        rig.clock.advance(Duration::from_secs(2));
    }
    assert_eq!(deadlines, [5, 10, 20]);
}

#[tokio::test]
async fn a_call_that_dispatch_cannot_take_is_made_later_and_is_no_attempt() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    *rig.script.busy.lock().unwrap() = true;
    rig.confirm(xid).answer().await.unwrap();
    rig.no_call().await;
    *rig.script.busy.lock().unwrap() = false;
    rig.no_call().await;
    rig.clock.advance(Duration::from_secs(1));
    for _ in 0..2 {
        assert_eq!(rig.call().await.call.attempt, 1);
    }
}

// ---- Keys.

#[tokio::test]
async fn two_begins_with_one_key_are_one_transaction() {
    let rig = Rig::new().await;
    let (one, two) = (rig.begin(keyed(7, 1)), rig.begin(keyed(7, 1)));
    let (one, two) = (one.answer().await.unwrap(), two.answer().await.unwrap());
    assert_eq!(one.global.xid, two.global.xid);
    assert_eq!((one.existed, two.existed), (false, true));
    assert_eq!(rig.store.key_looks(), [1], "asked for once, and known from then on");
    // Other content.
    let other = rig.begin(keyed(7, 2)).answer().await.unwrap_err();
    assert!(matches!(other, Error::KeyTaken(xid) if xid == one.global.xid), "{other:?}");
    assert_eq!(rig.store.key_looks(), [1]);
}

#[tokio::test]
async fn a_key_is_remembered_when_its_transaction_has_left_memory_and_after_a_restart() {
    let first = Rig::new().await;
    let xid = first.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    first.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        first.call().await.done().await;
    }
    first.until_memory_holds(0).await;
    for rig in [&first, &first.restart().await] {
        let again = rig.begin(keyed(7, 1)).answer().await.unwrap();
        assert_eq!(
            (again.global.xid, again.global.state, again.existed),
            (xid, State::Cancelled, true)
        );
        let other = rig.begin(keyed(7, 2)).answer().await.unwrap_err();
        assert!(matches!(other, Error::KeyTaken(taken) if taken == xid), "{other:?}");
        let found =
            rig.send(|reply| Command::FindKey { hash: [7; 32], reply }).answer().await.unwrap();
        assert_eq!(found.global.xid, xid);
        let none =
            rig.send(|reply| Command::FindKey { hash: [8; 32], reply }).answer().await.unwrap_err();
        assert!(matches!(none, Error::KeyUnknown));
    }
}

#[tokio::test]
async fn keys_that_come_together_are_looked_up_together() {
    let rig = Rig::new().await;
    let begins: Vec<_> = (0..100).map(|n| rig.begin(keyed(n, 1))).collect();
    let mut xids = BTreeSet::new();
    for begin in begins {
        xids.insert(begin.answer().await.unwrap().global.xid);
    }
    assert_eq!(xids.len(), 100);
    assert!(rig.store.key_looks().len() <= 2, "{:?}", rig.store.key_looks());
}

#[tokio::test]
async fn a_keyed_begin_is_answered_when_it_is_durable_also_without_branches() {
    let rig = Rig::new().await;
    rig.store.hold();
    let mut begin = rig.begin(NewTransaction { branches: Vec::new(), ..keyed(7, 1) });
    begin.none_yet().await;
    rig.store.release();
    let xid = begin.answer().await.unwrap().global.xid;
    assert!(rig.stored(xid).await.is_some());
}

// ---- Xids that are not known.

#[tokio::test]
async fn unknown_xids_are_told_apart() {
    let rig = Rig::new().await;
    let Ownership { partition, epoch, nonce } = rig.ownership;
    let ask =
        async |rig: &Rig, xid| rig.ask(xid, What::Get, Until::Now).answer().await.unwrap_err();
    let never = Xid { partition, epoch, sequence: 99, nonce };
    assert!(matches!(ask(&rig, never).await, Error::NeverRecorded(xid) if xid == never));
    let newer = Xid { epoch: epoch + 1, ..never };
    assert!(matches!(ask(&rig, newer).await, Error::OwnedElsewhere(_)));
    let restored = Xid { nonce: nonce.wrapping_add(1), ..never };
    assert!(
        matches!(ask(&rig, restored).await, Error::Forgotten(_)),
        "of another life of this store"
    );
    // Deciding, or registering, for what is not there is refused the same way: memory is never the last word.
    assert!(matches!(rig.confirm(never).answer().await.unwrap_err(), Error::NeverRecorded(_)));
    let register = rig.ask(never, What::Register(new(&["1"]).branches), Until::Now);
    assert!(matches!(register.answer().await.unwrap_err(), Error::NeverRecorded(_)));
    // Deleted after its retention.
    let xid = rig.begun().await;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    let (deleted, _) = rig.store.purge(PARTITION, Timestamp(i64::MAX), None, 100).await.unwrap();
    assert_eq!(deleted, 1);
    assert!(matches!(ask(&rig, xid).await, Error::Forgotten(_)));
    // An older epoch is ordinary.
    let next = rig.restart().await;
    assert!(matches!(ask(&next, never).await, Error::NeverRecorded(_)));
    assert!(matches!(ask(&next, xid).await, Error::Forgotten(_)));
}

// ---- Limits, and the end.

#[tokio::test]
async fn a_new_transaction_is_refused_when_too_many_are_open_and_a_decision_is_not() {
    let mut rig = Rig::new().await;
    rig.settings.open_max = 2;
    let rig = rig.restart().await;
    let (xid, _) = (rig.begun().await, rig.begun().await);
    let refused = rig.begin(new(&["1"])).answer().await.unwrap_err();
    assert!(matches!(refused, Error::TooManyOpen { open_max: 2 }));
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(1).await;
    rig.begun().await;
}

#[tokio::test]
async fn a_store_that_takes_no_more_ends_the_partition_loudly() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    rig.store.fail([Fault::Refused]);
    assert!(matches!(rig.confirm(xid).answer().await.unwrap_err(), Error::Corrupt));
    assert!(matches!(rig.begin(new(&["1"])).answer().await.unwrap_err(), Error::Corrupt));
    rig.no_call().await;
    assert_eq!(rig.stored(xid).await.unwrap().state, State::Trying);
}

#[tokio::test]
async fn an_operator_answers_for_a_branch_and_it_is_durable_before_it_is_told() {
    let rig = Rig::new().await;
    let xid = rig.begun().await;
    let resolve = |branch_id: &str| {
        let branch_id: BranchId = branch_id.parse().unwrap();
        let (operator, reason) = ("ann".to_owned(), "booked by hand".to_owned());
        rig.ask(xid, What::Resolve { branch_id, operator, reason }, Until::Now)
    };
    let early = resolve("1").answer().await.unwrap_err();
    assert!(matches!(early, Error::Rejected { rejection: Rejection::NotDecided, .. }));
    rig.confirm(xid).answer().await.unwrap();
    rig.call().await.done().await;
    let hanging = rig.call().await;
    settle().await;
    rig.store.hold();
    let mut resolved = resolve("2");
    resolved.none_yet().await;
    rig.store.release();
    let global = resolved.answer().await.unwrap().global;
    assert_eq!(global.state, State::Confirmed);
    assert_eq!(rig.stored(xid).await.unwrap(), global.recorded());
    // The participant's own answer comes late and changes nothing.
    hanging.fails().await;
    settle().await;
    assert_eq!(rig.state(xid).await, State::Confirmed);
}

#[tokio::test]
async fn a_refused_try_decides_without_waiting_for_the_others() {
    let rig = Rig::new().await;
    let execute = rig.send(|reply| Command::Begin {
        new: executed(&["1", "2"]),
        until: Until::Decided,
        reply,
    });
    let (one, two) = (rig.call().await, rig.call().await);
    let refusal = Refusal {
        reason: "OUT_OF_STOCK".to_owned(),
        domain: "inventory".to_owned(),
        message: String::new(),
        metadata: BTreeMap::new(),
    };
    one.returns(Outcome::Refused(refusal.clone())).await;
    let global = execute.answer().await.unwrap().global;
    assert_eq!(
        global.cancel,
        Some(CancelCause::Refused { branch_id: Some("1".parse().unwrap()), refusal })
    );
    let cancel = rig.call().await;
    assert_eq!((cancel.call.phase, cancel.call.branch), (Phase::Cancel, 0));
    rig.no_call().await; // the second Try is still under way
    two.done().await;
    assert_eq!(rig.call().await.call.branch, 1);
}

#[tokio::test]
async fn a_caller_who_gave_up_does_not_keep_a_transaction_in_memory() {
    let far = Duration::from_secs(3600 * 24 * 365);
    let mut rig = Rig::new().await;
    rig.settings.retry = RetryPolicy { initial: far, max: far };
    let rig = rig.restart().await;
    let xid = rig.begun().await;
    let tried = ["1", "2"].map(|id| id.parse().unwrap()).into();
    let waiting = rig.ask(xid, What::Decide(DecisionRequest::Confirm { tried }), Until::Completed);
    rig.call().await.done().await;
    let second = rig.call().await;
    drop(waiting); // the SDK waits for two seconds
    second.fails().await;
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn what_the_breaker_postpones_leaves_memory_too() {
    let rig = Rig::new().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(3));
    *rig.script.busy.lock().unwrap() = true;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    settle().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(15));
    for _ in 0..10 {
        rig.clock.advance(Duration::from_secs(15));
        settle().await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn a_branch_that_was_resolved_while_its_call_was_under_way_keeps_nothing_in_memory() {
    let far = Duration::from_secs(3600 * 24 * 365);
    let mut rig = Rig::new().await;
    rig.settings.retry = RetryPolicy { initial: far, max: far };
    let rig = rig.restart().await;
    let xid = rig.begun().await;
    rig.confirm(xid).answer().await.unwrap();
    let (one, two) = (rig.call().await, rig.call().await);
    let branch_id: BranchId = "1".parse().unwrap();
    let (operator, reason) = ("ann".to_owned(), "by hand".to_owned());
    rig.ask(xid, What::Resolve { branch_id, operator, reason }, Until::Now).answer().await.unwrap();
    one.fails().await;
    two.fails().await;
    rig.until_memory_holds(0).await;
}

#[tokio::test]
async fn an_old_row_does_not_take_its_key_back() {
    let rig = Rig::new().await;
    let old = rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    rig.cancel(old).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    // Somebody asks for the old one; the row is read; before it arrives the old one is purged and its key begins anew.
    rig.store.hold_loads(true);
    let asked = rig.ask(old, What::Get, Until::Now);
    while rig.store.loads().is_empty() {
        settle().await;
    }
    rig.store.purge(PARTITION, Timestamp(i64::MAX), None, 100).await.unwrap();
    rig.store.hold();
    let first = rig.begin(keyed(7, 1));
    settle().await;
    rig.store.hold_loads(false);
    asked.answer().await.unwrap();
    settle().await;
    let second = rig.begin(keyed(7, 1));
    settle().await;
    rig.store.release();
    assert_eq!(
        first.answer().await.unwrap().global.xid,
        second.answer().await.unwrap().global.xid,
        "one key, two transactions"
    );
}

#[tokio::test]
async fn what_leaves_during_a_look_of_several_pages_is_found_again() {
    let first = Rig::new().await;
    let count = 600;
    let mut xids = Vec::new();
    for _ in 0..count {
        let xid = first.begun().await;
        first.confirm(xid).answer().await.unwrap();
        xids.push(xid);
    }
    // The next owner. The first page is read, and its answer is on the way.
    first.store.hold_dues(true);
    let rig = first.restart().await;
    *rig.script.later.lock().unwrap() = Some(Duration::from_secs(15));
    *rig.script.busy.lock().unwrap() = true;
    let seen = rig.store.dues();
    while rig.store.dues() == seen {
        settle().await;
    }
    // Somebody asks for one of that page: it comes into memory, its participant is away for a while, it leaves.
    rig.ask(xids[0], What::Get, Until::Now).answer().await.unwrap();
    rig.until_memory_holds(0).await;
    *rig.script.busy.lock().unwrap() = false;
    first.store.hold_dues(false);
    for _ in 0..2 * (count - 1) {
        rig.call().await.done().await;
    }
    settle().await;
    rig.clock.advance(Duration::from_secs(16));
    settle().await;
    rig.clock.advance(Duration::from_secs(3600 * 24));
    settle().await;
    assert_eq!(rig.call().await.call.xid, xids[0], "nobody looks at it any more");
}

/// A read that fails says nothing: neither that a key is free, nor that a transaction was never recorded.
#[tokio::test]
async fn what_cannot_be_read_is_not_taken_for_absent() {
    let rig = Rig::new().await;
    let xid = rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid;
    rig.cancel(xid).answer().await.unwrap();
    for _ in 0..2 {
        rig.call().await.done().await;
    }
    rig.until_memory_holds(0).await;
    rig.store.fail_reads(true);
    let again = rig.begin(keyed(7, 1)).answer().await;
    assert!(matches!(again, Err(Error::StoreSilent)), "{again:?}");
    let asked = rig.ask(xid, What::Get, Until::Now).answer().await;
    assert!(matches!(asked, Err(Error::StoreSilent)), "{asked:?}");
    rig.store.fail_reads(false);
    assert_eq!(rig.begin(keyed(7, 1)).answer().await.unwrap().global.xid, xid);
}
