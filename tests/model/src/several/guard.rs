//! The rules for batches of several partitions, as guards that can be removed.

/// What can be removed. Each comment says what holds while the guard is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guard {
    /// A batch is applied only if all of its guards have matched.
    AllGuardsMatch,
    /// If a guard does not match, every partition is looked at. That one has landed says nothing about one that is fenced.
    FencedIsLookedForEverywhere,
    /// The rows of a fenced partition are dropped from the batch together with its guard.
    FencedRowsDropped,
    /// The rest of the batch is sent again, because nothing of it was applied.
    RestIsRepeated,
    /// The rest keeps its numbers.
    RestKeepsItsNumbers,
    /// The rest keeps its content.
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

    /// The number of its rule.
    pub(super) fn rule(self) -> u8 {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => 1,
            Self::FencedIsLookedForEverywhere
            | Self::RestKeepsItsNumbers
            | Self::RestKeepsItsContent => 2,
            Self::RestIsRepeated => 4,
        }
    }

    /// The property that is broken without it, by the start of its name.
    pub(super) fn expects(self) -> &'static str {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => "G",
            Self::FencedIsLookedForEverywhere | Self::RestIsRepeated => "I11",
            Self::RestKeepsItsNumbers => "O",
            Self::RestKeepsItsContent => "I11",
        }
    }
}
