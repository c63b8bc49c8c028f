//! Everything that the model knows at one moment: the store, the memory of each coordinator, the batches in the database, the
//! participants, the network, and what callers were told.
//!
//! There is one transaction with two branches. The other transactions of the partition appear only as batches without it.

use stateright::Representative;

/// One coordinator owns the partition. The other one waits, or was replaced and does not know it.
pub(super) const COORDINATORS: usize = 2;
/// Branches of the transaction.
pub(super) const BRANCHES: usize = 2;
/// How many batches may outlive their owner or their connection.
const ABANDONED: usize = 3;
/// One more than the largest epoch of any variant.
const EPOCHS: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Decision {
    Confirm,
    Cancel,
}

/// A set of branches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Branches([bool; BRANCHES]);

impl Branches {
    pub(super) const NONE: Self = Self([false; BRANCHES]);
    pub(super) const ALL: Self = Self([true; BRANCHES]);

    pub(super) fn has(self, branch: usize) -> bool {
        self.0[branch]
    }

    pub(super) fn add(&mut self, branch: usize) {
        self.0[branch] = true;
    }

    pub(super) fn remove(&mut self, branch: usize) {
        self.0[branch] = false;
    }

    pub(super) fn add_all(&mut self, others: Self) {
        (0..BRANCHES).filter(|branch| others.has(*branch)).for_each(|branch| self.add(branch));
    }

    fn mirror(&mut self) {
        self.0.reverse();
    }
}

/// The state of the transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Status {
    /// There is no such transaction in this place.
    #[default]
    Absent,
    Trying,
    Confirming,
    Cancelling,
    Confirmed,
    Cancelled,
}

impl Status {
    pub(super) fn decision(self) -> Option<Decision> {
        match self {
            Self::Absent | Self::Trying => None,
            Self::Confirming | Self::Confirmed => Some(Decision::Confirm),
            Self::Cancelling | Self::Cancelled => Some(Decision::Cancel),
        }
    }

    pub(super) fn is_final(self) -> bool {
        matches!(self, Self::Confirmed | Self::Cancelled)
    }

    pub(super) fn is_open(self) -> bool {
        !self.is_final() && self != Self::Absent
    }
}

/// The transaction in a row, in memory, or in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Record {
    pub(super) status: Status,
    pub(super) branches: Branches,
}

impl Record {
    pub(super) const ABSENT: Self = Self { status: Status::Absent, branches: Branches::NONE };
}

/// What is durable: the row of the transaction, and the row of its partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Store {
    pub(super) record: Record,
    pub(super) epoch: u8,
    /// The nonce of each epoch; 0: there was no such epoch. The model assumes only that the nonces differ if two histories have the
    /// same epoch number.
    pub(super) nonces: [u8; EPOCHS],
    pub(super) position: u8,
    /// The row was deleted after its retention.
    pub(super) purged: bool,
    /// Acknowledged changes of epochs up to this one are lost; 0: no loss is known.
    pub(super) lost_through: u8,
    /// How many batches each epoch had when the next one began, where the variant needs it.
    pub(super) ended: [u8; EPOCHS],
    /// Branches that an operator has resolved. Kept when the row is deleted.
    pub(super) resolved: Branches,
}

impl Store {
    /// The nonce of its epoch.
    pub(super) fn nonce(&self) -> u8 {
        self.nonces[usize::from(self.epoch)]
    }
}

/// How far the database is with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Progress {
    /// Sent; the database has not begun.
    Sent,
    /// The guard matched. The partition's row is held until COMMIT, which is in flight.
    Guarded,
    /// The guard matched no row.
    Missed,
    /// Committed, now or in an earlier attempt. The reply is in flight.
    Landed,
    /// The partition has a later owner. The reply is in flight.
    Fenced,
    /// Acknowledged changes are lost, or the store has another history. The reply is in flight.
    Lost,
    /// None of these fits. The reply is in flight.
    Corrupt,
}

/// A batch that was handed to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Batch {
    pub(super) progress: Progress,
    pub(super) epoch: u8,
    pub(super) nonce: u8,
    pub(super) position: u8,
    /// The row that the batch may change, where rule 21 applies.
    pub(super) expects: Record,
    /// The transaction as it is to be written; absent: the batch has only other transactions, or is a heartbeat.
    pub(super) record: Record,
    /// The transaction that its owner knows durable when the batch has landed.
    pub(super) claims: Record,
    /// It was sent before, and there was no reply.
    pub(super) repeat: bool,
}

/// A row that was read and has not reached the partition's task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Read {
    pub(super) row: Record,
    pub(super) purged: bool,
    pub(super) lost_through: u8,
    /// The store has the xid's epoch, with the xid's nonce.
    pub(super) knows_epoch: bool,
    /// The transaction left memory since the read began.
    pub(super) stale: bool,
}

/// The role of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    /// It waits, or is about to take over.
    Standby,
    /// It believes that it owns the partition. If the store has another epoch or nonce, it is a zombie.
    Owner,
}

/// A coordinator process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Coordinator {
    pub(super) role: Role,
    pub(super) epoch: u8,
    pub(super) nonce: u8,
    /// The number of its latest batch.
    pub(super) position: u8,
    pub(super) memory: Record,
    /// The transaction as this process knows it to be durable.
    pub(super) durable: Record,
    /// Branches that have acknowledged; while trying, branches whose Try was answered.
    pub(super) acknowledged: Branches,
    pub(super) batch: Option<Batch>,
    /// One because a caller asked, and one because the transaction is due.
    pub(super) reads: [Option<Read>; 2],
    /// The transaction as the first waiting change left it. Used without `LastContent` or `FirstPlace` only.
    pub(super) first_change: Record,
    /// The epoch that was read. Used without `TakeoverIsOneStatement` only.
    pub(super) seen_epoch: u8,
}

impl Coordinator {
    pub(super) const DOWN: Self = Self {
        role: Role::Down,
        epoch: 0,
        nonce: 0,
        position: 0,
        memory: Record::ABSENT,
        durable: Record::ABSENT,
        acknowledged: Branches::NONE,
        batch: None,
        reads: [None; 2],
        first_change: Record::ABSENT,
        seen_epoch: 0,
    };

    pub(super) fn owns(&self) -> bool {
        self.role == Role::Owner
    }

    /// No batch with the transaction was sent, and no row of it was read.
    pub(super) fn is_unrecorded(&self) -> bool {
        self.durable == Record::ABSENT
            && self.batch.is_none_or(|batch| batch.record == Record::ABSENT)
    }

    /// A batch is without an answer for so long that it was sent again.
    pub(super) fn is_store_silent(&self) -> bool {
        self.batch.is_some_and(|batch| batch.repeat)
    }

    /// The number of the latest batch that it knows to be durable.
    pub(super) fn known_position(&self) -> u8 {
        self.position.saturating_sub(u8::from(self.batch.is_some()))
    }
}

/// The fence row of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Fence {
    Nothing,
    Tried,
    Confirmed,
    Cancelled,
    Suspended,
}

/// A participant's database. Effects are counted up to two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Participant {
    pub(super) fence: Fence,
    pub(super) reserved: u8,
    pub(super) confirmed: u8,
    pub(super) released: u8,
    /// By its clock phase one and the margin after it are over.
    pub(super) phase_one_over: bool,
    /// By its clock the retention is over too, so the fence row may have been deleted.
    pub(super) retention_over: bool,
    /// The fence row was deleted.
    pub(super) cleaned: bool,
}

impl Participant {
    pub(super) fn is_cancelled(&self) -> bool {
        self.released > 0 || matches!(self.fence, Fence::Cancelled | Fence::Suspended)
    }
}

/// The messages that may have been sent. Each may arrive at any moment, any number of times, or never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Messages {
    pub(super) try_: Branches,
    pub(super) tried: Branches,
    pub(super) refused: Branches,
    pub(super) confirm: Branches,
    pub(super) confirmed: Branches,
    pub(super) cancel: Branches,
    pub(super) cancelled: Branches,
    /// Answers to participants that ask for their branch: it may be given back.
    pub(super) give_back: Branches,
}

/// The outcomes that any caller may have been told by any process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Told {
    pub(super) confirm: bool,
    pub(super) cancel: bool,
    /// That the store has lost the transaction.
    pub(super) lost: bool,
}

impl Told {
    pub(super) fn tell(&mut self, decision: Option<Decision>) {
        match decision {
            Some(Decision::Confirm) => self.confirm = true,
            Some(Decision::Cancel) => self.cancel = true,
            None => {}
        }
    }
}

/// Events that the rest of the state does not show any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct History {
    /// The first durable decision, and its branches.
    pub(super) decided: Option<Decision>,
    pub(super) decided_branches: Branches,
    /// A different decision was durable later.
    pub(super) decision_changed: bool,
    /// A phase-two call could leave before its decision was durable.
    pub(super) phase_two_early: bool,
    /// A Try had an effect after its Cancel was answered.
    pub(super) late_try_ran: bool,
    /// A participant received a call that a correct coordinator never makes.
    pub(super) refused_loudly: bool,
    /// A branch was added to a transaction whose decision was durable.
    pub(super) joined_late: bool,
    /// An owner that was not replaced ended, or stopped in alarm.
    pub(super) ended_for_nothing: bool,
    /// Acknowledged changes were lost in a failover, and no owner has noticed yet.
    pub(super) loss_unnoticed: bool,
    /// A registration was answered from memory by an owner whose store does not answer.
    pub(super) answered_in_silence: bool,
}

/// How many of the limited events have happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Spent {
    pub(super) crashes: u8,
    pub(super) takeovers: u8,
    pub(super) faults: u8,
    pub(super) failovers: u8,
}

impl Spent {
    /// The nonce that a takeover would get now.
    pub(super) fn nonce(self) -> u8 {
        self.failovers + 1
    }
}

/// Everything that the model knows at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    pub(super) store: Store,
    /// Earlier states of the store, where the variant needs them: a replica may still show one, or a failover bring it back. Sorted.
    pub(super) past: Vec<Store>,
    pub(super) coordinators: [Coordinator; COORDINATORS],
    /// Batches whose owner will not get the reply. Sorted.
    pub(super) abandoned: [Option<Batch>; ABANDONED],
    pub(super) participants: [Participant; BRANCHES],
    pub(super) messages: Messages,
    /// The epoch in the xid; 0: the transaction has not begun.
    pub(super) xid_epoch: u8,
    /// The nonce in the xid.
    pub(super) xid_nonce: u8,
    pub(super) told: Told,
    pub(super) history: History,
    pub(super) spent: Spent,
    /// The transaction may be recorded as late as with its decision. Its participants know.
    pub(super) at_decision: bool,
    /// The initiator registers both branches. (A nested branch is not like the other.)
    pub(super) branches_alike: bool,
}

impl State {
    /// The initial state: one coordinator owns an empty store.
    pub(super) fn first(standby: bool, branches_alike: bool) -> Self {
        let owner = Coordinator { role: Role::Owner, epoch: 1, nonce: 1, ..Coordinator::DOWN };
        let role = if standby { Role::Standby } else { Role::Down };
        let participant = Participant {
            fence: Fence::Nothing,
            reserved: 0,
            confirmed: 0,
            released: 0,
            phase_one_over: false,
            retention_over: false,
            cleaned: false,
        };
        let mut nonces = [0; EPOCHS];
        nonces[1] = 1;
        Self {
            store: Store {
                record: Record::ABSENT,
                epoch: 1,
                nonces,
                position: 0,
                purged: false,
                lost_through: 0,
                ended: [0; EPOCHS],
                resolved: Branches::NONE,
            },
            past: Vec::new(),
            coordinators: [owner, Coordinator { role, ..Coordinator::DOWN }],
            abandoned: [None; ABANDONED],
            participants: [participant; BRANCHES],
            messages: Messages::default(),
            xid_epoch: 0,
            xid_nonce: 0,
            told: Told::default(),
            history: History::default(),
            spent: Spent::default(),
            at_decision: false,
            branches_alike,
        }
    }

    /// Whether a process owns the partition in truth.
    pub(super) fn has_live_owner(&self) -> bool {
        self.coordinators.iter().any(|process| self.is_live_owner(process))
    }

    pub(super) fn is_live_owner(&self, process: &Coordinator) -> bool {
        process.owns() && process.epoch == self.store.epoch && process.nonce == self.store.nonce()
    }

    /// Whether changes were lost that may have decided the transaction. A person must look at it.
    pub(super) fn is_reported_lost(&self) -> bool {
        self.store.record.status.decision().is_none() && self.xid_epoch <= self.store.lost_through
    }

    /// Whether changes were lost that may have decided the transaction, or may have been its record. No owner can know what became of it.
    pub(super) fn is_lost(&self) -> bool {
        let known = self.store.nonces[usize::from(self.xid_epoch)] == self.xid_nonce;
        self.is_reported_lost() || self.at_decision && !known
    }

    /// Leaves a batch to the database. Returns `false` if there are too many already.
    #[must_use]
    pub(super) fn abandon(&mut self, batch: Batch) -> bool {
        let Some(free) = self.abandoned.iter_mut().find(|place| place.is_none()) else {
            return false;
        };
        *free = Some(Batch { claims: Record::ABSENT, ..batch });
        self.abandoned.sort();
        true
    }

    /// The same state with the two branches exchanged.
    fn mirrored(&self) -> Self {
        let mut mirrored = self.clone();
        mirrored.participants.reverse();
        let Messages { try_, tried, refused, confirm, confirmed, cancel, cancelled, give_back } =
            &mut mirrored.messages;
        [try_, tried, refused, confirm, confirmed, cancel, cancelled, give_back]
            .into_iter()
            .for_each(Branches::mirror);
        mirrored.history.decided_branches.mirror();
        for store in mirrored.past.iter_mut().chain([&mut mirrored.store]) {
            store.record.branches.mirror();
            store.resolved.mirror();
        }
        mirrored.past.sort();
        for process in &mut mirrored.coordinators {
            process.acknowledged.mirror();
            process.memory.branches.mirror();
            process.durable.branches.mirror();
            process.first_change.branches.mirror();
            process.reads.iter_mut().flatten().for_each(|read| read.row.branches.mirror());
        }
        let sent = mirrored.coordinators.iter_mut().filter_map(|process| process.batch.as_mut());
        for batch in sent.chain(mirrored.abandoned.iter_mut().flatten()) {
            batch.record.branches.mirror();
            batch.claims.branches.mirror();
            batch.expects.branches.mirror();
        }
        mirrored.abandoned.sort();
        mirrored
    }
}

impl Representative for State {
    /// Coordinators are alike, and so are branches. One state stands for all states that differ only in their order.
    fn representative(&self) -> Self {
        let mut as_it_is = self.clone();
        as_it_is.coordinators.sort();
        if !self.branches_alike {
            return as_it_is;
        }
        let mut mirrored = self.mirrored();
        mirrored.coordinators.sort();
        as_it_is.min(mirrored)
    }
}
