//! The laws of an action. Whatever the network does, a branch has one of two outcomes: confirmed exactly once, or no trace at
//! all.
//!
//! The tests deliver Try, Confirm and Cancel in every order that can happen: repeated, late, concurrently, and with the author's
//! future dropped in the middle. Each story is played in a new world, and the world's final state must be one of the two. The
//! same must hold for two branches whose Confirms or Cancels run in one batch.

mod play;
mod world;

use std::fmt::Debug;

use bytes::Bytes;

use crate::{Contract, Payload, Phase};

use play::{Play, Step};

pub use world::World;

/// Upper limit of suspensions in one call, far above what any action has.
const SUSPENSIONS_MAX: usize = 1000;
/// A call counts as having fewer than n suspensions once it has completed this often in a row before its nth suspension.
const THROUGH: usize = 3;
/// How often stories with concurrent calls are played, because their order is random.
const ROUNDS: usize = 10;

/// The extent of the check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Report {
    /// Stories played, each in its own world.
    pub stories: usize,
    /// Calls delivered.
    pub deliveries: usize,
    /// Calls dropped before they had completed.
    pub given_up: usize,
}

/// A broken law of an action.
#[derive(Debug, thiserror::Error)]
#[error(
    "{action} breaks a law.\n  story:    {story}\n  law:      {law}\n  expected: {expected}\n  found:    {found}"
)]
#[non_exhaustive]
pub struct BrokenLaw {
    /// The action's name.
    pub action: String,
    /// The calls that were delivered.
    pub story: String,
    /// The law.
    pub law: String,
    /// The expected state or answer.
    pub expected: String,
    /// The actual state or answer.
    pub found: String,
}

/// Checks the laws for the action `C` with these arguments. `new_world` makes the worlds. They must all be alike, and in each
/// the action must succeed at least twice. `invariant` must hold in every state, even in the middle of a transaction.
///
/// # Errors
///
/// The first broken law, with the story that breaks it.
pub async fn laws<C: Contract, S: PartialEq + Debug>(
    args: C::Args,
    new_world: impl AsyncFn() -> World<S>,
    invariant: impl Fn(&S) -> bool,
) -> Result<Report, BrokenLaw> {
    let payload = payload::<C>(&args);
    check(C::NAME, [payload.clone(), payload], new_world, invariant).await
}

/// As [`laws`], for an action that cannot be tried twice with the same arguments, for example because an order has a single row.
/// In stories with two branches, the second one is tried with `neighbour`.
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

    // The branch leaves no trace.
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
    // The branch is confirmed exactly once.
    for story in [
        &[Try, Confirm][..],
        &[Try, Try, Confirm],
        &[Try, Confirm, Confirm],
        &[Try, Confirm, Try],
        &[Try, Try, Confirm, Confirm, Try, Confirm],
    ] {
        play.ends_in(story, &confirmed, "a confirmed branch counts once").await?;
    }
    // Concurrent calls, on two connections.
    for _ in 0..ROUNDS {
        play.ends_in(&[TryTry, Cancel], &untouched, "a cancelled branch leaves no trace").await?;
        play.ends_in(&[TryTry, Confirm], &confirmed, "a confirmed branch counts once").await?;
        play.ends_in(&[Try, ConfirmConfirm], &confirmed, "a confirmed branch counts once").await?;
        play.ends_in(&[Try, CancelCancel], &untouched, "a cancelled branch leaves no trace")
            .await?;
        play.ends_in(&[TryCancel, Cancel], &untouched, "a cancelled branch leaves no trace")
            .await?;
    }
    // The call is dropped at its first suspension, its second, and so on, and then retried as a caller would.
    for (before, phase, after, end) in [
        (&[][..], Phase::Try, &[Cancel][..], &untouched),
        (&[], Phase::Try, &[Try, Cancel], &untouched),
        (&[], Phase::Try, &[Try, Confirm], &confirmed),
        (&[Try], Phase::Confirm, &[Confirm], &confirmed),
        (&[Try], Phase::Cancel, &[Cancel], &untouched),
        (&[], Phase::Cancel, &[Cancel, Try], &untouched),
    ] {
        let (mut suspension, mut through) = (1, 0);
        // On a busy machine, an answer may arrive before it is awaited. So a single completed call does not end the search.
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
    // Two branches: one is cancelled, the other confirmed.
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
    // A branch that was never tried cannot be confirmed.
    let end = play.story(&[Step::StrayConfirm], &[]).await?.state;
    play.same("confirm", "what was never tried is not confirmed", &untouched, &end)?;
    Ok(play.report)
}
