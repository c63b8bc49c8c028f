/// What is wrong with a branch's record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum BranchDamage {
    /// It has a payload to carry, which is not there.
    #[error("its payload is missing")]
    NoPayload,
    /// The same, of the payload's content type.
    #[error("the type of its payload is missing")]
    NoPayloadType,
    /// A later version has recorded this kind of branch.
    #[error("this version does not know its kind")]
    UnknownKind(String),
}
