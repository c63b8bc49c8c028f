//! Batches that carry several partitions: each partition's guard must hold for its own rows.
//!
//! There are two coordinators and two partitions, which may be taken over together or one by one. Each partition has one transaction,
//! of which only the decision is modelled: its owner confirms or cancels it. Loading is one step here; [`protocol`](crate::protocol)
//! has it in full.
//!
//! The coordinator stands for `Journal::append`, the database for `store/sql/write.rs`. One UPDATE moves the position of every
//! partition in the batch. If it has moved fewer rows than there are guards, everything is rolled back, and `judge` says why. A fenced
//! partition is dropped, and the rest of the batch is sent again under its old numbers.

mod action;
mod guard;
mod journal;
mod properties;
mod state;
mod variants;

use stateright::{Model, Property};

pub use self::{action::Action, state::State, variants::variants};
use self::{
    guard::Guard,
    state::{
        ABANDONED, Batch, COORDINATORS, Coordinator, Decision, Each, PARTITIONS, Progress, Row,
        Seat,
    },
};

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Several {
    crashes: u8,
    takeovers: u8,
    faults: u8,
    removed: Option<Guard>,
}

const SOME: [Each<bool>; 3] = [[true, true], [true, false], [false, true]];

impl Several {
    fn keeps(&self, guard: Guard) -> bool {
        self.removed != Some(guard)
    }

    fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut after = before.clone();
        let state = &mut after;
        match action {
            Action::TakeOver(who, which) => self.take_over(state, who, which)?,
            Action::Decide(who, partition, confirm) => {
                let seat = state.coordinators[who].seats[partition].as_mut()?;
                when(seat.memory.is_none())?;
                seat.memory = Some(if confirm { Decision::Confirm } else { Decision::Cancel });
            }
            Action::Send(who, which) => Self::send(state, who, which)?,
            Action::Guard(who) => {
                let batch = state.coordinators[who].batch?;
                let progress = self.guarded(state, batch)?;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Look(who) => {
                let batch = state.coordinators[who].batch?;
                let progress = self.judged(state, batch)?;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Commit(who) => {
                let batch = state.coordinators[who].batch?;
                when(batch.progress == Progress::Guarded)?;
                Self::write(state, batch);
                let progress = Progress::Landed;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Hear(who) => self.hear(state, who)?,
            Action::LoseConnection(who) => {
                let batch = state.coordinators[who].batch?;
                when(state.faults < self.faults)?;
                state.faults += 1;
                Self::leave_to_database(state, batch)?;
                let progress = Progress::Sent; // the same batch again
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Crash(who) => {
                let process = state.coordinators[who];
                when(process != Coordinator::default() && state.crashes < self.crashes)?;
                state.crashes += 1;
                if let Some(batch) = process.batch {
                    Self::leave_to_database(state, batch)?;
                }
                state.coordinators[who] = Coordinator::default();
            }
            Action::GuardAbandoned(which) => {
                let batch = state.abandoned[which]?;
                let progress = self.guarded(state, batch)?;
                let matched = progress == Progress::Guarded;
                state.abandoned[which] = matched.then_some(Batch { progress, ..batch });
            }
            Action::CommitAbandoned(which) => {
                let batch = state.abandoned[which]?;
                when(batch.progress == Progress::Guarded)?;
                Self::write(state, batch);
                state.abandoned[which] = None;
            }
            Action::EndAbandoned(which) => {
                state.abandoned[which].take()?;
            }
        }
        state.abandoned.sort();
        Self::speak(state);
        (after != *before).then_some(after)
    }

    fn take_over(&self, state: &mut State, who: usize, which: Each<bool>) -> Option<()> {
        let process = state.coordinators[who];
        // A process that has partitions takes no more: each start is one takeover.
        when(process == Coordinator::default())?;
        let held = Self::held(state);
        let taken = |partition: &usize| which[*partition];
        when(!(0..PARTITIONS).filter(taken).any(|partition| held[partition]))?;
        if (0..PARTITIONS).filter(taken).any(|partition| Self::has_owner(state, partition)) {
            when(state.takeovers < self.takeovers)?;
            state.takeovers += 1;
        }
        for partition in (0..PARTITIONS).filter(taken) {
            let row = &mut state.store[partition];
            (row.epoch, row.position) = (row.epoch + 1, 0);
            let (memory, durable) = (row.decision, row.decision);
            state.coordinators[who].seats[partition] =
                Some(Seat { epoch: row.epoch, position: 0, memory, durable });
        }
        Some(())
    }

    fn has_owner(state: &State, partition: usize) -> bool {
        state.coordinators.iter().any(|process| {
            process.seats[partition].is_some_and(|seat| seat.epoch == state.store[partition].epoch)
        })
    }

    /// Callers may be told every decision that is known to be durable.
    fn speak(state: &mut State) {
        for seats in state.coordinators.map(|process| process.seats) {
            for (told, seat) in state.told.iter_mut().zip(seats) {
                match seat.and_then(|seat| seat.durable) {
                    Some(Decision::Confirm) => told[0] = true,
                    Some(Decision::Cancel) => told[1] = true,
                    None => {}
                }
            }
        }
    }

    /// Nothing is left that must happen sooner or later.
    fn is_at_rest(&self, state: &State) -> bool {
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        actions.retain(|action| match action {
            Action::Send(..)
            | Action::Guard(..)
            | Action::Look(..)
            | Action::Commit(..)
            | Action::Hear(..)
            | Action::GuardAbandoned(..)
            | Action::CommitAbandoned(..) => true,
            Action::TakeOver(..)
            | Action::Decide(..)
            | Action::LoseConnection(..)
            | Action::Crash(..)
            | Action::EndAbandoned(..) => false,
        });
        !actions.into_iter().any(|action| self.step(state, action).is_some())
    }
}

impl Model for Several {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let seat = Some(Seat { epoch: 1, position: 0, memory: None, durable: None });
        let owner = Coordinator { seats: [seat; PARTITIONS], batch: None };
        vec![State {
            store: [Row { epoch: 1, position: 0, decision: None }; PARTITIONS],
            coordinators: [owner, Coordinator::default()],
            abandoned: [None; ABANDONED],
            told: [[false; 2]; PARTITIONS],
            changed: false,
            written_by_stranger: false,
            alarmed: false,
            crashes: 0,
            takeovers: 0,
            faults: 0,
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for who in 0..COORDINATORS {
            for which in SOME {
                actions.extend([Action::Send(who, which), Action::TakeOver(who, which)]);
            }
            for partition in 0..PARTITIONS {
                actions
                    .extend([true, false].map(|confirm| Action::Decide(who, partition, confirm)));
            }
            actions.extend([
                Action::Guard(who),
                Action::Look(who),
                Action::Commit(who),
                Action::Hear(who),
                Action::LoseConnection(who),
                Action::Crash(who),
            ]);
        }
        for which in 0..ABANDONED {
            actions.extend([
                Action::GuardAbandoned(which),
                Action::CommitAbandoned(which),
                Action::EndAbandoned(which),
            ]);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        self.all_properties()
    }
}

/// Goes on only if `condition` holds.
fn when(condition: bool) -> Option<()> {
    condition.then_some(())
}
