//! The laws of an action. Whatever the network does, a branch ends in one of two ways: confirmed, once; or as if it had never
//! been. Here Try, Confirm and Cancel are delivered in every order that can happen, repeated, late, side by side, and with the
//! author's code given up in the middle, each time in a new world; and each time the world's state must be the one or the other. So must
//! that of two branches whose phase two comes together.

use std::{
    fmt::{self, Debug},
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use handfast_proto::{Xid, reason};

use crate::{Answer, Branch, Contract, Participant, Payload, Phase};

/// More places at which one call can be given up than any author's code has.
const SUSPENSIONS_MAX: usize = 1000;
/// So many times in a row a call must end before its nth suspension, for it to have fewer.
const THROUGH: usize = 3;
/// How often a call that was given a passing error is repeated.
const REPEATS_MAX: usize = 50;
/// Pause before each of these repeats.
const REPEAT_PAUSE: Duration = Duration::from_millis(5);
/// A call that takes longer than this never ends.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the state is read until it is taken as it is, if it never stays the same.
const READS_MAX: usize = 20;
/// How often what happens side by side is tried: who comes first is up to chance.
const ROUNDS: usize = 10;

/// A participant with a database of its own, and a way to look at the state that matters.
pub struct World<S> {
    participant: Participant,
    state: Box<dyn ReadState<S>>,
}

impl<S> World<S> {
    /// `state` reads what the action changes: of all rows that it may touch. It is called often.
    pub fn new(participant: Participant, state: impl AsyncFn() -> S + 'static) -> Self {
        Self { participant, state: Box::new(state) }
    }

    /// What a call that was given up has begun, its COMMIT say, may be carried out a moment later, between two queries of one
    /// read. So this reads until two reads in a row agree.
    async fn state(&self) -> S
    where
        S: PartialEq,
    {
        let mut state = self.state.read().await;
        for _ in 0..READS_MAX {
            let again = self.state.read().await;
            if again == state {
                break;
            }
            state = again;
        }
        state
    }
}

/// An `async || state` closure, whatever its type.
trait ReadState<S> {
    fn read(&self) -> LocalBoxFuture<'_, S>;
}

impl<S, F: AsyncFn() -> S> ReadState<S> for F {
    fn read(&self) -> LocalBoxFuture<'_, S> {
        Box::pin(self())
    }
}

impl<S> Debug for World<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({})", self.participant.name())
    }
}

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

#[derive(Clone, Copy)]
enum Step {
    Try,
    Confirm,
    Cancel,
    /// Two of them, side by side.
    TryTry,
    ConfirmConfirm,
    CancelCancel,
    TryCancel,
    /// One that is dropped when it is suspended for the nth time.
    GiveUp(Phase, usize),
    /// A Confirm of what nobody has tried.
    StrayConfirm,
    /// One for each of the two branches, in one batch if the action is served in batches; or else side by side.
    Both(Phase),
    /// The same, beside one for the first branch alone.
    BothBesideOne(Phase),
    /// The same, dropped when it is suspended for the nth time.
    GiveUpBoth(Phase, usize),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Try => f.write_str("try"),
            Self::Confirm | Self::StrayConfirm => f.write_str("confirm"),
            Self::Cancel => f.write_str("cancel"),
            Self::TryTry => f.write_str("try beside try"),
            Self::ConfirmConfirm => f.write_str("confirm beside confirm"),
            Self::CancelCancel => f.write_str("cancel beside cancel"),
            Self::TryCancel => f.write_str("try beside cancel"),
            Self::Both(phase) => write!(f, "{phase} of both branches together"),
            Self::BothBesideOne(phase) => {
                write!(f, "{phase} of both branches together beside {phase} of the first")
            }
            Self::GiveUpBoth(phase, n) => {
                write!(f, "{phase} of both branches together given up at its {n}. suspension")
            }
            Self::GiveUp(phase, n) => write!(f, "{phase} given up at its {n}. suspension"),
        }
    }
}

fn words(steps: &[Step]) -> String {
    steps.iter().map(Step::to_string).collect::<Vec<_>>().join(", ")
}

struct Played<S> {
    state: S,
    /// The call that was to be given up had not ended by itself.
    gave_up: bool,
}

struct Play<W, I> {
    action: &'static str,
    /// What the Try of the one branch gets, and that of the other.
    payloads: [Bytes; 2],
    new_world: W,
    invariant: I,
    report: Report,
}

impl<W, I> Play<W, I> {
    /// Plays the stories of two branches in a new world, in turns, and says how the world is then.
    async fn story<S>(&mut self, one: &[Step], other: &[Step]) -> Result<Played<S>, BrokenLaw>
    where
        S: PartialEq + Debug,
        W: AsyncFn() -> World<S>,
        I: Fn(&S) -> bool,
    {
        self.report.stories += 1;
        let world = (self.new_world)().await;
        let mut gave_up = false;
        let mut played = Vec::new();
        for turn in 0..one.len().max(other.len()) {
            for (branch_id, steps) in [("1", one), ("2", other)] {
                let Some(step) = steps.get(turn) else { continue };
                played.push(*step);
                gave_up |= self.step(&world, branch_id, *step, &words(&played)).await?;
                let state = world.state().await;
                if !(self.invariant)(&state) {
                    let law = "the invariant holds in every state".to_owned();
                    return Err(self.broken(
                        &words(&played),
                        law,
                        "a state in which it holds",
                        &state,
                    ));
                }
            }
        }
        Ok(Played { state: world.state().await, gave_up })
    }

    /// Two branches whose phase two comes together. `ends`: untouched, the first one confirmed, the second one confirmed.
    async fn together<S>(&mut self, ends: [&S; 3]) -> Result<(), BrokenLaw>
    where
        S: PartialEq + Debug,
        W: AsyncFn() -> World<S>,
        I: Fn(&S) -> bool,
    {
        use Phase::{Cancel as Cancelled, Confirm as Confirmed};
        use Step::{Both, BothBesideOne, Cancel, Confirm, GiveUpBoth, Try};

        let law = "branches whose phase two comes together end as if each had come alone";
        let [untouched, one_confirmed, other_confirmed] = ends;
        let both_confirmed = &self.story(&[Try, Confirm], &[Try, Confirm]).await?.state;
        for (one, other, end) in [
            (&[Try, Both(Confirmed)][..], &[Try][..], both_confirmed),
            (&[Try, Both(Cancelled)], &[Try], untouched),
            // One that was done before, one that never was, and one that ended the other way.
            (&[Try, Confirm, Both(Confirmed), Both(Confirmed)], &[Try], both_confirmed),
            (&[Try, Cancel, Both(Cancelled), Both(Cancelled)], &[Try], untouched),
            (&[Both(Cancelled), Try, Both(Cancelled)], &[], untouched),
            (&[Try, Confirm, Both(Cancelled)], &[Try], one_confirmed),
            (&[Try, Cancel, Both(Confirmed)], &[Try], other_confirmed),
        ] {
            self.both_end_in(one, other, law, end).await?;
        }
        for _ in 0..ROUNDS {
            for (phase, end) in [(Confirmed, both_confirmed), (Cancelled, untouched)] {
                self.both_end_in(&[Try, BothBesideOne(phase)], &[Try], law, end).await?;
            }
        }
        for (phase, end) in [(Confirmed, both_confirmed), (Cancelled, untouched)] {
            let (mut suspension, mut through) = (1, 0);
            while through < THROUGH && suspension <= SUSPENSIONS_MAX {
                let steps = [Try, GiveUpBoth(phase, suspension), Both(phase)];
                if self.both_end_in(&steps, &[Try], law, end).await?.gave_up {
                    (suspension, through) = (suspension + 1, 0);
                } else {
                    through += 1;
                }
            }
        }
        Ok(())
    }

    async fn both_end_in<S>(
        &mut self,
        one: &[Step],
        other: &[Step],
        law: &str,
        expected: &S,
    ) -> Result<Played<S>, BrokenLaw>
    where
        S: PartialEq + Debug,
        W: AsyncFn() -> World<S>,
        I: Fn(&S) -> bool,
    {
        let played = self.story(one, other).await?;
        let other = if other.is_empty() { "nothing".to_owned() } else { words(other) };
        let story = format!("{}; and in turn with it, of another branch: {other}", words(one));
        self.same(&story, law, expected, &played.state)?;
        Ok(played)
    }

    async fn ends_in<S>(
        &mut self,
        steps: &[Step],
        expected: &S,
        law: &str,
    ) -> Result<Played<S>, BrokenLaw>
    where
        S: PartialEq + Debug,
        W: AsyncFn() -> World<S>,
        I: Fn(&S) -> bool,
    {
        let played = self.story(steps, &[]).await?;
        self.same(&words(steps), law, expected, &played.state)?;
        Ok(played)
    }

    /// Delivers one step. Returns whether a call was given up.
    async fn step<S>(
        &mut self,
        world: &World<S>,
        branch_id: &str,
        step: Step,
        story: &str,
    ) -> Result<bool, BrokenLaw> {
        let once = |phase| self.deliver(world, branch_id, phase);
        let answers = match step {
            Step::Try => vec![(Phase::Try, once(Phase::Try).await)],
            Step::Confirm => vec![(Phase::Confirm, once(Phase::Confirm).await)],
            Step::Cancel => vec![(Phase::Cancel, once(Phase::Cancel).await)],
            Step::TryTry => {
                side_by_side(Phase::Try, once(Phase::Try), Phase::Try, once(Phase::Try)).await
            }
            Step::ConfirmConfirm => {
                side_by_side(
                    Phase::Confirm,
                    once(Phase::Confirm),
                    Phase::Confirm,
                    once(Phase::Confirm),
                )
                .await
            }
            Step::CancelCancel => {
                side_by_side(Phase::Cancel, once(Phase::Cancel), Phase::Cancel, once(Phase::Cancel))
                    .await
            }
            Step::TryCancel => {
                side_by_side(Phase::Try, once(Phase::Try), Phase::Cancel, once(Phase::Cancel)).await
            }
            Step::GiveUp(phase, suspension) => {
                let gave_up =
                    !within_suspensions(self.call(world, branch_id, phase), suspension).await;
                self.report.deliveries += 1;
                self.report.given_up += usize::from(gave_up);
                return Ok(gave_up);
            }
            Step::Both(phase) => self.deliver_both(world, phase).await,
            Step::BothBesideOne(phase) => {
                let both = self.deliver_both(world, phase);
                let (mut answers, one) = tokio::join!(both, once(phase));
                answers.push((phase, one));
                answers
            }
            Step::GiveUpBoth(phase, suspension) => {
                let both = ["1", "2"].map(|branch_id| self.branch(branch_id, phase));
                let both = world.participant.handle_together(&both);
                let gave_up = !within_suspensions(both, suspension).await;
                self.report.deliveries += 2;
                self.report.given_up += usize::from(gave_up);
                return Ok(gave_up);
            }
            Step::StrayConfirm => {
                self.report.deliveries += 1;
                let answer = self.call(world, branch_id, Phase::Confirm).await;
                if matches!(answer, Answer::Refused(_)) {
                    return Ok(false);
                }
                let law = "what was never tried is not confirmed".to_owned();
                return Err(self.broken(story, law, "a refusal", &answer));
            }
        };
        self.report.deliveries += answers.len();
        for (phase, answer) in answers {
            let fits = match (phase, &answer) {
                (_, Answer::Done(_)) => true,
                // Whether it is too late the story knows; that it had no effect, its end.
                (Phase::Try, Answer::TooLate(_)) => story.contains("cancel"),
                // Of a batch, one may have ended the other way before: whether it has the story knows, too.
                (_, Answer::Refused(refusal)) if matches!(step, Step::Both(_)) => {
                    refusal.reason == reason::OPPOSITE_DONE
                }
                _ => false,
            };
            if !fits {
                let law = match phase {
                    Phase::Try => {
                        "a Try with these arguments succeeds (give the world enough for two)"
                    }
                    Phase::Confirm | Phase::Cancel => {
                        "a Confirm and a Cancel succeed, if need be after some repeats"
                    }
                };
                return Err(self.broken(story, law.to_owned(), "done", &answer));
            }
        }
        Ok(false)
    }

    /// Delivers a call, and repeats it while its answer says that this may help.
    async fn deliver<S>(&self, world: &World<S>, branch_id: &str, phase: Phase) -> Answer {
        let mut repeats = 0;
        loop {
            let call = tokio::time::timeout(CALL_TIMEOUT, self.call(world, branch_id, phase));
            let Ok(answer) = call.await else {
                return Answer::Unknown(format!("no answer within {CALL_TIMEOUT:?}"));
            };
            if !matches!(answer, Answer::Unknown(_) | Answer::Retry(_)) || repeats >= REPEATS_MAX {
                return answer;
            }
            repeats += 1;
            tokio::time::sleep(REPEAT_PAUSE).await;
        }
    }

    /// Delivers a call of phase two to both branches, together, and repeats alone what is to be repeated.
    async fn deliver_both<S>(&self, world: &World<S>, phase: Phase) -> Vec<(Phase, Answer)> {
        let both = ["1", "2"].map(|branch_id| self.branch(branch_id, phase));
        let together = world.participant.handle_together(&both);
        let answers = tokio::time::timeout(CALL_TIMEOUT, together).await.unwrap_or_else(|_| {
            vec![Answer::Unknown(format!("no answer within {CALL_TIMEOUT:?}")); both.len()]
        });
        let mut last = Vec::new();
        for (branch, mut answer) in both.iter().zip(answers) {
            if let Answer::Retry(_) = answer {
                answer = self.deliver(world, branch.branch_id.as_str(), phase).await;
            }
            last.push((phase, answer));
        }
        last
    }

    fn branch(&self, branch_id: &str, phase: Phase) -> Branch {
        let xid = Xid { partition: 0, epoch: 1, sequence: 1, nonce: 1 };
        Branch::new(xid, branch_id.parse().expect("a branch id"), self.action, phase)
    }

    async fn call<S>(&self, world: &World<S>, branch_id: &str, phase: Phase) -> Answer {
        let branch = self.branch(branch_id, phase);
        let payload: &[u8] = match (phase, branch.branch_id.as_str()) {
            (Phase::Confirm | Phase::Cancel, _) => &[],
            (Phase::Try, "1") => &self.payloads[0],
            (Phase::Try, _) => &self.payloads[1],
        };
        world.participant.handle(&branch, payload).await
    }

    fn same<S: PartialEq + Debug>(
        &self,
        story: &str,
        law: &str,
        expected: &S,
        found: &S,
    ) -> Result<(), BrokenLaw> {
        if expected == found {
            Ok(())
        } else {
            Err(self.broken(story, law.to_owned(), format!("{expected:?}"), found))
        }
    }

    fn broken(
        &self,
        story: &str,
        law: String,
        expected: impl Into<String>,
        found: &dyn Debug,
    ) -> BrokenLaw {
        let story = if story.is_empty() { "nothing" } else { story };
        BrokenLaw {
            action: self.action.to_owned(),
            story: story.to_owned(),
            law,
            expected: expected.into(),
            found: format!("{found:?}"),
        }
    }
}

async fn side_by_side(
    phase: Phase,
    one: impl Future<Output = Answer>,
    other_phase: Phase,
    other: impl Future<Output = Answer>,
) -> Vec<(Phase, Answer)> {
    let (one, other) = tokio::join!(one, other);
    vec![(phase, one), (other_phase, other)]
}

/// Runs `call` until it is suspended for the `n`th time, and drops it there. Returns whether it ended before.
async fn within_suspensions(call: impl Future, n: usize) -> bool {
    let mut call = pin!(call);
    let mut suspensions = 0;
    poll_fn(|cx| match call.as_mut().poll(cx) {
        Poll::Ready(_) => Poll::Ready(true),
        Poll::Pending => {
            suspensions += 1;
            if suspensions >= n { Poll::Ready(false) } else { Poll::Pending }
        }
    })
    .await
}
