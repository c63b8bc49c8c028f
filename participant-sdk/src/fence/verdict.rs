//! What to do with a call, from what is recorded of its branch: the whole protocol of a participant in one `match`.
//!
//! Nothing is touched here: no database, no clock. Whatever arrives, however often and in whatever order, these must hold:
//! the effect of Try, of Confirm and of Cancel each happens at most once; Confirm and Cancel never both; and a Try that comes
//! after its Cancel has no effect.

use crate::branch::Phase;

/// What the fence row says was done. Its number is what the database keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Try reserved.
    Tried = 1,
    /// Confirm used the reservation. Final.
    Confirmed = 2,
    /// Cancel released the reservation. Final.
    Cancelled = 3,
    /// Cancel came and there was no reservation: an empty rollback. Final; a Try that still comes is suspended for good.
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
    /// Nobody has done it: the author's code must run.
    Run,
    /// It was done before: answer the same.
    Repeat,
    /// A Cancel of what was never tried: record that, run nothing, answer done.
    EmptyRollback,
    /// A Confirm of what may have been confirmed so long ago that the row has been cleaned up: run nothing, answer done.
    Forgotten,
    /// A Try after the Cancel of an earlier delivery of it: too late.
    CancelledBefore,
    /// A Try after a Cancel that found nothing: too late.
    Suspension,
    /// A first Try after the end of phase one: too late.
    Expired,
    /// The branch was tried with another payload, or for another action: a mistake of the caller. Refused.
    Differs,
    /// A Confirm and no Try: a mistake of the caller. Refused.
    NeverTried,
    /// A Confirm of what was cancelled, or a Cancel of what was confirmed: a broken coordinator. Refused.
    OppositeDone,
}

impl Verdict {
    /// The word in logs.
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
/// - `recorded`: what was there before the call; `None` is nothing.
/// - `same`: the call agrees with the record. Of a Try: action and payload; of Confirm and Cancel: the action.
/// - `late`: by the clock of the fence's database, a first Try has expired, or a Confirm may have been forgotten. What is
///   recorded is answered from the record, whatever the time.
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

    /// The table of the design, row by row: recorded; asked Try, Confirm, Cancel.
    #[test]
    fn every_cell_of_the_table() {
        use Verdict::{
            CancelledBefore, Differs, EmptyRollback, Expired, Forgotten, NeverTried, OppositeDone,
            Repeat, Run, Suspension,
        };
        // The same call, in time.
        let same_in_time = [
            [Run, NeverTried, EmptyRollback],
            [Repeat, Run, Run],
            [Repeat, Repeat, OppositeDone],
            [CancelledBefore, OppositeDone, Repeat],
            [Suspension, OppositeDone, Repeat],
        ];
        // What changes if it comes late: only what has no record.
        let mut same_late = same_in_time;
        same_late[0] = [Expired, Forgotten, EmptyRollback];
        // What changes if it is another call: whatever would use or repeat what the first one did.
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
