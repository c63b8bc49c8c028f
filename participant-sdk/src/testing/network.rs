//! A network without ports: what is dialled is found by its host name, in this process.

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

/// Bytes on their way in one direction of a connection.
const BUFFER_BYTES: usize = 256 * 1024;

/// Hosts by name. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Network {
    hosts: Arc<Mutex<BTreeMap<String, mpsc::UnboundedSender<DuplexStream>>>>,
}

impl Network {
    /// Becomes the host of this name: connections to it come out of the stream. Whoever had the name before gets none any more.
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

    /// A channel to the host of this name.
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

/// For the coordinator's calls.
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
