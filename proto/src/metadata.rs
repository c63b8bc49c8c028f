//! The gRPC metadata keys that carry a global transaction along ordinary calls.

/// Request: the xid that the call belongs to.
pub const XID: &str = "handfast-xid";
/// Request: the branch id that the caller set aside for this call. What the callee registers is named under it: `2.1`.
pub const BRANCH_ID: &str = "handfast-branch-id";
/// Response: the branch ids that the callee registered and tried with success, joined by commas.
pub const BRANCHES: &str = "handfast-branches";
