//! The data of a global transaction: its state, its branches, and what each field means.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use handfast_proto::{BranchId, Xid, time::Timestamp};

use super::BranchDamage;

/// The state of a global transaction. Retry counts, timeouts, reasons and "stuck" are fields, not states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// No decision yet.
    Trying,
    /// Decided; at least one branch has not acknowledged its Confirm.
    Confirming,
    /// Decided; at least one branch has not acknowledged its Cancel.
    Cancelling,
    /// Final: every branch has confirmed, or an operator has resolved it.
    Confirmed,
    /// Final: every branch has cancelled, or an operator has resolved it.
    Cancelled,
}

impl State {
    /// For logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trying => "trying",
            Self::Confirming => "confirming",
            Self::Cancelling => "cancelling",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The decision, once it is made.
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

/// Made once, durable before anyone is told, and never changed.
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

impl Phase {
    /// For logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Try => "try",
            Self::Confirm => "confirm",
            Self::Cancel => "cancel",
        }
    }
}

/// The process that calls the Trys and asks for the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drive {
    /// The initiator.
    Initiator,
    /// The coordinator: `Execute`.
    Coordinator {
        /// True: one Try after another. False: all in parallel.
        in_order: bool,
    },
}

/// The arguments of a call, or its reply. Opaque to the coordinator.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Payload {
    /// At most `limits::PAYLOAD_BYTES_MAX`.
    pub data: Bytes,
    /// `application/json`, …: for the participant and for display.
    pub content_type: String,
}

impl fmt::Debug for Payload {
    /// Prints the size, never the content.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes, {:?})", self.data.len(), self.content_type)
    }
}

/// A participant's "no", as the participant wrote it. Retrying will not help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs: `OUT_OF_STOCK`.
    pub reason: String,
    /// The participant that refused: `inventory`.
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
        /// The initiator's text for people; may be empty.
        reason: String,
    },
    /// A Try was refused.
    Refused {
        /// The branch that refused, if the initiator named it.
        branch_id: Option<BranchId>,
        /// As the participant wrote it.
        refusal: Refusal,
    },
    /// Phase one took longer than its timeout.
    TimedOut,
    /// A Try had no clear answer.
    TryUnknown {
        /// The branch whose Try it was.
        branch_id: BranchId,
        /// The latest answer, as text.
        error: String,
    },
    /// Coordinator-driven: the coordinator stopped in phase one, and lost the payloads and replies with its memory.
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

/// An idempotency key, as the store keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// SHA-256 of everything that must be the same in a repeat.
    pub digest: [u8; 32],
}

/// One participant's part of a global transaction, as the initiator registers it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BranchSpec {
    /// Unique within the transaction, and the same in every repeat.
    pub branch_id: BranchId,
    /// One of the participant's actions: `inventory.deduct`.
    pub action: String,
    /// `inventory`. The configuration may have an address for this name.
    pub participant: String,
    /// `http://127.0.0.1:7001`: used if the configuration has no address for the participant. May be empty.
    pub target: String,
    /// Sent with Try (coordinator-driven), and with Confirm and Cancel if `carry_payload` is set.
    pub payload: Option<Payload>,
    /// Whether to store the payload and send it in phase two, for participants that do not keep it.
    pub carry_payload: bool,
    /// Coordinator-driven: how long the first attempt of the Try may take. Not stored: after a restart no Try is made.
    pub try_timeout: Option<Duration>,
    /// The participant asks about its reservations until it is answered. Not stored: a transaction that has a record needs nobody who
    /// asks.
    pub inquires: bool,
    /// What is wrong with its record, if it cannot be carried out as it is. The participant is not called then: an operator
    /// settles the branch.
    pub damage: Option<BranchDamage>,
}

impl BranchSpec {
    /// Whether a repeated registration is for the same branch. The target may differ, because services move.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.action == other.action
            && self.participant == other.participant
            && self.carry_payload == other.carry_payload
            && (!self.carry_payload || self.payload == other.payload)
    }
}

/// The progress of one branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BranchState {
    /// Its Try may or may not have happened.
    Registered,
    /// Coordinator-driven, and only in memory: its Try answered OK.
    Tried,
    /// The participant has carried out the decision.
    Acknowledged,
    /// An operator has resolved the branch by hand.
    Resolved(Box<Resolution>),
}

/// The record of an operator who resolved a branch by hand. Kept for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The operator's name.
    pub operator: String,
    /// Why, and what the operator did instead.
    pub reason: String,
    /// When the coordinator received it.
    pub at: Timestamp,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptError {
    /// The name of the gRPC code: `UNAVAILABLE`.
    pub code: String,
    /// The participant's text, cut to a bounded length.
    pub message: String,
    /// When the coordinator received the answer, or gave up waiting for it.
    pub at: Timestamp,
}

/// Whether a call to the participant is in flight. A branch has at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// No call is in flight.
    Idle {
        /// The next call may be made from this time on.
        due_at: Timestamp,
    },
    /// A call is in flight. This is known only in memory: after a restart the branch is idle and due.
    InFlight(Phase),
}

/// One participant's part of a global transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// The branch as it was registered. Shared, because a transaction is copied when it changes while its previous version is still
    /// being recorded or sent.
    pub spec: Arc<BranchSpec>,
    /// The progress of the branch.
    pub state: BranchState,
    /// Calls made so far in this phase.
    pub attempts: u32,
    /// How many of the latest calls, in a row, ran into their deadline. The next call gets more time. Only in memory.
    pub timeouts: u32,
    /// The participant has asked for a person. The branch is stuck at once.
    pub needs_attention: bool,
    /// Whether a call is in flight, or when the next one is due.
    pub call: Call,
    /// The error of the latest failed attempt.
    pub last_error: Option<Box<AttemptError>>,
    /// The reply to its Try. Only in memory, and only if coordinator-driven.
    pub reply: Option<Box<Payload>>,
}

impl Branch {
    /// A branch that has not been called yet.
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

    /// Drops the payload, unless phase two needs it (`carry_payload`).
    pub(super) fn let_go_of_payload(&mut self) {
        if self.spec.payload.is_some() && !self.spec.carry_payload {
            Arc::make_mut(&mut self.spec).payload = None;
        }
    }

    /// Whether the participant has not acknowledged yet.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self.state {
            BranchState::Registered | BranchState::Tried => true,
            BranchState::Acknowledged | BranchState::Resolved(_) => false,
        }
    }
}

/// A requested global transaction, after the request was validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTransaction {
    /// The kind of operation: `checkout`.
    pub name: String,
    /// Who calls the Trys.
    pub drive: Drive,
    /// The longest time that phase one may take.
    pub timeout: Duration,
    /// For people who search.
    pub labels: BTreeMap<String, String>,
    /// The same key gives the same transaction.
    pub key: Option<Key>,
    /// The branches that the initiator already knows. Their ids differ.
    pub branches: Vec<BranchSpec>,
    /// It may be lost as a whole until it is decided, and callers are answered before it has a record.
    pub at_decision: bool,
}

/// A global transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalTransaction {
    /// Its id.
    pub xid: Xid,
    /// The kind of operation: `checkout`.
    pub name: String,
    /// Who calls the Trys.
    pub drive: Drive,
    /// The state; only `apply` changes it.
    pub state: State,
    /// For people who search.
    pub labels: BTreeMap<String, String>,
    /// When the coordinator accepted it.
    pub begun_at: Timestamp,
    /// End of phase one. A wrong clock can end phase one early; it cannot split a decision.
    pub expires_at: Timestamp,
    /// When it was decided; `None` while trying.
    pub decided_at: Option<Timestamp>,
    /// When the last branch acknowledged; `None` before that.
    pub finished_at: Option<Timestamp>,
    /// Why it was cancelled; `None` unless it was.
    pub cancel: Option<CancelCause>,
    /// What the initiator gave with its Confirm, for a repeat. Written with the decision.
    pub result: Option<Box<Payload>>,
    /// Its idempotency key, if the initiator gave one.
    pub key: Option<Key>,
    /// In order of registration. The list grows only while trying.
    pub branches: Vec<Branch>,
    /// It may stay without a record until it is decided. Only in memory: what was read from the store has a record.
    pub at_decision: bool,
    /// The operator who decided it, because records were lost. Written with the decision, and kept for ever. Not read again.
    pub resolution: Option<Box<Resolution>>,
}

/// When a decided transaction is reported as stuck. Only a view for operators: the coordinator retries it all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StuckAfter {
    /// This many attempts of one branch have failed.
    pub attempts: u32,
    /// A branch has not acknowledged this long after the decision.
    pub time: Duration,
}

impl GlobalTransaction {
    /// A new transaction in state Trying.
    #[must_use]
    pub fn begin(xid: Xid, new: NewTransaction, now: Timestamp) -> Self {
        let all_inquire = new.branches.iter().all(|spec| spec.inquires);
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
            result: None,
            key: new.key,
            branches: new.branches.into_iter().map(|spec| Branch::registered(spec, now)).collect(),
            // Execute cancels what it finds after a restart, and nobody asks for what has no record.
            at_decision: new.at_decision && all_inquire && new.drive == Drive::Initiator,
            resolution: None,
        }
    }

    /// Whether phase two keeps failing, so that an operator should look.
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

    /// Whether it finished without a failed attempt and without an operator. Its final state then says everything about its branches,
    /// and they need not be written again.
    #[must_use]
    pub fn finished_smoothly(&self) -> bool {
        self.state.is_final()
            && self.branches.iter().all(|branch| {
                branch.state == BranchState::Acknowledged
                    && branch.attempts <= 1
                    && branch.last_error.is_none()
            })
    }

    /// The transaction as a store returns it: without the fields that exist only in memory.
    #[must_use]
    pub fn recorded(&self) -> Self {
        let mut recorded = Self { resolution: None, at_decision: false, ..self.clone() };
        for branch in &mut recorded.branches {
            if branch.spec.inquires {
                Arc::make_mut(&mut branch.spec).inquires = false;
            }
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

    /// When the next owner must look at it if it is not in memory; `None` when it is final.
    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        match (self.state, self.drive) {
            (State::Trying, Drive::Initiator) => Some(self.expires_at),
            // Only this coordinator can continue it, so the next owner has to cancel it at once.
            (State::Trying, Drive::Coordinator { .. }) => Some(self.begun_at),
            (State::Confirming | State::Cancelling, _) => {
                let next =
                    self.branches.iter().filter(|branch| branch.is_open()).map(
                        |branch| match branch.call {
                            Call::Idle { due_at } => due_at,
                            Call::InFlight(_) => self.begun_at, // the next owner cannot know whether the call arrived
                        },
                    );
                Some(next.min().unwrap_or(self.begun_at))
            }
            (State::Confirmed | State::Cancelled, _) => None,
        }
    }
}
