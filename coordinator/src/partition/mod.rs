//! A partition owns its open transactions in memory: one task takes in everything that happens to them, and nobody else
//! changes them. There is no read on the way of a new transaction, and nothing here ever waits for the store or a participant.
//!
//! What must always hold:
//!
//! - **Effects wait for durability.** Every change gets a number from the journal. An answer about a transaction, also a read, a
//!   repeat or a rejection, leaves when the transaction's latest change that matters is durable; so does a call. Completion is
//!   not waited for: that all participants have acknowledged stays true if the record of it is lost.
//! - **Memory is a cache with one writer.** A transaction leaves memory only when its record tells everything and is durable.
//!   What is read from the store enters memory only if the transaction was not held here since the read began (see `reading`).
//! - **Commands come before timers**, so that a Decide that is here in time is not overtaken by its transaction's timeout; and
//!   no transaction times out while the store is silent.
//!
//! Only Begin and RegisterBranch are refused for load; Decide and what comes back from participants never are.

mod entry;
mod keys;
mod reading;
mod specs;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::{Xid, crash_point, planted::Bug};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use self::{
    entry::{Entry, Watcher},
    keys::Keys,
    reading::{ReadResult, Reading},
    specs::Specs,
};
use crate::{
    clock::Clock,
    dispatch::{CallRequest, Dispatch, Later, Returned},
    journal::{Durable, Ended, JournalHealth, Outbox, Urgency},
    store::{Ownership, Store},
    transaction::{
        BranchSet, BranchSpec, Call, Change, Decision, DecisionRequest, DueCall, Event,
        GlobalTransaction, NewTransaction, Outcome, Phase, Rejection, Resolution, StuckAfter,
        Timestamp, Weight,
        retry::{self, RetryPolicy},
    },
};

/// Commands that wait for the partition. Whoever sends one more waits, or is refused.
pub const COMMANDS_MAX: usize = 4096;
/// Answers of participants that wait for the partition. Dispatch waits with one more.
const RETURNED_MAX: usize = 4096;
/// Events that are taken in before timers and durability are looked at again.
const EVENTS_IN_A_ROW_MAX: usize = 1024;
/// So many answers may wait for one change before those are dropped that nobody waits for any more.
const WAITING_ANSWERS: usize = 32;
/// A transaction whose next attempt is further away than this leaves memory, and comes back when it is due.
const PARK_AFTER: Duration = Duration::from_secs(5);

/// What a partition needs to know of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Pauses between attempts.
    pub retry: RetryPolicy,
    /// Deadline of a call to a participant; doubles after each call that ran into it.
    pub call_timeout: Duration,
    /// Longest deadline of a call.
    pub call_timeout_max: Duration,
    /// Transactions in memory, of all partitions together; above that no new one begins.
    pub open_max: usize,
    /// What counts as stuck.
    pub stuck_after: StuckAfter,
}

/// How far an answer waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// It does not.
    Now,
    /// There is a decision.
    Decided,
    /// Every branch has acknowledged.
    Completed,
}

impl Until {
    pub(crate) fn is_reached(self, global: &GlobalTransaction) -> bool {
        match self {
            Self::Now => true,
            Self::Decided => global.state.decision().is_some(),
            Self::Completed => global.state.is_final(),
        }
    }
}

/// What somebody asks of a partition.
#[derive(Debug)]
pub enum Command {
    /// Begin a transaction; with a key that is known, find it.
    Begin {
        /// Checked at the door.
        new: NewTransaction,
        /// How far the answer waits.
        until: Until,
        /// Where it goes.
        reply: Reply,
    },
    /// Find the transaction of a key.
    FindKey {
        /// SHA-256 of the key.
        hash: [u8; 32],
        /// Where the answer goes.
        reply: Reply,
    },
    /// Something about a transaction.
    Ask(Ask),
}

/// Something about one transaction.
#[derive(Debug)]
pub struct Ask {
    /// Which.
    pub xid: Xid,
    /// What.
    pub what: What,
    /// How far the answer waits.
    pub until: Until,
    /// Where it goes.
    pub reply: Reply,
}

/// What is asked about a transaction.
#[derive(Debug)]
pub enum What {
    /// What is known of it.
    Get,
    /// Branches are to join.
    Register(Vec<BranchSpec>),
    /// A decision.
    Decide(DecisionRequest),
    /// Its next attempts now.
    Retry,
    /// An operator answers for a branch.
    Resolve {
        /// Which.
        branch_id: handfast_proto::BranchId,
        /// Who.
        operator: String,
        /// Why.
        reason: String,
    },
    /// The Begin that made it came again, with this digest.
    BeginAgain([u8; 32]),
}

/// Where an answer goes. Whoever has stopped waiting has dropped the other end.
pub type Reply = oneshot::Sender<Result<Answer, Error>>;

/// What is told of a transaction. Durable, as far as that matters.
#[derive(Debug, Clone)]
pub struct Answer {
    /// As it was when the answer was made.
    pub global: Arc<GlobalTransaction>,
    /// It was there before, found by its key.
    pub existed: bool,
}

/// Why there is no answer of that kind.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Nothing was ever recorded under this xid: nothing was tried.
    #[error("{0} was never recorded, so nothing was tried under it")]
    NeverRecorded(Xid),
    /// There may have been such a transaction, and it was deleted after its retention.
    #[error("{0} is not known any more: it may have finished and been deleted after its retention")]
    Forgotten(Xid),
    /// No transaction has this key.
    #[error("no transaction has this idempotency key")]
    KeyUnknown,
    /// The key belongs to a transaction with other content.
    #[error(
        "this idempotency key belongs to {0}, which was begun with another name or other branches"
    )]
    KeyTaken(Xid),
    /// The transaction does not take it in.
    #[error("{rejection}")]
    Rejected {
        /// Why.
        rejection: Rejection,
        /// What stands.
        global: Arc<GlobalTransaction>,
    },
    /// Too many transactions are open.
    #[error(
        "{open_max} transactions are open, which is as many as this coordinator takes (limits.open)"
    )]
    TooManyOpen {
        /// The limit.
        open_max: usize,
    },
    /// Too many commands wait.
    #[error("this coordinator has as many calls waiting as it takes")]
    TooManyCalls,
    /// The store does not answer.
    #[error("the store does not answer; what was asked may or may not take effect")]
    StoreSilent,
    /// The xid belongs to somebody else.
    #[error("{0} belongs to a partition or an epoch that this coordinator does not own")]
    OwnedElsewhere(Xid),
    /// This coordinator was replaced by another one.
    #[error("another coordinator has taken over; ask again, and that one will answer")]
    Fenced,
    /// This coordinator is stopping.
    #[error("this coordinator is stopping")]
    Stopping,
    /// The store holds what cannot be.
    #[error("the record makes no sense; the coordinator's log says more")]
    Corrupt,
}

/// Whether an operator has asked for the calls that are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hurry {
    Yes,
    No,
}

/// What happens when a change is durable.
#[derive(Debug)]
enum Effect {
    /// The decision can be told.
    Decided(Xid),
    Answer(Reply, Result<Answer, Error>),
    /// It may have calls due now.
    Drive(Xid),
    /// It may leave memory now.
    Leave(Xid),
}

/// What a partition is made of, beside its ownership.
#[derive(Debug, Clone)]
pub struct Parts {
    /// For what is not in memory.
    pub store: Arc<dyn Store>,
    /// For calls to participants.
    pub dispatch: Arc<dyn Dispatch>,
    /// For the time.
    pub clock: Arc<dyn Clock>,
    /// For how the journal is doing.
    pub health: Arc<JournalHealth>,
    /// How many transactions all partitions hold together.
    pub open: Arc<AtomicUsize>,
    /// What everything is spawned on.
    pub tasks: TaskTracker,
    /// See [`Settings`].
    pub settings: Settings,
}

/// See the module's comment.
#[derive(Debug)]
pub struct Partition {
    ownership: Ownership,
    parts: Parts,
    outbox: Arc<Outbox>,
    entries: BTreeMap<Xid, Entry>,
    /// When to look at which transaction again.
    timers: BTreeSet<(Timestamp, Xid)>,
    /// What happens when the change of that number is durable.
    effects: BTreeMap<u64, Vec<Effect>>,
    durable: Durable,
    woke_at: Timestamp,
    next_sequence: u64,
    keys: Keys,
    specs: Specs,
    reading: Reading,
    returned: (mpsc::Sender<Returned>, mpsc::Receiver<Returned>),
    reads: (mpsc::UnboundedSender<ReadResult>, mpsc::UnboundedReceiver<ReadResult>),
}

impl Partition {
    /// A partition that holds nothing yet. It reads what is due as soon as it runs.
    #[must_use]
    pub fn new(ownership: Ownership, parts: Parts, outbox: Arc<Outbox>) -> Self {
        let now = parts.clock.now();
        Self {
            ownership,
            parts,
            durable: *outbox.durable().borrow(),
            outbox,
            woke_at: now,
            entries: BTreeMap::new(),
            timers: BTreeSet::new(),
            effects: BTreeMap::new(),
            next_sequence: 1,
            keys: Keys::default(),
            specs: Specs::default(),
            reading: Reading::from_the_start(now),
            returned: mpsc::channel(RETURNED_MAX),
            reads: mpsc::unbounded_channel(), // bounded by the reads under way
        }
    }

    /// Takes in what happens until `stop`; then hands what is not recorded yet to the journal.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut durable = self.outbox.durable();
        while !stop.is_cancelled() {
            let wake_at = self.wake_at();
            let clock = self.parts.clock.clone();
            tokio::select! {
                biased; // all that is ready is taken below; a run of the same events is the same run
                () = stop.cancelled() => { self.woken(); } // and takes what is ready
                Some(command) = commands.recv() => self.woken().take_command(command),
                Some(returned) = self.returned.1.recv() => self.woken().take_returned(returned),
                Some(read) = self.reads.1.recv() => self.woken().take_read(read),
                Ok(()) = durable.changed() => { self.woken(); }
                () = async { match wake_at {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                } } => { self.woken(); }
            }
            // Take everything that is ready, then act.
            for _ in 0..EVENTS_IN_A_ROW_MAX {
                if let Ok(command) = commands.try_recv() {
                    self.take_command(command);
                } else if let Ok(returned) = self.returned.1.try_recv() {
                    self.take_returned(returned);
                } else if let Ok(read) = self.reads.1.try_recv() {
                    self.take_read(read);
                } else {
                    break;
                }
            }
            self.take_durable(&mut durable);
            self.fire_timers();
            self.look_up_keys();
            self.scan();
        }
        self.hand_back();
        while let Ok(command) = commands.try_recv() {
            Self::answer_now(command.into_reply(), Err(Error::Stopping));
        }
    }

    /// When it woke: the clock is everybody's, and is not asked for each step.
    fn now(&self) -> Timestamp {
        self.woke_at
    }

    fn woken(&mut self) -> &mut Self {
        self.woke_at = self.parts.clock.now();
        self
    }

    fn wake_at(&self) -> Option<Timestamp> {
        let timer = self.timers.first().map(|(at, _)| *at);
        [timer, self.reading.scan_at()].into_iter().flatten().min()
    }

    fn take_command(&mut self, command: Command) {
        if let Some(ended) = self.durable.ended {
            Self::answer_now(command.into_reply(), Err(ended.into()));
            return;
        }
        match command {
            Command::Begin { new, until, reply } => self.begin(new, until, reply),
            Command::FindKey { hash, reply } => self.find_key(hash, reply),
            Command::Ask(ask) => self.ask(ask),
        }
    }

    /// Begins a transaction, unless it has a key that may be known.
    fn begin(&mut self, new: NewTransaction, until: Until, reply: Reply) {
        match new.key {
            Some(key) => self.begin_with_key(key, new, until, reply),
            None => self.begin_new(new, until, reply),
        }
    }

    fn begin_new(&mut self, new: NewTransaction, until: Until, reply: Reply) {
        let Settings { open_max, .. } = self.parts.settings;
        if self.parts.open.load(Ordering::Relaxed) >= open_max {
            return Self::answer_now(reply, Err(Error::TooManyOpen { open_max }));
        }
        let Ownership { partition, epoch, nonce } = self.ownership;
        let xid = Xid { partition, epoch, sequence: self.next_sequence, nonce };
        self.next_sequence += 1;
        // With neither branches nor key it may be lost: then nothing was tried, and nobody can ask for it again.
        let weight = if new.branches.is_empty() && new.key.is_none() {
            Weight::Lazy
        } else {
            Weight::Durable
        };
        let global = GlobalTransaction::begin(xid, new, self.now());
        debug!(%xid, name = global.name, branches = global.branches.len(), "begun");
        self.insert(Entry::begun(global));
        self.record(xid, Change { weight, head: true, branches: BranchSet::EMPTY });
        self.drive(xid, Hurry::No);
        self.respond(xid, until, false, reply);
    }

    fn ask(&mut self, ask: Ask) {
        let Ask { xid, what, until, reply } = ask;
        if xid.epoch > self.ownership.epoch {
            return Self::answer_now(reply, Err(Error::OwnedElsewhere(xid)));
        }
        let now = self.now();
        let Some(entry) = self.entries.get_mut(&xid) else {
            return self.read_for(Ask { xid, what, until, reply });
        };
        let event = match what {
            What::Get => None,
            What::BeginAgain(digest) => {
                if entry.global.key.is_none_or(|key| key.digest != digest) {
                    return self.answer(xid, reply, Err(Error::KeyTaken(xid)));
                }
                return self.respond(xid, until, true, reply);
            }
            What::Register(branches) => Some(Event::Registered(branches)),
            What::Decide(request) => Some(Event::DecisionRequested(request)),
            What::Retry => Some(Event::RetryRequested),
            What::Resolve { branch_id, operator, reason } => Some(Event::Resolved {
                branch_id,
                resolution: Resolution { operator, reason, at: now },
            }),
        };
        if let Some(event) = event {
            let resolving = matches!(event, Event::Resolved { .. }).then(|| event.clone());
            match self.apply(xid, event) {
                Ok(change) => {
                    if let Some(resolved) = resolving.filter(|_| change.weight == Weight::Durable) {
                        warn!(%xid, ?resolved, "an operator answers for a branch");
                    }
                }
                Err(rejection) => {
                    let global = self.entries[&xid].global.clone();
                    return self.answer(xid, reply, Err(Error::Rejected { rejection, global }));
                }
            }
        }
        self.respond(xid, until, false, reply);
    }

    fn take_returned(&mut self, returned: Returned) {
        let Returned { xid, branch, phase, outcome } = returned;
        let Some(entry) = self.entries.get(&xid) else {
            return; // the end of the process is near, or an operator has answered for the branch
        };
        let attempts = entry.global.branches[branch].attempts;
        let retry_in = self.parts.settings.retry.delay(attempts, fastrand::u32(..));
        self.log_failure(entry, branch, phase, &outcome);
        self.apply_fitting(xid, Event::CallReturned { branch, phase, outcome, retry_in });
    }

    /// The first failure, the second, the fourth, the eighth … of a branch, so that one dead participant does not fill the log.
    fn log_failure(&self, entry: &Entry, branch: usize, phase: Phase, outcome: &Outcome) {
        let (xid, branch) = (entry.global.xid, &entry.global.branches[branch]);
        let Outcome::Unknown { error, hopeless, .. } = outcome else { return };
        if branch.attempts.is_power_of_two() {
            let stuck = *hopeless || branch.attempts >= self.parts.settings.stuck_after.attempts;
            warn!(
                %xid, branch_id = %branch.spec.branch_id, action = branch.spec.action, participant = branch.spec.participant,
                phase = ?phase, attempt = branch.attempts, code = error.code, error = error.message, stuck,
                "call failed, will be repeated"
            );
        }
    }

    /// What went well is told in one line, at its end.
    fn log_decision(&self, xid: Xid) {
        let Some(entry) = self.entries.get(&xid) else { return };
        let global = &entry.global;
        match (global.state.decision(), &global.cancel) {
            (Some(Decision::Confirm), _) => {
                debug!(%xid, name = global.name, decision = "CONFIRM", "decided");
            }
            (_, Some(cause)) => {
                info!(%xid, name = global.name, decision = "CANCEL", %cause, "decided");
            }
            (_, None) => {}
        }
    }

    /// Applies an event that cannot be rejected.
    fn apply_fitting(&mut self, xid: Xid, event: Event) {
        if let Err(rejection) = self.apply(xid, event) {
            debug_assert!(false, "only commands are rejected: {rejection}");
        }
    }

    /// Applies an event to a transaction in memory, records what changed, and does what is due by now.
    fn apply(&mut self, xid: Xid, event: Event) -> Result<Change, Rejection> {
        let now = self.now();
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let before = entry.global.state;
        let hurry = if event == Event::RetryRequested { Hurry::Yes } else { Hurry::No };
        let global = Arc::make_mut(&mut entry.global);
        let known = global.branches.len();
        let change = global.apply(event, now)?;
        self.specs.share(&mut global.branches[known..]);
        let decided = before.decision().is_none() && entry.global.state.decision().is_some();
        self.record(xid, change);
        if decided {
            crash_point!("decision.before_durable");
            let awaits = self.entries[&xid].awaits;
            self.effects.entry(awaits).or_default().insert(0, Effect::Decided(xid));
        }
        let global = &self.entries[&xid].global;
        if global.state != before && global.state.is_final() {
            let took_ms = u64::try_from((now - global.begun_at).as_millis()).unwrap_or(u64::MAX);
            info!(%xid, name = global.name, state = ?global.state, took_ms, "finished");
            crash_point!("finished.before_record");
        }
        self.drive(xid, hurry);
        self.tell_watchers(xid);
        Ok(change)
    }

    /// Hands what `change` changed to the journal.
    fn record(&mut self, xid: Xid, change: Change) {
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let Some(write) = entry.write(change) else { return };
        let urgency =
            if change.weight == Weight::Durable { Urgency::Awaited } else { Urgency::Lazy };
        let number = self.outbox.put(write, urgency);
        entry.latest = number;
        let effects = self.effects.entry(number).or_default();
        if urgency == Urgency::Awaited {
            entry.awaits = number;
            effects.push(Effect::Drive(xid));
        }
        effects.push(Effect::Leave(xid));
    }

    /// Makes the calls that are due, if what they rest on is durable, and sets the timer for the next look.
    fn drive(&mut self, xid: Xid, hurry: Hurry) {
        let now = self.now();
        let Some(entry) = self.entries.get(&xid) else { return };
        if entry.awaits <= self.durable.upto || Bug::DecideBeforeDurable.is_planted() {
            let due = entry.global.plan(now).calls;
            for call in due {
                self.make_call(xid, call, now, hurry);
            }
        }
        let entry = self.entries.get_mut(&xid).expect("it is not gone");
        // What is due but waits for durability is looked at again then; a timer would only spin.
        let wake_at = entry.global.plan(now).wake_at;
        if entry.timer != wake_at {
            if let Some(at) = std::mem::replace(&mut entry.timer, wake_at) {
                self.timers.remove(&(at, xid));
            }
            self.timers.extend(wake_at.map(|at| (at, xid)));
        }
    }

    fn make_call(&mut self, xid: Xid, due: DueCall, now: Timestamp, hurry: Hurry) {
        let DueCall { branch, phase } = due;
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let global = Arc::make_mut(&mut entry.global);
        let known = &global.branches[branch];
        let Settings { call_timeout, call_timeout_max, .. } = self.parts.settings;
        let mut deadline = retry::call_deadline(call_timeout, known.timeouts, call_timeout_max);
        if phase == Phase::Try {
            deadline = deadline.min((global.expires_at - now).max(Duration::from_millis(1)));
        }
        let call = CallRequest {
            xid,
            branch,
            spec: known.spec.clone(),
            phase,
            attempt: known.attempts + 1,
            expires_at: global.expires_at,
            labels: global.labels.clone(),
            deadline,
            hurried: hurry == Hurry::Yes,
        };
        let event = match self.parts.dispatch.submit(call, &self.returned.0) {
            Ok(()) => Event::CallStarted { branch, phase },
            Err(Later(wait)) => Event::CallPostponed { branch, until: now + wait },
        };
        let parks = matches!(event, Event::CallPostponed { until, .. } if until > now + PARK_AFTER);
        if let Err(rejection) = global.apply(event, now) {
            debug_assert!(false, "only commands are rejected: {rejection}");
        }
        if parks && phase != Phase::Try {
            // Its record must say until when, so that it can leave memory and is not found due at once.
            let branches = BranchSet::only(branch);
            self.record(xid, Change { weight: Weight::Lazy, head: true, branches });
        }
    }

    /// Answers when the transaction has come as far as `until`.
    fn respond(&mut self, xid: Xid, until: Until, existed: bool, reply: Reply) {
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        if until.is_reached(&entry.global) {
            let answer = Answer { global: entry.global.clone(), existed };
            self.answer(xid, reply, Ok(answer));
        } else {
            entry.watchers.retain(|watcher| !watcher.reply.is_closed());
            entry.watchers.push(Watcher { until, existed, reply });
        }
    }

    fn tell_watchers(&mut self, xid: Xid) {
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let global = entry.global.clone();
        let reached: Vec<_> =
            entry.watchers.extract_if(.., |watcher| watcher.until.is_reached(&global)).collect();
        for Watcher { existed, reply, .. } in reached {
            self.answer(xid, reply, Ok(Answer { global: global.clone(), existed }));
        }
    }

    /// Sends an answer about a transaction in memory, once what it says is durable.
    fn answer(&mut self, xid: Xid, reply: Reply, answer: Result<Answer, Error>) {
        let awaits = self.entries[&xid].awaits;
        if awaits <= self.durable.upto || Bug::DecideBeforeDurable.is_planted() {
            Self::answer_now(reply, answer);
        } else {
            let effects = self.effects.entry(awaits).or_default();
            // While the store is silent, whoever asked may have given up, and asked again.
            if effects.len() >= WAITING_ANSWERS && effects.len().is_power_of_two() {
                effects.retain(
                    |effect| !matches!(effect, Effect::Answer(reply, _) if reply.is_closed()),
                );
            }
            effects.push(Effect::Answer(reply, answer));
        }
    }

    fn answer_now(reply: Reply, answer: Result<Answer, Error>) {
        drop(reply.send(answer)); // nobody may be waiting any more
    }

    /// Does what waited for durability.
    fn take_durable(&mut self, durable: &mut watch::Receiver<Durable>) {
        self.durable = *durable.borrow_and_update();
        if let Some(ended) = self.durable.ended {
            return self.end(ended.into());
        }
        let later = self.effects.split_off(&(self.durable.upto + 1));
        let mut leaving = Vec::new();
        for effect in std::mem::replace(&mut self.effects, later).into_values().flatten() {
            match effect {
                Effect::Decided(xid) => self.log_decision(xid),
                Effect::Answer(reply, answer) => {
                    crash_point!("durable.before_reply");
                    Self::answer_now(reply, answer);
                }
                Effect::Drive(xid) => {
                    crash_point!("durable.before_calls");
                    self.drive(xid, Hurry::No);
                }
                Effect::Leave(xid) => leaving.push(xid), // last: the others still look at it
            }
        }
        for xid in leaving {
            self.leave_if_idle(xid);
        }
    }

    fn fire_timers(&mut self) {
        let now = self.now();
        while let Some((at, xid)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            let entry = self.entries.get_mut(&xid).expect("timers go with their entries");
            let held_until = self.parts.health.expiry_held_until();
            self.timers.remove(&(at, xid));
            entry.timer = None;
            match held_until {
                Some(until)
                    if entry.global.state.decision().is_none()
                        && now >= entry.global.expires_at =>
                {
                    entry.timer = Some(until);
                    self.timers.insert((until, xid));
                }
                _ => {
                    self.apply_fitting(xid, Event::Ticked);
                    self.leave_if_idle(xid);
                }
            }
        }
    }

    /// Takes a transaction into memory.
    fn insert(&mut self, mut entry: Entry) {
        let xid = entry.global.xid;
        self.specs.share(&mut Arc::make_mut(&mut entry.global).branches);
        self.keys.known(&entry.global);
        if self.entries.insert(xid, entry).is_none() {
            self.parts.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets a transaction go if its record tells everything and nothing is due soon.
    fn leave_if_idle(&mut self, xid: Xid) {
        let now = self.now();
        let Some(entry) = self.entries.get_mut(&xid) else { return };
        entry.watchers.retain(|watcher| !watcher.reply.is_closed()); // those who have given up
        let global = &entry.global;
        let nothing_soon = match global.state.decision() {
            None => false,
            Some(_) => {
                let plan = global.plan(now);
                let in_flight =
                    global.branches.iter().any(|branch| matches!(branch.call, Call::InFlight(_)));
                let soon = plan.wake_at.is_some_and(|at| at <= now + PARK_AFTER);
                plan.calls.is_empty() && !soon && (!in_flight || global.state.is_final())
            }
        };
        let clean =
            entry.is_saved() && entry.latest <= self.durable.upto && entry.watchers.is_empty();
        if nothing_soon && clean {
            let entry = self.entries.remove(&xid).expect("just seen");
            self.parts.open.fetch_sub(1, Ordering::Relaxed);
            self.keys.left(&entry.global);
            if let Some(at) = entry.timer {
                self.timers.remove(&(at, xid));
            }
            self.reading.left(&entry);
        }
    }

    /// The partition is not ours any more: nobody hears anything that was not durable.
    fn end(&mut self, why: Error) {
        for effect in std::mem::take(&mut self.effects).into_values().flatten() {
            if let Effect::Answer(reply, _) = effect {
                Self::answer_now(reply, Err(why.clone()));
            }
        }
        for entry in std::mem::take(&mut self.entries).into_values() {
            self.parts.open.fetch_sub(1, Ordering::Relaxed);
            for Watcher { reply, .. } in entry.watchers {
                Self::answer_now(reply, Err(why.clone()));
            }
        }
        self.timers.clear();
        self.reading.end(&why);
        self.keys.end(&why);
    }

    /// An orderly end: what waited for company goes to the journal now.
    fn hand_back(&mut self) {
        for entry in self.entries.values_mut() {
            if let Some(write) = entry.last_write() {
                self.outbox.put(write, Urgency::Lazy);
            }
        }
    }
}

impl Command {
    /// Where its answer goes.
    pub fn into_reply(self) -> Reply {
        match self {
            Self::Begin { reply, .. }
            | Self::FindKey { reply, .. }
            | Self::Ask(Ask { reply, .. }) => reply,
        }
    }
}

impl From<Ended> for Error {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Fenced => Self::Fenced,
            Ended::Corrupt => Self::Corrupt,
        }
    }
}
