//! The rules, as guards that can be removed. With all guards the model must be clean. Without any one of them the search must find a
//! story in which something is lost, done twice or split. (Otherwise the guard is superfluous and should go.)

use std::fmt;

/// What can be removed. Each comment says what holds while the guard is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    // Rule 1: the first statement of a batch moves the position from n - 1 to n, only within the owner's epoch.
    /// The guard names the epoch.
    EpochInGuard,
    /// The guard names the position. (An abandoned batch may start late, and the epoch alone would let it through.)
    PositionInGuard,
    /// The guard is a write inside the batch's own local transaction, so it holds the row until COMMIT.
    GuardInsideTransaction,
    /// COMMIT is sent only if the guard has matched its row.
    GuardIsHeeded,
    /// The guard names the nonce. After a failover that lost a takeover, the next takeover gives the same epoch number again.
    NonceInGuard,

    // Rule 2: a batch number never gets other content.
    /// A batch without a reply is sent again unchanged, whatever has changed in memory.
    SameBatchAgain,
    /// The repeated batch has the guard too.
    RepeatIsGuarded,
    /// An owner that looks whether its batch has landed compares the epoch, not only the position.
    LookComparesEpoch,
    /// It also compares the nonce.
    LookComparesNonce,

    // Rule 3: "not found" after a lost reply proves nothing.
    /// A lost reply does not count as a failure: the change stays in memory.
    SilenceIsNoFailure,
    /// No caller is told that the change failed.
    SilenceIsNotAnswered,
    /// A read on another connection that does not find the change proves nothing: the batch may be about to commit.
    AbsenceIsNoProof,

    // Rule 4: after "no row matched" the batch reads the partition's row.
    /// "No row matched" alone does not mean "fenced".
    MissIsNoFence,
    /// "No row matched" alone does not mean "landed in an earlier attempt".
    MissIsNoLanding,

    // Rule 5: one batch of a partition is in flight at a time, unless the guards are chained as in rule 1.
    /// The next batch is sent after the reply to the one before.
    OneBatchAtATime,

    // Rule 6: a transaction that changes again while it waits is written once: at its first place, with its last content.
    /// It is written with its last content.
    LastContent,
    /// It keeps its first place in the queue.
    FirstPlace,
    /// If one batch is too small, the rest goes into the next batch, which has a number of its own.
    PartsHaveOwnNumbers,

    // Rule 7: every start is a takeover.
    /// A start raises the epoch, even if the row names this process as the owner.
    StartIsTakeover,
    /// The takeover adds one to the epoch in the row, not to an epoch that was read before.
    TakeoverIsOneStatement,
    /// A takeover without a reply is repeated.
    LostTakeoverIsRepeated,

    // Rule 8: loading.
    /// A row that was read before the takeover committed is not used.
    LoadAfterTakeover,
    /// Undecided transactions are due too, when their time is over.
    TryingIsDue,
    /// A process that was fenced starts with empty memory.
    MemoryIsReplaced,
    /// The owner looks into the store before it says "never recorded".
    AnswerAfterLook,

    // Rule 9: the first decision wins when it is applied, and has effects when it is durable.
    /// The first decision wins.
    FirstDecisionWins,
    /// Callers are told the decision when it is durable.
    DecisionToldWhenDurable,
    /// Confirm and Cancel are sent when the decision is durable.
    PhaseTwoWhenDurable,

    // Rule 10: a branch is durable before its Try is sent.
    /// The reply "registered" leaves when the branch is durable.
    RegisteredToldWhenDurable,
    /// Under Execute, the coordinator sends Try when the branches are durable.
    TryWhenDurable,

    // Rule 11: calls for unknown transactions are refused.
    /// Decide is refused for a transaction without a record.
    UnknownDecideRefused,
    /// Decide for a transaction that is not in memory first reads the store.
    MemoryIsNotLastWord,
    /// RegisterBranch is refused for a transaction without a record.
    UnknownRegisterRefused,

    // Rule 12.
    /// Confirm names exactly the registered branches.
    ConfirmNamesBranches,

    // Rule 13: Cancel goes to every registered branch.
    /// Cancel goes also to a branch that refused its Try: a late duplicate of the Try may succeed.
    CancelAlsoToRefused,
    /// No branch joins after the decision.
    JoinBeforeDecision,
    /// Confirm and Cancel are repeated until acknowledged.
    AcknowledgementsAwaited,

    // Rule 14: "never recorded" means "never confirmed".
    /// An owner says so only of xids of its own epoch and older epochs.
    NewerEpochsAreNotOurs,
    /// An owner says so only if its history has the xid's epoch with the xid's nonce.
    OtherHistoriesAreNotOurs,
    /// A transaction that the purge may have deleted is "forgotten".
    PurgeIsRemembered,
    /// An owner that finds acknowledged changes lost records the loss before it stops.
    LossIsRecorded,
    /// Whoever records a loss also ends the present ownership. Its owner took over before the loss was known, and would decide what it
    /// has read.
    LossEndsOwnership,
    /// An owner says "lost" only after a batch that it sent after the read is durable. So nobody has replaced it, and the xid is of no
    /// newer owner.
    LostToldAfterBatch,
    /// After a loss a row that says "trying" may have had a decision. No owner decides it again; a person must look.
    LostIsNotDecided,

    // Rule 15.
    /// "Undecided" carries no promise: a participant does not cancel on it.
    UndecidedIsNoPromise,

    // Rule 16: memory is a cache.
    /// A transaction leaves memory only when its durable record equals its memory.
    CleanBeforeLeaving,
    /// A row is dropped if its transaction left memory after the read began.
    StaleRowDropped,

    // Rule 17, and the fence.
    /// A fence row in state tried is never deleted.
    TriedRowStays,
    /// No fence row is deleted before phase one is over: from then on its deadline keeps a late Try out.
    RowOutlivesPhaseOne,
    /// A first Try is refused after the end of phase one.
    TryHasDeadline,
    /// A Confirm that finds no row is answered done if the row may have been deleted.
    LateConfirmIsDone,
    /// A Cancel without a Try is recorded.
    EmptyRollbackRecorded,
    /// A Try after its Cancel is refused.
    LateTryRefused,
    /// A repeat runs nothing.
    RepeatRunsNothing,

    // Rule 18.
    /// The database ends the session of an owner that is gone.
    SilentSessionsEnd,

    // Rule 20: sight. A read counts only if it shows the partition's row too, and that row proves that it is new enough.
    /// The epoch is the reader's.
    SightEpoch,
    /// The nonce is the reader's.
    SightNonce,
    /// The position is at least that of the latest batch that the reader knows to be durable.
    SightPosition,

    // Rule 21: a batch changes a row only if the row is as its owner believes. This is a second line behind sight.
    /// The statement names the state that the row must have.
    RowNamesState,
    /// So does the statement of a batch that only adds branches.
    RegistrationNamesState,
    /// The statement names the number of branches that the row must have.
    RowNamesBranches,

    // Rule 22: a registration is answered from memory only while no batch with its transaction was sent, and no row of it was read.
    /// Once its row is handed to the journal, a transaction is an ordinary one: registrations are answered when durable.
    HandedOverIsOrdinary,
    /// From memory only while the store answers. (Otherwise an owner that is cut off makes reservations without end.)
    OnlyWhileStoreAnswers,

    // Rule 23: a reservation asks for its branch until it is answered.
    /// It asks.
    ReservationsAsk,
    /// A branch whose participant does not ask is durable before it is answered.
    OnlyWhereAllAsk,

    // Rule 24: the answer is about the branch.
    /// Confirmed without the branch: it may be given back. (A second line behind rule 22.)
    AnswerIsAboutBranch,
    /// "Forgotten": a branch that is still tried may be given back.
    ForgottenGivesBack,
    /// A branch that an operator has resolved is answered so for ever.
    ResolutionsAreKept,
    /// A transaction whose record may be lost is not called forgotten.
    LostIsNotForgotten,

    // Rule 25: the initiator cancels nothing itself.
    /// It only tells participants to ask.
    InitiatorOnlyNudges,
    /// The participant asks, and acts on the answer.
    NudgeIsAQuestion,
}

impl Guard {
    /// All guards of rule 20.
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
            | Self::LossEndsOwnership
            | Self::LostToldAfterBatch
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
            Self::HandedOverIsOrdinary | Self::OnlyWhileStoreAnswers => 22,
            Self::ReservationsAsk | Self::OnlyWhereAllAsk => 23,
            Self::AnswerIsAboutBranch
            | Self::ForgottenGivesBack
            | Self::ResolutionsAreKept
            | Self::LostIsNotForgotten => 24,
            Self::InitiatorOnlyNudges | Self::NudgeIsAQuestion => 25,
        }
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
