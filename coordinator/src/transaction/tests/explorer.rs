//! Visits every state that one transaction can reach with two and with three branches, in a small world: fenced participants, a store
//! that may lose changes that nothing waited for, a coordinator that may crash once, and an operator. It checks the invariants of the
//! life cycle in each state, and in each final world that all branches agree. The number of states is pinned, so that a change of
//! the state machine shows here.
//!
//! Two worlds count as one if they differ only in details that no decision depends on: how many attempts failed, how and when, and
//! which one of several equal branches was concerned.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::*;

const BEFORE: Timestamp = Timestamp(1_000);
const TIMEOUT: Duration = Duration::from_secs(10);
const AFTER: Timestamp = Timestamp(11_000);

/// The fence row of a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fence {
    Nothing,
    Tried,
    Confirmed,
    Cancelled,
    Suspended,
}

impl Fence {
    /// The participant handles a call. Returns whether it answers OK.
    fn take(&mut self, phase: Phase) -> bool {
        let (next, ok) = match (*self, phase) {
            (Self::Nothing | Self::Tried, Phase::Try) => (Self::Tried, true),
            (Self::Confirmed, Phase::Try | Phase::Confirm) => (Self::Confirmed, true),
            (Self::Tried, Phase::Confirm) => (Self::Confirmed, true),
            (Self::Tried, Phase::Cancel) => (Self::Cancelled, true),
            (Self::Nothing, Phase::Cancel) => (Self::Suspended, true),
            (Self::Cancelled | Self::Suspended, Phase::Cancel) => (*self, true),
            (Self::Cancelled | Self::Suspended, Phase::Try) => (*self, false),
            (Self::Nothing | Self::Cancelled | Self::Suspended, Phase::Confirm)
            | (Self::Confirmed, Phase::Cancel) => {
                panic!("a participant was asked to {phase:?} what it recorded as {self:?}")
            }
        };
        *self = next;
        ok
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct World {
    global: GlobalTransaction,
    /// The state after a crash: the last durable change, and those other changes that were written with it.
    stored: GlobalTransaction,
    fences: Vec<Fence>,
    /// Initiator-driven: the branches whose Try answered OK, as far as the initiator knows.
    tried: BTreeSet<usize>,
    now: Timestamp,
    crashes: u32,
    resolved: bool,
}

impl World {
    fn new(drive: Drive, branches: usize) -> Self {
        let specs: Vec<_> = match drive {
            Drive::Initiator => Vec::new(), // registered one after another
            Drive::Coordinator { .. } => (1..=branches).map(|n| spec(&n.to_string())).collect(),
        };
        let global = GlobalTransaction::begin(XID, new_transaction(drive, TIMEOUT, specs), BEFORE);
        Self {
            stored: global.recorded(),
            global,
            fences: vec![Fence::Nothing; branches],
            tried: BTreeSet::new(),
            now: BEFORE,
            crashes: 0,
            resolved: false,
        }
    }

    /// The world after `event`. Checks what must hold for every event.
    fn after(&self, event: &Event) -> Self {
        let mut world = self.clone();
        let before = &self.global;
        match world.global.apply(event.clone(), self.now) {
            Err(rejection) => assert_eq!(world.global, *before, "{rejection} changed something"),
            Ok(change) => {
                if change.weight >= Weight::Lazy {
                    world.stored = world.global.recorded();
                }
                if world.global.state != before.state && !world.global.state.is_final() {
                    assert_eq!(
                        change.weight,
                        Weight::Durable,
                        "a decision was not to be durable: {event:?}"
                    );
                }
                if world.global.branches.len() > before.branches.len() {
                    assert_eq!(
                        change.weight,
                        Weight::Durable,
                        "a registration was not to be durable"
                    );
                    assert_eq!(before.state, State::Trying, "a branch joined after the decision");
                }
                for (index, (was, is)) in
                    before.branches.iter().zip(&world.global.branches).enumerate()
                {
                    if was.state != is.state
                        && matches!(is.state, BranchState::Acknowledged | BranchState::Resolved(_))
                    {
                        assert!(
                            change.branches.contains(index),
                            "{event:?} does not say that branch {index} changed"
                        );
                    }
                }
            }
        }
        assert!(
            before.state.decision().is_none()
                || before.state.decision() == world.global.state.decision(),
            "{event:?} changed the decision of {before:?}"
        );
        world
    }

    fn command(&self, request: DecisionRequest) -> Self {
        let event = Event::DecisionRequested(request);
        let world = self.after(&event);
        assert_eq!(world.after(&event).global, world.global, "a repeat changed something");
        world
    }

    /// Everything that can happen next.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let global = &self.global;
        if global.drive == Drive::Initiator {
            self.initiator_moves(&mut next);
        }
        next.push(
            self.command(DecisionRequest::Cancel(CancelCause::Requested { reason: String::new() })),
        );
        // Time.
        next.push(self.after(&Event::Ticked));
        next.push(Self { now: AFTER, ..self.clone() }.after(&Event::Ticked));
        // Calls leave. In this world every change that they rest on is durable; the partition guarantees that.
        for call in global.plan(self.now).calls {
            next.push(self.after(&Event::CallStarted { branch: call.branch, phase: call.phase }));
            let until = self.now;
            next.push(self.after(&Event::CallPostponed { branch: call.branch, until }));
        }
        // Calls come back.
        for (branch, known) in global.branches.iter().enumerate() {
            if let Call::InFlight(phase) = known.call {
                self.returns(branch, phase, &mut next);
            }
        }
        // An operator.
        next.push(self.after(&Event::RetryRequested));
        if !self.resolved
            && let Some(branch) = global.branches.iter().find(|branch| branch.is_open())
        {
            let resolution =
                Resolution { operator: "ann".to_owned(), reason: "gone".to_owned(), at: self.now };
            let branch_id = branch.spec.branch_id.clone();
            let mut world = self.after(&Event::Resolved { branch_id, resolution });
            world.resolved = world.global != *global;
            next.push(world);
        }
        // A crash: memory is lost. Calls in flight may have arrived or not.
        if self.crashes == 0 {
            let mut world = Self { global: self.stored.clone(), crashes: 1, ..self.clone() };
            world = world.after(&Event::Recovered { longest_pause: Duration::from_secs(60) });
            for (branch, known) in global.branches.iter().enumerate() {
                if let Call::InFlight(phase) = known.call {
                    let mut arrived = world.clone();
                    arrived.fences[branch].take(phase);
                    next.push(arrived);
                }
            }
            next.push(world);
        }
        next
    }

    fn initiator_moves(&self, next: &mut Vec<Self>) {
        let global = &self.global;
        if global.branches.len() < self.fences.len() {
            let event = Event::Registered(vec![spec(&(global.branches.len() + 1).to_string())]);
            let world = self.after(&event);
            assert_eq!(world.after(&event).global, world.global, "a repeat changed something");
            next.push(world);
        }
        // A Try may be sent once its branch is registered. It may arrive at any time, also after the Cancel.
        for branch in 0..global.branches.len() {
            let mut world = self.clone();
            if world.fences[branch].take(Phase::Try) {
                world.tried.insert(branch);
            }
            next.push(world);
        }
        // The initiator confirms the branches that it knows to be tried. Some may be missing.
        let tried =
            self.tried.iter().map(|index| (index + 1).to_string().parse().unwrap()).collect();
        next.push(self.command(DecisionRequest::Confirm { tried, result: None }));
    }

    fn returns(&self, branch: usize, phase: Phase, next: &mut Vec<Self>) {
        let came_back = |world: &Self, outcome| {
            world.after(&Event::CallReturned { branch, phase, outcome, retry_in: Duration::ZERO })
        };
        // The call arrived, and so did its answer.
        let mut arrived = self.clone();
        let ok = arrived.fences[branch].take(phase);
        next.push(came_back(
            &arrived,
            if ok { Outcome::Done { reply: None } } else { unknown(false, true, self.now) },
        ));
        // The call arrived and its answer was lost; or the call was lost; or the answer made no sense.
        next.push(came_back(&arrived, unknown(true, false, self.now)));
        next.push(came_back(self, unknown(false, false, self.now)));
        next.push(came_back(self, unknown(false, true, self.now)));
        if phase == Phase::Try && matches!(self.fences[branch], Fence::Nothing) {
            next.push(came_back(self, Outcome::Refused(refusal())));
        }
    }

    /// Checks the invariants.
    fn check(&self) {
        let global = &self.global;
        for now in [BEFORE, AFTER] {
            let plan = global.plan(now);
            let allowed = match global.state {
                State::Trying => Some(Phase::Try),
                State::Confirming => Some(Phase::Confirm),
                State::Cancelling => Some(Phase::Cancel),
                State::Confirmed | State::Cancelled => None,
            };
            for call in &plan.calls {
                let branch = &global.branches[call.branch];
                assert_eq!(
                    Some(call.phase),
                    allowed,
                    "a call that does not fit {:?}",
                    global.state
                );
                assert!(branch.is_open(), "a closed branch is called");
                assert!(
                    matches!(branch.call, Call::Idle { .. }),
                    "a branch is called twice at once"
                );
            }
            // No open branch is forgotten: a call to it is due, or in flight, or a timer is set.
            let in_flight =
                global.branches.iter().any(|branch| matches!(branch.call, Call::InFlight(_)));
            assert!(
                global.state.is_final()
                    || !plan.calls.is_empty()
                    || in_flight
                    || plan.wake_at.is_some(),
                "nobody will ever look at {global:?} again"
            );
        }
        assert_eq!(global.state.is_final(), global.finished_at.is_some());
        assert_eq!(global.state.is_final(), global.due_at().is_none());
        assert_eq!(global.state.decision().is_some(), global.decided_at.is_some());
        assert_eq!(global.state.decision() == Some(Decision::Cancel), global.cancel.is_some());
        assert_eq!(
            global.recorded().recorded(),
            global.recorded(),
            "what comes back from a store is not what a store would keep"
        );
        if global.state.is_final() {
            assert!(
                global.branches.iter().all(|branch| !branch.is_open()),
                "final, with an open branch"
            );
            for (branch, fence) in global.branches.iter().zip(&self.fences) {
                if branch.state == BranchState::Acknowledged {
                    let agrees = match global.state.decision() {
                        Some(Decision::Confirm) => *fence == Fence::Confirmed,
                        Some(Decision::Cancel) => {
                            matches!(fence, Fence::Cancelled | Fence::Suspended)
                        }
                        None => false,
                    };
                    assert!(agrees, "{:?}, and a participant has {fence:?}", global.state);
                }
            }
        }
        // A branch that was never registered was never called.
        for fence in &self.fences[global.branches.len()..] {
            assert_eq!(*fence, Fence::Nothing, "tried before it was registered");
        }
        let confirmed = self.fences.contains(&Fence::Confirmed);
        let cancelled =
            self.fences.iter().any(|fence| matches!(fence, Fence::Cancelled | Fence::Suspended));
        assert!(!(confirmed && cancelled), "one participant confirmed and another cancelled");
    }
}

/// The part of a branch that decides what can happen next.
fn sketch_of_branch(branch: &Branch) -> (u8, Option<Phase>, bool, bool) {
    let state = match branch.state {
        BranchState::Registered => 0,
        BranchState::Tried => 1,
        BranchState::Acknowledged => 2,
        BranchState::Resolved(_) => 3,
    };
    let in_flight = match branch.call {
        Call::InFlight(phase) => Some(phase),
        Call::Idle { .. } => None,
    };
    (state, in_flight, branch.last_error.is_some(), branch.needs_attention)
}

impl World {
    /// The part of the world that decides what can happen next.
    fn sketch(&self) -> impl Ord + use<> {
        let mut branches: Vec<_> = (0..self.global.branches.len())
            .map(|index| {
                let stored = self.stored.branches.get(index).map(sketch_of_branch);
                let tried = self.tried.contains(&index);
                (sketch_of_branch(&self.global.branches[index]), stored, self.fences[index], tried)
            })
            .collect();
        if self.global.drive != (Drive::Coordinator { in_order: true }) {
            branches.sort(); // equal branches can be exchanged
        }
        let (is, was) = (self.global.state, self.stored.state);
        (is, was, branches, self.stored.branches.len(), self.now, self.crashes, self.resolved)
    }
}

/// Visits every world. Returns their number, in all and for each state.
fn explore(drive: Drive, branches: usize) -> (usize, BTreeMap<State, usize>) {
    let first = World::new(drive, branches);
    let mut seen = BTreeSet::from([first.sketch()]);
    let mut states = BTreeMap::new();
    let mut open = VecDeque::from([first]);
    while let Some(world) = open.pop_front() {
        world.check();
        *states.entry(world.global.state).or_insert(0) += 1;
        for next in world.next() {
            if seen.insert(next.sketch()) {
                open.push_back(next);
            }
        }
    }
    (seen.len(), states)
}

#[track_caller]
fn explored(drive: Drive, branches: usize, expected: usize) {
    let (worlds, states) = explore(drive, branches);
    assert_eq!(states.len(), 5, "not every state can be reached: {states:?}");
    assert_eq!(worlds, expected, "the machine has changed: {states:?}");
}

#[test]
fn every_state_with_two_branches_that_the_initiator_tries() {
    explored(Drive::Initiator, 2, 5_604);
}

#[test]
fn every_state_with_two_branches_that_the_coordinator_tries() {
    explored(Drive::Coordinator { in_order: false }, 2, 5_679);
    explored(Drive::Coordinator { in_order: true }, 2, 6_802);
}

#[test]
fn every_state_with_three_branches_that_the_initiator_tries() {
    explored(Drive::Initiator, 3, 66_250);
}
