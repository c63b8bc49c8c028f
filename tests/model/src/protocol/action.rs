//! What can happen next. Anything that can happen may also never happen, except what [`Protocol::is_certain`] names.

use std::fmt;

use super::{
    Protocol,
    guard::Guard,
    state::{BRANCHES, Role, State, Status},
};

/// A coordinator.
type Who = usize;
/// A branch.
type Branch = usize;
/// One of several reads, or of abandoned batches.
type Which = usize;

/// One step.
#[allow(missing_docs, reason = "what each is, its text says below")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    // The initiator and whoever else asks: early, late, twice, of a zombie, or not at all.
    Begin(Who),
    Register(Who, Branch),
    AskConfirm(Who),
    /// Or phase one has run out of time.
    AskCancel(Who),

    // The network delivers, and a participant does it in one local transaction.
    Try(Branch),
    Refuse(Branch),
    Confirm(Branch),
    Cancel(Branch),
    /// At the participant, phase one is over, and the margin after it.
    PhaseOneOver(Branch),
    /// At the participant, the retention is over, too.
    RetentionOver(Branch),
    CleanFence(Branch),
    /// The participant asks what became of a reservation that nobody comes for.
    Inquire(Branch),

    // An owner's task.
    TakeTried(Who, Branch),
    TakeAcknowledged(Who, Branch),
    LeaveMemory(Who),
    Read(Who),
    /// On a replica that lags.
    ReadOld(Who, Which),
    TakeRow(Who, Which),

    // An owner's journal, and the database below it.
    Send(Who),
    SendOthers(Who),
    Guard(Who),
    Look(Who),
    Commit(Who),
    Hear(Who),
    /// A deadlock at COMMIT.
    RollBack(Who),
    LoseConnection(Who),
    /// Without `AbsenceIsNoProof` only.
    ReadBesideBatch(Who),
    GuardAbandoned(Which),
    CommitAbandoned(Which),
    EndAbandoned(Which),
    /// Another server answers from now on, which is as the first one was then.
    FailOver(Which),
    /// An owner's heartbeat finds the store behind, or of another history.
    Beat(Who),
    Purge,

    // Ownership.
    Crash(Who),
    Start(Who),
    /// Without `TakeoverIsOneStatement` only.
    ReadEpoch(Who),
    TakeOver(Who),
    TakeOverUnheard(Who),
}

impl Protocol {
    /// All that may be possible in this state. What is not has no next state; this only spares the trials of most of it.
    pub(super) fn push_possible(&self, state: &State, actions: &mut Vec<Action>) {
        for (who, process) in state.coordinators.iter().enumerate() {
            match process.role {
                Role::Down => actions.push(Action::Start(who)),
                Role::Standby => actions.extend([
                    Action::ReadEpoch(who),
                    Action::Read(who),
                    Action::TakeOver(who),
                    Action::TakeOverUnheard(who),
                ]),
                Role::Owner => self.push_owner(state, who, actions),
            }
            if process.batch.is_some() {
                actions.extend([
                    Action::Guard(who),
                    Action::Look(who),
                    Action::Commit(who),
                    Action::Hear(who),
                    Action::RollBack(who),
                    Action::LoseConnection(who),
                    Action::ReadBesideBatch(who),
                ]);
            }
        }
        for branch in 0..BRANCHES {
            actions.extend([
                Action::Try(branch),
                Action::Refuse(branch),
                Action::Confirm(branch),
                Action::Cancel(branch),
            ]);
            if self.scope.cleanup {
                actions.extend([
                    Action::PhaseOneOver(branch),
                    Action::RetentionOver(branch),
                    Action::CleanFence(branch),
                    Action::Inquire(branch),
                ]);
            }
        }
        let abandoned = state.abandoned.iter().enumerate();
        for (which, _) in abandoned.filter(|(_, batch)| batch.is_some()) {
            actions.extend([
                Action::GuardAbandoned(which),
                Action::CommitAbandoned(which),
                Action::EndAbandoned(which),
            ]);
        }
        if state.spent.failovers < self.scope.failovers {
            actions.extend((0..state.past.len()).map(Action::FailOver));
        }
        if self.scope.purge {
            actions.push(Action::Purge);
        }
    }

    fn push_owner(&self, state: &State, who: usize, actions: &mut Vec<Action>) {
        if state.xid_epoch == 0 {
            actions.push(Action::Begin(who));
        }
        actions.extend([
            Action::AskConfirm(who),
            Action::AskCancel(who),
            Action::LeaveMemory(who),
            Action::Read(who),
            Action::Send(who),
            Action::SendOthers(who),
            Action::Crash(who),
        ]);
        if self.scope.failovers > 0 {
            actions.push(Action::Beat(who));
        }
        if self.scope.old_reads {
            actions.extend((0..state.past.len()).map(|which| Action::ReadOld(who, which)));
        }
        let reads = state.coordinators[who].reads.iter().enumerate();
        let arrived = reads.filter(|(_, read)| read.is_some());
        actions.extend(arrived.map(|(which, _)| Action::TakeRow(who, which)));
        for branch in 0..BRANCHES {
            actions.extend([
                Action::Register(who, branch),
                Action::TakeTried(who, branch),
                Action::TakeAcknowledged(who, branch),
            ]);
        }
    }

    /// Whether it happens sooner or later once everybody is reachable. All else may stay away for ever: the initiator may have
    /// died, a zombie may sleep on, and nobody can count on a fault.
    pub(super) fn is_certain(&self, state: &State, action: Action) -> bool {
        // An owner whose takeover was lost goes on until it notices, or until another one takes over.
        let owns = |who: usize| {
            let process = &state.coordinators[who];
            process.owns() && (state.is_live_owner(process) || !state.has_live_owner())
        };
        match action {
            // The owner goes on: time runs out, calls are repeated until they are acknowledged, what has changed is written.
            Action::AskCancel(who)
            | Action::TakeTried(who, ..)
            | Action::TakeAcknowledged(who, ..)
            | Action::Send(who)
            | Action::Hear(who)
            | Action::TakeRow(who, ..) => owns(who),
            Action::Confirm(branch) | Action::Cancel(branch) => {
                state.coordinators.iter().any(|process| {
                    state.is_live_owner(process)
                        && matches!(process.memory.status, Status::Confirming | Status::Cancelling)
                        && process.memory.branches.has(branch)
                        && !process.acknowledged.has(branch)
                })
            }
            // It looks for what is due, and finds what is open.
            Action::Read(who) => {
                let status = state.store.record.status;
                let due = status.is_open()
                    && !(state.is_reported_lost() && self.keeps(Guard::LostIsNotDecided))
                    && (status != Status::Trying || self.keeps(Guard::TryingIsDue));
                owns(who) && due
            }
            // Every owner has its heartbeat.
            Action::Beat(..) => true,
            // The database ends what it has begun.
            Action::Guard(..) | Action::Look(..) | Action::Commit(..) => true,
            Action::GuardAbandoned(..) | Action::CommitAbandoned(..) => {
                self.keeps(Guard::SilentSessionsEnd)
            }
            // A process that has ended is started again, and takes a store over that nobody has.
            Action::Start(..) | Action::ReadEpoch(..) | Action::TakeOver(..) => {
                !state.has_live_owner()
            }
            Action::RetentionOver(branch) => state.participants[branch].phase_one_over,
            Action::Begin(..)
            | Action::Register(..)
            | Action::AskConfirm(..)
            | Action::Try(..)
            | Action::Refuse(..)
            | Action::PhaseOneOver(..)
            | Action::CleanFence(..)
            | Action::Inquire(..)
            | Action::LeaveMemory(..)
            | Action::ReadOld(..)
            | Action::SendOthers(..)
            | Action::FailOver(..)
            | Action::RollBack(..)
            | Action::LoseConnection(..)
            | Action::ReadBesideBatch(..)
            | Action::EndAbandoned(..)
            | Action::Purge
            | Action::Crash(..)
            | Action::TakeOverUnheard(..) => false,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |who: &usize| ["A", "B"][*who];
        match self {
            Self::Begin(who) => write!(f, "{} begins the transaction", name(who)),
            Self::Register(who, branch) => {
                write!(f, "branch {branch} registers at {}", name(who))
            }
            Self::AskConfirm(who) => write!(f, "{} is asked to confirm", name(who)),
            Self::AskCancel(who) => {
                write!(f, "{} is asked to cancel, or time is over", name(who))
            }
            Self::Try(branch) => write!(f, "Try arrives at branch {branch}"),
            Self::Refuse(branch) => write!(f, "branch {branch} refuses a Try"),
            Self::Confirm(branch) => write!(f, "Confirm arrives at branch {branch}"),
            Self::Cancel(branch) => write!(f, "Cancel arrives at branch {branch}"),
            Self::PhaseOneOver(branch) => write!(f, "phase one is over at branch {branch}"),
            Self::RetentionOver(branch) => write!(f, "retention is over at branch {branch}"),
            Self::CleanFence(branch) => write!(f, "branch {branch} deletes its fence row"),
            Self::Inquire(branch) => write!(f, "branch {branch} asks what became of it"),
            Self::TakeTried(who, branch) => {
                write!(f, "{} hears that branch {branch} is tried", name(who))
            }
            Self::TakeAcknowledged(who, branch) => {
                write!(f, "{} hears that branch {branch} has done it", name(who))
            }
            Self::LeaveMemory(who) => write!(f, "it leaves {}'s memory", name(who)),
            Self::Read(who) => write!(f, "{} reads the row", name(who)),
            Self::ReadOld(who, ..) => write!(f, "{} reads an old row on a replica", name(who)),
            Self::TakeRow(who, ..) => write!(f, "{} takes in what it read", name(who)),
            Self::Send(who) => write!(f, "{} sends a batch with it", name(who)),
            Self::SendOthers(who) => write!(f, "{} sends a batch of others", name(who)),
            Self::Guard(who) => write!(f, "the guard of {}'s batch runs", name(who)),
            Self::Look(who) => write!(f, "{}'s batch looks at epoch and position", name(who)),
            Self::Commit(who) => write!(f, "{}'s batch commits", name(who)),
            Self::Hear(who) => write!(f, "{} hears what became of its batch", name(who)),
            Self::RollBack(who) => write!(f, "{}'s batch deadlocks", name(who)),
            Self::LoseConnection(who) => {
                write!(f, "{}'s batch is left without an answer", name(who))
            }
            Self::ReadBesideBatch(who) => write!(f, "{} looks beside its batch", name(who)),
            Self::GuardAbandoned(which) => {
                write!(f, "the guard of abandoned batch {which} runs")
            }
            Self::CommitAbandoned(which) => write!(f, "abandoned batch {which} commits"),
            Self::EndAbandoned(which) => write!(f, "abandoned batch {which} is rolled back"),
            Self::FailOver(..) => {
                f.write_str("another server takes over, without the last changes")
            }
            Self::Beat(who) => write!(f, "{}'s heartbeat shows that changes are lost", name(who)),
            Self::Purge => f.write_str("the row is deleted after its retention"),
            Self::Crash(who) => write!(f, "{} is killed", name(who)),
            Self::Start(who) => write!(f, "{} starts", name(who)),
            Self::ReadEpoch(who) => write!(f, "{} reads the epoch", name(who)),
            Self::TakeOver(who) => write!(f, "{} takes over", name(who)),
            Self::TakeOverUnheard(who) => {
                write!(f, "{} takes over, and does not hear of it", name(who))
            }
        }
    }
}
