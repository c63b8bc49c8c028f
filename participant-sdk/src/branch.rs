//! Which branch of which global transaction a call is about, and what is asked of it.

use std::{collections::BTreeMap, fmt};

use handfast_proto::{BranchId, Xid, limits, time, v1};

/// What is asked of a participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Reserve.
    Try,
    /// Use what was reserved.
    Confirm,
    /// Release what was reserved, if anything was.
    Cancel,
}

impl Phase {
    /// `try`, `confirm` or `cancel`, as in logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Try => "try",
            Self::Confirm => "confirm",
            Self::Cancel => "cancel",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One call to a participant: everything but its payload.
///
/// A [`Participant`](crate::Participant) reads it from the request. If your calls come in another way, make one with
/// [`Branch::new`] and fill in the other fields.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Branch {
    /// The global transaction.
    pub xid: Xid,
    /// The branch within it. Together with the xid it names the fence row, so repeats of a call must bring the same two.
    pub branch_id: BranchId,
    /// What to do: [`Contract::NAME`](crate::Contract::NAME).
    pub action: String,
    /// Which of the three is asked for.
    pub phase: Phase,
    /// Counts the calls of this phase, from 1. For logs; nothing depends on it.
    pub attempt: u32,
    /// The end of phase one, UTC milliseconds since 1970. A Try that was not seen before has no effect after it. `None`: the
    /// caller named none, and a Try may arrive as late as it likes.
    pub expires_at: Option<i64>,
    /// What the initiator wrote on the global transaction. For people and logs.
    pub labels: BTreeMap<String, String>,
    /// To a Try: the transaction is recorded with its decision, so it may be lost without a Cancel. The fence remembers it, and the
    /// participant asks about the branch from `expires_at` on.
    pub at_decision: bool,
}

impl Branch {
    /// The first attempt of a call that does not expire.
    #[must_use]
    pub fn new(xid: Xid, branch_id: BranchId, action: impl Into<String>, phase: Phase) -> Self {
        Self {
            xid,
            branch_id,
            action: action.into(),
            phase,
            attempt: 1,
            expires_at: None,
            labels: BTreeMap::new(),
            at_decision: false,
        }
    }

    /// Reads the context that a gRPC request carries.
    ///
    /// # Errors
    ///
    /// When a field is missing or is not what it should be; the error names the field.
    pub fn from_context(
        context: Option<v1::BranchContext>,
        phase: Phase,
    ) -> Result<Self, InvalidBranch> {
        fn field(field: &'static str, message: impl fmt::Display) -> InvalidBranch {
            InvalidBranch { field, message: message.to_string() }
        }
        let context = context.ok_or_else(|| field("context", "is missing"))?;
        let at_decision = context.record() == v1::Record::AtDecision;
        if context.action.is_empty() || context.action.len() > limits::ACTION_BYTES_MAX {
            let message = format!(
                "has {} bytes; the name of an action has 1 to {}",
                context.action.len(),
                limits::ACTION_BYTES_MAX
            );
            return Err(field("context.action", message));
        }
        Ok(Self {
            xid: context.xid.parse().map_err(|error| field("context.xid", error))?,
            branch_id: (context.branch_id.parse())
                .map_err(|error| field("context.branch_id", error))?,
            action: context.action,
            phase,
            attempt: context.attempt.max(1),
            expires_at: context.expires_at.as_ref().map(time::millis),
            labels: context.labels,
            at_decision,
        })
    }
}

/// A call does not say which branch it is about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
#[non_exhaustive]
pub struct InvalidBranch {
    /// The path of the field in the request.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> v1::BranchContext {
        v1::BranchContext {
            xid: "3-7-1042-9f3c01d2".to_owned(),
            branch_id: "2.1".to_owned(),
            action: "inventory.deduct".to_owned(),
            attempt: 0,
            expires_at: Some(time::timestamp(1_700_000_000_123)),
            labels: BTreeMap::from([("order".to_owned(), "77".to_owned())]),
            record: v1::Record::AtDecision.into(),
        }
    }

    #[test]
    fn a_context_is_read() {
        let branch = Branch::from_context(Some(context()), Phase::Cancel).unwrap();
        assert_eq!(branch.xid.to_string(), "3-7-1042-9f3c01d2");
        assert_eq!(branch.branch_id.as_str(), "2.1");
        assert_eq!(branch.phase, Phase::Cancel);
        assert_eq!(branch.attempt, 1, "a caller that does not count makes its first attempt");
        assert_eq!(branch.expires_at, Some(1_700_000_000_123));
        assert_eq!(branch.labels["order"], "77");
        assert!(branch.at_decision);
        let older = v1::BranchContext { record: 0, ..context() };
        assert!(!Branch::from_context(Some(older), Phase::Try).unwrap().at_decision);
    }

    #[test]
    fn an_error_names_the_field() {
        let wrong = |change: fn(&mut v1::BranchContext)| {
            let mut context = context();
            change(&mut context);
            Branch::from_context(Some(context), Phase::Try).unwrap_err().field
        };
        assert_eq!(Branch::from_context(None, Phase::Try).unwrap_err().field, "context");
        assert_eq!(wrong(|context| context.xid.clear()), "context.xid");
        assert_eq!(wrong(|context| context.branch_id.push('!')), "context.branch_id");
        assert_eq!(wrong(|context| context.action.clear()), "context.action");
        assert_eq!(wrong(|context| context.action = "a".repeat(129)), "context.action");
    }
}
