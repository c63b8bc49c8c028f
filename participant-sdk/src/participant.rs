//! Level 2: you write three functions for each action; everything around them is done for you.

use std::{collections::BTreeMap, error::Error, fmt, future::Future, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
#[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
use futures_util::future::join_all;
use handfast_proto::{BranchId, Xid, limits, reason};

use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    contract::{Contract, Payload},
    error::{Failed, Refusal, TryError},
    fence::{Fence, FenceDb, Tx, log},
};

/// What a participant does for one action.
///
/// Write the three as plain `async fn`. Around them, the fence and the local transaction are taken care of, so you can rely on
/// this:
///
/// - each runs with effect at most once for a branch, however often the calls are repeated;
/// - `on_confirm` and `on_cancel` run only after an `on_try` that returned `Ok`, and never both;
/// - both get the arguments that Try got;
/// - no `on_try` runs after its Cancel;
/// - what is done through `tx` is kept if the function returns `Ok`, and undone otherwise.
///
/// Do nothing in them that cannot be rolled back with `tx`: no mail, no call to another service.
///
/// If many branches change the same few rows, see [`ActionInBatches`](crate::ActionInBatches).
///
/// ```
/// # #[cfg(feature = "sqlite")]
/// # mod example {
/// use handfast::{Action, Branch, Contract, Failed, Json, Refusal, TryError, Tx};
/// use sqlx::Sqlite;
/// # pub struct DeductStock;
/// # impl Contract for DeductStock {
/// #     const NAME: &'static str = "inventory.deduct";
/// #     type Args = Json<i64>;
/// #     type Reply = ();
/// # }
///
/// pub struct Inventory;
///
/// impl Action for Inventory {
///     type Contract = DeductStock;
///     type Db = Sqlite;
///
///     async fn on_try(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(sku): &Json<i64>) -> Result<(), TryError> {
///         let taken = sqlx::query("UPDATE stock SET free = free - 1, held = held + 1 WHERE sku = ? AND free > 0")
///             .bind(sku)
///             .execute(&mut **tx)
///             .await?;
///         if taken.rows_affected() == 0 {
///             return Err(Refusal::new("OUT_OF_STOCK").message("none left").with("sku", sku).into());
///         }
///         Ok(())
///     }
///
///     async fn on_confirm(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(sku): &Json<i64>) -> Result<(), Failed> {
///         sqlx::query("UPDATE stock SET held = held - 1 WHERE sku = ?").bind(sku).execute(&mut **tx).await?;
///         Ok(())
///     }
///
///     async fn on_cancel(&self, tx: &mut Tx<Sqlite>, _: &Branch, Json(sku): &Json<i64>) -> Result<(), Failed> {
///         sqlx::query("UPDATE stock SET free = free + 1, held = held - 1 WHERE sku = ?").bind(sku).execute(&mut **tx).await?;
///         Ok(())
///     }
/// }
/// # }
/// ```
pub trait Action: Send + Sync + 'static {
    /// Name, arguments and reply.
    type Contract: Contract;
    /// Where the fence and the work are.
    type Db: FenceDb;

    /// Reserves, or refuses. The reply is kept, and a repeated Try gives it again without coming here.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] is a decided no. Any other error is unknown. Both roll back, and the global transaction will be cancelled.
    fn on_try(
        &self,
        tx: &mut Tx<Self::Db>,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> impl Future<Output = Result<<Self::Contract as Contract>::Reply, TryError>> + Send;

    /// Uses what was reserved. It must succeed in the end: nobody is left to refuse to.
    ///
    /// # Errors
    ///
    /// Rolls back; the call is repeated until this returns `Ok`.
    fn on_confirm(
        &self,
        tx: &mut Tx<Self::Db>,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> impl Future<Output = Result<(), Failed>> + Send;

    /// Releases what was reserved. It must succeed in the end.
    ///
    /// # Errors
    ///
    /// Rolls back; the call is repeated until this returns `Ok`.
    fn on_cancel(
        &self,
        tx: &mut Tx<Self::Db>,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> impl Future<Output = Result<(), Failed>> + Send;
}

/// A program that serves actions. Cheap to clone.
///
/// [`Participant::into_service`] puts it on the network; [`Participant::handle`] is the same without one.
#[derive(Clone)]
pub struct Participant {
    name: Arc<str>,
    actions: Arc<BTreeMap<&'static str, Box<dyn Served>>>,
}

/// Makes a [`Participant`].
#[must_use]
pub struct ParticipantBuilder {
    name: Arc<str>,
    actions: BTreeMap<&'static str, Box<dyn Served>>,
}

impl Participant {
    /// Begins one with this name, by which coordinators look up its address and refusals say whose they are: 1 to 64 bytes.
    ///
    /// # Panics
    ///
    /// When the name is empty or too long.
    pub fn builder(name: impl Into<Arc<str>>) -> ParticipantBuilder {
        let name = name.into();
        let max = limits::PARTICIPANT_BYTES_MAX;
        assert!((1..=max).contains(&name.len()), "a participant's name has 1 to {max} bytes");
        ParticipantBuilder { name, actions: BTreeMap::new() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the actions that it serves, in alphabetical order.
    pub fn actions(&self) -> impl Iterator<Item = &'static str> {
        self.actions.keys().copied()
    }

    /// Serves one call. `payload` is what came with a Try; Confirm and Cancel get what Try got, and theirs is ignored.
    ///
    /// What is guaranteed, and what a repeat does: see [`Fence::run`] and [`Action`].
    ///
    /// # Cancel safety
    ///
    /// As [`Fence::run`]. What waits with others (see [`ActionInBatches`](crate::ActionInBatches)) may be done all the same.
    pub async fn handle(&self, branch: &Branch, payload: &[u8]) -> Answer {
        let Some(served) = self.actions.get(branch.action.as_str()) else {
            let answer = Answer::NotServed(self.not_served(&branch.action));
            log::log(branch, None, &answer, Duration::ZERO);
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

    /// Serves calls of one action and phase, not Try, each for another branch, as if they had waited together.
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

    /// Of every action, Cancels of branches that are still tried long after the end of phase one.
    pub(crate) async fn overdue(&self) -> Result<Vec<Branch>, sqlx::Error> {
        let mut overdue = Vec::new();
        for (name, served) in self.actions.iter() {
            let cancel = |(xid, branch_id)| Branch::new(xid, branch_id, *name, Phase::Cancel);
            overdue.extend(served.overdue().await?.into_iter().map(cancel));
        }
        Ok(overdue)
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
    /// Serves one more action.
    ///
    /// # Panics
    ///
    /// When an action of this name is served already, or the name is empty or longer than 128 bytes.
    pub fn action<A: Action>(self, fence: &Fence<A::Db>, action: A) -> Self {
        let served = Fenced { fence: fence.clone(), action };
        self.serve(<A::Contract as Contract>::NAME, Box::new(served))
    }

    pub(crate) fn serve(mut self, name: &'static str, served: Box<dyn Served>) -> Self {
        let max = limits::ACTION_BYTES_MAX;
        assert!((1..=max).contains(&name.len()), "an action's name has 1 to {max} bytes");
        let before = self.actions.insert(name, served);
        assert!(before.is_none(), "{} serves {name} twice", self.name);
        self
    }

    /// That is all.
    #[must_use]
    pub fn build(self) -> Participant {
        Participant { name: self.name, actions: Arc::new(self.actions) }
    }
}

/// An action whose types are forgotten.
pub(crate) trait Served: Send + Sync {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer>;
    /// Calls of one phase, not Try, each for another branch, that have waited together.
    #[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
    fn handle_together<'a>(&'a self, branches: &'a [Branch]) -> BoxFuture<'a, Vec<Answer>> {
        Box::pin(join_all(branches.iter().map(|branch| self.handle(branch, &[]))))
    }
    fn content_types(&self) -> ContentTypes;
    /// Branches that are still tried long after the end of phase one.
    fn overdue(&self) -> BoxFuture<'_, Overdue>;
}

pub(crate) type Overdue = Result<Vec<(Xid, BranchId)>, sqlx::Error>;

pub(crate) struct ContentTypes {
    pub(crate) args: &'static str,
    pub(crate) reply: &'static str,
}

impl ContentTypes {
    pub(crate) fn of<Args: Payload, Reply: Payload>() -> Self {
        Self { args: Args::CONTENT_TYPE, reply: Reply::CONTENT_TYPE }
    }
}

/// An action with its fence, which serves one call at a time.
pub(crate) struct Fenced<A: Action> {
    pub(crate) fence: Fence<A::Db>,
    pub(crate) action: A,
}

type Args<A> = <<A as Action>::Contract as Contract>::Args;
type Reply<A> = <<A as Action>::Contract as Contract>::Reply;

impl<A: Action> Served for Fenced<A> {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer> {
        match branch.phase {
            Phase::Try => Box::pin(self.on_try(branch, payload)),
            Phase::Confirm | Phase::Cancel => Box::pin(self.phase_two(branch)),
        }
    }

    fn content_types(&self) -> ContentTypes {
        ContentTypes::of::<Args<A>, Reply<A>>()
    }

    fn overdue(&self) -> BoxFuture<'_, Overdue> {
        Box::pin(self.fence.overdue(<A::Contract as Contract>::NAME))
    }
}

impl<A: Action> Fenced<A> {
    async fn on_try(&self, branch: &Branch, payload: &[u8]) -> Answer {
        // Before the local transaction begins: what cannot be read now could never be confirmed.
        let args = match Args::<A>::decode(payload) {
            Ok(args) => args,
            Err(error) => return unreadable::<Args<A>>(branch, &*error),
        };
        let work = async |tx: &mut Tx<A::Db>| {
            let reply = self.action.on_try(tx, branch, &args).await?;
            tx.reply(reply.encode().map_err(TryError::Unknown)?);
            Ok::<_, TryError>(())
        };
        self.fence.run(branch, payload, work).await
    }

    /// A Confirm or a Cancel.
    pub(crate) async fn phase_two(&self, branch: &Branch) -> Answer {
        let work = async |tx: &mut Tx<A::Db>| {
            let args = stored_args::<A>(tx)?;
            match branch.phase {
                Phase::Cancel => self.action.on_cancel(tx, branch, &args).await,
                Phase::Try | Phase::Confirm => self.action.on_confirm(tx, branch, &args).await,
            }
        };
        self.fence.run(branch, &[], work).await
    }
}

/// What Try got. It could be read then; if it cannot now, the contract has changed in between.
fn stored_args<A: Action>(tx: &Tx<A::Db>) -> Result<Args<A>, Failed> {
    Args::<A>::decode(tx.payload()).map_err(|_| {
        unreadable_stored::<Args<A>>(<A::Contract as Contract>::NAME, tx.payload().len())
    })
}

/// The answer to a Try whose arguments cannot be read.
pub(crate) fn unreadable<Args: Payload>(branch: &Branch, error: &dyn Error) -> Answer {
    let kind = Args::CONTENT_TYPE;
    let answer = Answer::Invalid {
        field: "payload.data",
        message: format!("is not what {} takes ({kind}): {error}", branch.action),
    };
    log::log(branch, None, &answer, Duration::ZERO);
    answer
}

/// The arguments that Try got cannot be read any more. Why is left out: it may quote them, and this goes to operators.
pub(crate) fn unreadable_stored<Args: Payload>(action: &str, bytes: usize) -> Failed {
    let kind = Args::CONTENT_TYPE;
    Failed::NeedsAttention(format!(
        "the payload that Try got ({bytes} bytes) is not what {action} takes now ({kind}): has its contract changed?"
    ))
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
    use crate::fence::fixture::{DeductStock, Shop, branch, payload, payload_that};

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

        // Tried with the contract of yesterday.
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
