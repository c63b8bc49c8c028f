//! Deliberate bugs, to prove that the test tools find bugs. One bug at a time can be planted at run time, and only in a
//! program built with the cargo feature `planted-bugs`. No release has this feature. Without it, every check is the constant `false`.

/// A safeguard that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Decisions are reported, and phase two begins, before they are durable.
    DecideBeforeDurable = 1,
    /// The store accepts batches from coordinators that no longer own the partition.
    SkipEpochCheck = 2,
    /// Transactions that are undecided after a restart are never finished.
    ForgetTrying = 3,
    /// A participant does not record a Cancel that arrived before its Try.
    DropEmptyRollback = 4,
    /// An initiator that got no answer to its Confirm reports "cancelled".
    UnknownIsRefused = 5,
    /// A read is trusted although it misses records that are known to be durable.
    BelieveOldRead = 6,
    /// A store that has lost batches is trusted about the time before the loss.
    ForgetLoss = 7,
    /// Old transactions are deleted although the store's clock contradicts this machine's.
    BelieveClock = 8,
    /// A participant does not ask about reservations whose transaction may be lost.
    NeverAsk = 9,
    /// A participant that is told to ask gives its reservation back instead.
    BelieveNudge = 10,
}

impl Bug {
    /// All bugs, with their names on the command line.
    pub const ALL: [(&'static str, Self); 10] = [
        ("decide-before-durable", Self::DecideBeforeDurable),
        ("skip-epoch-check", Self::SkipEpochCheck),
        ("forget-trying", Self::ForgetTrying),
        ("drop-empty-rollback", Self::DropEmptyRollback),
        ("unknown-is-refused", Self::UnknownIsRefused),
        ("believe-old-read", Self::BelieveOldRead),
        ("forget-loss", Self::ForgetLoss),
        ("believe-clock", Self::BelieveClock),
        ("never-ask", Self::NeverAsk),
        ("believe-nudge", Self::BelieveNudge),
    ];

    /// Whether this bug is planted in this process.
    #[must_use]
    pub fn is_planted(self) -> bool {
        #[cfg(feature = "planted-bugs")]
        return PLANTED.load(std::sync::atomic::Ordering::Relaxed) == self as u8;
        #[cfg(not(feature = "planted-bugs"))]
        false
    }

    /// Plants this bug until the process ends.
    #[cfg(feature = "planted-bugs")]
    pub fn plant(self) {
        PLANTED.store(self as u8, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(feature = "planted-bugs")]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);
