//! An in-memory network without ports. Hosts are found by name within this process.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex},
};

use handfast_coordinator::{
    dispatch::{Destination, Dialler},
    rpc::Connection,
};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Capacity of each direction of a connection, in bytes.
const BUFFER_BYTES: usize = 256 * 1024;

/// Hosts by name. Cheap to clone; clones are the same network.
#[derive(Clone, Default)]
pub(super) struct Network {
    hosts: Arc<Mutex<BTreeMap<String, mpsc::UnboundedSender<DuplexStream>>>>,
}

impl Network {
    /// Registers a host of this name. The stream yields the connections to it. A previous host of the same name gets no further
    /// connections.
    pub(super) fn host(
        &self,
        name: &str,
    ) -> impl futures_util::Stream<Item = io::Result<Connection<DuplexStream>>> + use<> {
        use futures_util::StreamExt as _;
        let (sender, receiver) = mpsc::unbounded_channel();
        self.hosts
            .lock()
            .expect("nothing panics while it is locked")
            .insert(name.to_owned(), sender);
        UnboundedReceiverStream::new(receiver).map(|stream| Ok(Connection::new(stream, None)))
    }

    /// A channel to the host with this name.
    pub(super) fn connect(&self, name: &str) -> Channel {
        let hosts = self.hosts.clone();
        let connector = tower::service_fn(move |uri: Uri| {
            let host = uri.host().unwrap_or_default().to_owned();
            let hosts = hosts.clone();
            async move {
                let (here, there) = tokio::io::duplex(BUFFER_BYTES);
                let hosts = hosts.lock().expect("nothing panics while it is locked");
                let refused = || {
                    io::Error::new(io::ErrorKind::ConnectionRefused, format!("nobody is at {host}"))
                };
                hosts.get(&host).ok_or_else(refused)?.send(there).map_err(|_| refused())?;
                Ok::<_, io::Error>(TokioIo::new(here))
            }
        });
        Endpoint::from_shared(format!("http://{name}:1"))
            .expect("a host name")
            .connect_with_connector_lazy(connector)
    }
}

/// The coordinator dials participants through it.
impl Dialler for Network {
    fn channel(&self, destination: &Destination) -> Channel {
        self.connect(destination.address.uri().host().unwrap_or_default())
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}
