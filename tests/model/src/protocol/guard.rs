//! The rules, each as a guard that can be taken away. With all of them the model must be clean; without any one of them the
//! search must find a story in which something is lost, done twice or split. (Or the rule is superfluous, and should go.)

use std::fmt;

/// What may be taken away. The comment says what holds while it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    // Rule 1: a batch's first statement moves the position from n - 1 to n, and only under its own epoch.
    /// The guard names the epoch.
    EpochInGuard,
    /// The guard names the position. (An abandoned batch may start late: the epoch alone does not keep it out.)
    PositionInGuard,
    /// The guard is a write inside the batch's own local transaction, so it holds the row until COMMIT.
    GuardInsideTransaction,
    /// COMMIT is sent only if the guard has matched its row.
    GuardIsHeeded,
    /// The guard names the nonce: after a failover that lost a takeover, the next takeover gives the same epoch number again.
    NonceInGuard,

    // Rule 2: a batch number never gets other content.
    /// A batch without an answer is sent again as it was, whatever has changed in memory.
    SameBatchAgain,
    /// The repeat has the guard too.
    RepeatIsGuarded,
    /// Whoever looks whether a batch has landed compares the epoch, not the position alone.
    LookComparesEpoch,
    /// And the nonce.
    LookComparesNonce,

    // Rule 3: "not found" after a lost reply proves nothing.
    /// A lost reply is not taken for a failure: the change stays in memory.
    SilenceIsNoFailure,
    /// Nobody is told that it failed.
    SilenceIsNotAnswered,
    /// Nor is it taken for a failure when a read beside the batch does not find it: the batch may be about to commit.
    AbsenceIsNoProof,

    // Rule 4: "no row matched" is looked at before it is believed.
    /// It is not believed to mean "fenced".
    MissIsNoFence,
    /// It is not believed to mean "landed by an earlier attempt".
    MissIsNoLanding,

    // Rule 5: one batch of a partition is under way at a time, unless the guard is the chain of rule 1.
    /// The next batch is sent when the one before is answered.
    OneBatchAtATime,

    // Rule 6: what waits to be written is written once, at its first place in the queue and with its last content.
    /// Last content.
    LastContent,
    /// First place.
    FirstPlace,
    /// What does not fit into one batch goes with the next one, which has its own number.
    PartsHaveOwnNumbers,

    // Rule 7: every start is a takeover.
    /// A start makes the epoch larger, also when the row names this process as its owner.
    StartIsTakeover,
    /// The epoch grows by one from what is in the row when it is written, not from what was read before.
    TakeoverIsOneStatement,
    /// A takeover without an answer is taken again.
    LostTakeoverIsRepeated,

    // Rule 8: loading.
    /// What is read before the takeover committed is not used.
    LoadAfterTakeover,
    /// Those that have no decision are due, too, when their time is over.
    TryingIsDue,
    /// Whoever was fenced starts with empty memory.
    MemoryIsReplaced,
    /// Nothing is called "never recorded" before the store was asked.
    AnswerAfterLook,

    // Rule 9: the first decision wins when it is applied, and has effects when it is durable.
    /// The first decision wins.
    FirstDecisionWins,
    /// It is told when it is durable.
    DecisionToldWhenDurable,
    /// Confirm and Cancel are sent when it is durable.
    PhaseTwoWhenDurable,

    // Rule 10: a branch is durable before its Try is sent.
    /// "Registered" is answered when it is durable.
    RegisteredToldWhenDurable,
    /// What the coordinator drives itself is tried when its branches are durable.
    TryWhenDurable,

    // Rule 11: what is not known is refused.
    /// A decision about a transaction that is in no record.
    UnknownDecideRefused,
    /// A decision about a transaction that is not in memory, without a look into the store.
    MemoryIsNotLastWord,
    /// A branch of a transaction that is in no record.
    UnknownRegisterRefused,

    // Rule 12.
    /// Confirm names exactly the registered branches.
    ConfirmNamesBranches,

    // Rule 13: Cancel goes to every registered branch.
    /// Also to one that refused its Try: a late duplicate of the Try may succeed.
    CancelAlsoToRefused,
    /// None joins after the decision.
    JoinBeforeDecision,
    /// Confirm and Cancel are repeated until acknowledged.
    AcknowledgementsAwaited,

    // Rule 14: "never recorded" means "never confirmed".
    /// An owner says so only of xids of its own epoch and older ones.
    NewerEpochsAreNotOurs,
    /// And only if the nonce of the xid's epoch is the xid's: else it is of another history.
    OtherHistoriesAreNotOurs,
    /// What may have been deleted after its retention is "forgotten".
    PurgeIsRemembered,
    /// An owner that finds the store behind what was acknowledged records that loss before it stops.
    LossIsRecorded,
    /// What was undecided in a store that lost something may have been decided: a person decides, no owner does.
    LostIsNotDecided,

    // Rule 15.
    /// "Undecided" carries no promise: a participant does not cancel on it.
    UndecidedIsNoPromise,

    // Rule 16: memory is a cache.
    /// A transaction leaves memory only when its record tells everything and is durable.
    CleanBeforeLeaving,
    /// A row that was read while its transaction was in memory is the past, and dropped.
    StaleRowDropped,

    // Rule 17, and the fence.
    /// A fence row that is still tried is never deleted.
    TriedRowStays,
    /// None is deleted before the end of phase one, when a late Try is refused for its time.
    RowOutlivesPhaseOne,
    /// A first Try is refused after the end of phase one.
    TryHasDeadline,
    /// A Confirm that finds nothing when its row may have been deleted is done.
    LateConfirmIsDone,
    /// A Cancel of what was not tried is recorded.
    EmptyRollbackRecorded,
    /// A Try after its Cancel is refused.
    LateTryRefused,
    /// A repeat runs nothing.
    RepeatRunsNothing,

    // Rule 18.
    /// The database ends the session of an owner that is gone.
    SilentSessionsEnd,

    // Rule 20: sight. A read counts only if what it shows with the row proves that it is new enough.
    /// The epoch is the reader's own.
    SightEpoch,
    /// The nonce is the reader's own.
    SightNonce,
    /// The position is at least that of the latest batch that the reader knows to be durable.
    SightPosition,

    // Rule 21: a batch changes a row only if the row is what its owner believes. A second line behind sight.
    /// The state is the same.
    RowNamesState,
    /// Also for a batch that only adds a branch.
    RegistrationNamesState,
    /// The number of branches is the same.
    RowNamesBranches,
}

impl Guard {
    /// All of rule 20.
    pub const SIGHT: [Self; 3] = [Self::SightEpoch, Self::SightNonce, Self::SightPosition];

    /// The number of its rule.
    #[must_use]
    pub fn rule(self) -> u8 {
        match self {
            Self::EpochInGuard
            | Self::PositionInGuard
            | Self::GuardInsideTransaction
            | Self::GuardIsHeeded
            | Self::NonceInGuard => 1,
            Self::SameBatchAgain
            | Self::RepeatIsGuarded
            | Self::LookComparesEpoch
            | Self::LookComparesNonce => 2,
            Self::SilenceIsNoFailure | Self::SilenceIsNotAnswered | Self::AbsenceIsNoProof => 3,
            Self::MissIsNoFence | Self::MissIsNoLanding => 4,
            Self::OneBatchAtATime => 5,
            Self::LastContent | Self::FirstPlace | Self::PartsHaveOwnNumbers => 6,
            Self::StartIsTakeover | Self::TakeoverIsOneStatement | Self::LostTakeoverIsRepeated => {
                7
            }
            Self::LoadAfterTakeover
            | Self::TryingIsDue
            | Self::MemoryIsReplaced
            | Self::AnswerAfterLook => 8,
            Self::FirstDecisionWins | Self::DecisionToldWhenDurable | Self::PhaseTwoWhenDurable => {
                9
            }
            Self::RegisteredToldWhenDurable | Self::TryWhenDurable => 10,
            Self::UnknownDecideRefused
            | Self::MemoryIsNotLastWord
            | Self::UnknownRegisterRefused => 11,
            Self::ConfirmNamesBranches => 12,
            Self::CancelAlsoToRefused
            | Self::JoinBeforeDecision
            | Self::AcknowledgementsAwaited => 13,
            Self::NewerEpochsAreNotOurs
            | Self::OtherHistoriesAreNotOurs
            | Self::PurgeIsRemembered
            | Self::LossIsRecorded
            | Self::LostIsNotDecided => 14,
            Self::UndecidedIsNoPromise => 15,
            Self::CleanBeforeLeaving | Self::StaleRowDropped => 16,
            Self::TriedRowStays
            | Self::RowOutlivesPhaseOne
            | Self::TryHasDeadline
            | Self::LateConfirmIsDone
            | Self::EmptyRollbackRecorded
            | Self::LateTryRefused
            | Self::RepeatRunsNothing => 17,
            Self::SilentSessionsEnd => 18,
            Self::SightEpoch | Self::SightNonce | Self::SightPosition => 20,
            Self::RowNamesState | Self::RegistrationNamesState | Self::RowNamesBranches => 21,
        }
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
