//! How an `async |x| …` closure is taken whose future must be `Send`.

use std::future::Future;

/// An async closure with one argument, and the future it returns.
///
/// You never name this trait. Rust has no way yet to say "its future is `Send`" of an `AsyncFnOnce`, and without that no such
/// closure could run inside `tokio::spawn` or a tonic handler; this trait gives the future a name to say it of. Every closure
/// has it.
pub trait AsyncFunc<A, R>:
    AsyncFnOnce(A) -> R + FnOnce(A) -> <Self as AsyncFunc<A, R>>::Future
{
    /// What the closure returns.
    type Future: Future<Output = R>;
}

impl<F, Fut, A, R> AsyncFunc<A, R> for F
where
    F: AsyncFnOnce(A) -> R + FnOnce(A) -> Fut,
    Fut: Future<Output = R>,
{
    type Future = Fut;
}
