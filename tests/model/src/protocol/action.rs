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
/// The place of a read, an abandoned batch, or an earlier state of the store.
type Which = usize;

/// One step.
#[allow(missing_docs, reason = "`Display` describes each of them")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    // A caller asks: early, late, twice, a zombie, or not at all.
    /// The flag: it is recorded with the decision.
    Begin(Who, bool),
    Register(Who, Branch),
    AskConfirm(Who),
    /// Also when the time for phase one is over.
    AskCancel(Who),

    // The network delivers a call, and the participant handles it in one local transaction.
    Try(Branch),
    Refuse(Branch),
    Confirm(Branch),
    Cancel(Branch),
    /// By the participant's clock phase one and the margin after it are over.
    PhaseOneOver(Branch),
    /// By the participant's clock the retention is over too.
    RetentionOver(Branch),
    CleanFence(Branch),
    /// The participant asks what became of an old reservation.
    Inquire(Branch),
    /// The same of a transaction that is recorded with its decision. The participant asks for its branch, and gives it back.
    GiveBack(Branch),
    /// Without `NudgeIsAQuestion` only.
    Nudge(Branch),
    /// Without `InitiatorOnlyNudges` only.
    Release(Branch),

    // The partition's task in an owner.
    TakeTried(Who, Branch),
    TakeAcknowledged(Who, Branch),
    Resolve(Who, Branch),
    LeaveMemory(Who),
    Read(Who),
    /// A replica that lags answers.
    ReadOld(Who, Which),
    TakeRow(Who, Which),

    // The journal of an owner, and the database.
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
    /// From now on a server answers whose state is an earlier one.
    FailOver(Which),
    /// The heartbeat of an owner finds that changes are lost, or another history.
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
    /// Pushes every action that may be possible in this state. An impossible one has no next state, so this only saves time.
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
            if state.at_decision {
                actions.extend([
                    Action::GiveBack(branch),
                    Action::Nudge(branch),
                    Action::Release(branch),
                ]);
            }
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
            let ways = [false, true].into_iter().filter(|way| self.scope.begins(*way));
            actions.extend(ways.map(|at_decision| Action::Begin(who, at_decision)));
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
            if self.scope.operators {
                actions.push(Action::Resolve(who, branch));
            }
        }
    }

    /// Whether the action happens sooner or later once all processes can reach each other. Any other action may never happen: the
    /// initiator may be dead, a zombie may sleep for ever, and no progress may depend on a fault.
    pub(super) fn is_certain(&self, state: &State, action: Action) -> bool {
        // An owner whose takeover was lost goes on until it notices, or until another one takes over.
        let owns = |who: usize| {
            let process = &state.coordinators[who];
            process.owns() && (state.is_live_owner(process) || !state.has_live_owner())
        };
        match action {
            // The owner works: it times out phase one, repeats calls until they are acknowledged, and writes changes.
            Action::AskCancel(who)
            | Action::TakeTried(who, ..)
            | Action::TakeAcknowledged(who, ..)
            | Action::TakeRow(who, ..) => owns(who),
            Action::Send(who) => {
                owns(who) && !Self::may_stay_unrecorded(state, &state.coordinators[who])
            }
            // It asks until it is answered.
            Action::GiveBack(..) => true,
            // The owner of a batch that was lost hears that it had landed, and notices the loss later. (Who never hears it has told nobody.)
            Action::Hear(who) => owns(who) || state.history.loss_unnoticed,
            Action::Confirm(branch) | Action::Cancel(branch) => {
                state.coordinators.iter().any(|process| {
                    state.is_live_owner(process)
                        && matches!(process.memory.status, Status::Confirming | Status::Cancelling)
                        && process.memory.branches.has(branch)
                        && !process.acknowledged.has(branch)
                })
            }
            // The owner looks for due transactions, and finds the open one.
            Action::Read(who) => {
                let status = state.store.record.status;
                let due = status.is_open()
                    && !(state.is_reported_lost() && self.keeps(Guard::LostIsNotDecided))
                    && (status != Status::Trying || self.keeps(Guard::TryingIsDue));
                owns(who) && (due || self.inquiry_needs_read(state, who))
            }
            // Every owner sends heartbeats.
            Action::Beat(..) => true,
            // The database finishes the sessions that it has begun.
            Action::Guard(..) | Action::Look(..) | Action::Commit(..) => true,
            Action::GuardAbandoned(..) | Action::CommitAbandoned(..) => {
                self.keeps(Guard::SilentSessionsEnd)
            }
            // A process that has ended is started again, and takes over if the partition has no owner.
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
            | Action::Nudge(..)
            | Action::Release(..)
            | Action::Resolve(..)
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
            Self::Begin(who, false) => write!(f, "{} begins the transaction", name(who)),
            Self::Begin(who, true) => {
                write!(f, "{} begins the transaction, to be recorded with its decision", name(who))
            }
            Self::Register(who, branch) => {
                write!(f, "branch {branch} registers at {}", name(who))
            }
            Self::AskConfirm(who) => write!(f, "{} is asked to confirm", name(who)),
            Self::AskCancel(who) => {
                write!(f, "{} is asked to cancel, or phase one times out", name(who))
            }
            Self::Try(branch) => write!(f, "Try arrives at branch {branch}"),
            Self::Refuse(branch) => write!(f, "branch {branch} refuses a Try"),
            Self::Confirm(branch) => write!(f, "Confirm arrives at branch {branch}"),
            Self::Cancel(branch) => write!(f, "Cancel arrives at branch {branch}"),
            Self::PhaseOneOver(branch) => write!(f, "phase one is over at branch {branch}"),
            Self::RetentionOver(branch) => write!(f, "retention is over at branch {branch}"),
            Self::CleanFence(branch) => write!(f, "branch {branch} deletes its fence row"),
            Self::Inquire(branch) => {
                write!(f, "branch {branch} asks what became of the transaction")
            }
            Self::GiveBack(branch) => {
                write!(f, "branch {branch} asks what became of it, and is told to give it back")
            }
            Self::Nudge(branch) => write!(f, "branch {branch} takes a nudge for an answer"),
            Self::Release(branch) => write!(f, "the initiator releases branch {branch}"),
            Self::TakeTried(who, branch) => {
                write!(f, "{} hears that branch {branch} is tried", name(who))
            }
            Self::TakeAcknowledged(who, branch) => {
                write!(f, "{} hears that branch {branch} has acknowledged", name(who))
            }
            Self::Resolve(who, branch) => {
                write!(f, "an operator resolves branch {branch} at {}", name(who))
            }
            Self::LeaveMemory(who) => write!(f, "the transaction leaves {}'s memory", name(who)),
            Self::Read(who) => write!(f, "{} reads the row", name(who)),
            Self::ReadOld(who, ..) => write!(f, "{} reads an old row on a replica", name(who)),
            Self::TakeRow(who, ..) => write!(f, "{} takes in what it read", name(who)),
            Self::Send(who) => write!(f, "{} sends a batch with the transaction", name(who)),
            Self::SendOthers(who) => {
                write!(f, "{} sends a batch without the transaction", name(who))
            }
            Self::Guard(who) => write!(f, "the guard of {}'s batch runs", name(who)),
            Self::Look(who) => {
                write!(f, "{}'s batch compares epoch, nonce and position", name(who))
            }
            Self::Commit(who) => write!(f, "{}'s batch commits", name(who)),
            Self::Hear(who) => write!(f, "{} hears what became of its batch", name(who)),
            Self::RollBack(who) => write!(f, "{}'s batch deadlocks", name(who)),
            Self::LoseConnection(who) => {
                write!(f, "the reply to {}'s batch is lost", name(who))
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
                write!(f, "{} takes over, and the reply is lost", name(who))
            }
        }
    }
}
