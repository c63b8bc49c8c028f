//! How an event changes a transaction. This is the only code that changes a state.

use std::{collections::BTreeSet, time::Duration};

use handfast_proto::{BranchId, limits};

use super::{
    AttemptError, Branch, BranchSet, BranchSpec, BranchState, Call, CancelCause, Decision, Drive,
    GlobalTransaction, Payload, Phase, Refusal, Rejection, Resolution, State, Timestamp,
};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// New branches ask to join. Their ids differ.
    Registered(Vec<BranchSpec>),
    /// The initiator or an operator asks for a decision.
    DecisionRequested(DecisionRequest),
    /// Time has passed.
    Ticked,
    /// A call that was due has been handed to dispatch.
    CallStarted {
        /// Index of the branch.
        branch: usize,
        /// Try, Confirm or Cancel.
        phase: Phase,
    },
    /// A call that was due could not be made now. It is due later, and does not count as an attempt.
    CallPostponed {
        /// Index of the branch.
        branch: usize,
        /// The call is due again at this time.
        until: Timestamp,
    },
    /// A call came back, or its deadline passed.
    CallReturned {
        /// Index of the branch.
        branch: usize,
        /// Try, Confirm or Cancel.
        phase: Phase,
        /// The answer, or the lack of one.
        outcome: Outcome,
        /// The backoff before a retry, if one is needed.
        retry_in: Duration,
    },
    /// It has been read from the store.
    Recovered {
        /// The longest pause between two attempts.
        longest_pause: Duration,
    },
    /// An operator asks for the next attempts at once.
    RetryRequested,
    /// An operator resolves a branch by hand.
    Resolved {
        /// The branch to resolve.
        branch_id: BranchId,
        /// What is recorded about it for ever.
        resolution: Resolution,
    },
    /// An operator decides, because records were lost and the decision may have been among them.
    TransactionResolved {
        /// What the operator found to be right.
        decision: Decision,
        /// What is recorded about it for ever.
        by: Resolution,
    },
}

/// A requested decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecisionRequest {
    /// Use what was reserved.
    Confirm {
        /// The branches whose Try answered OK. They must be exactly the registered branches.
        tried: BTreeSet<BranchId>,
        /// What the operation came to, for a repeat. At most `limits::RESULT_BYTES_MAX`.
        result: Option<Box<Payload>>,
    },
    /// Release what was reserved.
    Cancel(CancelCause),
}

/// The result of one call to a participant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// OK.
    Done {
        /// The reply to a Try; `None` for Confirm and Cancel.
        reply: Option<Payload>,
    },
    /// The participant refused a Try: retrying will not help.
    Refused(Refusal),
    /// There was no answer that settles the question, or a retry may change the answer.
    Unknown {
        /// The error, or the missing answer.
        error: AttemptError,
        /// The call ran into its deadline, so the next call gets more time.
        timed_out: bool,
        /// A retry is not expected to help. After a Try: cancel now. In phase two: report the branch as stuck at once.
        hopeless: bool,
    },
}

/// The parts of a transaction that an event changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Whether and when the change must be stored.
    pub weight: Weight,
    /// Whether the transaction's own row changed, and not only rows of branches.
    pub head: bool,
    /// The branches that existed before and whose rows changed.
    pub branches: BranchSet,
}

/// Whether and when a change must be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Nothing that is stored has changed.
    Nothing,
    /// Stored together with the next change that is: an acknowledgement that is not the last one.
    Later,
    /// Stored, but nothing waits for it: attempts, acknowledgements, completion. If it is lost, the participants are called once
    /// more.
    Lazy,
    /// Answers and calls wait until it is durable: branches, the decision, a resolution by an operator.
    Durable,
}

impl Change {
    const NOTHING: Self = Self { weight: Weight::Nothing, head: false, branches: BranchSet::EMPTY };
    const REGISTERED: Self =
        Self { weight: Weight::Durable, head: false, branches: BranchSet::EMPTY };
    const DECIDED: Self = Self { weight: Weight::Durable, head: true, branches: BranchSet::EMPTY };

    /// The branch at `index` has changed, and with it the transaction's `due_at` or its final state.
    fn of_branch(index: usize, weight: Weight) -> Self {
        Self { weight, head: true, branches: BranchSet::only(index) }
    }
}

impl GlobalTransaction {
    /// Applies `event`. After `Err` the transaction is unchanged. A repeat is `Ok` and changes nothing.
    ///
    /// # Errors
    ///
    /// When the event does not fit the state: see [`Rejection`]. Only requests can be rejected. Time, results of calls and recovery
    /// are accepted in every state.
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
            Event::Recovered { longest_pause } => Ok(self.recover(longest_pause, now)),
            Event::RetryRequested => Ok(self.retry_now(now)),
            Event::Resolved { branch_id, resolution } => self.resolve(&branch_id, resolution, now),
            Event::TransactionResolved { decision, by } => {
                self.resolve_transaction(decision, by, now)
            }
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
        // A participant that does not ask would keep a reservation for ever if its transaction were lost.
        self.at_decision &= fresh.iter().all(|spec| spec.inquires);
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
            DecisionRequest::Confirm { tried, result } => {
                // A nested service may have registered a branch that the initiator does not know and that was never tried. To
                // confirm "all branches" would confirm that one, too.
                let registered: BTreeSet<_> =
                    self.branches.iter().map(|branch| branch.spec.branch_id.clone()).collect();
                if registered != tried {
                    return Err(Rejection::BranchesDiffer {
                        not_named: registered.difference(&tried).cloned().collect(),
                        not_registered: tried.difference(&registered).cloned().collect(),
                    });
                }
                self.result = result;
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
        Change::NOTHING // stored with the result of the call
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
            // The transaction was decided while the Try was in flight. Cancel undoes whatever the Try did.
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
            return Change::NOTHING; // an operator has resolved the branch while the call was in flight
        }
        match outcome {
            Outcome::Done { .. } => {
                branch.state = BranchState::Acknowledged;
                branch.call = Call::Idle { due_at: now };
                self.finish_if_acknowledged(index, now)
            }
            Outcome::Refused(refusal) => {
                // `dispatch` never reads a refusal from a phase-two answer. If it did, the call would be retried all the same.
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

    fn recover(&mut self, longest_pause: Duration, now: Timestamp) -> Change {
        match (self.state, self.drive) {
            (State::Trying, Drive::Coordinator { .. }) => {
                self.cancel(CancelCause::CoordinatorRestarted, now)
            }
            (State::Trying, Drive::Initiator) => {
                if self.begun_at > now {
                    // Phase one lasts as long from now as it was to last.
                    let timeout = self.expires_at - self.begun_at;
                    self.expires_at = self.expires_at.min(now + timeout);
                }
                Change::NOTHING
            }
            (State::Confirming | State::Cancelling, _) => {
                // Only somebody who changes rows by hand leaves it so. No answer to a call will come that finishes it.
                if !self.branches.iter().any(Branch::is_open) {
                    self.finish(now);
                    return Change { weight: Weight::Lazy, head: true, branches: BranchSet::EMPTY };
                }
                for branch in &mut self.branches {
                    if let Call::Idle { due_at } = &mut branch.call
                        && *due_at > now + longest_pause
                    {
                        *due_at = now; // recorded while the clock was ahead
                    }
                }
                Change::NOTHING
            }
            (State::Confirmed | State::Cancelled, _) => Change::NOTHING,
        }
    }

    /// Whether the clock was ahead when its row was written, if the row is due later than after the longest pause between two
    /// attempts. Only phase one may wait so long.
    #[must_use]
    pub fn was_ahead(&self, now: Timestamp) -> bool {
        self.state != State::Trying || self.begun_at > now
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

    fn resolve_transaction(
        &mut self,
        decision: Decision,
        by: Resolution,
        now: Timestamp,
    ) -> Result<Change, Rejection> {
        match self.state.decision() {
            Some(present) if present == decision => return Ok(Change::NOTHING),
            Some(present) => return Err(Rejection::AlreadyDecided(present)),
            None => {}
        }
        let reason = format!("{}, an operator: {}", by.operator, by.reason);
        self.resolution = Some(Box::new(by));
        Ok(match decision {
            Decision::Confirm => self.decide(State::Confirming, now),
            Decision::Cancel => self.cancel(CancelCause::Requested { reason }, now),
        })
    }

    fn cancel(&mut self, cause: CancelCause, now: Timestamp) -> Change {
        self.cancel = Some(cause);
        self.decide(State::Cancelling, now)
    }

    /// Trying → Confirming or Cancelling. Call it only while trying.
    fn decide(&mut self, decided: State, now: Timestamp) -> Change {
        debug_assert_eq!(self.state, State::Trying);
        self.state = decided;
        self.decided_at = Some(now);
        for branch in &mut self.branches {
            branch.attempts = 0;
            branch.timeouts = 0;
            branch.last_error = None;
            // A branch has one call at a time: while a Try is in flight, phase two waits for its answer or its deadline.
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

    /// The branch at `index` has just been acknowledged or resolved.
    fn finish_if_acknowledged(&mut self, index: usize, now: Timestamp) -> Change {
        if self.branches.iter().any(Branch::is_open) {
            // As long as no attempt failed, acknowledgements are not stored one by one: the final state implies them all.
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

    /// The branch with this id, and its index.
    #[must_use]
    pub fn branch(&self, branch_id: &BranchId) -> Option<(usize, &Branch)> {
        self.branches.iter().enumerate().find(|(_, branch)| branch.spec.branch_id == *branch_id)
    }
}
