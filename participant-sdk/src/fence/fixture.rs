//! Test cases for a small shop with a fence: calls, and their expected results. The shop itself is in `tests/shop.rs`.

use handfast_proto::reason;
use serde::{Deserialize, Serialize};

use crate::{Answer, Branch, Contract, Json, Payload as _, Phase, Xid};

pub(crate) const STOCK: i64 = 10;

/// The arguments of a Try. `how` makes the shop misbehave: `refuse`, `fail`, `attention`, `panic`, `hang`, `long`, `end`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Deduct {
    pub(crate) quantity: i64,
    pub(crate) how: String,
}

pub(crate) struct DeductStock;

impl Contract for DeductStock {
    const NAME: &'static str = "inventory.deduct";
    type Args = Json<Deduct>;
    type Reply = Json<String>;
}

pub(crate) fn payload(quantity: i64) -> Vec<u8> {
    payload_that(quantity, "")
}

pub(crate) fn payload_that(quantity: i64, how: &str) -> Vec<u8> {
    Json(Deduct { quantity, how: how.to_owned() }).encode().unwrap().to_vec()
}

/// Branch 1 of the `n`th transaction.
pub(crate) fn branch(n: u64, phase: Phase) -> Branch {
    let xid = Xid { partition: 3, epoch: 7, sequence: n, nonce: 0x9f3c_01d2 };
    Branch::new(xid, "1".parse().unwrap(), DeductStock::NAME, phase)
}

/// Pieces that are free, held and sold.
pub(crate) type Shelf = (i64, i64, i64);

pub(crate) const UNTOUCHED: Shelf = (STOCK, 0, 0);
const TRIED: Shelf = (STOCK - 2, 2, 0);
const CONFIRMED: Shelf = (STOCK - 2, 0, 2);

/// The earlier calls, the call, its answer, the shelf afterwards, the row's state afterwards.
type Cell = (&'static [Phase], Phase, &'static str, Shelf, Option<&'static str>);

/// The table of the fence, for a branch that takes two pieces.
pub(crate) const CELLS: [Cell; 15] = {
    use Phase::{Cancel, Confirm, Try};
    [
        (&[], Try, "Done", TRIED, Some("tried")),
        (&[], Confirm, reason::NEVER_TRIED, UNTOUCHED, None),
        (&[], Cancel, "Done", UNTOUCHED, Some("suspended")),
        (&[Try], Try, "Done", TRIED, Some("tried")),
        (&[Try], Confirm, "Done", CONFIRMED, Some("confirmed")),
        (&[Try], Cancel, "Done", UNTOUCHED, Some("cancelled")),
        (&[Try, Confirm], Try, "Done", CONFIRMED, Some("confirmed")),
        (&[Try, Confirm], Confirm, "Done", CONFIRMED, Some("confirmed")),
        (&[Try, Confirm], Cancel, reason::OPPOSITE_DONE, CONFIRMED, Some("confirmed")),
        (&[Try, Cancel], Try, reason::CANCELLED_BEFORE, UNTOUCHED, Some("cancelled")),
        (&[Try, Cancel], Confirm, reason::OPPOSITE_DONE, UNTOUCHED, Some("cancelled")),
        (&[Try, Cancel], Cancel, "Done", UNTOUCHED, Some("cancelled")),
        (&[Cancel], Try, reason::CANCELLED_BEFORE, UNTOUCHED, Some("suspended")),
        (&[Cancel], Confirm, reason::OPPOSITE_DONE, UNTOUCHED, Some("suspended")),
        (&[Cancel], Cancel, "Done", UNTOUCHED, Some("suspended")),
    ]
};

/// `Done`, or the reason of the refusal, or the kind of the answer.
pub(crate) fn word(answer: &Answer) -> &str {
    match answer {
        Answer::Done(_) => "Done",
        Answer::Refused(refusal) | Answer::TooLate(refusal) | Answer::NotServed(refusal) => {
            &refusal.reason
        }
        Answer::Unknown(_) => "Unknown",
        Answer::Retry(_) => "Retry",
        Answer::Invalid { field, .. } => field,
    }
}

/// The API of the SDK through which a test makes its calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    Enter,
    Run,
    Action,
    /// As [`Level::Action`], but phase two runs as a batch of one, which does not happen otherwise.
    Batch,
}

pub(crate) const LEVELS: [Level; 4] = [Level::Enter, Level::Run, Level::Action, Level::Batch];
