//! Pools of connections to a database. A connection is lent to one piece of work at a time, and is given back only when all of that
//! work has succeeded. In every other case (an error, a deadline, a caller that dropped the call) a statement may still be in flight on
//! it, so it is closed.

use std::{
    fmt,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use sqlx::Connection as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Connection, Dialect};
use crate::store::Error;

/// Longest wait for one call, with the wait for a connection.
pub(in crate::store) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Role {
    /// Batches and takeovers.
    Write,
    /// Everything that changes nothing.
    Read,
    /// Deleting what is old.
    CleanUp,
}

/// See the module's comment.
pub(in crate::store) struct Connections<D: Dialect> {
    role: Role,
    options: D::Options,
    permits: Semaphore,
    state: Mutex<State<D>>,
}

struct State<D: Dialect> {
    /// The one that was given back last is lent first.
    idle: Vec<(Connection<D>, u64)>,
    /// The server's ids of connections that were closed while something may have been in flight, until the next connection has killed
    /// them there. At most as many as the pool may have connections.
    doubtful: Vec<u64>,
}

/// A connection that is lent. Closes it when dropped.
struct Lent<'a, D: Dialect> {
    of: &'a Connections<D>,
    /// `None`: given back.
    connection: Option<Connection<D>>,
    id: u64,
    _permit: SemaphorePermit<'a>,
}

impl<D: Dialect> Connections<D> {
    /// Up to `max` connections, made when they are needed.
    pub(in crate::store) fn new(role: Role, options: D::Options, max: usize) -> Self {
        let state = Mutex::new(State { idle: Vec::new(), doubtful: Vec::new() });
        Self { role, options, permits: Semaphore::new(max), state }
    }

    /// The same, with one that is there already.
    pub(in crate::store) fn with_first(self, connection: Connection<D>) -> Self {
        self.state().idle.push((connection, 0));
        self
    }

    /// Runs `work` on one of them.
    pub(in crate::store) async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut Connection<D>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let run = async {
            let mut lent = self.lend().await?;
            let connection = lent.connection.as_mut().expect("it is lent");
            let done = work(connection).await?;
            lent.give_back();
            Ok(done)
        };
        tokio::time::timeout(CALL_TIMEOUT, run)
            .await
            .unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed)))
    }

    /// Closes those that nobody uses: the next piece of work gets a new one.
    pub(in crate::store) fn close_idle(&self) {
        self.state().idle.clear();
    }

    async fn lend(&self) -> Result<Lent<'_, D>, Error> {
        let permit = self.permits.acquire().await.expect("never closed");
        let mut lent = Lent { of: self, connection: None, id: 0, _permit: permit };
        loop {
            let idle = self.state().idle.pop();
            let Some((connection, id)) = idle else { break };
            let connection = lent.connection.insert(connection);
            lent.id = id;
            // What is lost on a connection that writes is repeated anyway.
            if self.role == Role::Write || connection.ping().await.is_ok() {
                return Ok(lent);
            }
        }
        let doubtful = self.state().doubtful.clone();
        let (connection, id) = D::connect(&self.options, self.role, &doubtful).await?;
        self.state().doubtful.retain(|id| !doubtful.contains(id));
        (lent.connection, lent.id) = (Some(connection), id);
        Ok(lent)
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().expect("nothing panics while it is locked")
    }
}

impl<D: Dialect> Lent<'_, D> {
    fn give_back(mut self) {
        if let Some(connection) = self.connection.take() {
            self.of.state().idle.push((connection, self.id));
        }
    }
}

impl<D: Dialect> Drop for Lent<'_, D> {
    fn drop(&mut self) {
        if self.connection.take().is_some() && self.of.role == Role::Write {
            self.of.state().doubtful.push(self.id);
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
