//! What the contract allows at most. Everything that grows has a limit here or in the coordinator's configuration.

use std::time::Duration;

/// Branches of one global transaction. A set of them fits one 64-bit word.
pub const BRANCHES_MAX: usize = 64;
/// Bytes of one payload, and of one Try's reply: what a fence row keeps.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// Bytes of all payloads of one global transaction together: what one request may bring.
pub const PAYLOADS_BYTES_MAX: usize = 1024 * 1024;
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
/// Bytes of a reason in words: of a Cancel, of an operator.
pub const REASON_BYTES_MAX: usize = 1024;
/// Bytes of an operator's name.
pub const OPERATOR_BYTES_MAX: usize = 128;
/// Bytes of the text of a gRPC status. It travels twice, as a header and in the details, and in the header each byte of Chinese
/// takes three. gRPC clients take 16 KiB of headers (Rust) or 8 KiB (Java): a longer text would turn a refusal into an unknown.
pub const STATUS_MESSAGE_BYTES_MAX: usize = 1024;
/// Bytes of a whole refusal: reason, domain, message and metadata together.
pub const REFUSAL_BYTES_MAX: usize = 4 * 1024;
/// Shortest timeout of phase one.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// Longest timeout of phase one. Reservations that last longer want another design.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Longest wait of one call for a transaction to complete; the caller asks again.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Wait of one call for a transaction to complete, if it names none.
pub const WAIT_DEFAULT: Duration = Duration::from_secs(10);
/// Transactions in one answer of ListTransactions.
pub const LIST_MAX: usize = 1000;
/// Transactions in one answer of ListTransactions, if the call names no limit.
pub const LIST_DEFAULT: usize = 50;
/// Bytes of a request: all payloads, and the names around them.
pub const REQUEST_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Bytes of a response: a reply for each branch, or a list of [`LIST_MAX`] transactions.
pub const RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The text, or as many whole characters of it as leave room for an ellipsis.
#[must_use]
pub fn cut(mut text: String, bytes_max: usize) -> String {
    const ELLIPSIS: &str = "…";
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max - ELLIPSIS.len()));
        text.push_str(ELLIPSIS);
    }
    text
}
