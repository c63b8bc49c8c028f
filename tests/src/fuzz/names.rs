//! Fuzzes xids and branch ids. An accepted text must print unchanged, and any other text must be refused.

use std::str::FromStr;

use handfast_proto::{BranchId, Xid};

use super::Round;

pub(super) fn play(round: &mut Round) {
    while round.next() {
        let random = &mut round.random;
        let mut text =
            random.text_of(&["3-7-1042-9f3c01d2", "0-0-0-00000000", "2.1", "a-b_c.9"]).into_bytes();
        if random.once_in(2) {
            random.bend(&mut text);
        }
        let bytes: [u8; 16] = random.bytes(16).try_into().expect("16 were asked for");
        let text = String::from_utf8_lossy(&text).into_owned();
        let xid = Xid::from_str(&text).ok();
        let branch_id = BranchId::from_str(&text).ok();
        round.accepted(xid.is_some() || branch_id.is_some());
        if xid.is_some_and(|xid| xid.to_string() != text || Xid::from_bytes(xid.to_bytes()) != xid)
            || branch_id.is_some_and(|id| id.as_str() != text)
        {
            round.found(format!("{text:?} reads as something else"));
        }
        let xid = Xid::from_bytes(bytes);
        if xid.to_bytes() != bytes || xid.to_string().parse() != Ok(xid) {
            round.found(format!("{xid} does not read back"));
        }
    }
}
