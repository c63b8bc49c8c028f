//! The gRPC metadata keys that carry a global transaction along ordinary calls.

/// Request: the xid of the transaction that the call belongs to.
pub const XID: &str = "handfast-xid";
/// Request: the branch id that the caller reserved for this call. The callee's branches are numbered below it: `2.1`.
pub const BRANCH_ID: &str = "handfast-branch-id";
/// Request: the transaction is recorded with its decision. There is no such key otherwise.
pub const AT_DECISION: &str = "handfast-at-decision";
/// Response: the ids of the branches that the callee registered and whose Try succeeded, joined by commas.
pub const BRANCHES: &str = "handfast-branches";
