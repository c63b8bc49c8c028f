//! Pools of connections to a database. A connection is lent to one piece of work at a time. It goes back to the pool only if
//! all of that work has succeeded. Otherwise (an error, a deadline, a caller that dropped the call) a statement may still be in
//! flight, so the connection is closed.

use std::{
    fmt,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use sqlx::Connection as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Connection, Dialect};
use crate::store::Error;

/// The deadline of one call, including the wait for a connection.
pub(in crate::store) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The use of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Role {
    /// Batches and takeovers.
    Write,
    /// Reads.
    Read,
    /// The purge.
    CleanUp,
}

pub(in crate::store) struct Connections<D: Dialect> {
    role: Role,
    options: D::Options,
    permits: Semaphore,
    state: Mutex<State<D>>,
}

struct State<D: Dialect> {
    /// Idle connections. The one that was returned last is lent first.
    idle: Vec<(Connection<D>, D::Session)>,
    /// The sessions of closed connections that may still be running a statement. The next connection kills them at the
    /// server first. The list is no longer than the pool.
    doubtful: Vec<D::Session>,
}

/// A lent connection. Closed when dropped.
struct Lent<'a, D: Dialect> {
    of: &'a Connections<D>,
    /// `None`: it was given back.
    connection: Option<(Connection<D>, D::Session)>,
    _permit: SemaphorePermit<'a>,
}

impl<D: Dialect> Connections<D> {
    /// A pool of up to `max` connections, made when they are needed.
    pub(in crate::store) fn new(role: Role, options: D::Options, max: usize) -> Self {
        let state = Mutex::new(State { idle: Vec::new(), doubtful: Vec::new() });
        Self { role, options, permits: Semaphore::new(max), state }
    }

    /// Adds a connection that exists already.
    pub(in crate::store) fn with_first(self, connection: Connection<D>, at: D::Session) -> Self {
        self.state().idle.push((connection, at));
        self
    }

    /// Runs `work` on a connection of the pool.
    pub(in crate::store) async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut Connection<D>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let run = async {
            let mut lent = self.lend().await?;
            let (connection, _) = lent.connection.as_mut().expect("it is lent");
            let done = work(connection).await?;
            lent.give_back();
            Ok(done)
        };
        tokio::time::timeout(CALL_TIMEOUT, run)
            .await
            .unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed)))
    }

    /// Closes idle connections, so that the next piece of work gets a new one.
    pub(in crate::store) fn close_idle(&self) {
        self.state().idle.clear();
    }

    /// Closes all connections in order, once the work on them has ended. There will be no more work.
    pub(in crate::store) async fn close(&self, max: usize) {
        let all = u32::try_from(max).expect("a few connections");
        let _no_more = self.permits.acquire_many(all).await.map(SemaphorePermit::forget);
        let idle = std::mem::take(&mut self.state().idle);
        for (connection, _) in idle {
            drop(connection.close().await); // if it fails, it is gone all the same
        }
    }

    async fn lend(&self) -> Result<Lent<'_, D>, Error> {
        let permit = self.permits.acquire().await.expect("never closed");
        let mut lent = Lent { of: self, connection: None, _permit: permit };
        loop {
            let idle = self.state().idle.pop();
            let Some((connection, session)) = idle else { break };
            if !D::is_current(&self.options, &session) {
                continue;
            }
            let (connection, _) = lent.connection.insert((connection, session));
            // A connection that writes needs no ping: a failed batch is retried anyway.
            if self.role == Role::Write || connection.ping().await.is_ok() {
                return Ok(lent);
            }
        }
        let doubtful = self.state().doubtful.clone();
        lent.connection = Some(D::connect(&self.options, self.role, &doubtful).await?);
        self.state().doubtful.retain(|session| !doubtful.contains(session));
        Ok(lent)
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().expect("nothing panics while it is locked")
    }
}

impl<D: Dialect> Lent<'_, D> {
    fn give_back(mut self) {
        if let Some(connection) = self.connection.take() {
            self.of.state().idle.push(connection);
        }
    }
}

impl<D: Dialect> Drop for Lent<'_, D> {
    fn drop(&mut self) {
        if let Some((_, session)) = self.connection.take()
            && self.of.role != Role::Read
        {
            self.of.state().doubtful.push(session);
        }
    }
}

impl<D: Dialect> fmt::Debug for Connections<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Connections")
            .field("role", &self.role)
            .field("idle", &state.idle.len())
            .field("doubtful", &state.doubtful)
            .finish_non_exhaustive()
    }
}
