//! The rules for batches of several partitions, each as a guard that can be taken away.

/// What may be taken away. The comment says what holds while it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guard {
    /// A batch is applied only if all of its guards have matched.
    AllGuardsMatch,
    /// What does not match is looked at in every partition; one that has landed says nothing of one that is fenced.
    FencedIsLookedForEverywhere,
    /// When a partition is fenced, its rows are dropped from the batch with its guard.
    FencedRowsDropped,
    /// What is left of the batch is sent again: nothing of it was applied.
    RestIsRepeated,
    /// What is left keeps its numbers.
    RestKeepsItsNumbers,
    /// What is left keeps its content.
    RestKeepsItsContent,
}

impl Guard {
    pub(super) const ALL: [Self; 6] = [
        Self::AllGuardsMatch,
        Self::FencedIsLookedForEverywhere,
        Self::FencedRowsDropped,
        Self::RestIsRepeated,
        Self::RestKeepsItsNumbers,
        Self::RestKeepsItsContent,
    ];

    /// The rule of which it is a case.
    pub(super) fn rule(self) -> u8 {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => 1,
            Self::FencedIsLookedForEverywhere
            | Self::RestKeepsItsNumbers
            | Self::RestKeepsItsContent => 2,
            Self::RestIsRepeated => 4,
        }
    }

    /// What must be broken without it.
    pub(super) fn expects(self) -> &'static str {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => "G",
            Self::FencedIsLookedForEverywhere | Self::RestIsRepeated => "I11",
            Self::RestKeepsItsNumbers => "O",
            Self::RestKeepsItsContent => "I11",
        }
    }
}
