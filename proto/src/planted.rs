//! Bugs on purpose. A machine that is to find bugs must be seen to find some, so seven can be planted here, one at a time, in a
//! program that was built for it: with the cargo feature `planted-bugs`, which no release has, and told to at run time. Without
//! the feature nothing of this is compiled: every question is a constant no.

/// A guard that is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Decisions are told, and phase two begins, before they are durable.
    DecideBeforeDurable = 1,
    /// The store takes batches of owners that have been replaced.
    SkipEpochCheck = 2,
    /// What is found undecided after a restart is left alone.
    ForgetTrying = 3,
    /// A participant does not remember a Cancel that came before its Try.
    DropEmptyRollback = 4,
    /// An initiator that has no answer to its Confirm says cancelled.
    UnknownIsRefused = 5,
    /// A read is believed although it does not show what is known to be durable.
    BelieveOldRead = 6,
    /// A store that has lost batches is believed in what it says, and in what it does not say, about the time before.
    ForgetLoss = 7,
}

impl Bug {
    /// All of them, by the names that people type.
    pub const ALL: [(&'static str, Self); 7] = [
        ("decide-before-durable", Self::DecideBeforeDurable),
        ("skip-epoch-check", Self::SkipEpochCheck),
        ("forget-trying", Self::ForgetTrying),
        ("drop-empty-rollback", Self::DropEmptyRollback),
        ("unknown-is-refused", Self::UnknownIsRefused),
        ("believe-old-read", Self::BelieveOldRead),
        ("forget-loss", Self::ForgetLoss),
    ];

    /// Whether it was planted in this process.
    #[must_use]
    pub fn is_planted(self) -> bool {
        #[cfg(feature = "planted-bugs")]
        return PLANTED.load(std::sync::atomic::Ordering::Relaxed) == self as u8;
        #[cfg(not(feature = "planted-bugs"))]
        false
    }

    /// Plants it, for the rest of this process.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(self) {
        PLANTED.store(self as u8, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(feature = "planted-bugs")]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);
