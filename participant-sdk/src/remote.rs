//! A participant, as its callers see it.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use handfast_proto::{
    address::InvalidAddress, calls::ToParticipant, connection::endpoint, stream::Line,
};
use tonic::transport::Channel;

use crate::{answer::Answer, branch::Branch};

/// A participant: its name, its address, and how to reach it from here. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    name: Arc<str>,
    target: Arc<str>,
    reach: Reach,
}

#[derive(Clone)]
pub(crate) enum Reach {
    /// Over the network.
    Line(Line<ToParticipant>),
    /// In this process.
    Here(Arc<dyn Local>),
}

/// A participant in this process.
pub(crate) trait Local: Send + Sync {
    fn answer<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer>;
}

impl Remote {
    /// The participant of this name at `url`: `http://127.0.0.1:7001`. The coordinator calls it there too, unless its
    /// configuration has another address for the name. Does not wait for a connection. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn connect(name: &str, url: &str) -> Result<Self, InvalidAddress> {
        Ok(Self::with_channel(name, url, endpoint(&url.parse()?).connect_lazy()))
    }

    /// The participant of this name, called from here through `channel` and by the coordinator at `target`.
    #[must_use]
    pub fn with_channel(name: &str, target: &str, channel: Channel) -> Self {
        Self::new(name, target, Reach::Line(Line::new(channel)))
    }

    pub(crate) fn new(name: &str, target: &str, reach: Reach) -> Self {
        Self { name: name.into(), target: target.into(), reach }
    }

    /// The same participant, with every call from here made by itself. By default calls share a stream, if the participant has
    /// streams; a load balancer in between spreads calls over several instances only if they are made by themselves.
    #[must_use]
    pub fn without_streams(self) -> Self {
        let reach = match self.reach {
            Reach::Line(line) => Reach::Line(line.to_unary()),
            here @ Reach::Here(_) => here,
        };
        Self { reach, ..self }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address at which the coordinator calls it.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    pub(crate) fn reach(&self) -> &Reach {
        &self.reach
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({} at {})", self.name, self.target)
    }
}
