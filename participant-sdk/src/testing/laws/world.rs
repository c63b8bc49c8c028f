//! The environment in which a story is played: a participant and its state.

use std::fmt::{self, Debug};

use futures_util::future::LocalBoxFuture;

use crate::Participant;

/// The state is read repeatedly until two reads agree, at most this often.
const READS_MAX: usize = 20;

/// A participant with its own database, and a function that reads the relevant state.
pub struct World<S> {
    pub(super) participant: Participant,
    state: Box<dyn ReadState<S>>,
}

impl<S> World<S> {
    /// `state` reads what the action changes, in all rows that it may touch. It is called often.
    pub fn new(participant: Participant, state: impl AsyncFn() -> S + 'static) -> Self {
        Self { participant, state: Box::new(state) }
    }

    /// Reads until two consecutive reads agree. The COMMIT of a dropped call may be executed a moment later, even between two
    /// queries of one read.
    pub(super) async fn state(&self) -> S
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

/// Erases the type of an `async || state` closure.
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
