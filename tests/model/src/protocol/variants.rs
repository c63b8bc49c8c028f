//! How much happens in each variant of the protocol, and what breaks when a guard is missing.

use super::{Guard, Protocol, Scope};
use crate::variant::{Size, Variant};

const MODEL: &str = "protocol";

/// One coordinator; it is killed once, and the database fails it once.
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
};
/// A standby takes over from an owner that lives on as a zombie.
const ZOMBIE: Scope = Scope { standby: true, crashes: 0, takeovers: 1, faults: 0, ..ALONE };
/// The same, and the database fails somebody once.
const FAULTY: Scope = Scope { faults: 1, ..ZOMBIE };
/// Everything that lets go of something.
const FORGETFUL: Scope = Scope { forgets: true, purge: true, ..ALONE };
const CLEANING: Scope = Scope { cleanup: true, ..ALONE };

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

fn broken() -> Vec<Variant> {
    use Guard as G;
    let without = |guard: Guard, expects: &'static str, scope: Scope| {
        let model = Protocol::new(scope).without(guard);
        Variant::broken(MODEL, format!("without {guard}"), guard.rule(), expects, model)
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
    ]
}
