//! A partition owns its open transactions in memory. One task applies everything that happens to them, and no other code
//! changes them. A new transaction needs no read, and this task never waits for the store or for a participant.
//!
//! These rules always hold:
//!
//! - **Effects wait for durability.** The journal gives every change a number. An answer is sent when the transaction's latest
//!   relevant change is durable. This includes answers to reads and repeats, and rejections. A call to a participant waits in
//!   the same way. Completion does not wait: if its record is lost, it is still true that all participants acknowledged.
//! - **A transaction that is recorded with its decision has all or nothing recorded.** Begin and Register are answered before it has
//!   a record. Its first record has every branch that was answered. Once that is handed to the journal, or was read, Register
//!   waits for durability as ever. What has no record can only be lost as a whole; then nobody ever confirms it.
//! - **Memory is a cache with one writer.** A transaction leaves memory only when its record is complete and durable. A row
//!   enters memory only if its transaction has not been in memory since the read of the row began (see `reading`).
//! - **Commands come before timers**, so that a transaction's timeout does not overtake a Decide that arrived in time. No
//!   transaction times out while the store does not answer.
//!
//! Only Begin and RegisterBranch are refused under load. Decide and the outcomes of calls never are.
//!
//! Each source of events has a file: `commands` and `keys` (callers), `calls` (participants), `effects` (durability), `reading`
//! (the store). Timers and the main loop are in this file. `ask` defines the commands and answers.

mod ask;
mod calls;
mod commands;
mod effects;
mod entry;
mod held;
mod keys;
mod log;
mod missing;
mod reading;
mod specs;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use handfast_proto::{Xid, crash_point, planted::Bug};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use self::{
    ask::answer_now,
    effects::{Effect, Effects},
    entry::{Entry, Watcher},
    keys::Keys,
    reading::{FoundKey, ReadResult, Reading},
    specs::Specs,
};
pub use self::{
    ask::{Answer, Ask, COMMANDS_MAX, Command, Error, Reply, Settings, Until, WAITING_MAX, What},
    held::MemoryUse,
};
use crate::{
    clock::Clock,
    dispatch::{Dispatch, Hurry, Returned},
    journal::{Durable, Ended, JournalHealth, Outbox, Urgency},
    store::{Ownership, Store},
    transaction::{BranchSet, Call, Change, Event, Rejection, State, Timestamp, Weight},
};

/// Outcomes of calls that may wait in the partition's queue. When it is full, dispatch waits.
const RETURNED_MAX: usize = 4096;
/// Events that are handled before the partition looks at timers and durability again.
const EVENTS_IN_A_ROW_MAX: usize = 1024;
/// Callers are answered from memory only if a batch has landed within this time. Owners whose store has heartbeats write one at least
/// every two seconds. So one that is cut off from its store soon stops to make promises that it cannot record.
const ALIVE_WITHIN: Duration = Duration::from_secs(3);
/// A transaction whose next attempt is further away than this leaves memory. It is read again when it is due.
const PARK_AFTER: Duration = Duration::from_secs(5);

/// The parts of the coordinator that a partition uses.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Where transactions that are not in memory are read from.
    pub store: Arc<dyn Store>,
    /// Where due calls to participants are submitted.
    pub dispatch: Arc<dyn Dispatch>,
    /// The source of the present time.
    pub clock: Arc<dyn Clock>,
    /// Tells whether the store answers.
    pub health: Arc<JournalHealth>,
    /// Counts what all partitions together hold in memory.
    pub held: Arc<MemoryUse>,
    /// Spawns and counts the partition's reads.
    pub tasks: TaskTracker,
    /// Limits, deadlines and pauses from the configuration.
    pub settings: Settings,
}

/// See the module's comment.
#[derive(Debug)]
pub struct Partition {
    ownership: Ownership,
    parts: Parts,
    outbox: Arc<Outbox>,
    entries: BTreeMap<Xid, Entry>,
    /// When each transaction must be looked at again.
    timers: BTreeSet<(Timestamp, Xid)>,
    effects: Effects,
    /// Why no further change will become durable; `None`: changes still become durable.
    ended: Option<Ended>,
    /// The partition is being handed back.
    handing_back: bool,
    /// The number of the latest durable batch. A read must be at least as new.
    position: u64,
    /// The present moment for all events of one round. The clock is shared between partitions, so it is read once per round.
    woke_at: Timestamp,
    next_sequence: u64,
    keys: Keys,
    specs: Specs,
    reading: Reading,
    /// When the partition last looked for callers that have given up.
    forgot_at: Timestamp,
    returned_sender: mpsc::Sender<Returned>,
    returned: mpsc::Receiver<Returned>,
    reads_sender: mpsc::UnboundedSender<ReadResult>,
    reads: mpsc::UnboundedReceiver<ReadResult>,
}

impl Partition {
    /// An empty partition. When it runs, it first reads the transactions that are due.
    #[must_use]
    pub fn new(ownership: Ownership, parts: Parts, outbox: Arc<Outbox>) -> Self {
        let now = parts.clock.now();
        let Durable { upto, ended, position } = *outbox.durable().borrow();
        let lost_through = ownership.lost_through.filter(|_| !Bug::ForgetLoss.is_planted());
        let lost_from = ownership.lost_from.filter(|_| lost_through.is_some());
        let ownership = Ownership { lost_from, lost_through, ..ownership };
        if let Some(epoch) = lost_through {
            warn!(
                partition = ownership.partition,
                epoch, "the store has lost batches up to this epoch"
            );
        }
        let (returned_sender, returned) = mpsc::channel(RETURNED_MAX);
        let (reads_sender, reads) = mpsc::unbounded_channel(); // bounded by the reads under way
        Self {
            ownership,
            parts,
            outbox,
            woke_at: now,
            entries: BTreeMap::new(),
            timers: BTreeSet::new(),
            effects: Effects::new(upto),
            ended,
            handing_back: false,
            position,
            next_sequence: 1,
            keys: Keys::default(),
            specs: Specs::default(),
            reading: Reading::from_the_start(now),
            forgot_at: now,
            returned_sender,
            returned,
            reads_sender,
            reads,
        }
    }

    /// Handles events until `stop`, then gives the journal all changes that are not recorded yet. A partition that has lost its
    /// ownership goes on until no caller can reach it any more: it answers that it is not the owner.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut durable = self.outbox.durable();
        let mut can_be_asked = true;
        while !stop.is_cancelled() && (can_be_asked || self.ended.is_none()) {
            let wake_at = self.wake_at();
            let clock = self.parts.clock.clone();
            tokio::select! {
                biased; // so that a simulated run can be repeated; all other events that are ready are taken below
                () = stop.cancelled() => { self.woken(); }
                command = commands.recv(), if can_be_asked => match command {
                    Some(command) => self.woken().take_command(command),
                    None => can_be_asked = false,
                },
                Some(returned) = self.returned.recv() => self.woken().take_returned(returned),
                Some(read) = self.reads.recv() => self.woken().take_read(read),
                Ok(()) = durable.changed() => { self.woken(); }
                () = async { match wake_at {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                } } => { self.woken(); }
            }
            self.handing_back = stop.is_cancelled();
            // Take everything that is ready, then act.
            for _ in 0..EVENTS_IN_A_ROW_MAX {
                if let Ok(command) = commands.try_recv() {
                    self.take_command(command);
                } else if let Ok(returned) = self.returned.try_recv() {
                    self.take_returned(returned);
                } else if let Ok(read) = self.reads.try_recv() {
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
            answer_now(command.into_reply(), Err(Error::Stopping));
        }
    }

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

    /// Applies an event that the transaction cannot reject.
    fn apply_fitting(&mut self, xid: Xid, event: Event) {
        if let Err(rejection) = self.apply(xid, event) {
            debug_assert!(false, "only commands are rejected: {rejection}");
        }
    }

    /// Applies an event to a transaction in memory, records the change, and makes the calls that are due.
    fn apply(&mut self, xid: Xid, event: Event) -> Result<Change, Rejection> {
        let now = self.now();
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let before = entry.global.state;
        let hurry = if event == Event::RetryRequested { Hurry::Yes } else { Hurry::No };
        let global = Arc::make_mut(&mut entry.global);
        let known = global.branches.len();
        let change = global.apply(event, now)?;
        self.specs.share(&mut global.branches[known..]);
        let bytes = held::bytes_of(global);
        self.parts.held.changes(entry.bytes, bytes);
        entry.bytes = bytes;
        let decided = before.decision().is_none() && entry.global.state.decision().is_some();
        self.record(xid, change);
        if decided {
            crash_point!("decision.before_durable");
            let awaits = self.entries[&xid].awaits;
            self.effects.push_first(awaits, Effect::Decided(xid));
        }
        let global = &self.entries[&xid].global;
        if global.state != before && global.state.is_final() {
            let took_ms = u64::try_from((now - global.begun_at).as_millis()).unwrap_or(u64::MAX);
            let labels = self.labels_of(global);
            info!(%xid, name = global.name, labels, state = global.state.as_str(), took_ms, "finished");
            crash_point!("finished.before_record");
        }
        self.drive(xid, hurry);
        self.tell_watchers(xid);
        Ok(change)
    }

    /// Hands a change to the journal, unless its transaction may stay without a record.
    fn record(&mut self, xid: Xid, change: Change) {
        if !self.may_stay_unrecorded(xid) {
            self.write_down(xid, change);
        }
    }

    /// Whether the transaction needs no record yet. Then callers are answered at once.
    fn may_stay_unrecorded(&self, xid: Xid) -> bool {
        let entry = &self.entries[&xid];
        let Parts { store, health, .. } = &self.parts;
        // What has no heartbeat cannot be taken over from this process.
        let alive = store.heartbeat().is_none() || health.has_landed_within(ALIVE_WITHIN);
        entry.global.at_decision
            && entry.global.state == State::Trying
            && !entry.is_handed_over()
            && alive
            && !health.is_store_silent()
            && !self.handing_back
    }

    fn write_down(&mut self, xid: Xid, change: Change) {
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let Some(write) = entry.write(change) else { return };
        let urgency =
            if change.weight == Weight::Durable { Urgency::Awaited } else { Urgency::Lazy };
        let number = self.outbox.put(write, urgency);
        entry.latest = number;
        if urgency == Urgency::Awaited {
            entry.awaits = number;
            self.effects.push(number, Effect::Drive(xid));
        }
        self.effects.push(number, Effect::Leave(xid));
    }

    /// Records when a decided transaction is due. Its row names a day that a clock told which was ahead. If the transaction left
    /// memory before its next record, no scan would find it.
    fn record_due(&mut self, xid: Xid) {
        let state = self.entries[&xid].global.state;
        if state.decision().is_some() && !state.is_final() {
            let (head, branches) = (true, BranchSet::EMPTY);
            self.record(xid, Change { weight: Weight::Lazy, head, branches });
        }
    }

    /// Makes the due calls if the change that they depend on is durable, and sets the next timer.
    fn drive(&mut self, xid: Xid, hurry: Hurry) {
        let now = self.now();
        let Some(entry) = self.entries.get(&xid) else { return };
        if self.effects.may_happen(entry.awaits) {
            let due = entry.global.plan(now).calls;
            for call in due {
                self.make_call(xid, call, now, hurry);
            }
        }
        let record_after = self.parts.settings.record_after;
        let entry = self.entries.get_mut(&xid).expect("it is not gone");
        let record_at = (!entry.is_handed_over()).then(|| entry.global.begun_at + record_after);
        // A call that waits for durability is made when the change is durable. A timer for it would only fire again and again.
        let wake_at = [entry.global.plan(now).wake_at, record_at].into_iter().flatten().min();
        if entry.timer != wake_at {
            if let Some(at) = std::mem::replace(&mut entry.timer, wake_at) {
                self.timers.remove(&(at, xid));
            }
            self.timers.extend(wake_at.map(|at| (at, xid)));
        }
    }

    fn fire_timers(&mut self) {
        let now = self.now();
        while let Some((at, xid)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            let entry = self.entries.get_mut(&xid).expect("timers go with their entries");
            let held_until = self.parts.health.expiry_held_until();
            self.timers.remove(&(at, xid));
            entry.timer = None;
            if !entry.is_handed_over() {
                // It has been open for so long that it should be seen, and found again after a crash.
                let (head, branches) = (true, BranchSet::EMPTY);
                self.write_down(xid, Change { weight: Weight::Lazy, head, branches });
            }
            let entry = self.entries.get_mut(&xid).expect("it is not gone");
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
        let bytes = entry.bytes;
        if self.entries.insert(xid, entry).is_none() {
            self.parts.held.enters(bytes);
        }
    }

    /// Removes a transaction from memory if its record is complete and durable, and nothing is due soon.
    fn leave_if_idle(&mut self, xid: Xid) {
        let now = self.now();
        let Some(was_due) = self.entries.get(&xid).map(|entry| entry.was_due) else { return };
        let park_after = self.park_after(was_due);
        let entry = self.entries.get_mut(&xid).expect("just seen");
        entry.watchers.retain(|watcher| !watcher.reply.is_closed()); // callers that gave up do not hold it
        let global = &entry.global;
        let nothing_soon = match global.state.decision() {
            None => false,
            Some(_) => {
                let plan = global.plan(now);
                let in_flight =
                    global.branches.iter().any(|branch| matches!(branch.call, Call::InFlight(_)));
                let soon = plan.wake_at.is_some_and(|at| at <= now + park_after);
                plan.calls.is_empty() && !soon && (!in_flight || global.state.is_final())
            }
        };
        let clean =
            entry.is_saved() && self.effects.is_durable(entry.latest) && entry.watchers.is_empty();
        if nothing_soon && clean {
            let entry = self.entries.remove(&xid).expect("just seen");
            self.parts.held.leaves(entry.bytes);
            self.keys.left(&entry.global);
            if let Some(at) = entry.timer {
                self.timers.remove(&(at, xid));
            }
            self.reading.left(&entry, now);
        }
    }

    /// The partition ends without handing over. Callers are not told about changes that are not durable.
    fn end(&mut self, why: &Error) {
        self.effects.end(why);
        for entry in std::mem::take(&mut self.entries).into_values() {
            self.parts.held.leaves(entry.bytes);
            for Watcher { reply, .. } in entry.watchers {
                answer_now(reply, Err(why.clone()));
            }
        }
        self.timers.clear();
        self.reading.end(why);
        self.keys.end(why);
    }

    /// An orderly end: gives the journal the changes that were waiting for a later change, and the transactions without a record.
    fn hand_back(&mut self) {
        for entry in self.entries.values_mut() {
            if let Some(write) = entry.last_write() {
                self.outbox.put(write, Urgency::Lazy);
            }
        }
    }
}
