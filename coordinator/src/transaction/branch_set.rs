//! A set of branches of one transaction, as small as a number.

/// A set of branches of one transaction: one bit for each index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BranchSet(u64);

impl BranchSet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// The set of one branch. `index` is below `limits::BRANCHES_MAX`.
    #[must_use]
    pub fn only(index: usize) -> Self {
        Self(1 << index)
    }

    /// The branches that are in either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the branch at `index` is in the set.
    #[must_use]
    pub fn contains(self, index: usize) -> bool {
        self.0 & (1 << index) != 0
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The number of branches in the set.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The indexes, in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |index| self.contains(*index))
    }
}
