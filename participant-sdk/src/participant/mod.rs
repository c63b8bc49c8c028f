//! The participant's side: it serves the Try, Confirm and Cancel of its actions.
//!
//! `action.rs` contains what an author writes, and the code that runs it. `service.rs` serves a participant over gRPC.
//! `batches/` runs waiting Confirms together. `inquiry.rs` asks about reservations that were never settled. `asking.rs` asks about those
//! whose transaction may be lost without a Cancel. `upkeep.rs` does that regularly, and cleans up.

pub(crate) mod action;
mod asking;
pub(crate) mod batches;
pub(crate) mod inquiry;
mod service;
mod upkeep;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use handfast_proto::{BranchId, Xid, limits, reason};

use crate::{
    answer::Answer,
    branch::Branch,
    contract::Contract,
    error::Refusal,
    fence::{Fence, log},
    remote::{Local, Reach, Remote},
    rpc::Handfast,
};

use action::{Action, ContentTypes, Fenced, Served};
use upkeep::Upkeep;

pub use upkeep::UPKEEP_INTERVAL;

/// A program that serves actions. Cheap to clone.
///
/// [`Participant::into_service`] serves it over gRPC; [`Participant::handle`] serves calls without a network.
#[derive(Clone)]
pub struct Participant {
    name: Arc<str>,
    actions: Arc<BTreeMap<&'static str, Box<dyn Served>>>,
    /// `None`: its coordinator is not known, or this is the upkeep's own clone.
    upkeep: Option<Upkeep>,
}

/// Builds a [`Participant`].
#[must_use]
pub struct ParticipantBuilder {
    name: Arc<str>,
    actions: BTreeMap<&'static str, Box<dyn Served>>,
    coordinator: Option<Handfast>,
    /// `None`: the program does the upkeep itself.
    upkeep_interval: Option<Duration>,
}

impl Participant {
    /// Starts a builder for a participant of this name, 1 to 64 bytes long. Coordinators look up its address by the name, and
    /// its refusals carry the name.
    ///
    /// # Panics
    ///
    /// When the name is empty or too long.
    pub fn builder(name: impl Into<Arc<str>>) -> ParticipantBuilder {
        let name = name.into();
        let max = limits::PARTICIPANT_BYTES_MAX;
        assert!((1..=max).contains(&name.len()), "a participant's name has 1 to {max} bytes");
        let upkeep_interval = Some(UPKEEP_INTERVAL);
        ParticipantBuilder { name, actions: BTreeMap::new(), coordinator: None, upkeep_interval }
    }

    /// The participant's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of its actions, in alphabetical order.
    pub fn actions(&self) -> impl Iterator<Item = &'static str> {
        self.actions.keys().copied()
    }

    /// Serves one call. `payload` is the payload of a Try. Confirm and Cancel use the payload of the branch's Try, and ignore
    /// `payload`.
    ///
    /// For guarantees and repeats, see [`Fence::run`] and [`Action`].
    ///
    /// # Cancel safety
    ///
    /// As [`Fence::run`]. If the call is waiting for a batch (see [`ActionInBatches`](crate::ActionInBatches)), it may still be
    /// executed.
    pub async fn handle(&self, branch: &Branch, payload: &[u8]) -> Answer {
        let Some(served) = self.actions.get(branch.action.as_str()) else {
            let answer = Answer::NotServed(self.not_served(&branch.action));
            log::log(branch, None, &answer, Duration::ZERO, &[]);
            return answer;
        };
        let mut answer = served.handle(branch, payload).await;
        if let Answer::Refused(refusal) = &mut answer
            && refusal.domain.is_empty()
        {
            refusal.domain = self.name.as_ref().to_owned();
        }
        answer
    }

    /// Serves a batch of calls of one action, all Confirm or all Cancel, each for a different branch.
    #[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
    pub(crate) async fn handle_together(&self, branches: &[Branch]) -> Vec<Answer> {
        self.actions[branches[0].action.as_str()].handle_together(branches).await
    }

    fn not_served(&self, action: &str) -> Refusal {
        let served: Vec<_> = self.actions().collect();
        let message =
            format!("{} does not serve {action}; it serves {}", self.name, served.join(", "));
        Refusal::of_handfast(reason::ACTION_UNKNOWN, message)
    }

    /// Each action with the content types of its arguments and its reply.
    pub(crate) fn content_types(&self) -> impl Iterator<Item = (&'static str, ContentTypes)> {
        self.actions.iter().map(|(name, served)| (*name, served.content_types()))
    }

    /// The content type of a Try's reply.
    pub(crate) fn reply_content_type(&self, action: &str) -> &'static str {
        self.actions.get(action).map_or("", |served| served.content_types().reply)
    }
}

impl ParticipantBuilder {
    /// Adds an action.
    ///
    /// # Panics
    ///
    /// When an action of this name exists already, or the name is empty or longer than 128 bytes.
    pub fn action<A: Action>(self, fence: &Fence<A::Db>, action: A) -> Self {
        let served = Fenced { fence: fence.clone(), action };
        self.serve(<A::Contract as Contract>::NAME, Box::new(served))
    }

    /// Says which coordinator the participant belongs to. [`Participant::into_service`] then also starts its upkeep, which goes
    /// on until the service is dropped: once per [`UPKEEP_INTERVAL`], it [cleans up](Fence::clean_up) the fences of its actions
    /// and [inquires](Participant::inquire) about overdue reservations. The first time is within a minute. Every few seconds it
    /// [asks](Participant::ask) about reservations of transactions that are recorded with their decision. Only a participant with a
    /// coordinator can take part in such a transaction before it is durable.
    ///
    /// Without a coordinator nothing is started: see [`Participant::inquire_every`] and [`Fence::clean_up_every`].
    pub fn coordinator(self, handfast: &Handfast) -> Self {
        Self { coordinator: Some(handfast.clone()), ..self }
    }

    /// Sets the interval of the upkeep, at least a second; see [`ParticipantBuilder::coordinator`].
    pub fn upkeep_every(self, interval: Duration) -> Self {
        Self { upkeep_interval: Some(interval), ..self }
    }

    /// As [`ParticipantBuilder::coordinator`], for a program that does the upkeep itself: it calls [`Participant::ask`] every few
    /// seconds, and [`Participant::inquire`] and [`Fence::clean_up`] about once an hour.
    pub fn asks(self, handfast: &Handfast) -> Self {
        Self { coordinator: Some(handfast.clone()), upkeep_interval: None, ..self }
    }

    pub(crate) fn serve(mut self, name: &'static str, served: Box<dyn Served>) -> Self {
        let max = limits::ACTION_BYTES_MAX;
        assert!((1..=max).contains(&name.len()), "an action's name has 1 to {max} bytes");
        let before = self.actions.insert(name, served);
        assert!(before.is_none(), "{} serves {name} twice", self.name);
        self
    }

    /// Builds the participant.
    #[must_use]
    pub fn build(self) -> Participant {
        let interval = self.upkeep_interval;
        let upkeep = self.coordinator.map(|handfast| Upkeep::new(handfast, interval));
        Participant { name: self.name, actions: Arc::new(self.actions), upkeep }
    }
}

impl Local for Participant {
    fn answer<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer> {
        Box::pin(self.handle(branch, payload))
    }

    fn inquires(&self) -> bool {
        self.upkeep.is_some()
    }

    fn nudge<'a>(&'a self, xid: Xid, branch_id: &'a BranchId) -> BoxFuture<'a, ()> {
        Box::pin(self.ask_now(xid, branch_id))
    }
}

impl Remote {
    /// A participant in this process, for a service that is itself a participant of a transaction that it begins or joins. The
    /// coordinator calls it at `target`.
    #[must_use]
    pub fn here(participant: &Participant, target: &str) -> Self {
        Self::new(participant.name(), target, Reach::Here(Arc::new(participant.clone())))
    }
}

impl fmt::Debug for Participant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Participant").field(&self.name).field(&self.actions.keys()).finish()
    }
}

impl fmt::Debug for ParticipantBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ParticipantBuilder").field(&self.name).field(&self.actions.keys()).finish()
    }
}

#[cfg(test)]
#[cfg(feature = "sqlite")]
mod tests {
    use super::*;
    use crate::{
        Phase, TryError, Tx,
        fence::{
            fixture::{DeductStock, branch, payload, payload_that},
            tests::sqlite::shop::Shop,
        },
    };

    #[tokio::test]
    async fn a_refusal_says_whose_it_is() {
        let shop = Shop::in_memory().await;
        let call = branch(1, Phase::Try);
        let answer = shop.participant().handle(&call, &payload_that(2, "refuse")).await;
        let Answer::Refused(refusal) = answer else { panic!("{answer:?}") };
        assert_eq!(
            (refusal.domain.as_str(), refusal.reason.as_str()),
            ("inventory", "OUT_OF_STOCK")
        );

        let confirm = shop.participant().handle(&branch(1, Phase::Confirm), &[]).await;
        let Answer::Refused(refusal) = confirm else { panic!("{confirm:?}") };
        assert_eq!((refusal.domain.as_str(), refusal.reason.as_str()), ("handfast", "NEVER_TRIED"));
    }

    #[tokio::test]
    async fn an_action_that_is_not_served_is_told_what_is() {
        let shop = Shop::in_memory().await;
        let mut call = branch(1, Phase::Try);
        call.action = "inventory.count".to_owned();
        let answer = shop.participant().handle(&call, &payload(2)).await;
        let Answer::NotServed(refusal) = answer else { panic!("{answer:?}") };
        assert_eq!(refusal.reason, reason::ACTION_UNKNOWN);
        assert!(refusal.message.ends_with("it serves inventory.deduct"), "{refusal}");
    }

    #[tokio::test]
    async fn a_payload_that_cannot_be_read_is_the_callers_mistake_in_try_and_an_operators_case_later()
     {
        let shop = Shop::in_memory().await;
        let participant = shop.participant();
        let answer = participant.handle(&branch(1, Phase::Try), b"{}").await;
        assert!(matches!(answer, Answer::Invalid { field: "payload.data", .. }), "{answer:?}");
        assert_eq!(shop.state(1).await, None);

        // The branch was tried under an older version of the contract.
        let work = async |_: &mut Tx<_>| Ok::<_, TryError>(());
        shop.fence.run(&branch(2, Phase::Try), b"\"hunter2\"", work).await;
        for phase in [Phase::Confirm, Phase::Cancel] {
            let answer = participant.handle(&branch(2, phase), &payload(2)).await;
            let Answer::Refused(refusal) = answer else { panic!("{answer:?}") };
            assert_eq!(refusal.reason, reason::NEEDS_ATTENTION);
            assert!(!refusal.message.contains("hunter2"), "{refusal}");
            assert_eq!(shop.state(2).await.unwrap(), "tried");
        }
    }

    #[tokio::test]
    #[should_panic(expected = "inventory serves inventory.deduct twice")]
    async fn an_action_is_served_once() {
        let shop = Shop::in_memory().await;
        let builder = Participant::builder("inventory").action(&shop.fence, shop.clone());
        drop(builder.action(&shop.fence, shop.clone()));
    }

    #[tokio::test]
    async fn a_participant_tells_what_it_serves() {
        let participant = Shop::in_memory().await.participant();
        assert_eq!(participant.name(), "inventory");
        assert_eq!(participant.actions().collect::<Vec<_>>(), [DeductStock::NAME]);
        let text = format!("{participant:?}");
        assert_eq!(text, "Participant(\"inventory\", [\"inventory.deduct\"])");
    }
}
