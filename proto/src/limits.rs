//! The limits of the contract. Everything that grows is limited here or in the coordinator's configuration.

use std::time::Duration;

/// Branches of one global transaction. A set of branches fits into a 64-bit word.
pub const BRANCHES_MAX: usize = 64;
/// Bytes of one payload, and of one Try's reply. A fence row stores both.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// Bytes of all payloads of one global transaction together. They must fit into one request.
pub const PAYLOADS_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of the result that is kept with a confirmed transaction. It is written in the batch of the decision.
pub const RESULT_BYTES_MAX: usize = 4 * 1024;
/// Bytes of a content type.
pub const CONTENT_TYPE_BYTES_MAX: usize = 128;
/// Bytes of the name of a global transaction.
pub const NAME_BYTES_MAX: usize = 128;
/// Bytes of the name of an action.
pub const ACTION_BYTES_MAX: usize = 128;
/// Bytes of the name of a participant.
pub const PARTICIPANT_BYTES_MAX: usize = 64;
/// Bytes of a target address.
pub const TARGET_BYTES_MAX: usize = 256;
/// Labels of one global transaction.
pub const LABELS_MAX: usize = 16;
/// Bytes of a label's key.
pub const LABEL_KEY_BYTES_MAX: usize = 64;
/// Bytes of a label's value.
pub const LABEL_VALUE_BYTES_MAX: usize = 256;
/// Bytes of an idempotency key.
pub const KEY_BYTES_MAX: usize = 128;
/// Bytes of the fingerprint of an operation's content.
pub const FINGERPRINT_BYTES_MAX: usize = 64;
/// Bytes that a record keeps of a participant's error message, and of each text of a refusal. That is enough for a person to see
/// the problem, and as much as the message of a refusal may have.
pub const KEPT_BYTES_MAX: usize = STATUS_MESSAGE_BYTES_MAX;
/// Bytes of a reason in free text, from a Cancel or from an operator.
pub const REASON_BYTES_MAX: usize = 1024;
/// Bytes of an operator's name.
pub const OPERATOR_BYTES_MAX: usize = 128;
/// Bytes of the message of a gRPC status. It is sent twice, as a header and in the details. In the header, percent-encoding
/// triples each non-ASCII byte. gRPC clients accept 16 KiB of headers (Rust) or 8 KiB (Java). With a longer message, the client
/// would see an unknown error instead of the refusal.
pub const STATUS_MESSAGE_BYTES_MAX: usize = 1024;
/// Bytes of a whole refusal: reason, domain, message and metadata together.
pub const REFUSAL_BYTES_MAX: usize = 4 * 1024;
/// Shortest timeout of phase one.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// Longest timeout of phase one. Do not hold reservations longer.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Longest time for which one call waits for a transaction to complete. The caller then asks again.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// How long one call waits for a transaction to complete, if it sets no limit.
pub const WAIT_DEFAULT: Duration = Duration::from_secs(10);
/// Branches in one InquireBranches. A participant that asks about thousands sends several calls.
pub const INQUIRED_MAX: usize = 256;
/// Transactions in one response of ListTransactions.
pub const LIST_MAX: usize = 1000;
/// Transactions in one response of ListTransactions, if the request sets no limit.
pub const LIST_DEFAULT: usize = 50;
/// Bytes of a request: all payloads, and the other fields.
pub const REQUEST_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Bytes of a response: a reply for each branch, or a list of [`LIST_MAX`] transactions.
pub const RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;
