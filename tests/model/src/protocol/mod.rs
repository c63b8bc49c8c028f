//! One global transaction with two branches, from Begin to the end of the retention. There are two coordinators that may be killed,
//! paused and replaced, one store that may lose its replies, two participants, and a network that loses, delays, repeats and reorders
//! messages.
//!
//! How each part is made small enough to visit every state:
//!
//! - **The network** is the set of messages that may have been sent. Each may arrive at any moment, any number of times, or never.
//! - **Callers** (the initiator, a nested service, an operator) may ask anything at any moment, also of a zombie, or never ask again.
//!   The state keeps what they may have been told; a property says that no two callers are told different outcomes.
//! - **A zombie** is an owner that was replaced and does not know it. It goes on as if nothing had happened.
//! - **A batch** is a database session in steps: sent, guarded (it holds the partition's row), committed, answered. It outlives its
//!   owner and its connection, and may even start after both are gone.
//! - **Time** has no length: "phase one is over" happens at any moment, or not yet.
//! - **A replica that lags** shows any earlier state of the store. After **a failover** the store goes on from an earlier state.
//! - **A transaction that is recorded with its decision** is answered from memory until then. Its participants ask for their branches.
//! - **At rest** means that nothing is left that must happen sooner or later. Then no transaction may be open, and nothing reserved.

mod action;
mod failover;
mod guard;
mod journal;
mod owner;
mod participant;
mod properties;
mod recording;
mod sight;
mod state;
mod variants;

use stateright::{Model, Property};

pub use self::{
    action::Action, guard::Guard, recording::Recording, state::State, variants::variants,
};

/// What may happen in a variant, and how many times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scope {
    /// There is a second coordinator.
    pub standby: bool,
    /// How many owners are killed.
    pub crashes: u8,
    /// How many takeovers leave the former owner behind as a zombie.
    pub takeovers: u8,
    /// How many batches and takeovers fail, or lose their reply.
    pub faults: u8,
    /// The coordinator makes the Try calls itself.
    pub execute: bool,
    /// Branch 1 is registered by a nested service, and the initiator need not know of it.
    pub nested: bool,
    /// A participant may refuse a Try.
    pub refusals: bool,
    /// Transactions leave memory, and are read again when they are asked for or due.
    pub forgets: bool,
    /// Finished transactions are deleted after the retention.
    pub purge: bool,
    /// Phase one ends by the participants' clocks. Fence rows are deleted, and participants inquire.
    pub cleanup: bool,
    /// There are batches of other transactions, and heartbeats.
    pub others: bool,
    /// A replica that lags may answer reads. Rule 21 applies only here: elsewhere it would be a second line that hides the absence of
    /// another guard.
    pub old_reads: bool,
    /// How many failovers there are, each to a server without the last takeover.
    pub failovers: u8,
    /// A failover may also lose acknowledged batches, of an owner that is alive and will notice.
    pub losses: bool,
    /// A standby may take over before the loss is noticed.
    pub late_notice: bool,
    /// How transactions are recorded.
    pub recording: Recording,
    /// The participant of branch 1 does not ask about its reservations.
    pub silent_participant: bool,
    /// Operators resolve branches.
    pub operators: bool,
    /// The store has lost batches before the story begins, and its owners know it: an epoch with a larger number than theirs may be a lost
    /// one.
    pub lost_before: bool,
}

/// The protocol, without some of its guards.
#[derive(Clone, Copy, Debug, Default)]
pub struct Protocol {
    /// What may happen.
    pub scope: Scope,
    /// The missing guards, one bit each.
    removed: u128,
}

impl Protocol {
    /// The protocol with all guards.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        Self { scope, removed: 0 }
    }

    /// The same without this guard.
    #[must_use]
    pub fn without(self, guard: Guard) -> Self {
        Self { removed: self.removed | 1_u128 << guard as u32, ..self }
    }

    fn keeps(&self, guard: Guard) -> bool {
        self.removed & 1_u128 << guard as u32 == 0
    }

    /// The state after `action`; `None`: it cannot happen now, or changes nothing.
    fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut after = before.clone();
        let state = &mut after;
        match action {
            Action::Begin(who, at_decision) => self.begin(state, who, at_decision),
            Action::Register(who, branch) => self.register(state, who, branch),
            Action::AskConfirm(who) => self.ask_confirm(state, who),
            Action::AskCancel(who) => self.ask_cancel(state, who),
            Action::Try(branch) => self.try_branch(state, branch),
            Action::Refuse(branch) => self.refuse(state, branch),
            Action::Confirm(branch) => self.confirm(state, branch),
            Action::Cancel(branch) => self.cancel(state, branch),
            Action::PhaseOneOver(branch) => self.phase_one_over(state, branch),
            Action::RetentionOver(branch) => self.retention_over(state, branch),
            Action::CleanFence(branch) => self.clean_fence(state, branch),
            Action::Inquire(branch) => self.inquire(state, branch),
            Action::GiveBack(branch) => self.give_back(state, branch),
            Action::Nudge(branch) => self.nudge(state, branch),
            Action::Release(branch) => self.release(state, branch),
            Action::TakeTried(who, branch) => self.take_tried(state, who, branch),
            Action::TakeAcknowledged(who, branch) => self.take_acknowledged(state, who, branch),
            Action::Resolve(who, branch) => self.resolve(state, who, branch),
            Action::LeaveMemory(who) => self.leave_memory(state, who),
            Action::Read(who) => self.read(state, who),
            Action::ReadOld(who, which) => self.read_old(state, who, which),
            Action::TakeRow(who, which) => self.take_row(state, who, which),
            Action::Send(who) => self.send(state, who),
            Action::SendOthers(who) => self.send_others(state, who),
            Action::Guard(who) => self.guard(state, who),
            Action::Look(who) => self.look(state, who),
            Action::Commit(who) => self.commit(state, who),
            Action::Hear(who) => self.hear(state, who),
            Action::RollBack(who) => self.roll_back(state, who),
            Action::LoseConnection(who) => self.lose_connection(state, who),
            Action::ReadBesideBatch(who) => self.read_beside_batch(state, who),
            Action::GuardAbandoned(which) => self.guard_abandoned(state, which),
            Action::CommitAbandoned(which) => self.commit_abandoned(state, which),
            Action::EndAbandoned(which) => self.end_abandoned(state, which),
            Action::FailOver(which) => self.fail_over(state, which),
            Action::Beat(who) => self.beat(state, who),
            Action::Purge => self.purge(state),
            Action::Crash(who) => self.crash(state, who),
            Action::Start(who) => self.start(state, who),
            Action::ReadEpoch(who) => self.read_epoch(state, who),
            Action::TakeOver(who) => self.take_over(state, who, true),
            Action::TakeOverUnheard(who) => self.take_over(state, who, false),
        }?;
        self.remember_past(before, state);
        self.speak(state);
        (after != *before).then_some(after)
    }

    /// Nothing is left that must happen sooner or later.
    fn is_at_rest(&self, state: &State) -> bool {
        let mut actions = Vec::new();
        self.push_possible(state, &mut actions);
        actions.retain(|action| self.is_certain(state, *action));
        !actions.into_iter().any(|action| {
            // One more refusal is no progress.
            self.step(state, action)
                .is_some_and(|after| State { history: state.history, ..after.clone() } != *state)
        })
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let Scope { standby, nested, silent_participant, .. } = self.scope;
        vec![State::first(standby, !nested && !silent_participant)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.push_possible(state, actions);
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
