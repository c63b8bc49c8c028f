//! Level 2: you write three functions for each action; the SDK runs the local transaction and the fence around them.

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
    fence::{ExpiredPage, Fence, FenceDb, OverduePage, Tx, db::OverdueKey, log},
};

/// What a participant does for one action.
///
/// Write the three as plain `async fn`. The SDK runs the fence and the local transaction around them and guarantees:
///
/// - each takes effect at most once for a branch, however often its call is retried;
/// - `on_confirm` and `on_cancel` run only after an `on_try` that returned `Ok`, and never both;
/// - both get the arguments that Try got;
/// - no `on_try` runs after its Cancel;
/// - changes made through `tx` are committed if the function returns `Ok`, and rolled back otherwise.
///
/// Do only what `tx` can roll back: send no mail, and call no other service.
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
    /// The action's name, arguments and reply.
    type Contract: Contract;
    /// The database that holds the fence and the author's tables.
    type Db: FenceDb;

    /// Reserves, or refuses. The reply is stored. A repeated Try returns it without running this function again.
    ///
    /// # Errors
    ///
    /// A [`Refusal`](crate::Refusal) is a definite no. After any other error the outcome is unknown. Both roll back, and the
    /// global transaction is cancelled.
    fn on_try(
        &self,
        tx: &mut Tx<Self::Db>,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> impl Future<Output = Result<<Self::Contract as Contract>::Reply, TryError>> + Send;

    /// Uses what was reserved. It must succeed in the end, because the global transaction is already decided.
    ///
    /// # Errors
    ///
    /// An error rolls back; the call is retried until this returns `Ok`.
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
    /// An error rolls back; the call is retried until this returns `Ok`.
    fn on_cancel(
        &self,
        tx: &mut Tx<Self::Db>,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> impl Future<Output = Result<(), Failed>> + Send;
}

/// An action with its types erased, so that a participant can hold several.
pub(crate) trait Served: Send + Sync {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer>;
    /// Serves a batch of calls, all Confirm or all Cancel, each for a different branch.
    #[cfg(any(feature = "testing", all(test, feature = "sqlite")))]
    fn handle_together<'a>(&'a self, branches: &'a [Branch]) -> BoxFuture<'a, Vec<Answer>> {
        Box::pin(join_all(branches.iter().map(|branch| self.handle(branch, &[]))))
    }
    fn content_types(&self) -> ContentTypes;
    /// The next branches, after this key, that are still tried long after the end of phase one.
    fn overdue<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<OverduePage, sqlx::Error>>;
    /// As [`Fence::expired`]: of all actions that share the fence.
    fn expired<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<ExpiredPage, sqlx::Error>>;
    /// As [`Fence::asking`].
    fn asking(&self, xid: Xid) -> BoxFuture<'_, Result<Vec<(BranchId, String)>, sqlx::Error>>;
    /// As [`Fence::close`].
    fn close<'a>(&'a self, branch: &'a Branch) -> BoxFuture<'a, Answer>;
    /// As [`Fence::clean_up`].
    fn clean_up(&self) -> BoxFuture<'_, Result<u64, sqlx::Error>>;
    /// Actions with the same number share a fence.
    fn fence_id(&self) -> usize;
}

pub(crate) struct ContentTypes {
    pub(crate) args: &'static str,
    pub(crate) reply: &'static str,
}

impl ContentTypes {
    pub(crate) fn of<Args: Payload, Reply: Payload>() -> Self {
        Self { args: Args::CONTENT_TYPE, reply: Reply::CONTENT_TYPE }
    }
}

/// An action with its fence. It serves each call alone.
pub(crate) struct Fenced<A: Action> {
    pub(crate) fence: Fence<A::Db>,
    pub(crate) action: A,
}

type Args<A> = <<A as Action>::Contract as Contract>::Args;
type Reply<A> = <<A as Action>::Contract as Contract>::Reply;

impl<A: Action> Served for Fenced<A> {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer> {
        match branch.phase {
            Phase::Try => Box::pin(self.decode_and_try(branch, payload)),
            Phase::Confirm | Phase::Cancel => Box::pin(self.phase_two(branch)),
        }
    }

    fn content_types(&self) -> ContentTypes {
        ContentTypes::of::<Args<A>, Reply<A>>()
    }

    fn overdue<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<OverduePage, sqlx::Error>> {
        Box::pin(self.fence.overdue(<A::Contract as Contract>::NAME, after))
    }

    fn expired<'a>(
        &'a self,
        after: &'a OverdueKey,
    ) -> BoxFuture<'a, Result<ExpiredPage, sqlx::Error>> {
        Box::pin(self.fence.expired(after))
    }

    fn asking(&self, xid: Xid) -> BoxFuture<'_, Result<Vec<(BranchId, String)>, sqlx::Error>> {
        Box::pin(self.fence.asking(xid))
    }

    fn close<'a>(&'a self, branch: &'a Branch) -> BoxFuture<'a, Answer> {
        Box::pin(self.fence.close(branch))
    }

    fn clean_up(&self) -> BoxFuture<'_, Result<u64, sqlx::Error>> {
        Box::pin(self.fence.clean_up())
    }

    fn fence_id(&self) -> usize {
        self.fence.id()
    }
}

impl<A: Action> Fenced<A> {
    async fn decode_and_try(&self, branch: &Branch, payload: &[u8]) -> Answer {
        // Checked before the local transaction begins: a Try whose arguments cannot be decoded could never be confirmed.
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

    /// Serves a Confirm or a Cancel.
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

/// The arguments of the branch's Try. They could be decoded then. If they cannot be decoded now, the contract has changed since.
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
    log::log(branch, None, &answer, Duration::ZERO, &[]);
    answer
}

/// The error when the arguments of the branch's Try can no longer be decoded. The decoder's error is left out: it may quote the
/// arguments, and operators read this text.
pub(crate) fn unreadable_stored<Args: Payload>(action: &str, bytes: usize) -> Failed {
    let kind = Args::CONTENT_TYPE;
    Failed::NeedsAttention(format!(
        "the payload that Try got ({bytes} bytes) is not what {action} takes now ({kind}): has its contract changed?"
    ))
}
