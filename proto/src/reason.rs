//! Reasons of errors, for programs: `google.rpc.ErrorInfo.reason` beside [`DOMAIN`]. The text beside them is for people and
//! may change; these do not.

/// `ErrorInfo.domain` of what the coordinator itself says. (A participant's refusal has the participant's.)
pub const DOMAIN: &str = "handfast";

/// NOT_FOUND: nothing was ever recorded under this xid, so nothing was tried.
pub const NEVER_RECORDED: &str = "NEVER_RECORDED";
/// NOT_FOUND: there may have been such a transaction, deleted after its retention.
pub const FORGOTTEN: &str = "FORGOTTEN";
/// NOT_FOUND: the store has lost records of the xid's time, as its owner noticed. There may have been such a transaction, and its
/// outcome may have been told.
pub const LOST: &str = "LOST";
/// NOT_FOUND: no transaction has this idempotency key.
pub const KEY_UNKNOWN: &str = "KEY_UNKNOWN";
/// NOT_FOUND: the transaction has no such branch.
pub const BRANCH_UNKNOWN: &str = "BRANCH_UNKNOWN";
/// FAILED_PRECONDITION: a decision stands. Metadata: [`XID`], [`DECISION`], and of a Cancel [`CANCEL_CAUSE`].
pub const ALREADY_DECIDED: &str = "ALREADY_DECIDED";
/// FAILED_PRECONDITION: Confirm named another set than the registered one. Metadata: [`NOT_NAMED`], [`NOT_REGISTERED`].
pub const BRANCHES_DIFFER: &str = "BRANCHES_DIFFER";
/// FAILED_PRECONDITION: the coordinator itself calls this transaction's Trys and decides; only Cancel may be asked for.
pub const COORDINATOR_DRIVEN: &str = "COORDINATOR_DRIVEN";
/// FAILED_PRECONDITION: there is no decision yet.
pub const NOT_DECIDED: &str = "NOT_DECIDED";
/// FAILED_PRECONDITION: the participant has acknowledged this branch itself.
pub const ALREADY_ACKNOWLEDGED: &str = "ALREADY_ACKNOWLEDGED";
/// ALREADY_EXISTS: the idempotency key belongs to a transaction with other content. Metadata: [`XID`].
pub const KEY_TAKEN: &str = "KEY_TAKEN";
/// ALREADY_EXISTS: the branch id belongs to a branch with other content.
pub const BRANCH_TAKEN: &str = "BRANCH_TAKEN";
/// INVALID_ARGUMENT: a field is wrong; `google.rpc.BadRequest` names it.
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// RESOURCE_EXHAUSTED: as many transactions are open as the coordinator takes.
pub const TOO_MANY_OPEN: &str = "TOO_MANY_OPEN";
/// RESOURCE_EXHAUSTED: as many calls wait as the coordinator takes.
pub const TOO_MANY_CALLS: &str = "TOO_MANY_CALLS";
/// UNAVAILABLE: the coordinator is stopping.
pub const STOPPING: &str = "STOPPING";
/// UNAVAILABLE: the store has not answered in time. What was asked may or may not take effect.
pub const STORE_SILENT: &str = "STORE_SILENT";
/// UNAVAILABLE: the xid belongs to a partition or an epoch that another coordinator owns.
pub const OWNED_ELSEWHERE: &str = "OWNED_ELSEWHERE";
/// INTERNAL: a record in the store makes no sense.
pub const CORRUPT_RECORD: &str = "CORRUPT_RECORD";

/// A participant's ABORTED: the branch was cancelled before its Try arrived.
pub const CANCELLED_BEFORE: &str = "CANCELLED_BEFORE";
/// A participant's ABORTED: the Try arrived after the end of phase one.
pub const EXPIRED: &str = "EXPIRED";
/// A participant's FAILED_PRECONDITION: the branch was tried before, with another payload.
pub const PAYLOAD_DIFFERS: &str = "PAYLOAD_DIFFERS";
/// A participant's FAILED_PRECONDITION to Confirm: there is no Try to confirm.
pub const NEVER_TRIED: &str = "NEVER_TRIED";
/// A participant's FAILED_PRECONDITION: the branch has been confirmed, or cancelled, and the opposite is asked.
pub const OPPOSITE_DONE: &str = "OPPOSITE_DONE";
/// A participant's FAILED_PRECONDITION to Confirm or Cancel: its author asks for a person.
pub const NEEDS_ATTENTION: &str = "NEEDS_ATTENTION";
/// UNIMPLEMENTED: the participant does not serve this action.
pub const ACTION_UNKNOWN: &str = "ACTION_UNKNOWN";

/// Metadata key: an xid.
pub const XID: &str = "xid";
/// Metadata key: `CONFIRM` or `CANCEL`.
pub const DECISION: &str = "decision";
/// Metadata key: the name of a `CancelCause`, without its prefix.
pub const CANCEL_CAUSE: &str = "cancel_cause";
/// Metadata key: branch ids that are registered and were not named, joined by commas.
pub const NOT_NAMED: &str = "not_named";
/// Metadata key: branch ids that were named and are not registered, joined by commas.
pub const NOT_REGISTERED: &str = "not_registered";
