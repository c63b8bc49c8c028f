//! The laws of an action. Whatever the network does, a branch ends in one of two ways: confirmed, once; or as if it had never been.
//!
//! Here Try, Confirm and Cancel are delivered in every order that can happen: repeated, late, side by side, and with the author's
//! future dropped in the middle. Each story is played in a new world, and the world's state must be one of the two in the end. The
//! same holds for two branches whose phase two comes in one batch.

mod play;
mod world;

use std::fmt::Debug;

use bytes::Bytes;

use crate::{Contract, Payload, Phase};

use play::{Play, Step};

pub use world::World;

/// More places at which one call can be dropped than any author's code has.
const SUSPENSIONS_MAX: usize = 1000;
/// A call must end this often in a row before its nth suspension, to count as one that has fewer than n.
const THROUGH: usize = 3;
/// How often stories with calls side by side are played: which call is first is up to chance.
const ROUNDS: usize = 10;

/// What was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Report {
    /// Stories that were played, each in a world of its own.
    pub stories: usize,
    /// Calls that were delivered in them.
    pub deliveries: usize,
    /// Calls that were given up in the middle.
    pub given_up: usize,
}

/// An action breaks a law.
#[derive(Debug, thiserror::Error)]
#[error(
    "{action} breaks a law.\n  story:    {story}\n  law:      {law}\n  expected: {expected}\n  found:    {found}"
)]
#[non_exhaustive]
pub struct BrokenLaw {
    /// Of which action.
    pub action: String,
    /// What was delivered.
    pub story: String,
    /// What must hold.
    pub law: String,
    /// What was to be found.
    pub expected: String,
    /// What was found.
    pub found: String,
}

/// Checks the action `C` with these arguments, in worlds that `new_world` makes: all alike, each with an action that can be tried
/// at least twice. `invariant` must hold in every state, also in the middle of a transaction.
///
/// # Errors
///
/// With the first law that is broken, and the story in which it is.
pub async fn laws<C: Contract, S: PartialEq + Debug>(
    args: C::Args,
    new_world: impl AsyncFn() -> World<S>,
    invariant: impl Fn(&S) -> bool,
) -> Result<Report, BrokenLaw> {
    let payload = payload::<C>(&args);
    check(C::NAME, [payload.clone(), payload], new_world, invariant).await
}

/// The same, for an action that cannot be tried twice with the same arguments: because an order has one row, say. Where there
/// are two branches, the other one is tried with `neighbour`.
///
/// # Errors
///
/// As [`laws`].
pub async fn laws_with_neighbour<C: Contract, S: PartialEq + Debug>(
    args: C::Args,
    neighbour: C::Args,
    new_world: impl AsyncFn() -> World<S>,
    invariant: impl Fn(&S) -> bool,
) -> Result<Report, BrokenLaw> {
    let payloads = [payload::<C>(&args), payload::<C>(&neighbour)];
    check(C::NAME, payloads, new_world, invariant).await
}

fn payload<C: Contract>(args: &C::Args) -> Bytes {
    args.encode().unwrap_or_else(|error| panic!("the arguments cannot be written: {error}"))
}

async fn check<S: PartialEq + Debug>(
    action: &'static str,
    payloads: [Bytes; 2],
    new_world: impl AsyncFn() -> World<S>,
    invariant: impl Fn(&S) -> bool,
) -> Result<Report, BrokenLaw> {
    use Step::{Cancel, CancelCancel, Confirm, ConfirmConfirm, GiveUp, Try, TryCancel, TryTry};

    let mut play = Play { action, payloads, new_world, invariant, report: Report::default() };

    let untouched = play.story(&[], &[]).await?.state;
    let tried = play.story(&[Try], &[]).await?.state;
    let confirmed = play.story(&[Try, Confirm], &[]).await?.state;
    if untouched == tried && untouched == confirmed {
        let law =
            "a Try, or its Confirm, changes something; else nothing can be checked here".to_owned();
        return Err(play.broken("try, confirm", law, "another state", &untouched));
    }

    // As if it had never been.
    for story in [
        &[Try, Cancel][..],
        &[Try, Try, Cancel],
        &[Try, Cancel, Cancel],
        &[Cancel],
        &[Cancel, Cancel],
        &[Cancel, Try],
        &[Cancel, Try, Cancel],
        &[Try, Cancel, Try],
        &[Try, Cancel, Try, Cancel, Try],
    ] {
        play.ends_in(story, &untouched, "a cancelled branch leaves no trace").await?;
    }
    // Confirmed, once.
    for story in [
        &[Try, Confirm][..],
        &[Try, Try, Confirm],
        &[Try, Confirm, Confirm],
        &[Try, Confirm, Try],
        &[Try, Try, Confirm, Confirm, Try, Confirm],
    ] {
        play.ends_in(story, &confirmed, "a confirmed branch counts once").await?;
    }
    // Side by side, on two connections.
    for _ in 0..ROUNDS {
        play.ends_in(&[TryTry, Cancel], &untouched, "a cancelled branch leaves no trace").await?;
        play.ends_in(&[TryTry, Confirm], &confirmed, "a confirmed branch counts once").await?;
        play.ends_in(&[Try, ConfirmConfirm], &confirmed, "a confirmed branch counts once").await?;
        play.ends_in(&[Try, CancelCancel], &untouched, "a cancelled branch leaves no trace")
            .await?;
        play.ends_in(&[TryCancel, Cancel], &untouched, "a cancelled branch leaves no trace")
            .await?;
    }
    // Given up at its first suspension, its second, … and then asked again, as callers do.
    for (before, phase, after, end) in [
        (&[][..], Phase::Try, &[Cancel][..], &untouched),
        (&[], Phase::Try, &[Try, Cancel], &untouched),
        (&[], Phase::Try, &[Try, Confirm], &confirmed),
        (&[Try], Phase::Confirm, &[Confirm], &confirmed),
        (&[Try], Phase::Cancel, &[Cancel], &untouched),
        (&[], Phase::Cancel, &[Cancel, Try], &untouched),
    ] {
        let (mut suspension, mut through) = (1, 0);
        // On a busy machine an answer may be there before it is waited for: one time through is not the end of it.
        while through < THROUGH && suspension <= SUSPENSIONS_MAX {
            let steps: Vec<_> = before
                .iter()
                .copied()
                .chain([GiveUp(phase, suspension)])
                .chain(after.iter().copied())
                .collect();
            let law = "a call that is given up in the middle has done nothing, or all; asked again, it ends as ever";
            if play.ends_in(&steps, end, law).await?.gave_up {
                (suspension, through) = (suspension + 1, 0);
            } else {
                through += 1;
            }
        }
    }
    // Two branches: the one is cancelled, the other confirmed.
    let neighbours = "what one branch does leaves its neighbour alone";
    let other_confirmed = play.story(&[], &[Try, Confirm]).await?.state;
    for other in [&[Try, Cancel][..], &[Cancel, Try], &[Try, Try, Cancel, Cancel]] {
        for (first, second, expected) in
            [(&[Try, Confirm][..], other, &confirmed), (other, &[Try, Confirm], &other_confirmed)]
        {
            play.both_end_in(first, second, neighbours, expected).await?;
        }
    }
    play.together([&untouched, &confirmed, &other_confirmed]).await?;
    // What was never tried cannot be confirmed.
    let end = play.story(&[Step::StrayConfirm], &[]).await?.state;
    play.same("confirm", "what was never tried is not confirmed", &untouched, &end)?;
    Ok(play.report)
}
