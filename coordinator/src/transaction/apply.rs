//! What an event does: the only code that changes a state.

use std::{collections::BTreeSet, time::Duration};

use handfast_proto::{BranchId, limits};

use super::{
    AttemptError, Branch, BranchSet, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
    GlobalTransaction, Payload, Phase, Refusal, Resolution, State, Timestamp,
};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Branches are to join. Their ids differ from each other.
    Registered(Vec<BranchSpec>),
    /// Somebody asks for a decision.
    DecisionRequested(DecisionRequest),
    /// Time has passed.
    Ticked,
    /// A call that was due has been handed to dispatch.
    CallStarted {
        /// Index of the branch.
        branch: usize,
        /// What was asked for.
        phase: Phase,
    },
    /// A call that was due could not be made now: it is due later, and does not count as an attempt.
    CallPostponed {
        /// Index of the branch.
        branch: usize,
        /// Not before.
        until: Timestamp,
    },
    /// A call came back, or its deadline passed.
    CallReturned {
        /// Index of the branch.
        branch: usize,
        /// What was asked for.
        phase: Phase,
        /// What became of it.
        outcome: Outcome,
        /// If it has to be repeated: not before this long from now.
        retry_in: Duration,
    },
    /// A new owner has found it in the store.
    Recovered,
    /// An operator wants the next attempts now.
    RetryRequested,
    /// An operator answers for a branch.
    Resolved {
        /// Which.
        branch_id: BranchId,
        /// Who, why, when.
        resolution: Resolution,
    },
}

/// The decision that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecisionRequest {
    /// Confirm these, whose Trys are known to have answered OK.
    Confirm {
        /// Must be exactly the registered ones.
        tried: BTreeSet<BranchId>,
    },
    /// Cancel.
    Cancel(CancelCause),
}

/// What became of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// OK.
    Done {
        /// Of a Try.
        reply: Option<Payload>,
    },
    /// A Try was refused: repeating will not help.
    Refused(Refusal),
    /// No answer that settles it, or one that a repeat may change.
    Unknown {
        /// What was answered, or not.
        error: AttemptError,
        /// The deadline passed: the next call gets more time.
        timed_out: bool,
        /// Time alone will not mend it: of a Try, cancel now; of phase two, show it as stuck at once.
        hopeless: bool,
    },
}

/// What an event changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// How much it matters that the change is stored.
    pub weight: Weight,
    /// Whether the transaction's own record is now another one; else only its branches are.
    pub head: bool,
    /// Branches that were there before and whose record is now another one.
    pub branches: BranchSet,
}

/// How much it matters that a change is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Nothing changed that is ever stored.
    Nothing,
    /// Goes to the store together with the next change that does: a first acknowledgement of several.
    Later,
    /// Goes to the store, and nobody waits for it: attempts, acknowledgements, completion. If it is lost, participants are
    /// asked once more.
    Lazy,
    /// Answers and calls wait until it is durable: branches, the decision, what an operator did.
    Durable,
}

impl Change {
    const NOTHING: Self = Self { weight: Weight::Nothing, head: false, branches: BranchSet::EMPTY };
    const REGISTERED: Self =
        Self { weight: Weight::Durable, head: false, branches: BranchSet::EMPTY };
    const DECIDED: Self = Self { weight: Weight::Durable, head: true, branches: BranchSet::EMPTY };

    /// The branch at `index` has changed, and with it when the transaction is due, or over.
    fn of_branch(index: usize, weight: Weight) -> Self {
        Self { weight, head: true, branches: BranchSet::only(index) }
    }
}

/// Why an event was not taken in. The transaction is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The opposite decision stands, or any decision for a branch that wants to join.
    #[error("{}", match .0 {
        Decision::Confirm => "the transaction has been confirmed",
        Decision::Cancel => "the transaction has been cancelled",
    })]
    AlreadyDecided(Decision),
    /// Confirm named another set than the registered one.
    #[error("Confirm must name exactly the registered branches")]
    BranchesDiffer {
        /// Registered, not named.
        not_named: Vec<BranchId>,
        /// Named, not registered.
        not_registered: Vec<BranchId>,
    },
    /// The id belongs to a branch with other content.
    #[error("branch {0} is registered already, with other content")]
    BranchTaken(BranchId),
    /// There would be too many.
    #[error("a transaction has at most {} branches", limits::BRANCHES_MAX)]
    TooManyBranches,
    /// Their carried payloads would be too large together.
    #[error(
        "the payloads of a transaction have at most {} bytes together",
        limits::PAYLOADS_BYTES_MAX
    )]
    PayloadsTooLarge,
    /// Only the coordinator registers and confirms what it drives itself.
    #[error(
        "the coordinator drives this transaction itself: its branches come with Execute, and only Cancel may be asked for"
    )]
    CoordinatorDriven,
    /// There is nothing to resolve before the decision.
    #[error("there is no decision yet, so there is nothing to resolve")]
    NotDecided,
    /// The transaction has no such branch.
    #[error("the transaction has no branch {0}")]
    BranchUnknown(BranchId),
    /// The participant itself has answered.
    #[error("the participant has acknowledged branch {0} itself")]
    AlreadyAcknowledged(BranchId),
}

impl GlobalTransaction {
    /// Takes in `event`. On `Err` the transaction is unchanged; a repeat is `Ok` and changes nothing.
    ///
    /// # Errors
    ///
    /// When the event does not fit the state: see [`Rejection`]. Only commands can be rejected; time, calls and recovery
    /// are taken in whenever they come.
    pub fn apply(&mut self, event: Event, now: Timestamp) -> Result<Change, Rejection> {
        match event {
            Event::Registered(specs) => self.register(specs, now),
            Event::DecisionRequested(request) => self.request_decision(request, now),
            Event::Ticked => Ok(self.tick(now)),
            Event::CallStarted { branch, phase } => Ok(self.call_started(branch, phase)),
            Event::CallPostponed { branch, until } => {
                self.branches[branch].call = Call::Idle { due_at: until };
                Ok(Change::NOTHING)
            }
            Event::CallReturned { branch, phase: Phase::Try, outcome, retry_in } => {
                Ok(self.try_returned(branch, outcome, retry_in, now))
            }
            Event::CallReturned { branch, phase, outcome, retry_in } => {
                Ok(self.phase_two_returned(branch, phase, outcome, retry_in, now))
            }
            Event::Recovered => Ok(self.recover(now)),
            Event::RetryRequested => Ok(self.retry_now(now)),
            Event::Resolved { branch_id, resolution } => self.resolve(&branch_id, resolution, now),
        }
    }

    fn register(&mut self, specs: Vec<BranchSpec>, now: Timestamp) -> Result<Change, Rejection> {
        if let Some(decision) = self.state.decision() {
            return Err(Rejection::AlreadyDecided(decision));
        }
        if self.drive != Drive::Initiator {
            return Err(Rejection::CoordinatorDriven);
        }
        let mut fresh = Vec::new();
        for spec in specs {
            match self.branch(&spec.branch_id) {
                Some((_, known)) if known.spec.same_content(&spec) => {}
                Some(_) => return Err(Rejection::BranchTaken(spec.branch_id)),
                None => fresh.push(spec),
            }
        }
        if self.branches.len() + fresh.len() > limits::BRANCHES_MAX {
            return Err(Rejection::TooManyBranches);
        }
        let payload_bytes: usize = (self.branches.iter().map(|branch| &*branch.spec).chain(&fresh))
            .filter_map(|spec| spec.payload.as_ref())
            .map(|payload| payload.data.len())
            .sum();
        if payload_bytes > limits::PAYLOADS_BYTES_MAX {
            return Err(Rejection::PayloadsTooLarge);
        }
        if fresh.is_empty() {
            return Ok(Change::NOTHING);
        }
        self.branches.extend(fresh.into_iter().map(|spec| Branch::registered(spec, now)));
        Ok(Change::REGISTERED)
    }

    fn request_decision(
        &mut self,
        request: DecisionRequest,
        now: Timestamp,
    ) -> Result<Change, Rejection> {
        let asked = match request {
            DecisionRequest::Confirm { .. } => Decision::Confirm,
            DecisionRequest::Cancel(_) => Decision::Cancel,
        };
        match self.state.decision() {
            Some(decision) if decision == asked => return Ok(Change::NOTHING),
            Some(decision) => return Err(Rejection::AlreadyDecided(decision)),
            None => {}
        }
        match request {
            DecisionRequest::Cancel(cause) => Ok(self.cancel(cause, now)),
            DecisionRequest::Confirm { .. } if self.drive != Drive::Initiator => {
                Err(Rejection::CoordinatorDriven)
            }
            DecisionRequest::Confirm { tried } => {
                // The initiator may not know of a branch that a nested service has registered and that may not have been
                // tried: confirming "all" would confirm it too.
                let registered: BTreeSet<_> =
                    self.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
                if registered != tried {
                    return Err(Rejection::BranchesDiffer {
                        not_named: registered.difference(&tried).cloned().collect(),
                        not_registered: tried.difference(&registered).cloned().collect(),
                    });
                }
                Ok(self.decide(State::Confirming, now))
            }
        }
    }

    fn tick(&mut self, now: Timestamp) -> Change {
        if self.state == State::Trying && now >= self.expires_at {
            return self.cancel(CancelCause::TimedOut, now);
        }
        Change::NOTHING
    }

    fn call_started(&mut self, branch: usize, phase: Phase) -> Change {
        let branch = &mut self.branches[branch];
        branch.call = Call::InFlight(phase);
        branch.attempts = branch.attempts.saturating_add(1);
        Change::NOTHING // it is told with what becomes of it
    }

    fn try_returned(
        &mut self,
        index: usize,
        outcome: Outcome,
        retry_in: Duration,
        now: Timestamp,
    ) -> Change {
        let half_time = self.begun_at + (self.expires_at - self.begun_at) / 2;
        let branch = &mut self.branches[index];
        branch.call = Call::Idle { due_at: now };
        if self.state != State::Trying {
            // Decided meanwhile. Whatever the Try did, Cancel undoes it; it was only waiting for the call to end.
            return Change::NOTHING;
        }
        match outcome {
            Outcome::Done { reply } => {
                branch.state = BranchState::Tried;
                branch.reply = reply.map(Box::new);
                if self.branches.iter().all(|branch| branch.state == BranchState::Tried) {
                    return self.decide(State::Confirming, now);
                }
                Change::NOTHING
            }
            Outcome::Refused(refusal) => {
                let branch_id = Some(branch.spec.branch_id.clone());
                self.cancel(CancelCause::Refused { branch_id, refusal }, now)
            }
            Outcome::Unknown { error, timed_out, hopeless } => {
                branch.timeouts = if timed_out { branch.timeouts.saturating_add(1) } else { 0 };
                branch.call = Call::Idle { due_at: now + retry_in };
                let cause = CancelCause::TryUnknown {
                    branch_id: branch.spec.branch_id.clone(),
                    error: format!("{}: {}", error.code, error.message),
                };
                branch.last_error = Some(Box::new(error));
                if hopeless || now + retry_in >= half_time {
                    return self.cancel(cause, now);
                }
                Change::NOTHING
            }
        }
    }

    fn phase_two_returned(
        &mut self,
        index: usize,
        phase: Phase,
        outcome: Outcome,
        retry_in: Duration,
        now: Timestamp,
    ) -> Change {
        let asked = match self.state {
            State::Confirming => Phase::Confirm,
            State::Cancelling => Phase::Cancel,
            State::Trying | State::Confirmed | State::Cancelled => return Change::NOTHING,
        };
        let branch = &mut self.branches[index];
        if phase != asked || !branch.is_open() {
            if branch.call == Call::InFlight(phase) {
                branch.call = Call::Idle { due_at: now };
            }
            return Change::NOTHING; // an operator has answered for it meanwhile
        }
        match outcome {
            Outcome::Done { .. } => {
                branch.state = BranchState::Acknowledged;
                branch.call = Call::Idle { due_at: now };
                self.finish_if_acknowledged(index, now)
            }
            Outcome::Refused(refusal) => {
                // dispatch reads no refusal out of a phase-two answer; if it did, it would be repeated all the same.
                let error =
                    AttemptError { code: "REFUSED".to_owned(), message: refusal.reason, at: now };
                self.phase_two_failed(index, error, false, true, now + retry_in)
            }
            Outcome::Unknown { error, timed_out, hopeless } => {
                self.phase_two_failed(index, error, timed_out, hopeless, now + retry_in)
            }
        }
    }

    fn phase_two_failed(
        &mut self,
        index: usize,
        error: AttemptError,
        timed_out: bool,
        hopeless: bool,
        due_at: Timestamp,
    ) -> Change {
        let branch = &mut self.branches[index];
        branch.timeouts = if timed_out { branch.timeouts.saturating_add(1) } else { 0 };
        branch.needs_attention = hopeless;
        branch.last_error = Some(Box::new(error));
        branch.call = Call::Idle { due_at };
        Change::of_branch(index, Weight::Lazy)
    }

    fn recover(&mut self, now: Timestamp) -> Change {
        if self.state == State::Trying && self.drive != Drive::Initiator {
            return self.cancel(CancelCause::CoordinatorRestarted, now);
        }
        Change::NOTHING
    }

    fn retry_now(&mut self, now: Timestamp) -> Change {
        if !self.state.is_final() && self.state != State::Trying {
            for branch in self.branches.iter_mut().filter(|branch| branch.is_open()) {
                if let Call::Idle { due_at } = &mut branch.call {
                    *due_at = now.min(*due_at);
                }
            }
        }
        Change::NOTHING
    }

    fn resolve(
        &mut self,
        branch_id: &BranchId,
        resolution: Resolution,
        now: Timestamp,
    ) -> Result<Change, Rejection> {
        let Some((index, branch)) = self.branch(branch_id) else {
            return Err(Rejection::BranchUnknown(branch_id.clone()));
        };
        match branch.state {
            BranchState::Acknowledged => Err(Rejection::AlreadyAcknowledged(branch_id.clone())),
            BranchState::Resolved(_) => Ok(Change::NOTHING),
            BranchState::Registered | BranchState::Tried if self.state == State::Trying => {
                Err(Rejection::NotDecided)
            }
            BranchState::Registered | BranchState::Tried => {
                self.branches[index].state = BranchState::Resolved(Box::new(resolution));
                let change = self.finish_if_acknowledged(index, now);
                Ok(Change { weight: Weight::Durable, ..change })
            }
        }
    }

    fn cancel(&mut self, cause: CancelCause, now: Timestamp) -> Change {
        self.cancel = Some(cause);
        self.decide(State::Cancelling, now)
    }

    /// Trying → Confirming or Cancelling. Called only while trying.
    fn decide(&mut self, decided: State, now: Timestamp) -> Change {
        debug_assert_eq!(self.state, State::Trying);
        self.state = decided;
        self.decided_at = Some(now);
        for branch in &mut self.branches {
            branch.attempts = 0;
            branch.timeouts = 0;
            branch.last_error = None;
            // One call at a time: where a Try is under way, phase two waits until it has come back or timed out.
            if let Call::Idle { due_at } = &mut branch.call {
                *due_at = now;
            }
            branch.let_go_of_payload();
        }
        if self.branches.is_empty() {
            self.finish(now);
        }
        Change::DECIDED
    }

    /// The branch at `index` has just been closed.
    fn finish_if_acknowledged(&mut self, index: usize, now: Timestamp) -> Change {
        if self.branches.iter().any(Branch::is_open) {
            // In the first round acknowledgements wait for the completion, which tells them all in one row.
            let first_round = self.branches.iter().all(|branch| branch.last_error.is_none());
            return Change::of_branch(
                index,
                if first_round { Weight::Later } else { Weight::Lazy },
            );
        }
        self.finish(now);
        Change::of_branch(index, Weight::Lazy)
    }

    fn finish(&mut self, now: Timestamp) {
        self.state = match self.state {
            State::Confirming | State::Confirmed => State::Confirmed,
            State::Cancelling | State::Cancelled => State::Cancelled,
            State::Trying => unreachable!("only what is decided finishes"),
        };
        self.finished_at = Some(now);
    }

    /// The branch of that id, and its index.
    #[must_use]
    pub fn branch(&self, branch_id: &BranchId) -> Option<(usize, &Branch)> {
        self.branches.iter().enumerate().find(|(_, branch)| branch.spec.branch_id == *branch_id)
    }
}
