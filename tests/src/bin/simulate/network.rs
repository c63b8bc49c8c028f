//! Real gRPC connections over the simulated network.
//!
//! The simulated TCP does not retransmit. A link that is *held up* delivers everything later, as TCP does after a short outage. A link
//! that was *cut* has lost bytes, so its connections break when it comes back, as with TCP after a long outage: both ends see a reset.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::{Stream, stream};
use handfast_coordinator::dispatch::{Destination, Dialler};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// Every host listens on this port.
pub(crate) const PORT: u16 = 7420;
/// A name for all coordinators, as of a load balancer.
pub(crate) const COORDINATORS: &str = "coordinators.test";

/// The network of one simulation. It can break connections.
#[derive(Debug)]
pub(crate) struct Network {
    /// For each link, smaller address first, a token that is cancelled when its connections break.
    links: Mutex<BTreeMap<[IpAddr; 2], CancellationToken>>,
    /// The names of the coordinators.
    coordinators: Vec<String>,
    /// Which of them is tried first for the next connection.
    turn: AtomicUsize,
}

impl Network {
    pub(crate) fn new(coordinators: Vec<String>) -> Arc<Self> {
        Arc::new(Self { links: Mutex::default(), coordinators, turn: AtomicUsize::new(0) })
    }

    fn link(&self, one: IpAddr, other: IpAddr) -> CancellationToken {
        let mut links = self.links.lock().expect("nothing panics while it is locked");
        links.entry([one.min(other), one.max(other)]).or_default().clone()
    }

    /// Breaks all connections between two hosts.
    pub(crate) fn reset(&self, one: IpAddr, other: IpAddr) {
        let mut links = self.links.lock().expect("nothing panics while it is locked");
        if let Some(link) = links.remove(&[one.min(other), one.max(other)]) {
            link.cancel();
        }
    }

    fn connection(&self, stream: TcpStream) -> io::Result<Connection> {
        let link = self.link(stream.local_addr()?.ip(), stream.peer_addr()?.ip());
        Ok(Connection { stream, broken: Box::pin(link.cancelled_owned()) })
    }

    /// Listens on the host that runs this.
    pub(crate) async fn listen(
        self: &Arc<Self>,
    ) -> io::Result<impl Stream<Item = io::Result<Connection>> + use<>> {
        let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
        Ok(stream::unfold((listener, self.clone()), async |(listener, network)| {
            let accepted = listener.accept().await;
            let accepted = accepted.and_then(|(stream, _)| network.connection(stream));
            Some((accepted, (listener, network)))
        }))
    }

    /// A channel with the settings that the SDK gives its own channels.
    pub(crate) fn channel(self: &Arc<Self>, host: &str) -> Channel {
        let address = url(host).parse().expect("a host's name");
        handfast_proto::connection::endpoint(&address).connect_with_connector_lazy(self.connector())
    }

    fn connector(
        self: &Arc<Self>,
    ) -> impl tower::Service<Uri, Response = TokioIo<Connection>, Error = io::Error, Future: Send>
    + Send
    + use<> {
        let network = self.clone();
        tower::service_fn(move |uri: Uri| {
            let network = network.clone();
            async move {
                let host = uri.host().unwrap_or_default();
                let stream = if host == COORDINATORS {
                    network.any_coordinator().await?
                } else {
                    TcpStream::connect((host, PORT)).await?
                };
                Ok(TokioIo::new(network.connection(stream)?))
            }
        })
    }

    /// Connects to the first coordinator that answers. Each call begins with another one.
    async fn any_coordinator(&self) -> io::Result<TcpStream> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        for n in 0..self.coordinators.len() {
            let host = self.coordinators[(turn + n) % self.coordinators.len()].as_str();
            match TcpStream::connect((host, PORT)).await {
                Ok(stream) => return Ok(stream),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

pub(crate) fn url(host: &str) -> String {
    format!("http://{host}:{PORT}")
}

/// Connections from coordinators to participants.
pub(crate) struct Dials(pub(crate) Arc<Network>);

impl Dialler for Dials {
    fn channel(&self, destination: &Destination) -> Channel {
        handfast_proto::connection::endpoint(&destination.address)
            .connect_with_connector_lazy(self.0.connector())
    }
}

impl fmt::Debug for Dials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dials")
    }
}

/// A connection that breaks with its link.
pub(crate) struct Connection {
    stream: TcpStream,
    broken: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.broken.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
