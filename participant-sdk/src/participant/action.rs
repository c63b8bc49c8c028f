//! Level 2: you write three functions for each action; the local transaction and the fence around them are taken care of.

use std::{error::Error, future::Future, time::Duration};

use futures_util::future::BoxFuture;
#[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
use futures_util::future::join_all;
use handfast_proto::{BranchId, Xid};

use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    contract::{Contract, Payload},
    error::{Failed, TryError},
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
    /// A [`Refusal`](crate::Refusal) is a decided no. Any other error is unknown. Both roll back, and the global transaction will be cancelled.
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

/// An action without its types, so that a participant can keep several.
pub(crate) trait Served: Send + Sync {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer>;
    /// Serves calls of one phase, Confirm or Cancel, each for another branch, as one batch.
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

/// An action with its fence. It serves each call by itself.
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
        // Before the local transaction begins: arguments that cannot be decoded now could never be confirmed.
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

/// The arguments that Try got. They could be decoded then; if they cannot now, the contract has changed in between.
fn stored_args<A: Action>(tx: &Tx<A::Db>) -> Result<Args<A>, Failed> {
    Args::<A>::decode(tx.payload()).map_err(|_| {
        unreadable_stored::<Args<A>>(<A::Contract as Contract>::NAME, tx.payload().len())
    })
}

/// The answer to a Try whose arguments cannot be decoded.
pub(crate) fn unreadable<Args: Payload>(branch: &Branch, error: &dyn Error) -> Answer {
    let kind = Args::CONTENT_TYPE;
    let answer = Answer::Invalid {
        field: "payload.data",
        message: format!("is not what {} takes ({kind}): {error}", branch.action),
    };
    log::log(branch, None, &answer, Duration::ZERO);
    answer
}

/// The arguments that Try got cannot be decoded any more. The decoder's error is left out: it may quote them, and this text goes to
/// operators.
pub(crate) fn unreadable_stored<Args: Payload>(action: &str, bytes: usize) -> Failed {
    let kind = Args::CONTENT_TYPE;
    Failed::NeedsAttention(format!(
        "the payload that Try got ({bytes} bytes) is not what {action} takes now ({kind}): has its contract changed?"
    ))
}
