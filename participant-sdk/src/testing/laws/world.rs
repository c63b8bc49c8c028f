//! The world in which a story is played.

use std::fmt::{self, Debug};

use futures_util::future::LocalBoxFuture;

use crate::Participant;

/// How often the state is read at most until two reads agree.
const READS_MAX: usize = 20;

/// A participant with a database of its own, and a way to look at the state that matters.
pub struct World<S> {
    pub(super) participant: Participant,
    state: Box<dyn ReadState<S>>,
}

impl<S> World<S> {
    /// `state` reads what the action changes: of all rows that it may touch. It is called often.
    pub fn new(participant: Participant, state: impl AsyncFn() -> S + 'static) -> Self {
        Self { participant, state: Box::new(state) }
    }

    /// Reads until two reads in a row agree: the COMMIT of a call that was dropped may be carried out a moment later, between two
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
