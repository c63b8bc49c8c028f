//! Effects wait for durability. An answer, a call or a departure from memory happens once the change that it depends on is
//! durable. The partition's outbox numbers the changes. This file keeps the effects that wait, by the number of their change.

use std::collections::BTreeMap;

use handfast_proto::{Xid, crash_point, planted::Bug};
use tokio::sync::watch;

use super::{Answer, Error, Hurry, Partition, Reply, answer_now};
use crate::journal::Durable;

/// When this many effects wait for one change, answers whose caller has gone are dropped. The same is done at 64, 128, …
/// While the store does not answer, callers give up and ask again, so such answers pile up.
const EFFECTS_BEFORE_CLEAN_UP: usize = 32;

/// An action that follows when a change is durable.
#[derive(Debug)]
pub(super) enum Effect {
    /// Log the decision.
    Decided(Xid),
    Answer(Reply, Result<Answer, Error>),
    /// Make the transaction's due calls.
    Drive(Xid),
    /// Let the transaction leave memory, if it may.
    Leave(Xid),
}

/// Waiting effects, by the number of the change that they wait for.
#[derive(Debug)]
pub(super) struct Effects {
    by_number: BTreeMap<u64, Vec<Effect>>,
    /// Changes up to this number are durable.
    durable_upto: u64,
    /// How many of the effects are answers.
    answers: usize,
}

impl Effects {
    pub(super) fn new(durable_upto: u64) -> Self {
        Self { by_number: BTreeMap::new(), durable_upto, answers: 0 }
    }

    pub(super) fn is_durable(&self, number: u64) -> bool {
        number <= self.durable_upto
    }

    /// Whether effects of the change with this number may happen now.
    pub(super) fn may_happen(&self, number: u64) -> bool {
        self.is_durable(number) || Bug::DecideBeforeDurable.is_planted()
    }

    pub(super) fn push(&mut self, number: u64, effect: Effect) {
        self.by_number.entry(number).or_default().push(effect);
    }

    /// Puts an effect before all others of its change.
    pub(super) fn push_first(&mut self, number: u64, effect: Effect) {
        self.by_number.entry(number).or_default().insert(0, effect);
    }

    /// Sends the answer now if the change with this number is durable. Otherwise keeps the answer until it is.
    pub(super) fn answer_or_wait(
        &mut self,
        number: u64,
        reply: Reply,
        answer: Result<Answer, Error>,
    ) {
        if self.may_happen(number) {
            return answer_now(reply, answer);
        }
        let effects = self.by_number.entry(number).or_default();
        if effects.len() >= EFFECTS_BEFORE_CLEAN_UP && effects.len().is_power_of_two() {
            self.answers -= forget_gone(effects);
        }
        effects.push(Effect::Answer(reply, answer));
        self.answers += 1;
    }

    pub(super) fn waiting(&self) -> usize {
        self.answers
    }

    /// Forgets callers that gave up.
    pub(super) fn forget_gone(&mut self) {
        let gone: usize = self.by_number.values_mut().map(forget_gone).sum();
        self.answers -= gone;
    }

    /// Notes that changes are durable up to `number`, and takes the effects that waited for them, in order.
    fn take_upto(&mut self, number: u64) -> impl Iterator<Item = Effect> + use<> {
        self.durable_upto = number;
        let later = self.by_number.split_off(&(number + 1));
        let taken = std::mem::replace(&mut self.by_number, later);
        let is_answer = |effect: &&Effect| matches!(effect, Effect::Answer(..));
        self.answers -= taken.values().flatten().filter(is_answer).count();
        taken.into_values().flatten()
    }

    /// No further change will become durable: every waiting answer becomes the error `why`.
    pub(super) fn end(&mut self, why: &Error) {
        self.answers = 0;
        for effect in std::mem::take(&mut self.by_number).into_values().flatten() {
            if let Effect::Answer(reply, _) = effect {
                answer_now(reply, Err(why.clone()));
            }
        }
    }
}

/// Drops answers whose caller has given up. Returns how many.
fn forget_gone(effects: &mut Vec<Effect>) -> usize {
    let before = effects.len();
    effects.retain(|effect| !matches!(effect, Effect::Answer(reply, _) if reply.is_closed()));
    before - effects.len()
}

impl Partition {
    /// Carries out the effects that waited for durability.
    pub(super) fn take_durable(&mut self, durable: &mut watch::Receiver<Durable>) {
        let Durable { upto, ended, position } = *durable.borrow_and_update();
        (self.ended, self.position) = (ended, position);
        if let Some(ended) = ended {
            return self.end(&ended.into());
        }
        let mut leaving = Vec::new();
        for effect in self.effects.take_upto(upto) {
            match effect {
                Effect::Decided(xid) => self.log_decision(xid),
                Effect::Answer(reply, answer) => {
                    crash_point!("durable.before_reply");
                    answer_now(reply, answer);
                }
                Effect::Drive(xid) => {
                    crash_point!("durable.before_calls");
                    self.drive(xid, Hurry::No);
                }
                Effect::Leave(xid) => leaving.push(xid), // last, because the other effects still need its entry
            }
        }
        for xid in leaving {
            self.leave_if_idle(xid);
        }
        self.tell_proven();
    }
}
