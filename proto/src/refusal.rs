//! A participant's refusal as a gRPC status: FAILED_PRECONDITION, with its reason in `google.rpc.ErrorInfo`.

use std::collections::BTreeMap;

use tonic::{Code, Status};
use tonic_types::{ErrorInfo, StatusExt as _};

use crate::{limits, text::cut, v1::Refusal};

/// Bytes of a refusal's reason.
const REASON_BYTES_MAX: usize = 128;

/// Reads the refusal from a status. `None` if the code is not FAILED_PRECONDITION.
///
/// FAILED_PRECONDITION is always a refusal. If the participant sent no `google.rpc.ErrorInfo`, the reason is
/// `FAILED_PRECONDITION`.
#[must_use]
pub fn read(status: &Status) -> Option<Refusal> {
    if status.code() != Code::FailedPrecondition {
        return None;
    }
    let message = status.message().to_owned();
    Some(within_limits(match status.get_details_error_info() {
        Some(ErrorInfo { reason, domain, metadata }) => {
            Refusal { reason, domain, message, metadata: metadata.into_iter().collect() }
        }
        None => {
            let reason = "FAILED_PRECONDITION".to_owned();
            Refusal { reason, message, ..Refusal::default() }
        }
    }))
}

/// Builds a status that carries this refusal.
#[must_use]
pub fn status(code: Code, refusal: Refusal) -> Status {
    let Refusal { reason, domain, message, metadata } = within_limits(refusal);
    let info = ErrorInfo { reason, domain, metadata: metadata.into_iter().collect() };
    Status::with_error_details_vec(code, message, [info.into()])
}

/// Fits a refusal into the limits of the contract. Texts are truncated; metadata that does not fit is left out.
#[must_use]
pub fn within_limits(refusal: Refusal) -> Refusal {
    let mut short = Refusal {
        reason: cut(refusal.reason, REASON_BYTES_MAX),
        domain: cut(refusal.domain, limits::PARTICIPANT_BYTES_MAX),
        message: cut(refusal.message, limits::STATUS_MESSAGE_BYTES_MAX),
        metadata: BTreeMap::new(),
    };
    let texts = short.reason.len() + short.domain.len() + short.message.len();
    let mut room = limits::REFUSAL_BYTES_MAX - texts;
    for (key, value) in refusal.metadata {
        let value = cut(value, limits::LABEL_VALUE_BYTES_MAX);
        // Keys are never truncated, because half a key would be a different key.
        if let Some(left) = room.checked_sub(key.len() + value.len()) {
            room = left;
            short.metadata.insert(key, value);
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(refusal: &Refusal) -> usize {
        let metadata: usize = refusal.metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
        refusal.reason.len() + refusal.domain.len() + refusal.message.len() + metadata
    }

    fn out_of_stock() -> Refusal {
        Refusal {
            reason: "OUT_OF_STOCK".to_owned(),
            domain: "inventory".to_owned(),
            message: "2 on hand".to_owned(),
            metadata: BTreeMap::from([("sku".to_owned(), "1042".to_owned())]),
        }
    }

    #[test]
    fn a_refusal_survives_the_wire() {
        assert_eq!(read(&status(Code::FailedPrecondition, out_of_stock())), Some(out_of_stock()));
        assert_eq!(read(&status(Code::Aborted, out_of_stock())), None);
    }

    #[test]
    fn a_failed_precondition_without_details_is_a_refusal_too() {
        let refusal = read(&Status::failed_precondition("no")).unwrap();
        assert_eq!(
            (refusal.reason.as_str(), refusal.message.as_str()),
            ("FAILED_PRECONDITION", "no")
        );
    }

    #[test]
    fn a_short_refusal_is_left_alone() {
        assert_eq!(within_limits(out_of_stock()), out_of_stock());
    }

    #[test]
    fn a_long_refusal_is_cut_between_characters_and_keeps_whole_keys() {
        let mut refusal = Refusal {
            reason: "R".repeat(500),
            message: "库存不足".repeat(1000),
            ..Refusal::default()
        };
        for n in 0..100 {
            refusal.metadata.insert(format!("key-{n:03}"), "值".repeat(n));
        }
        refusal.metadata.insert("k".repeat(5000), String::new());
        let short = within_limits(refusal);
        assert!(bytes(&short) <= limits::REFUSAL_BYTES_MAX, "{}", bytes(&short));
        assert!(bytes(&short) > limits::REFUSAL_BYTES_MAX - 300, "room is used");
        assert!(short.message.starts_with("库存不足") && short.message.ends_with('…'));
        assert!(short.metadata.keys().all(|key| key.len() == 7));
        assert_eq!(within_limits(short.clone()), short);
    }
}
