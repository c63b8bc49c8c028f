//! Plays stories: delivers their calls, and checks the state afterwards.

use std::{
    fmt::{self, Debug},
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use handfast_proto::{Xid, reason};

use super::{BrokenLaw, ROUNDS, Report, SUSPENSIONS_MAX, THROUGH, World};
use crate::{Answer, Branch, Phase};

/// How often a call with a transient error is retried.
const REPEATS_MAX: usize = 50;
/// Pause before each retry.
const REPEAT_PAUSE: Duration = Duration::from_millis(5);
/// A call that takes longer than this counts as hung.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
pub(super) enum Step {
    Try,
    Confirm,
    Cancel,
    /// Two Trys, concurrently.
    TryTry,
    ConfirmConfirm,
    CancelCancel,
    TryCancel,
    /// A call that is dropped at its nth suspension.
    GiveUp(Phase, usize),
    /// A Confirm of a branch that was never tried.
    StrayConfirm,
    /// One call for each of the two branches: in one batch if the action is served in batches, otherwise concurrently.
    Both(Phase),
    /// As `Both`, concurrently with another such call for the first branch alone.
    BothBesideOne(Phase),
    /// As `Both`, dropped at the nth suspension.
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

pub(super) struct Played<S> {
    pub(super) state: S,
    /// Whether a call was dropped before it had completed.
    pub(super) gave_up: bool,
}

pub(super) struct Play<W, I> {
    pub(super) action: &'static str,
    /// The Try payloads of the first and of the second branch.
    pub(super) payloads: [Bytes; 2],
    pub(super) new_world: W,
    pub(super) invariant: I,
    pub(super) report: Report,
}

impl<W, I> Play<W, I> {
    /// Plays the stories of two branches in a new world, alternating step by step. Returns the state of the world at the end.
    pub(super) async fn story<S>(
        &mut self,
        one: &[Step],
        other: &[Step],
    ) -> Result<Played<S>, BrokenLaw>
    where
        S: PartialEq + Debug,
        W: AsyncFn() -> World<S>,
        I: Fn(&S) -> bool,
    {
        self.report.stories += 1;
        let world = (self.new_world)().await;
        let mut gave_up = false;
        let mut played = Vec::new();
        for n in 0..one.len().max(other.len()) {
            for (branch_id, steps) in [("1", one), ("2", other)] {
                let Some(step) = steps.get(n) else { continue };
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

    /// Tests batches: two branches whose Confirm or Cancel is delivered together. `ends` holds the states: untouched, only the
    /// first branch confirmed, only the second branch confirmed.
    pub(super) async fn together<S>(&mut self, ends: [&S; 3]) -> Result<(), BrokenLaw>
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
            // The first branch was done before, was never tried, or had the opposite outcome.
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

    pub(super) async fn both_end_in<S>(
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

    pub(super) async fn ends_in<S>(
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

    /// Delivers one step. Returns whether a call was dropped before it had completed.
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
                // A Try may be too late only if the story has a Cancel. That it had no effect shows in the state at the end.
                (Phase::Try, Answer::TooLate(_)) => story.contains("cancel"),
                // In a batch, one branch may already have the opposite outcome. Whether it really has shows in the state at the
                // end.
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

    /// Delivers a call, and retries it while the answer asks for that.
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

    /// Delivers a Confirm or Cancel to both branches together. Retries are delivered alone.
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

    pub(super) fn same<S: PartialEq + Debug>(
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

    pub(super) fn broken(
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

/// Polls `call` until its `n`th suspension, and drops it there. Returns whether it completed before.
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
