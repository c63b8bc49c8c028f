//! What is known of a global transaction.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use handfast_proto::{BranchId, Xid, time::Timestamp};

/// Where a global transaction stands. Retry counts, timeouts, reasons and being stuck are fields, not states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// No decision yet.
    Trying,
    /// Decided; some branch has not acknowledged its Confirm.
    Confirming,
    /// Decided; some branch has not acknowledged its Cancel.
    Cancelling,
    /// Final: every branch has confirmed, or an operator has answered for it.
    Confirmed,
    /// Final: every branch has cancelled, or an operator has answered for it.
    Cancelled,
}

impl State {
    /// The decision that stands, if there is one.
    #[must_use]
    pub fn decision(self) -> Option<Decision> {
        match self {
            Self::Trying => None,
            Self::Confirming | Self::Confirmed => Some(Decision::Confirm),
            Self::Cancelling | Self::Cancelled => Some(Decision::Cancel),
        }
    }

    /// Whether nothing is left to do.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Confirmed | Self::Cancelled)
    }
}

/// Made once, durable before anybody hears of it, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// Use what was reserved.
    Confirm,
    /// Release what was reserved.
    Cancel,
}

impl Decision {
    /// The word for it in logs and error details.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Confirm => "CONFIRM",
            Self::Cancel => "CANCEL",
        }
    }
}

/// What a participant is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Reserve. Phase one.
    Try,
    /// Use what was reserved. Phase two.
    Confirm,
    /// Release what was reserved. Phase two.
    Cancel,
}

/// Who calls the Trys and asks for the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drive {
    /// The initiator.
    Initiator,
    /// The coordinator: `Execute`.
    Coordinator {
        /// Each Try after the one before it; else all at once.
        in_order: bool,
    },
}

/// Bytes that participants understand and the coordinator does not.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Payload {
    /// At most `limits::PAYLOAD_BYTES_MAX`.
    pub data: Bytes,
    /// `application/json`, …: for the participant and for display.
    pub content_type: String,
}

impl fmt::Debug for Payload {
    /// Says how much there is, never what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes, {:?})", self.data.len(), self.content_type)
    }
}

/// A participant's decided "no", as it wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs: `OUT_OF_STOCK`.
    pub reason: String,
    /// Who says so: `inventory`.
    pub domain: String,
    /// For people.
    pub message: String,
    /// Details: `sku` is `1042`.
    pub metadata: BTreeMap<String, String>,
}

/// Why a global transaction was cancelled. Written once, with the decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CancelCause {
    /// The initiator asked for it.
    Requested {
        /// In its words; may be empty.
        reason: String,
    },
    /// A Try was refused.
    Refused {
        /// Whose, if the initiator said so.
        branch_id: Option<BranchId>,
        /// Why.
        refusal: Refusal,
    },
    /// Phase one took longer than its timeout.
    TimedOut,
    /// Coordinator-driven: a Try had no clear answer.
    TryUnknown {
        /// Whose.
        branch_id: BranchId,
        /// The latest answer, in words.
        error: String,
    },
    /// Coordinator-driven: the coordinator stopped in phase one, and with it the payloads and replies were gone.
    CoordinatorRestarted,
}

impl fmt::Display for CancelCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested { reason } if reason.is_empty() => f.write_str("requested"),
            Self::Requested { reason } => write!(f, "requested: {reason}"),
            Self::Refused { branch_id, refusal: Refusal { reason, message, .. } } => {
                if let Some(id) = branch_id {
                    write!(f, "branch {id} ")?;
                }
                write!(f, "refused: {reason}")?;
                if message.is_empty() { Ok(()) } else { write!(f, " {message}") }
            }
            Self::TimedOut => f.write_str("timed out"),
            Self::TryUnknown { branch_id, error } => {
                write!(f, "the Try of branch {branch_id} had no clear answer: {error}")
            }
            Self::CoordinatorRestarted => f.write_str("the coordinator restarted in phase one"),
        }
    }
}

/// An idempotency key, as it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// SHA-256 of what must be the same in a repeat.
    pub digest: [u8; 32],
}

/// One participant's part, as its initiator names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BranchSpec {
    /// Its name within the transaction; the same in every repeat.
    pub branch_id: BranchId,
    /// `inventory.deduct`: which of the participant's actions.
    pub action: String,
    /// `inventory`: whose address the configuration may know.
    pub participant: String,
    /// `http://127.0.0.1:7001`: the address if the configuration has none; empty: none given.
    pub target: String,
    /// Sent with Try (coordinator-driven), and with Confirm and Cancel if it is carried.
    pub payload: Option<Payload>,
    /// Whether the payload is stored and sent in phase two, for participants that do not keep it themselves.
    pub carry_payload: bool,
}

impl BranchSpec {
    /// Whether a repeat of a registration names the same branch. The target may differ: services move.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.action == other.action
            && self.participant == other.participant
            && self.carry_payload == other.carry_payload
            && (!self.carry_payload || self.payload == other.payload)
    }
}

/// How far one branch has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BranchState {
    /// Its Try may or may not have happened.
    Registered,
    /// Coordinator-driven, and only in memory: its Try answered OK.
    Tried,
    /// The participant has done what was decided.
    Acknowledged,
    /// An operator has answered for the participant.
    Resolved(Box<Resolution>),
}

/// What an operator did for a branch by hand. Kept for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// Who.
    pub operator: String,
    /// Why, and what was done instead.
    pub reason: String,
    /// When.
    pub at: Timestamp,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptError {
    /// The gRPC code's name: `UNAVAILABLE`.
    pub code: String,
    /// In words, cut to a bounded length.
    pub message: String,
    /// When the answer, or the lack of one, was noticed.
    pub at: Timestamp,
}

/// Whether a call to the participant is under way. One branch has one call at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// None is; the next one may be made from this moment on.
    Idle {
        /// Not before.
        due_at: Timestamp,
    },
    /// One is. Only in memory: after a restart the branch is idle and due.
    InFlight(Phase),
}

/// One participant's part of a global transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// As it was registered. Shared: a transaction that changes while what it was is still being recorded or answered is copied.
    pub spec: Arc<BranchSpec>,
    /// How far it has come.
    pub state: BranchState,
    /// Calls made so far in the present phase.
    pub attempts: u32,
    /// How many of the latest calls in a row ran into their deadline: the next one gets more time. Only in memory.
    pub timeouts: u32,
    /// The participant has asked for a person: stuck at once.
    pub needs_attention: bool,
    /// Whether a call is under way, or when the next one is due.
    pub call: Call,
    /// Of the latest attempt that failed.
    pub last_error: Option<Box<AttemptError>>,
    /// What its Try answered. Only in memory, coordinator-driven only.
    pub reply: Option<Box<Payload>>,
}

impl Branch {
    /// A branch that nobody has called yet.
    #[must_use]
    pub fn registered(spec: BranchSpec, now: Timestamp) -> Self {
        Self {
            spec: Arc::new(spec),
            state: BranchState::Registered,
            attempts: 0,
            timeouts: 0,
            needs_attention: false,
            call: Call::Idle { due_at: now },
            last_error: None,
            reply: None,
        }
    }

    /// Unless it is to be carried: what only a Try needs is not kept after it.
    pub(super) fn let_go_of_payload(&mut self) {
        if self.spec.payload.is_some() && !self.spec.carry_payload {
            Arc::make_mut(&mut self.spec).payload = None;
        }
    }

    /// Whether its participant still has to do what was decided.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self.state {
            BranchState::Registered | BranchState::Tried => true,
            BranchState::Acknowledged | BranchState::Resolved(_) => false,
        }
    }
}

/// A set of branches of one transaction, by index: one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BranchSet(u64);

impl BranchSet {
    /// No branch.
    pub const EMPTY: Self = Self(0);

    /// Only this one. `index` is below `limits::BRANCHES_MAX`.
    #[must_use]
    pub fn only(index: usize) -> Self {
        Self(1 << index)
    }

    /// These and those.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it has this one.
    #[must_use]
    pub fn contains(self, index: usize) -> bool {
        self.0 & (1 << index) != 0
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many it has.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The indexes, in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |index| self.contains(*index))
    }
}

/// A global transaction as it is asked for, checked at the door.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTransaction {
    /// `checkout`.
    pub name: String,
    /// Who calls the Trys.
    pub drive: Drive,
    /// Of phase one.
    pub timeout: Duration,
    /// For people who search.
    pub labels: BTreeMap<String, String>,
    /// The same key gives the same transaction.
    pub key: Option<Key>,
    /// What is known already. Their ids differ from each other.
    pub branches: Vec<BranchSpec>,
}

/// A global transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalTransaction {
    /// Its name.
    pub xid: Xid,
    /// What kind of operation it is: `checkout`.
    pub name: String,
    /// Who calls the Trys.
    pub drive: Drive,
    /// Where it stands.
    pub state: State,
    /// For people who search.
    pub labels: BTreeMap<String, String>,
    /// When the coordinator took it in.
    pub begun_at: Timestamp,
    /// End of phase one. A wrong clock can make it early, never split a decision.
    pub expires_at: Timestamp,
    /// When it was decided.
    pub decided_at: Option<Timestamp>,
    /// When the last branch acknowledged.
    pub finished_at: Option<Timestamp>,
    /// Why it was cancelled; only when it was.
    pub cancel: Option<CancelCause>,
    /// Its idempotency key.
    pub key: Option<Key>,
    /// In order of registration; grows only while trying.
    pub branches: Vec<Branch>,
}

/// When a decided transaction counts as stuck. A view for operators: it is retried all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StuckAfter {
    /// So many attempts of one branch have failed.
    pub attempts: u32,
    /// So long after the decision a branch has not acknowledged.
    pub time: Duration,
}

impl GlobalTransaction {
    /// Begins one.
    #[must_use]
    pub fn begin(xid: Xid, new: NewTransaction, now: Timestamp) -> Self {
        Self {
            xid,
            name: new.name,
            drive: new.drive,
            state: State::Trying,
            labels: new.labels,
            begun_at: now,
            expires_at: now + new.timeout,
            decided_at: None,
            finished_at: None,
            cancel: None,
            key: new.key,
            branches: new.branches.into_iter().map(|spec| Branch::registered(spec, now)).collect(),
        }
    }

    /// Whether phase two keeps failing and an operator should look.
    #[must_use]
    pub fn is_stuck(&self, now: Timestamp, after: StuckAfter) -> bool {
        let Some(decided_at) = self.decided_at else { return false };
        !self.state.is_final()
            && (now - decided_at >= after.time
                || self.branches.iter().any(|branch| {
                    branch.is_open()
                        && branch.last_error.is_some()
                        && (branch.needs_attention || branch.attempts >= after.attempts)
                }))
    }

    /// Whether it finished without a failed attempt and without an operator: its final state then tells all that there is to
    /// know of its branches, and they need not be written again.
    #[must_use]
    pub fn finished_smoothly(&self) -> bool {
        self.state.is_final()
            && self.branches.iter().all(|branch| {
                branch.state == BranchState::Acknowledged
                    && branch.attempts <= 1
                    && branch.last_error.is_none()
            })
    }

    /// What a store gives back of it: the same, without what lives only in memory.
    #[must_use]
    pub fn recorded(&self) -> Self {
        let mut recorded = self.clone();
        for branch in &mut recorded.branches {
            branch.reply = None;
            branch.timeouts = 0;
            branch.let_go_of_payload();
            if branch.state == BranchState::Tried {
                branch.state = BranchState::Registered;
            }
            let failed_in_phase_two = self.state != State::Trying && branch.last_error.is_some();
            if branch.is_open() && !failed_in_phase_two {
                branch.attempts = 0;
                branch.last_error = None;
            }
            let due_at = match branch.call {
                Call::Idle { due_at } if branch.is_open() && failed_in_phase_two => due_at,
                Call::Idle { .. } | Call::InFlight(_) => self.begun_at,
            };
            branch.call = Call::Idle { due_at };
        }
        recorded
    }

    /// When somebody has to look at it if nobody is working on it; `None` when it is final.
    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        match (self.state, self.drive) {
            (State::Trying, Drive::Initiator) => Some(self.expires_at),
            // Nobody but this coordinator drives it: the next owner has to cancel it at once.
            (State::Trying, Drive::Coordinator { .. }) => Some(self.begun_at),
            (State::Confirming | State::Cancelling, _) => {
                let next =
                    self.branches.iter().filter(|branch| branch.is_open()).map(
                        |branch| match branch.call {
                            Call::Idle { due_at } => due_at,
                            Call::InFlight(_) => self.begun_at, // whether it arrived is unknown to whoever comes next
                        },
                    );
                Some(next.min().unwrap_or(self.begun_at))
            }
            (State::Confirmed | State::Cancelled, _) => None,
        }
    }
}
