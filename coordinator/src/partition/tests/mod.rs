//! One partition with its journal. The test controls the store, the participants and the clock.

mod durability;
mod keys;
mod limits;
mod memory;
mod recording;
mod recovery;
mod time;

use std::{collections::VecDeque, sync::Mutex};

use bytes::Bytes;
use handfast_proto::BranchId;
use tokio::sync::oneshot;

use super::*;
use crate::{
    clock::ManualClock,
    dispatch::{CallRequest, Later},
    journal::Journal,
    store::scripted::{Fault, ScriptedStore},
    transaction::{
        AttemptError, BranchSpec, CancelCause, Decision, DecisionRequest, Drive, GlobalTransaction,
        Key, NewTransaction, Outcome, Payload, Phase, Refusal, State, StuckAfter,
        retry::RetryPolicy,
    },
};

const PARTITION: u16 = 3;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Participants that answer when the test tells them to.
#[derive(Debug, Default)]
struct Script {
    calls: Mutex<VecDeque<(CallRequest, mpsc::Sender<Returned>)>>,
    busy: Mutex<bool>,
    /// The pause for calls that are turned away. `None`: one second.
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

/// A coordinator with one partition.
struct Rig {
    store: Arc<ScriptedStore>,
    clock: ManualClock,
    script: Arc<Script>,
    settings: Settings,
    ownership: Ownership,
    commands: mpsc::Sender<Command>,
    held: Arc<MemoryUse>,
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
            open_bytes_max: 1_000_000_000,
            stuck_after: StuckAfter { attempts: 3, time: Duration::from_secs(120) },
            log_labels: Arc::default(),
            record_after: Duration::from_millis(500),
        })
        .await
    }

    async fn with(settings: Settings) -> Self {
        let store = Arc::new(ScriptedStore::default());
        Self::start(store, ManualClock::at(Timestamp(1_000_000)), settings).await
    }

    /// Another process takes over on the same store. The old one is left as it is, as if paused or dead.
    async fn restart(&self) -> Self {
        Self::start(self.store.clone(), self.clock.clone(), self.settings.clone()).await
    }

    async fn start(store: Arc<ScriptedStore>, clock: ManualClock, settings: Settings) -> Self {
        let ownership = store.acquire(&[PARTITION], "test", clock.now()).await.unwrap()[0];
        let journal = Journal::new(store.clone(), Arc::new(clock.clone()));
        let (script, held, tasks) =
            (Arc::new(Script::default()), Arc::<MemoryUse>::default(), TaskTracker::new());
        let parts = Parts {
            store: store.clone(),
            dispatch: script.clone(),
            clock: Arc::new(clock.clone()),
            health: journal.health().clone(),
            held: held.clone(),
            tasks: tasks.clone(),
            settings: settings.clone(),
        };
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let (stop, journal_stop) = (CancellationToken::new(), CancellationToken::new());
        let partition = Partition::new(ownership, parts, journal.add(ownership));
        let journal = tasks.spawn(journal.run(journal_stop.clone()));
        let stopping = stop.clone();
        tasks.spawn(async move {
            partition.run(receiver, stopping).await;
            journal_stop.cancel();
            journal.await.unwrap();
        });
        Self { store, clock, script, settings, ownership, commands, held, stop, tasks }
    }

    fn send(&self, command: impl FnOnce(Reply) -> Command) -> Waiting {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).unwrap();
        Waiting(answer)
    }

    fn ask(&self, xid: Xid, what: What, until: Until) -> Waiting {
        self.send(|reply| Command::Ask(Ask { xid, what, until, reply }))
    }

    /// An xid of this owner that no transaction has.
    fn unknown(&self, n: usize) -> Xid {
        let Ownership { partition, epoch, nonce, .. } = self.ownership;
        Xid { partition, epoch, sequence: 1_000_000 + u64::try_from(n).unwrap(), nonce }
    }

    /// Makes as many calls as may wait.
    async fn fill(&self, call: impl Fn(usize) -> Waiting) -> Vec<Waiting> {
        let mut waiting = Vec::new();
        for n in 0..WAITING_MAX {
            waiting.push(call(n));
            if n % 1000 == 0 {
                let_tasks_run().await;
            }
        }
        let_tasks_run().await;
        waiting
    }

    fn begin(&self, new: NewTransaction) -> Waiting {
        self.send(|reply| Command::Begin { new, until: Until::Now, reply })
    }

    /// Begins a transaction with two branches and waits for the answer.
    async fn begun(&self) -> Xid {
        self.begin(new(&["1", "2"])).answer().await.unwrap().global.xid
    }

    fn confirm(&self, xid: Xid) -> Waiting {
        let tried = ["1", "2"].map(|id| id.parse().unwrap()).into();
        self.ask(xid, What::Decide(DecisionRequest::Confirm { tried, result: None }), Until::Now)
    }

    fn cancel(&self, xid: Xid) -> Waiting {
        let cause = CancelCause::Requested { reason: String::new() };
        self.ask(xid, What::Decide(DecisionRequest::Cancel(cause)), Until::Now)
    }

    async fn state(&self, xid: Xid) -> State {
        self.ask(xid, What::Get, Until::Now).answer().await.unwrap().global.state
    }

    /// The next call that is made.
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

    /// Checks that no call is made, after every task has run.
    async fn no_call(&self) {
        let_tasks_run().await;
        if let Some((call, _)) = self.script.calls.lock().unwrap().front() {
            panic!("{:?} of {} left", call.phase, call.spec.branch_id);
        }
    }

    async fn stored(&self, xid: Xid) -> Option<GlobalTransaction> {
        self.store.inner.get(xid)
    }

    async fn until_memory_holds(&self, count: usize) {
        let holds = async {
            while self.held.transactions() != count {
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

    /// Checks that there is no answer yet, after every task has run.
    async fn none_yet(&mut self) {
        let_tasks_run().await;
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

/// Lets every task run until none has anything left to do. (Tests run on one thread.)
async fn let_tasks_run() {
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
        try_timeout: None,
        inquires: false,
        damage: None,
    };
    NewTransaction {
        at_decision: false,
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
