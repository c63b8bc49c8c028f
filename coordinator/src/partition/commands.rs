//! Commands: what callers ask of the partition, and when each caller is answered.

use std::time::Duration;

use handfast_proto::Xid;
use tracing::{debug, warn};

use super::{
    Answer, Ask, Command, Error, Hurry, Partition, Reply, Until, WAITING_MAX, What, answer_now,
    entry::{Entry, Watcher},
};
use crate::{
    journal::Ended,
    store::Ownership,
    transaction::{
        BranchSet, Change, Event, GlobalTransaction, NewTransaction, Rejection, Resolution, State,
        Weight,
    },
};

/// Shortest pause between two searches for callers that have given up.
const FORGET_PAUSE: Duration = Duration::from_millis(100);

/// What must come before a command can be answered.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    /// A read of the store.
    read: bool,
    /// A batch that is durable.
    durability: bool,
}

impl Partition {
    pub(super) fn take_command(&mut self, command: Command) {
        match self.ended {
            None => {}
            Some(Ended::Fenced) => {
                let not_here = Error::NotHere(command.xid());
                return answer_now(command.into_reply(), Err(not_here));
            }
            Some(Ended::Corrupt) => {
                return answer_now(command.into_reply(), Err(Error::Corrupt));
            }
        }
        if !self.has_room_for(&command) {
            return answer_now(command.into_reply(), Err(Error::TooManyCalls));
        }
        match command {
            Command::Begin { new, until, reply } => self.begin(new, until, reply),
            Command::FindKey { hash, reply } => self.find_key(hash, reply),
            Command::Ask(ask) => self.ask(ask),
        }
    }

    /// Whether the command's caller may wait for what the answer needs. Callers that have given up do not count.
    fn has_room_for(&mut self, command: &Command) -> bool {
        let needs = self.needs_of(command);
        if self.has_room(needs) {
            return true;
        }
        if self.now() >= self.forgot_at + FORGET_PAUSE {
            self.forgot_at = self.now();
            self.keys.forget_gone();
            self.reading.forget_gone();
            self.effects.forget_gone();
        }
        self.has_room(needs)
    }

    fn has_room(&self, Needs { read, durability }: Needs) -> bool {
        let reads = self.keys.waiting() + self.reading.waiting();
        (!read || reads < WAITING_MAX) && (!durability || self.effects.waiting() < WAITING_MAX)
    }

    fn needs_of(&self, command: &Command) -> Needs {
        let of_transaction = |xid: &Xid, changes: bool| match self.entries.get(xid) {
            Some(entry) => {
                let durability = changes || !self.effects.may_happen(entry.awaits);
                Needs { read: false, durability }
            }
            None => Needs { read: true, durability: changes },
        };
        let of_key = |hash: &[u8; 32], changes: bool| match self.keys.leads_to(hash) {
            Some(xid) => of_transaction(&xid, changes),
            None => Needs { read: true, durability: changes },
        };
        match command {
            Command::Begin { new, .. } => match &new.key {
                Some(key) => of_key(&key.hash, true),
                None => Needs { read: false, durability: true },
            },
            Command::FindKey { hash, .. } => of_key(hash, false),
            Command::Ask(Ask { xid, what, .. }) => match what {
                What::Get | What::GetByKey(_) | What::Inquire(_) => of_transaction(xid, false),
                What::Register(_) | What::BeginAgain { .. } => of_transaction(xid, true),
                // Never refused: reservations wait for a decision.
                What::Decide(_)
                | What::Retry
                | What::Resolve { .. }
                | What::ResolveTransaction { .. } => Needs::default(),
            },
        }
    }

    fn begin(&mut self, new: NewTransaction, until: Until, reply: Reply) {
        match new.key {
            Some(key) => self.begin_with_key(key, Box::new(new), until, reply),
            None => self.begin_new(new, until, reply),
        }
    }

    pub(super) fn begin_new(&mut self, new: NewTransaction, until: Until, reply: Reply) {
        if let Err(full) = self.parts.held.room_for_one(&self.parts.settings) {
            return answer_now(reply, Err(full));
        }
        let Ownership { partition, epoch, nonce, .. } = self.ownership;
        let xid = Xid { partition, epoch, sequence: self.next_sequence, nonce };
        self.next_sequence += 1;
        // A transaction without branches and key may be lost: no participant was called, and no caller can find it again.
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

    pub(super) fn ask(&mut self, ask: Ask) {
        let Ask { xid, what, until, reply } = ask;
        // After a loss, an epoch with a larger number may be one of those that the store has lost. The read tells them apart: if
        // there is a later owner, the read fails.
        if xid.epoch > self.ownership.epoch && self.ownership.lost_from.is_none() {
            return answer_now(reply, Err(Error::NotHere(Some(xid))));
        }
        let now = self.now();
        let Some(entry) = self.entries.get_mut(&xid) else {
            return self.read_for(Ask { xid, what, until, reply });
        };
        let event = match what {
            What::Get | What::GetByKey(_) | What::Inquire(_) => None,
            What::BeginAgain { key, new: _ } => {
                if entry.global.key.is_none_or(|known| known.digest != key.digest) {
                    return self.answer(xid, reply, Err(Error::KeyTaken(xid)));
                }
                return self.respond(xid, until, true, reply);
            }
            What::Register(branches) => {
                if let Err(full) = self.parts.held.room_for_bytes(&self.parts.settings) {
                    return answer_now(reply, Err(full));
                }
                Some(Event::Registered(branches))
            }
            What::Decide(request) => Some(Event::DecisionRequested(request)),
            What::Retry => Some(Event::RetryRequested),
            What::Resolve { branch_id, operator, reason } => Some(Event::Resolved {
                branch_id,
                resolution: Resolution { operator, reason, at: now },
            }),
            What::ResolveTransaction { decision, operator, reason } => {
                let global = &entry.global;
                let lost = self.ownership.may_have_lost_the_decision_of(global);
                if global.state == State::Trying && !lost {
                    let (rejection, global) = (Rejection::NotLost, global.clone());
                    return self.answer(xid, reply, Err(Error::Rejected { rejection, global }));
                }
                if lost {
                    warn!(%xid, decision = decision.as_str(), operator, reason, "an operator decides a transaction whose decision may be lost");
                }
                Some(Event::TransactionResolved {
                    decision,
                    by: Resolution { operator, reason, at: now },
                })
            }
        };
        if let Some(event) = event {
            let resolving = if let Event::Resolved { branch_id, resolution } = &event {
                Some((branch_id.clone(), resolution.clone()))
            } else {
                None
            };
            match self.apply(xid, event) {
                Ok(change) => {
                    let resolving = resolving.filter(|_| change.weight == Weight::Durable);
                    if let Some((branch_id, Resolution { operator, reason, .. })) = resolving {
                        let labels = self.labels_of(&self.entries[&xid].global);
                        warn!(%xid, %branch_id, labels, operator, reason, "an operator resolved a branch");
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

    /// Answers now if the transaction has come as far as `until`. Otherwise answers when it has.
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

    /// Answers the callers whose transaction has come as far as they asked for.
    pub(super) fn tell_watchers(&mut self, xid: Xid) {
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let global = entry.global.clone();
        let reached: Vec<_> =
            entry.watchers.extract_if(.., |watcher| watcher.until.is_reached(&global)).collect();
        for Watcher { existed, reply, .. } in reached {
            self.answer(xid, reply, Ok(Answer { global: global.clone(), existed }));
        }
    }

    /// Sends an answer about a transaction in memory as soon as the state in the answer is durable.
    pub(super) fn answer(&mut self, xid: Xid, reply: Reply, answer: Result<Answer, Error>) {
        self.effects.answer_or_wait(self.entries[&xid].awaits, reply, answer);
    }
}
