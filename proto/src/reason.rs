//! Machine-readable reasons of errors: `google.rpc.ErrorInfo.reason`, in the domain [`DOMAIN`]. These strings never change. The
//! status message next to them is for people and may change.

/// The `ErrorInfo.domain` of errors that the coordinator itself raises. A participant's refusal carries the participant's
/// domain.
pub const DOMAIN: &str = "handfast";

/// NOT_FOUND: nothing was ever recorded under this xid. It was not confirmed and never will be. Nothing was tried either, unless
/// its Begin asked for RECORD_AT_DECISION.
pub const NEVER_RECORDED: &str = "NEVER_RECORDED";
/// NOT_FOUND: the transaction may have existed and been deleted after its retention.
pub const FORGOTTEN: &str = "FORGOTTEN";
/// NOT_FOUND: the store has lost records from the time of this xid. The transaction may have existed, and its outcome may have
/// been reported.
pub const LOST: &str = "LOST";
/// NOT_FOUND: no transaction has this idempotency key.
pub const KEY_UNKNOWN: &str = "KEY_UNKNOWN";
/// NOT_FOUND: the transaction has no such branch.
pub const BRANCH_UNKNOWN: &str = "BRANCH_UNKNOWN";
/// FAILED_PRECONDITION: the transaction is already decided. Metadata: [`XID`], [`DECISION`], and for a Cancel [`CANCEL_CAUSE`].
pub const ALREADY_DECIDED: &str = "ALREADY_DECIDED";
/// FAILED_PRECONDITION: Confirm named other branches than the registered ones. Metadata: [`NOT_NAMED`], [`NOT_REGISTERED`].
pub const BRANCHES_DIFFER: &str = "BRANCHES_DIFFER";
/// FAILED_PRECONDITION: the coordinator itself calls this transaction's Trys and decides it. Clients may only ask for Cancel.
pub const COORDINATOR_DRIVEN: &str = "COORDINATOR_DRIVEN";
/// FAILED_PRECONDITION: this coordinator cannot record transactions with their decision, as it is set up.
pub const RECORD_AT_DECISION_REFUSED: &str = "RECORD_AT_DECISION_REFUSED";
/// FAILED_PRECONDITION: there is no decision yet.
pub const NOT_DECIDED: &str = "NOT_DECIDED";
/// FAILED_PRECONDITION: the participant itself has already acknowledged this branch.
pub const ALREADY_ACKNOWLEDGED: &str = "ALREADY_ACKNOWLEDGED";
/// ALREADY_EXISTS: another transaction, with other content, uses the idempotency key. Metadata: [`XID`].
pub const KEY_TAKEN: &str = "KEY_TAKEN";
/// ALREADY_EXISTS: another branch, with other content, uses the branch id.
pub const BRANCH_TAKEN: &str = "BRANCH_TAKEN";
/// INVALID_ARGUMENT: a field is wrong; `google.rpc.BadRequest` names it.
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// RESOURCE_EXHAUSTED: the coordinator has reached its limit of open transactions.
pub const TOO_MANY_OPEN: &str = "TOO_MANY_OPEN";
/// RESOURCE_EXHAUSTED: the coordinator has reached its limit of waiting calls.
pub const TOO_MANY_CALLS: &str = "TOO_MANY_CALLS";
/// UNAVAILABLE: the coordinator is shutting down.
pub const STOPPING: &str = "STOPPING";
/// UNAVAILABLE: the store did not answer in time. The request may or may not take effect.
pub const STORE_SILENT: &str = "STORE_SILENT";
/// UNAVAILABLE: another coordinator owns the partition or the epoch of the xid.
pub const OWNED_ELSEWHERE: &str = "OWNED_ELSEWHERE";
/// INTERNAL: a record in the store is corrupt.
pub const CORRUPT_RECORD: &str = "CORRUPT_RECORD";

/// A participant's ABORTED: the branch was cancelled before its Try arrived.
pub const CANCELLED_BEFORE: &str = "CANCELLED_BEFORE";
/// A participant's ABORTED: the Try arrived after phase one had ended.
pub const EXPIRED: &str = "EXPIRED";
/// A participant's FAILED_PRECONDITION: an earlier Try of the branch had another payload.
pub const PAYLOAD_DIFFERS: &str = "PAYLOAD_DIFFERS";
/// A participant's FAILED_PRECONDITION to Confirm: there is no Try to confirm.
pub const NEVER_TRIED: &str = "NEVER_TRIED";
/// A participant's FAILED_PRECONDITION: the branch is already confirmed and a Cancel arrived, or the other way round.
pub const OPPOSITE_DONE: &str = "OPPOSITE_DONE";
/// A participant's FAILED_PRECONDITION to Confirm or Cancel: its code reports that a person must intervene.
pub const NEEDS_ATTENTION: &str = "NEEDS_ATTENTION";
/// UNIMPLEMENTED: the participant does not serve this action.
pub const ACTION_UNKNOWN: &str = "ACTION_UNKNOWN";

/// Metadata key: an xid.
pub const XID: &str = "xid";
/// Metadata key: `CONFIRM` or `CANCEL`.
pub const DECISION: &str = "decision";
/// Metadata key: the name of a `CancelCause`, without its prefix.
pub const CANCEL_CAUSE: &str = "cancel_cause";
/// Metadata key: branch ids that are registered but were not named, joined by commas.
pub const NOT_NAMED: &str = "not_named";
/// Metadata key: branch ids that were named but are not registered, joined by commas.
pub const NOT_REGISTERED: &str = "not_registered";
