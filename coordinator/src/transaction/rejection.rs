//! Why a request to change a transaction is rejected.

use handfast_proto::{BranchId, limits};

use super::Decision;

/// Why an event was rejected. The transaction is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// For Decide: the opposite decision stands. For RegisterBranch: there is a decision.
    #[error("{}", match .0 {
        Decision::Confirm => "the transaction has been confirmed",
        Decision::Cancel => "the transaction has been cancelled",
    })]
    AlreadyDecided(Decision),
    /// Confirm did not name exactly the registered branches.
    #[error("Confirm must name exactly the registered branches")]
    BranchesDiffer {
        /// Registered, but not named.
        not_named: Vec<BranchId>,
        /// Named, but not registered.
        not_registered: Vec<BranchId>,
    },
    /// The branch id belongs to a branch with other content.
    #[error("branch {0} is registered already, with other content")]
    BranchTaken(BranchId),
    /// The transaction would have too many branches.
    #[error("a transaction has at most {} branches", limits::BRANCHES_MAX)]
    TooManyBranches,
    /// The carried payloads would be too large in total.
    #[error(
        "the payloads of a transaction have at most {} bytes together",
        limits::PAYLOADS_BYTES_MAX
    )]
    PayloadsTooLarge,
    /// The transaction is coordinator-driven: only the coordinator registers its branches and confirms it.
    #[error(
        "the coordinator drives this transaction itself: its branches come with Execute, and only Cancel may be asked for"
    )]
    CoordinatorDriven,
    /// Operators decide only what may have lost its decision.
    #[error(
        "operators may decide only transactions whose records may be lost; this one is decided by its initiator or its timeout"
    )]
    NotLost,
    /// There is nothing to resolve before the decision.
    #[error("there is no decision yet, so there is nothing to resolve")]
    NotDecided,
    /// The transaction has no such branch.
    #[error("the transaction has no branch {0}")]
    BranchUnknown(BranchId),
    /// The participant has acknowledged the branch.
    #[error("the participant has acknowledged branch {0} itself")]
    AlreadyAcknowledged(BranchId),
}
