//! Decides what to do with a call, from the branch's record. One `match` contains the whole protocol of a participant.
//!
//! The decision uses no database and no clock. Calls may arrive any number of times, in any order. These must always hold: Try,
//! Confirm and Cancel each take effect at most once; Confirm and Cancel never both take effect; a Try that arrives after its
//! Cancel has no effect.

use crate::branch::Phase;

/// The state in a fence row. The database stores its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Try reserved.
    Tried = 1,
    /// Confirm used the reservation. Final.
    Confirmed = 2,
    /// Cancel released the reservation. Final.
    Cancelled = 3,
    /// Cancel arrived before any Try: an empty rollback. Final. A Try that still arrives is rejected for ever (suspension).
    Suspended = 4,
}

impl State {
    pub(crate) fn from_code(code: i16) -> Option<Self> {
        [Self::Tried, Self::Confirmed, Self::Cancelled, Self::Suspended]
            .into_iter()
            .find(|state| state.code() == code)
    }

    pub(crate) fn code(self) -> i16 {
        self as i16
    }
}

/// What to do with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// The work has not been done: run the author's code.
    Run,
    /// The work was done by an earlier call: give the same answer.
    Repeat,
    /// A Cancel of a branch that was never tried: record it, run nothing, answer "done".
    EmptyRollback,
    /// A Confirm without a row, when the row may have been cleaned up long ago: run nothing, answer "done".
    Forgotten,
    /// A Try that arrives after the branch was tried and cancelled: too late.
    CancelledBefore,
    /// A Try that arrives after an empty rollback: too late.
    Suspension,
    /// A first Try after phase one has ended: too late.
    Expired,
    /// The branch was tried with another payload or for another action. The caller made a mistake; refused.
    Differs,
    /// A Confirm without a Try. The caller made a mistake; refused.
    NeverTried,
    /// A Confirm after a Cancel, or a Cancel after a Confirm. The coordinator is broken; refused.
    OppositeDone,
}

impl Verdict {
    /// The verdict's name in logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Repeat => "repeat",
            Self::EmptyRollback => "empty_rollback",
            Self::Forgotten => "forgotten",
            Self::CancelledBefore => "cancelled_before",
            Self::Suspension => "suspension",
            Self::Expired => "expired",
            Self::Differs => "differs",
            Self::NeverTried => "never_tried",
            Self::OppositeDone => "opposite_done",
        }
    }
}

/// The verdict on a call.
///
/// - `recorded`: the state before this call; `None` if there is no row.
/// - `same`: the call matches the record. A Try must match in action and payload; Confirm and Cancel in the action.
/// - `late`: a first Try has expired, or a Confirm's row may have been cleaned up, by the database's clock. It has no
///   influence if there is a record.
pub(crate) fn verdict(recorded: Option<State>, asked: Phase, same: bool, late: bool) -> Verdict {
    match (recorded, asked) {
        (None, Phase::Try) if late => Verdict::Expired,
        (None, Phase::Try) => Verdict::Run,
        (None, Phase::Confirm) if late => Verdict::Forgotten,
        (None, Phase::Confirm) => Verdict::NeverTried,
        (None, Phase::Cancel) => Verdict::EmptyRollback,

        (Some(State::Tried), Phase::Try | Phase::Confirm | Phase::Cancel) if !same => {
            Verdict::Differs
        }
        (Some(State::Tried), Phase::Try) => Verdict::Repeat,
        (Some(State::Tried), Phase::Confirm | Phase::Cancel) => Verdict::Run,

        (Some(State::Confirmed), Phase::Try) if !same => Verdict::Differs,
        (Some(State::Confirmed), Phase::Try | Phase::Confirm) => Verdict::Repeat,
        (Some(State::Confirmed), Phase::Cancel) => Verdict::OppositeDone,

        (Some(State::Cancelled), Phase::Try) => Verdict::CancelledBefore,
        (Some(State::Cancelled), Phase::Confirm) => Verdict::OppositeDone,
        (Some(State::Cancelled), Phase::Cancel) => Verdict::Repeat,

        (Some(State::Suspended), Phase::Try) => Verdict::Suspension,
        (Some(State::Suspended), Phase::Confirm) => Verdict::OppositeDone,
        (Some(State::Suspended), Phase::Cancel) => Verdict::Repeat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: [Option<State>; 5] = [
        None,
        Some(State::Tried),
        Some(State::Confirmed),
        Some(State::Cancelled),
        Some(State::Suspended),
    ];
    const ASKED: [Phase; 3] = [Phase::Try, Phase::Confirm, Phase::Cancel];

    /// One row for each recorded state; columns Try, Confirm, Cancel.
    #[test]
    fn every_cell_of_the_table() {
        use Verdict::{
            CancelledBefore, Differs, EmptyRollback, Expired, Forgotten, NeverTried, OppositeDone,
            Repeat, Run, Suspension,
        };
        // The same call, not late.
        let same_in_time = [
            [Run, NeverTried, EmptyRollback],
            [Repeat, Run, Run],
            [Repeat, Repeat, OppositeDone],
            [CancelledBefore, OppositeDone, Repeat],
            [Suspension, OppositeDone, Repeat],
        ];
        // A late call differs only if there is no record.
        let mut same_late = same_in_time;
        same_late[0] = [Expired, Forgotten, EmptyRollback];
        // A differing call is refused wherever the same call would use or repeat earlier work.
        let other = |mut table: [[Verdict; 3]; 5]| {
            table[1] = [Differs, Differs, Differs];
            table[2][0] = Differs;
            table
        };
        for (same, late, table) in [
            (true, false, same_in_time),
            (true, true, same_late),
            (false, false, other(same_in_time)),
            (false, true, other(same_late)),
        ] {
            for (recorded, row) in RECORDED.into_iter().zip(table) {
                for (asked, expected) in ASKED.into_iter().zip(row) {
                    let found = verdict(recorded, asked, same, late);
                    assert_eq!(
                        found, expected,
                        "{recorded:?}, asked {asked}, same {same}, late {late}"
                    );
                }
            }
        }
    }

    #[test]
    fn states_keep_their_numbers() {
        for (code, state) in (1..).zip(RECORDED.into_iter().flatten()) {
            assert_eq!(state.code(), code);
            assert_eq!(State::from_code(code), Some(state));
        }
        assert_eq!(State::from_code(0), None);
        assert_eq!(State::from_code(5), None);
    }
}
