//! The variants of the protocol: limits for the clean ones, and the broken property for each missing guard.

use super::{Guard, Protocol, Recording, Scope};
use crate::variant::{Size, Variant};

const MODEL: &str = "protocol";

/// One coordinator, 1 crash, 1 database fault.
const ALONE: Scope = Scope {
    standby: false,
    crashes: 1,
    takeovers: 0,
    faults: 1,
    execute: false,
    nested: false,
    refusals: false,
    forgets: false,
    purge: false,
    cleanup: false,
    others: false,
    old_reads: false,
    failovers: 0,
    losses: false,
    late_notice: false,
    recording: Recording::AtBegin,
    silent_participant: false,
    operators: false,
    lost_before: false,
};
/// A standby takes over from an owner that lives on as a zombie.
const ZOMBIE: Scope = Scope { standby: true, crashes: 0, takeovers: 1, faults: 0, ..ALONE };
/// The same with 1 database fault.
const FAULTY: Scope = Scope { faults: 1, ..ZOMBIE };
/// Memory and store forget.
const FORGETFUL: Scope = Scope { forgets: true, purge: true, ..ALONE };
const CLEANING: Scope = Scope { cleanup: true, ..ALONE };
/// A replica that lags answers some reads.
const LAGGING: Scope = old_reads(ALONE);
/// A failover loses the takeover of an owner that is still alive.
const TWO_HISTORIES: Scope = Scope { standby: true, crashes: 1, faults: 0, failovers: 1, ..ALONE };
/// A failover loses batches of an owner that is still alive.
const LOSSY: Scope = Scope { crashes: 0, faults: 0, failovers: 1, losses: true, ..ALONE };

/// A standby takes over before the owner notices the loss.
const NOTICED_LATE: Scope = Scope { standby: true, takeovers: 1, late_notice: true, ..LOSSY };
/// Operators resolve branches, and the store forgets.
const RESOLVING: Scope = Scope { crashes: 0, faults: 0, operators: true, ..FORGETFUL };

/// An owner that was replaced is cut off with a server that still answers reads. It knows of an earlier loss.
const CUT_OFF: Scope = Scope { lost_before: true, ..old_reads(ZOMBIE) };

/// All variants.
#[must_use]
pub fn variants() -> Vec<Variant> {
    let mut variants = clean();
    variants.extend(broken());
    variants
}

fn clean() -> Vec<Variant> {
    let small = |name: &str, scope| Variant::clean(MODEL, name, Size::Small, Protocol::new(scope));
    let large = |name: &str, scope| Variant::clean(MODEL, name, Size::Large, Protocol::new(scope));
    vec![
        small("one coordinator, 1 crash, 1 database fault", ALONE),
        large("the same with 2 crashes, 2 faults", Scope { crashes: 2, faults: 2, ..ALONE }),
        small("a takeover from a living owner", ZOMBIE),
        small("the same with 1 database fault", FAULTY),
        small(
            "Execute, 2 crashes, 2 faults",
            Scope { execute: true, crashes: 2, faults: 2, ..ALONE },
        ),
        small(
            "Execute, a takeover from a living owner, 1 fault",
            Scope { execute: true, ..FAULTY },
        ),
        small("a nested service registers a branch", Scope { nested: true, ..ALONE }),
        small("a participant refuses", Scope { refusals: true, ..ALONE }),
        small("memory and store forget", FORGETFUL),
        small("the fence forgets, participants inquire", CLEANING),
        small("batches of others, heartbeats", Scope { others: true, ..ALONE }),
        small(
            "memory and store forget, takeover",
            Scope { crashes: 0, faults: 0, standby: true, takeovers: 1, ..FORGETFUL },
        ),
        small("a replica lags, 1 crash, 1 fault", LAGGING),
        small(
            "a replica lags, memory and store forget, 1 crash",
            Scope { faults: 0, ..old_reads(FORGETFUL) },
        ),
        small("a replica lags, a takeover from a living owner", old_reads(ZOMBIE)),
        small("a replaced owner knows of an earlier loss, and is cut off", CUT_OFF),
        small("a failover loses a takeover, 1 crash", TWO_HISTORIES),
        small("a failover loses a takeover, 1 crash, a replica lags", old_reads(TWO_HISTORIES)),
        small("a failover loses batches, 1 crash", Scope { crashes: 1, ..LOSSY }),
        small("a failover loses batches, the fence forgets", Scope { cleanup: true, ..LOSSY }),
        small("a failover loses batches and a takeover", Scope { losses: true, ..TWO_HISTORIES }),
        small("a failover loses batches, a takeover before that is noticed", NOTICED_LATE),
        small(
            "recorded at begin or with the decision, 1 crash",
            Scope { recording: Recording::Mixed, faults: 0, ..ALONE },
        ),
        small("recorded with the decision, 1 crash, 1 fault", at_decision(ALONE)),
        small(
            "recorded with the decision, batches of others, 1 database fault",
            at_decision(Scope { others: true, crashes: 0, ..ALONE }),
        ),
        small("recorded with the decision, a takeover", at_decision(ZOMBIE)),
        small(
            "recorded with the decision, memory and store forget, 1 crash",
            at_decision(Scope { faults: 0, ..FORGETFUL }),
        ),
        small(
            "recorded with the decision, nested, 1 crash",
            at_decision(Scope { nested: true, faults: 0, ..ALONE }),
        ),
        small(
            "recorded with the decision, a participant does not ask, 1 crash",
            at_decision(Scope { silent_participant: true, faults: 0, ..ALONE }),
        ),
        small(
            "recorded with the decision, the fence forgets, 1 crash",
            at_decision(Scope { faults: 0, ..CLEANING }),
        ),
        small("recorded with the decision, operators resolve", at_decision(RESOLVING)),
        small(
            "recorded with the decision, a failover loses batches",
            at_decision(Scope { purge: true, ..LOSSY }),
        ),
        small(
            "recorded with the decision, a failover loses a takeover, 1 crash",
            at_decision(TWO_HISTORIES),
        ),
        large("recorded with the decision, a takeover, 1 fault", at_decision(FAULTY)),
        large(
            "recorded with the decision, a takeover, nested",
            at_decision(Scope { nested: true, ..ZOMBIE }),
        ),
        large(
            "recorded with the decision, memory and store forget, 1 crash, 1 fault",
            at_decision(FORGETFUL),
        ),
        large(
            "recorded with the decision, memory and store forget, takeover",
            at_decision(Scope { crashes: 0, faults: 0, standby: true, takeovers: 1, ..FORGETFUL }),
        ),
        large(
            "recorded with the decision, a replica lags, 1 crash",
            at_decision(old_reads(Scope { faults: 0, ..ALONE })),
        ),
        large(
            "recorded with the decision, a failover loses batches, a takeover before that is noticed",
            at_decision(NOTICED_LATE),
        ),
        large("recorded at begin or with the decision, a takeover, 1 crash", {
            Scope { recording: Recording::Mixed, crashes: 1, ..ZOMBIE }
        }),
        large("a replica lags, memory and store forget, 1 crash, 1 fault", old_reads(FORGETFUL)),
        large("a replica lags, a takeover, 1 fault", old_reads(FAULTY)),
        large(
            "a replica lags, memory and store forget, takeover",
            Scope { crashes: 0, faults: 0, standby: true, takeovers: 1, ..old_reads(FORGETFUL) },
        ),
        large(
            "a replica lags, a takeover, 1 crash, 1 fault",
            old_reads(Scope { crashes: 1, ..FAULTY }),
        ),
        large(
            "a failover loses a takeover, memory forgets",
            Scope { forgets: true, ..TWO_HISTORIES },
        ),
        large(
            "a failover loses batches, 2 crashes, 1 fault",
            Scope { crashes: 2, faults: 1, ..LOSSY },
        ),
        large(
            "a failover loses batches, memory and store forget, 2 crashes",
            Scope { forgets: true, purge: true, crashes: 2, ..LOSSY },
        ),
        large("a takeover, 1 crash, 1 fault", Scope { crashes: 1, ..FAULTY }),
        large("two takeovers (two zombies), 1 fault", Scope { takeovers: 2, ..FAULTY }),
        large("two takeovers, 1 crash", Scope { takeovers: 2, crashes: 1, ..ZOMBIE }),
        large(
            "memory and store forget, takeover, 1 fault",
            Scope { crashes: 0, standby: true, takeovers: 1, ..FORGETFUL },
        ),
        large("the fence forgets, takeover", Scope { cleanup: true, ..ZOMBIE }),
        large(
            "the fence, memory and store forget, nested",
            Scope { nested: true, cleanup: true, ..FORGETFUL },
        ),
        large(
            "Execute, 2 takeovers, 1 crash, 1 fault",
            Scope { execute: true, crashes: 1, takeovers: 2, ..FAULTY },
        ),
    ]
}

const fn at_decision(scope: Scope) -> Scope {
    Scope { recording: Recording::AtDecision, ..scope }
}

const fn old_reads(scope: Scope) -> Scope {
    Scope { old_reads: true, ..scope }
}

fn broken() -> Vec<Variant> {
    use Guard as G;
    let without = |guard: Guard, expects: &'static str, scope: Scope| {
        let model = Protocol::new(scope).without(guard);
        Variant::broken(MODEL, format!("without {guard}"), guard.rule(), expects, model)
    };
    let without_sight_and = |guards: &[Guard], expects: &'static str, scope: Scope| {
        let guards = [guards, &G::SIGHT].concat();
        let model = guards.iter().fold(Protocol::new(scope), |model, guard| model.without(*guard));
        let names: Vec<_> = guards.iter().map(ToString::to_string).collect();
        let name = format!("without {}: {expects}", names.join(", "));
        Variant::broken(MODEL, name, guards[0].rule(), expects, model)
    };
    let execute = |scope| Scope { execute: true, ..scope };
    vec![
        without(G::EpochInGuard, "I2", FAULTY),
        without(G::PositionInGuard, "I2", ALONE),
        without(G::GuardInsideTransaction, "I2", ZOMBIE),
        without(G::GuardIsHeeded, "I2", ZOMBIE),
        without(G::SameBatchAgain, "I2", ALONE),
        without(G::RepeatIsGuarded, "I2", FAULTY),
        without(G::LookComparesEpoch, "I2", FAULTY),
        without(G::SilenceIsNoFailure, "I4", ALONE),
        without(G::SilenceIsNotAnswered, "I4", ALONE),
        without(G::AbsenceIsNoProof, "I4", ALONE),
        without(G::MissIsNoFence, "O", ALONE),
        without(G::MissIsNoLanding, "I2", ZOMBIE),
        {
            let model =
                Protocol::new(ALONE).without(G::OneBatchAtATime).without(G::PositionInGuard);
            let name = "without OneBatchAtATime, and without PositionInGuard".to_owned();
            Variant::broken(MODEL, name, G::OneBatchAtATime.rule(), "I2", model)
        },
        without(G::LastContent, "I2", ALONE),
        without(G::FirstPlace, "I5", Scope { others: true, ..ALONE }),
        without(G::PartsHaveOwnNumbers, "I5", Scope { others: true, ..ALONE }),
        without(G::StartIsTakeover, "I4", ALONE),
        without(G::TakeoverIsOneStatement, "I2", Scope { crashes: 1, ..ZOMBIE }),
        without(G::LostTakeoverIsRepeated, "I4", FAULTY),
        without(G::LoadAfterTakeover, "I2", FAULTY),
        without(G::TryingIsDue, "I5", ALONE),
        without(G::MemoryIsReplaced, "I2", Scope { takeovers: 2, faults: 0, ..ZOMBIE }),
        without(G::AnswerAfterLook, "I4", ALONE),
        without(G::FirstDecisionWins, "I2", ALONE),
        without(G::DecisionToldWhenDurable, "I4", ALONE),
        without(G::PhaseTwoWhenDurable, "I2", ALONE),
        without(G::RegisteredToldWhenDurable, "I5", ALONE),
        without(G::TryWhenDurable, "I5", execute(ALONE)),
        without(G::UnknownDecideRefused, "I4", FORGETFUL),
        without(G::MemoryIsNotLastWord, "I4", FORGETFUL),
        without(G::UnknownRegisterRefused, "I2", FORGETFUL),
        without(G::ConfirmNamesBranches, "L", Scope { nested: true, ..ALONE }),
        without(G::CancelAlsoToRefused, "I5", Scope { refusals: true, ..ALONE }),
        without(G::JoinBeforeDecision, "I5", ALONE),
        without(G::AcknowledgementsAwaited, "I5", ALONE),
        without(G::NewerEpochsAreNotOurs, "I4", ZOMBIE),
        without(G::PurgeIsRemembered, "I4", FORGETFUL),
        without(G::UndecidedIsNoPromise, "I2", Scope { cleanup: true, ..ZOMBIE }),
        without(G::CleanBeforeLeaving, "I2", FORGETFUL),
        without(G::StaleRowDropped, "I4", FORGETFUL),
        without(G::TriedRowStays, "I5", CLEANING),
        without(G::RowOutlivesPhaseOne, "I5", CLEANING),
        without(G::TryHasDeadline, "I5", CLEANING),
        without(G::LateConfirmIsDone, "I6", CLEANING),
        without(G::EmptyRollbackRecorded, "I5", ALONE),
        without(G::LateTryRefused, "I5", ALONE),
        without(G::RepeatRunsNothing, "I3", ALONE),
        without(G::SilentSessionsEnd, "I6", ALONE),
        without(G::NonceInGuard, "I2", TWO_HISTORIES),
        without(G::LookComparesNonce, "I4", TWO_HISTORIES),
        without(G::OtherHistoriesAreNotOurs, "I4", old_reads(TWO_HISTORIES)),
        without(G::LossIsRecorded, "I4", LOSSY),
        without(G::LostIsNotDecided, "I4", LOSSY),
        without(G::LostToldAfterBatch, "I4", CUT_OFF),
        without(G::LossEndsOwnership, "I4", NOTICED_LATE),
        without(G::SightEpoch, "I4", LAGGING),
        without(G::SightNonce, "I4", TWO_HISTORIES),
        without(G::SightPosition, "I4", old_reads(FORGETFUL)),
        without_sight_and(&[G::RowNamesState], "I7", old_reads(FORGETFUL)),
        without_sight_and(&[G::RowNamesState], "I2", old_reads(FORGETFUL)),
        without_sight_and(&[G::RegistrationNamesState], "J", old_reads(FORGETFUL)),
        without_sight_and(&[G::RowNamesBranches], "I5", Scope { faults: 0, ..LAGGING }),
        // With rule 21 alone no decision changes, but a correct owner stops, and a confirmed transaction is denied.
        without_sight_and(&[], "O", LAGGING),
        without_sight_and(&[], "I4", LAGGING),
        without(G::HandedOverIsOrdinary, "R", at_decision(ALONE)),
        without(G::OnlyWhileStoreAnswers, "S", at_decision(Scope { others: true, ..ALONE })),
        without(G::ReservationsAsk, "I5", at_decision(ALONE)),
        without(G::OnlyWhereAllAsk, "I5", at_decision(Scope { silent_participant: true, ..ALONE })),
        {
            let nested = at_decision(Scope { nested: true, ..ALONE });
            let model = Protocol::new(nested)
                .without(G::AnswerIsAboutBranch)
                .without(G::HandedOverIsOrdinary);
            let name = "without AnswerIsAboutBranch, and without HandedOverIsOrdinary".to_owned();
            Variant::broken(MODEL, name, G::AnswerIsAboutBranch.rule(), "I5", model)
        },
        without(G::ForgottenGivesBack, "I5", at_decision(FORGETFUL)),
        without(G::ResolutionsAreKept, "I1", at_decision(RESOLVING)),
        without(G::LostIsNotForgotten, "I4", at_decision(LOSSY)),
        without(G::InitiatorOnlyNudges, "I3", at_decision(ALONE)),
        without(G::NudgeIsAQuestion, "I2", at_decision(ALONE)),
    ]
}
