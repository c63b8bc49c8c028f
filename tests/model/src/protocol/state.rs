//! Everything that the model knows at one moment: what is recorded, what each coordinator has in memory, what the database is
//! doing for whom, what the participants have done, and what has been said.
//!
//! There is one transaction with two branches. All other transactions of the partition appear as batches without it.

use stateright::Representative;

/// Coordinators: one owns, the other waits, or was replaced and does not know it.
pub(super) const COORDINATORS: usize = 2;
/// Branches of the transaction.
pub(super) const BRANCHES: usize = 2;
/// Batches that outlive their owner, or the connection that they came on.
const ABANDONED: usize = 3;
/// More than any variant has, counted from 0.
const EPOCHS: usize = 10;

/// Confirm or Cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Decision {
    Confirm,
    Cancel,
}

/// Some of the branches.
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

    pub(super) fn add_all(&mut self, others: Self) {
        (0..BRANCHES).filter(|branch| others.has(*branch)).for_each(|branch| self.add(branch));
    }

    fn mirror(&mut self) {
        self.0.reverse();
    }
}

/// Where the transaction is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Status {
    /// There is no such transaction, here.
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

/// The transaction as it is in a row, in memory, or on its way from one to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Record {
    pub(super) status: Status,
    pub(super) branches: Branches,
}

impl Record {
    pub(super) const ABSENT: Self = Self { status: Status::Absent, branches: Branches::NONE };
}

/// What is durable: the transaction's row, and the partition's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Store {
    pub(super) record: Record,
    pub(super) epoch: u8,
    /// The nonce of each epoch; 0: there was no such epoch. Of a nonce no more is asked than that it differs between epochs of two
    /// histories that have the same number.
    pub(super) nonces: [u8; EPOCHS],
    pub(super) position: u8,
    /// The row was deleted after its retention.
    pub(super) purged: bool,
    /// Some acknowledged changes of epochs up to this one are lost; 0: none that anybody knows of.
    pub(super) lost_through: u8,
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
    /// Sent; nothing was done.
    Sent,
    /// The guard matched: the partition's row is held until COMMIT, which is on its way.
    Guarded,
    /// The guard matched no row.
    Missed,
    /// Committed, now or by an earlier attempt; the answer is on its way.
    Landed,
    /// Somebody else owns the partition; the answer is on its way.
    Fenced,
    /// The store has less than was acknowledged, or belongs to another history; the answer is on its way.
    Lost,
    /// It fits none of these; the answer is on its way.
    Corrupt,
}

/// A batch that was handed to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Batch {
    pub(super) progress: Progress,
    pub(super) epoch: u8,
    pub(super) nonce: u8,
    pub(super) position: u8,
    /// Where rows are guarded (rule 21): what the row must be for this batch to change it.
    pub(super) expects: Record,
    /// The transaction as it is to be written; absent: the batch carries only others, or is a heartbeat.
    pub(super) record: Record,
    /// What its owner may call durable when it has landed.
    pub(super) claims: Record,
    /// It was sent before, and not answered.
    pub(super) repeat: bool,
}

/// A row that was read off the owner's task and has not been taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Read {
    pub(super) row: Record,
    pub(super) purged: bool,
    pub(super) lost_through: u8,
    /// The xid is of an epoch of that history.
    pub(super) knows_epoch: bool,
    /// The transaction left memory since the read began.
    pub(super) stale: bool,
}

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    /// It waits for the store, or is about to take it over.
    Standby,
    /// It thinks that it owns the partition. If its epoch is not the store's, it is a zombie.
    Owner,
}

/// A coordinator process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Coordinator {
    pub(super) role: Role,
    pub(super) epoch: u8,
    pub(super) nonce: u8,
    /// Number of its latest batch.
    pub(super) position: u8,
    pub(super) memory: Record,
    /// What of it this process knows to be durable.
    pub(super) durable: Record,
    /// Branches that have acknowledged; while trying, those whose Try has answered.
    pub(super) acknowledged: Branches,
    pub(super) batch: Option<Batch>,
    /// One that somebody asked for, and a look for what is due.
    pub(super) reads: [Option<Read>; 2],
    /// Without `LastContent` or `FirstPlace` only: what the first change that waits has made of the transaction.
    pub(super) first_change: Record,
    /// Without `TakeoverIsOneStatement` only: the epoch that was read.
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

    /// Number of the latest batch that it knows to be durable.
    pub(super) fn known_position(&self) -> u8 {
        self.position.saturating_sub(u8::from(self.batch.is_some()))
    }
}

/// What a participant's fence says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Fence {
    Nothing,
    Tried,
    Confirmed,
    Cancelled,
    Suspended,
}

/// A participant's database. The effects are counted up to two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Participant {
    pub(super) fence: Fence,
    pub(super) reserved: u8,
    pub(super) confirmed: u8,
    pub(super) released: u8,
    /// By its clock phase one is over, and the margin after it.
    pub(super) phase_one_over: bool,
    /// And the retention too: a row may have been deleted.
    pub(super) retention_over: bool,
    /// It was.
    pub(super) cleaned: bool,
}

impl Participant {
    pub(super) fn is_cancelled(&self) -> bool {
        self.released > 0 || matches!(self.fence, Fence::Cancelled | Fence::Suspended)
    }
}

/// What may be on the network: once it may have been sent, it may arrive at any time, any number of times, or never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Messages {
    pub(super) try_: Branches,
    pub(super) tried: Branches,
    pub(super) refused: Branches,
    pub(super) confirm: Branches,
    pub(super) confirmed: Branches,
    pub(super) cancel: Branches,
    pub(super) cancelled: Branches,
}

/// What somebody may have been told of the outcome, by anybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Told {
    pub(super) confirm: bool,
    pub(super) cancel: bool,
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

/// What happened once and no state shows any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct History {
    /// The first decision that was durable, and of which branches.
    pub(super) decided: Option<Decision>,
    pub(super) decided_branches: Branches,
    /// Another decision was durable after it.
    pub(super) decision_changed: bool,
    /// A phase-two call could leave before its decision was durable.
    pub(super) phase_two_early: bool,
    /// A Try had an effect after its Cancel was answered.
    pub(super) late_try_ran: bool,
    /// A participant met what no right coordinator asks for.
    pub(super) refused_loudly: bool,
    /// A branch was added to a transaction whose decision was durable.
    pub(super) joined_late: bool,
    /// An owner that nobody had replaced ended, or stopped in alarm.
    pub(super) ended_for_nothing: bool,
    /// Acknowledged changes were lost in a failover, and no owner has noticed yet.
    pub(super) loss_unnoticed: bool,
}

/// What has happened of the things that happen a limited number of times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Spent {
    pub(super) crashes: u8,
    pub(super) takeovers: u8,
    pub(super) faults: u8,
    pub(super) failovers: u8,
}

impl Spent {
    /// The nonce of a takeover that happens now.
    pub(super) fn nonce(self) -> u8 {
        self.failovers + 1
    }
}

/// See the module's comment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    pub(super) store: Store,
    /// What the store was before, where that matters: a replica may still show it, or a failover bring it back. Sorted.
    pub(super) past: Vec<Store>,
    pub(super) coordinators: [Coordinator; COORDINATORS],
    /// Batches whose owner does not hear of them any more. Sorted.
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
    /// Both branches are the initiator's. (A nested one is not like the other.)
    pub(super) branches_alike: bool,
}

impl State {
    /// One coordinator owns an empty store.
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
            branches_alike,
        }
    }

    /// Whether a process thinks that it owns the partition, and is right.
    pub(super) fn has_live_owner(&self) -> bool {
        self.coordinators.iter().any(|process| self.is_live_owner(process))
    }

    pub(super) fn is_live_owner(&self, process: &Coordinator) -> bool {
        process.owns() && process.epoch == self.store.epoch && process.nonce == self.store.nonce()
    }

    /// Acknowledged changes were lost, and what is recorded of the transaction says nothing of what became of it.
    pub(super) fn is_reported_lost(&self) -> bool {
        self.store.record.status.decision().is_none() && self.xid_epoch <= self.store.lost_through
    }

    /// Leaves a batch to the database. Returns whether there was room for one more.
    #[must_use]
    pub(super) fn abandon(&mut self, batch: Batch) -> bool {
        let Some(free) = self.abandoned.iter_mut().find(|place| place.is_none()) else {
            return false;
        };
        *free = Some(Batch { claims: Record::ABSENT, ..batch });
        self.abandoned.sort();
        true
    }

    /// Everything that is of branches, with the two of them changed over.
    fn mirrored(&self) -> Self {
        let mut mirrored = self.clone();
        mirrored.participants.reverse();
        let Messages { try_, tried, refused, confirm, confirmed, cancel, cancelled } =
            &mut mirrored.messages;
        [try_, tried, refused, confirm, confirmed, cancel, cancelled]
            .into_iter()
            .for_each(Branches::mirror);
        mirrored.history.decided_branches.mirror();
        mirrored.store.record.branches.mirror();
        mirrored.past.iter_mut().for_each(|store| store.record.branches.mirror());
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
    /// Coordinators are alike, and so are branches: one state stands for all that differ only in who is called first.
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
