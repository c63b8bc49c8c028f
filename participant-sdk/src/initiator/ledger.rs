//! What became of the calls of one global transaction, as far as this program knows. From it follows whether to confirm.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
};

use handfast_proto::BranchId;

use crate::error::Refusal;

/// Why a call has no reply. The transaction will be cancelled, also if your closure swallows this error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The participant said no.
    #[error("{action} refused: {refusal}")]
    #[non_exhaustive]
    Refused {
        /// The branch that was refused.
        branch_id: BranchId,
        /// The action that was called.
        action: String,
        /// The reason, as the participant wrote it.
        refusal: Refusal,
    },
    /// It is not known whether the participant has reserved anything.
    #[error("{action} had no clear answer{}: {cause}", match participant.as_str() {
        "" => String::new(),
        name => format!(" from {name}"),
    })]
    #[non_exhaustive]
    Unknown {
        /// The branch that was called.
        branch_id: BranchId,
        /// The participant that was called. Empty: it is not known, because the call was an ordinary one.
        participant: String,
        /// The action that was called.
        action: String,
        /// The answer or error that came instead of a clear answer.
        cause: String,
    },
    /// The branch could not be registered with the coordinator, so its Try was not sent.
    #[error("cannot register with the coordinator, so nothing was tried: {cause}")]
    #[non_exhaustive]
    NotRegistered {
        /// The coordinator's answer, or why there is none.
        cause: String,
    },
    /// The arguments cannot be encoded, or the reply cannot be decoded.
    #[error("{action}: {cause}")]
    #[non_exhaustive]
    Payload {
        /// The action that was called.
        action: String,
        /// The error of the encoder or decoder.
        cause: String,
    },
}

/// How phase one went, as far as the calls tell.
pub(crate) enum Calls {
    /// Every branch has been tried with success.
    Tried(BTreeSet<BranchId>),
    /// At least one call was refused or had no clear answer.
    Failed(CallError),
}

/// See the module's comment.
#[derive(Default)]
pub(super) struct Ledger(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    /// Branches for which a Try was begun: the participant and the action.
    meant: BTreeMap<BranchId, (String, String)>,
    /// Branches whose Try has answered OK, nested ones too.
    tried: BTreeSet<BranchId>,
    /// The first refusal; if there is none, the first failure.
    failed: Option<CallError>,
}

impl Ledger {
    pub(super) fn meant(&self, branch_id: BranchId, participant: &str, action: &str) {
        let called = (participant.to_owned(), action.to_owned());
        self.entries().meant.insert(branch_id, called);
    }

    pub(super) fn tried(&self, branch_id: BranchId) {
        self.entries().tried.insert(branch_id);
    }

    pub(super) fn failed(&self, error: CallError) {
        let mut entries = self.entries();
        let refused = matches!(error, CallError::Refused { .. });
        match &entries.failed {
            None => entries.failed = Some(error),
            Some(CallError::Refused { .. }) => {}
            // A refusal has a reason for programs, so it wins over a failure.
            Some(_) if refused => entries.failed = Some(error),
            Some(_) => {}
        }
    }

    pub(super) fn calls(&self) -> Calls {
        let entries = self.entries();
        if let Some(error) = &entries.failed {
            return Calls::Failed(error.clone());
        }
        match entries.meant.iter().find(|(branch_id, _)| !entries.tried.contains(*branch_id)) {
            None => Calls::Tried(entries.tried.clone()),
            Some((branch_id, (participant, action))) => Calls::Failed(CallError::Unknown {
                branch_id: branch_id.clone(),
                participant: participant.clone(),
                action: action.clone(),
                cause: "the call was abandoned before its answer".to_owned(),
            }),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().expect("nothing panics while it is locked")
    }
}
