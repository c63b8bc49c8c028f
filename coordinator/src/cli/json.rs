//! The output of `-o json`. `handfast show --help` documents it. It is stable: keys may be added, and nothing else changes.

use std::{collections::BTreeMap, fmt::Write as _};

use handfast_proto::{text::is_unprintable, time, v1 as pb};
use jiff::Timestamp;
use serde::Serialize;

/// One JSON document, with a line break at the end.
pub(super) fn line(document: &impl Serialize) -> String {
    // Texts and numbers can always be serialised.
    let text = serde_json::to_string_pretty(document).unwrap_or_default();
    let mut line = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        // Controls are escaped already. What turns text around on a terminal is the same text for a program when it is escaped.
        if is_unprintable(c) && !c.is_control() {
            let _always_fits = write!(line, "\\u{:04x}", u32::from(c));
        } else {
            line.push(c);
        }
    }
    line.push('\n');
    line
}

#[derive(Debug, Serialize)]
pub(super) struct Transactions {
    transactions: Vec<Transaction>,
    more: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Transaction {
    xid: String,
    name: String,
    state: String,
    decision: Option<String>,
    drive: Option<String>,
    labels: BTreeMap<String, String>,
    stuck: bool,
    timeout_ms: Option<u64>,
    begun_at: Option<String>,
    expires_at: Option<String>,
    decided_at: Option<String>,
    finished_at: Option<String>,
    cancel: Option<Cancel>,
    branches: Vec<Branch>,
}

#[derive(Debug, Serialize)]
struct Cancel {
    cause: String,
    reason: String,
    branch_id: Option<String>,
    refusal: Option<Refusal>,
}

#[derive(Debug, Serialize)]
struct Refusal {
    reason: String,
    domain: String,
    message: String,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Branch {
    branch_id: String,
    action: String,
    participant: String,
    target: Option<String>,
    address: Option<String>,
    state: String,
    attempts: u32,
    next_attempt_at: Option<String>,
    last_error: Option<AttemptError>,
    resolution: Option<Resolution>,
}

#[derive(Debug, Serialize)]
struct AttemptError {
    code: String,
    message: String,
    at: Option<String>,
}

#[derive(Debug, Serialize)]
struct Resolution {
    operator: String,
    reason: String,
    at: Option<String>,
}

impl From<pb::ListTransactionsResponse> for Transactions {
    fn from(message: pb::ListTransactionsResponse) -> Self {
        let pb::ListTransactionsResponse { transactions, more, next_page: _ } = message;
        Self { transactions: transactions.into_iter().map(Transaction::from).collect(), more }
    }
}

impl From<pb::Transaction> for Transaction {
    fn from(message: pb::Transaction) -> Self {
        let cause = given(word(message.cancel_cause().as_str_name(), "CANCEL_CAUSE_"));
        let timeout = message.timeout.as_ref().and_then(time::duration);
        Self {
            state: word(message.state().as_str_name(), "TRANSACTION_STATE_"),
            decision: given(word(message.decision().as_str_name(), "DECISION_")),
            drive: given(word(message.drive().as_str_name(), "DRIVE_")),
            stuck: message.stuck,
            timeout_ms: timeout.and_then(|timeout| u64::try_from(timeout.as_millis()).ok()),
            begun_at: moment(message.begun_at),
            expires_at: moment(message.expires_at),
            decided_at: moment(message.decided_at),
            finished_at: moment(message.finished_at),
            cancel: cause.map(|cause| Cancel {
                cause,
                reason: message.cancel_reason,
                branch_id: given(message.refused_branch_id),
                refusal: message.refusal.map(|refusal| Refusal {
                    reason: refusal.reason,
                    domain: refusal.domain,
                    message: refusal.message,
                    metadata: refusal.metadata,
                }),
            }),
            xid: message.xid,
            name: message.name,
            labels: message.labels,
            branches: message.branches.into_iter().map(Branch::from).collect(),
        }
    }
}

impl From<pb::Branch> for Branch {
    fn from(message: pb::Branch) -> Self {
        Self {
            state: word(message.state().as_str_name(), "BRANCH_STATE_"),
            branch_id: message.branch_id,
            action: message.action,
            participant: message.participant,
            target: given(message.target),
            address: given(message.address),
            attempts: message.attempts,
            next_attempt_at: moment(message.next_attempt_at),
            last_error: message.last_error.map(|error| AttemptError {
                code: error.code,
                message: error.message,
                at: moment(error.at),
            }),
            resolution: message.resolution.map(|resolution| Resolution {
                operator: resolution.operator,
                reason: resolution.reason,
                at: moment(resolution.at),
            }),
        }
    }
}

/// `TRANSACTION_STATE_TRYING` is `trying`.
pub(super) fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

fn given(text: String) -> Option<String> {
    (!matches!(text.as_str(), "" | "unspecified")).then_some(text)
}

/// RFC 3339, UTC, milliseconds: `2026-11-21T09:14:03.123Z`.
fn moment(at: Option<prost_types::Timestamp>) -> Option<String> {
    let at = Timestamp::from_millisecond(time::millis(&at?)).ok()?;
    Some(format!("{at:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::fixture::samples;

    /// Scripts depend on this shape. A new key is fine; any other change breaks them.
    #[test]
    fn the_shape_stays() {
        let [stuck, cancelled, ..] = samples();
        assert_eq!(
            line(&Transaction::from(stuck)),
            r#"{
  "xid": "3-7-1042-9f3c01d2",
  "name": "checkout",
  "state": "confirming",
  "decision": "confirm",
  "drive": "initiator",
  "labels": {
    "order": "A-1042"
  },
  "stuck": true,
  "timeout_ms": 30000,
  "begun_at": "2026-11-21T09:14:03.123Z",
  "expires_at": "2026-11-21T09:14:33.123Z",
  "decided_at": "2026-11-21T09:14:03.223Z",
  "finished_at": null,
  "cancel": null,
  "branches": [
    {
      "branch_id": "1",
      "action": "order.create",
      "participant": "orders",
      "target": null,
      "address": null,
      "state": "confirmed",
      "attempts": 1,
      "next_attempt_at": null,
      "last_error": null,
      "resolution": null
    },
    {
      "branch_id": "2",
      "action": "points.spend",
      "participant": "points",
      "target": "http://127.0.0.1:7701",
      "address": "http://127.0.0.1:7703",
      "state": "registered",
      "attempts": 9,
      "next_attempt_at": "2026-11-21T09:17:15.123Z",
      "last_error": {
        "code": "UNAVAILABLE",
        "message": "connection refused",
        "at": "2026-11-21T09:17:01.123Z"
      },
      "resolution": null
    },
    {
      "branch_id": "3",
      "action": "mail.send",
      "participant": "mail",
      "target": null,
      "address": null,
      "state": "resolved",
      "attempts": 4,
      "next_attempt_at": null,
      "last_error": null,
      "resolution": {
        "operator": "ann",
        "reason": "mail is gone",
        "at": "2026-11-21T09:16:03.123Z"
      }
    }
  ]
}
"#
        );
        let cancelled = serde_json::to_value(Transaction::from(cancelled)).unwrap();
        assert_eq!(
            cancelled["cancel"],
            serde_json::json!({
                "cause": "refused",
                "reason": "branch 2 refused: OUT_OF_STOCK only 2 left",
                "branch_id": "2",
                "refusal": {
                    "reason": "OUT_OF_STOCK",
                    "domain": "inventory",
                    "message": "only 2 left",
                    "metadata": { "sku": "1042" }
                }
            })
        );
    }

    #[test]
    fn an_empty_answer_is_a_document_too() {
        let list = Transactions::from(pb::ListTransactionsResponse::default());
        assert_eq!(serde_json::to_string(&list).unwrap(), r#"{"transactions":[],"more":false}"#);
        assert!(
            line(&Transaction::from(pb::Transaction::default()))
                .contains(r#""state": "unspecified""#)
        );
    }

    #[test]
    fn moments_that_do_not_exist_are_null() {
        let far = prost_types::Timestamp { seconds: i64::MAX, nanos: 0 };
        assert_eq!(moment(Some(far)), None);
    }
}
