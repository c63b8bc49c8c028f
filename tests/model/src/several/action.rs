//! What can happen next.

use std::fmt;

use super::state::Each;

/// One step of a coordinator, or of an abandoned batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "`Display` describes each of them")]
pub enum Action {
    TakeOver(usize, Each<bool>),
    Decide(usize, usize, bool),
    Send(usize, Each<bool>),
    Guard(usize),
    Look(usize),
    Commit(usize),
    Hear(usize),
    LoseConnection(usize),
    Crash(usize),
    GuardAbandoned(usize),
    CommitAbandoned(usize),
    EndAbandoned(usize),
}
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |who: &usize| ["A", "B"][*who];
        let of = |which: &Each<bool>| match which {
            [true, true] => "both partitions",
            [true, false] => "partition 0",
            [false, _] => "partition 1",
        };
        match self {
            Self::TakeOver(who, which) => write!(f, "{} takes over {}", name(who), of(which)),
            Self::Decide(who, partition, confirm) => {
                let decision = if *confirm { "Confirm" } else { "Cancel" };
                write!(f, "{} decides {decision} in partition {partition}", name(who))
            }
            Self::Send(who, which) => write!(f, "{} sends a batch of {}", name(who), of(which)),
            Self::Guard(who) => write!(f, "the guards of {}'s batch run", name(who)),
            Self::Look(who) => write!(f, "{}'s batch looks at epochs and positions", name(who)),
            Self::Commit(who) => write!(f, "{}'s batch commits", name(who)),
            Self::Hear(who) => write!(f, "{} hears what became of its batch", name(who)),
            Self::LoseConnection(who) => {
                write!(f, "the reply to {}'s batch is lost", name(who))
            }
            Self::Crash(who) => write!(f, "{} is killed", name(who)),
            Self::GuardAbandoned(which) => {
                write!(f, "the guards of abandoned batch {which} run")
            }
            Self::CommitAbandoned(which) => write!(f, "abandoned batch {which} commits"),
            Self::EndAbandoned(which) => write!(f, "abandoned batch {which} is rolled back"),
        }
    }
}
