//! Checks the promises after a run: by the participants' own counters, and by what callers were told.

use std::collections::{BTreeMap, BTreeSet};

use handfast::Xid;
use handfast_coordinator::transaction::Decision;

use crate::{account::Effects, world::World};

/// What is not resolved, in words. Empty if everything is.
pub(crate) fn unresolved(world: &World) -> Vec<String> {
    let mut left = Vec::new();
    if world.is_busy() {
        left.push("an initiator still waits for a reply".to_owned());
    }
    for global in world.database.open() {
        if world.database.is_lost(global.xid) {
            continue;
        }
        left.push(format!("{} is {:?}", global.xid, global.state));
    }
    for account in &world.accounts {
        let books = account.books();
        for ((xid, branch), effects) in &books.effects {
            let lost = is_lost(world, *xid, effects);
            if effects.reserved > effects.confirmed + effects.released && !lost {
                left.push(format!("{xid} {branch} is reserved at {}", account.name));
            }
        }
    }
    left
}

/// Whether a person must look at the reservations of this transaction. Where batches were lost, nobody knows whether a transaction
/// without a record had one.
fn is_lost(world: &World, xid: Xid, effects: &Effects) -> bool {
    let without_record = effects.at_decision && world.database.recorded(xid).is_none();
    world.database.is_lost(xid) || without_record && world.database.has_lost_batches()
}

/// Whether it was recorded with its decision, and lost before that.
fn is_lost_whole(world: &World, xid: Xid, branches: &[(String, Effects)]) -> bool {
    branches.iter().all(|(_, effects)| effects.at_decision)
        && world.database.recorded(xid).is_none()
}

/// Checks every promise that can be checked at rest.
pub(crate) fn audit(world: &World) {
    let by_xid = effects(world);
    branches(world, &by_xid);
    what_was_told(world, &by_xid);
    keys(world, &by_xid);
    for account in &world.accounts {
        let books = account.books();
        let settled = books.held == 0 || world.database.has_lost_batches();
        if !books.is_conserved() || !settled {
            world.chronicle.violation(
                "I10",
                format!(
                    "the sums of {}: {} {} {}",
                    account.name, books.free, books.held, books.used
                ),
            );
        }
    }
}

type ByXid = BTreeMap<Xid, Vec<(String, Effects)>>;

fn effects(world: &World) -> ByXid {
    let mut by_xid = ByXid::new();
    for account in &world.accounts {
        for ((xid, branch), effects) in &account.books().effects {
            let place = format!("{branch} at {}", account.name);
            by_xid.entry(*xid).or_default().push((place, *effects));
            let lost = is_lost(world, *xid, effects);
            if effects.reserved != effects.confirmed + effects.released && !lost {
                world
                    .chronicle
                    .violation("I5", format!("{xid} {branch} at {}: {effects:?}", account.name));
            }
            if effects.reserved > 0 && account.fence.recorded(*xid, branch) == Some("suspended") {
                world.chronicle.violation(
                    "I9",
                    format!("{xid} {branch} at {} was tried after its Cancel", account.name),
                );
            }
        }
    }
    by_xid
}

/// The branches of a transaction are all confirmed or all released, as decided.
fn branches(world: &World, by_xid: &ByXid) {
    for (xid, branches) in by_xid {
        let confirmed = branches.iter().filter(|(_, effects)| effects.confirmed > 0).count();
        let released = branches.iter().filter(|(_, effects)| effects.released > 0).count();
        if confirmed > 0 && released > 0 {
            world.chronicle.violation("I2", format!("{xid}: {branches:?}"));
        }
        let decision = world.database.decision(*xid);
        if confirmed > 0 && decision != Some(Decision::Confirm) {
            world
                .chronicle
                .violation("I6", format!("{xid} is {decision:?}, and was confirmed: {branches:?}"));
        }
        if released > 0 && decision == Some(Decision::Confirm) {
            world
                .chronicle
                .violation("I6", format!("{xid} is confirmed, and was released: {branches:?}"));
        }
        // Every recorded branch was confirmed at a participant.
        if let Some(global) = world.database.recorded(*xid)
            && decision == Some(Decision::Confirm)
            && !world.database.is_lost(*xid)
            && global.branches.len() != confirmed
        {
            let text = format!(
                "{xid} has {} branches, and {confirmed} were confirmed",
                global.branches.len()
            );
            world.chronicle.violation("I6", text);
        }
    }
}

fn what_was_told(world: &World, by_xid: &ByXid) {
    let confirmed = |xid: &Xid| {
        by_xid
            .get(xid)
            .is_some_and(|branches| branches.iter().any(|(_, effects)| effects.confirmed > 0))
    };
    for (xid, told) in world.all_told() {
        let decision = world.database.decision(xid);
        if told.contains(&Decision::Confirm) && decision != Some(Decision::Confirm) {
            world
                .chronicle
                .violation("I11", format!("{xid} was told confirmed, and is {decision:?}"));
        }
        if told.contains(&Decision::Cancel)
            && (confirmed(&xid) || decision == Some(Decision::Confirm))
        {
            world.chronicle.violation("I4", format!("{xid} was told cancelled, and is confirmed"));
        }
    }
    for xid in world.all_never() {
        let Some(branches) = by_xid.get(&xid) else { continue };
        if !is_lost_whole(world, xid, branches) {
            world
                .chronicle
                .violation("I11", format!("{xid} was told never recorded, and was tried"));
        }
        if confirmed(&xid) {
            let text = format!("{xid} was told never recorded, and is confirmed");
            world.chronicle.violation("I4", text);
        }
    }
}

/// One key has one transaction. (Where transactions are deleted within the run or were lost, a key may be used again.)
fn keys(world: &World, by_xid: &ByXid) {
    if world.mix.retention < world.mix.active {
        return;
    }
    let mut of_order: BTreeMap<u64, BTreeSet<Xid>> = BTreeMap::new();
    for (xid, branches) in by_xid {
        // It reserved, and gave back. A repeat of the order begins another one.
        if is_lost_whole(world, *xid, branches) {
            continue;
        }
        for (_, effects) in branches {
            of_order.entry(effects.order).or_default().insert(*xid);
        }
    }
    let keyed = world.keyed();
    for (order, xids) in of_order.into_iter().filter(|(order, _)| keyed.contains(order)) {
        let lost = xids.iter().any(|xid| world.database.is_lost(*xid));
        if xids.len() > 1 && !lost {
            world.chronicle.violation("I3", format!("order {order} with one key is {xids:?}"));
        }
    }
}
