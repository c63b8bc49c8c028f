//! Connection settings for both sides: the coordinator connects to participants, and the SDK to both.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, Join, ReadBuf, join},
    net::{
        TcpStream, lookup_host,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use tonic::{
    ConnectError, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::address::{Address, Host};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long looking up a name may take.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection with calls in flight may be silent before it is pinged.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the peer may take to answer a ping before the connection is closed.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The deadline sent with a call is this much later than the caller's own, so that the caller's timer always fires first.
/// tonic's timers, on either end, would report CANCELLED instead of DEADLINE_EXCEEDED.
pub const DEADLINE_MARGIN: Duration = Duration::from_secs(1);

/// The endpoint for `address`, with the settings that every connection uses. Does not connect yet.
#[must_use]
pub fn endpoint(address: &Address) -> Endpoint {
    endpoint_of(address.uri().clone())
}

/// The same for any URI, such as one without a port.
#[must_use]
pub fn endpoint_of(uri: Uri) -> Endpoint {
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
}

/// A channel to the server at `address`. It connects on first use, and reconnects when the connection is lost. `at` is the
/// result of the name lookup. Without `at`, each connection looks the name up and tries the first IP address first. Call this
/// within a tokio runtime.
#[must_use]
pub fn channel(address: &Address, at: Option<SocketAddr>) -> Channel {
    let endpoint = endpoint(address);
    let Some(at) = at else { return endpoint.connect_lazy() };
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| connect(at)))
}

/// The IP addresses behind `address`, sorted. Both sides look names up with this and choose among the addresses. A connection that
/// looks the name up by itself always begins with the first one.
///
/// # Errors
///
/// When the name does not exist, or could not be looked up in time.
pub async fn look_up(address: &Address) -> io::Result<Vec<SocketAddr>> {
    let port = address.port();
    let name = match address.host() {
        Host::V4(ip) => return Ok(vec![(*ip, port).into()]),
        Host::V6(ip) => return Ok(vec![(*ip, port).into()]),
        Host::Name(name) => name,
    };
    let what = match timeout(LOOK_UP_TIMEOUT, lookup_host((name.as_str(), port))).await {
        Ok(Ok(found)) => {
            let mut found: Vec<_> = found.collect();
            found.sort();
            found.dedup();
            return Ok(found);
        }
        Ok(Err(_)) => "was not found",
        Err(_) => "could not be looked up in time",
    };
    Err(io::Error::new(io::ErrorKind::NotFound, format!("the name {name} {what}")))
}

/// Opens a connection, for channels that manage their own connections.
///
/// # Errors
///
/// When the connection fails.
pub async fn connect(at: SocketAddr) -> io::Result<TokioIo<Http2Stream>> {
    let stream = TcpStream::connect(at).await?;
    stream.set_nodelay(true)?;
    let (reads, writes) = stream.into_split();
    Ok(TokioIo::new(join(FirstByte { stream: reads, is_sure: false }, writes)))
}

/// Whether the call failed because it had no connection. Then the call cannot have arrived.
#[must_use]
pub fn is_not_connected(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<ConnectError>())
}

/// How I/O errors are worded for people.
const IO_WORDS: [(io::ErrorKind, &str); 8] = [
    (io::ErrorKind::ConnectionRefused, "connection refused"),
    (io::ErrorKind::ConnectionReset, "connection reset"),
    (io::ErrorKind::ConnectionAborted, "connection reset"),
    (io::ErrorKind::BrokenPipe, "connection reset"),
    (io::ErrorKind::UnexpectedEof, "connection reset"),
    (io::ErrorKind::TimedOut, "connecting timed out"),
    (io::ErrorKind::HostUnreachable, "host unreachable"),
    (io::ErrorKind::NetworkUnreachable, "network unreachable"),
];

/// Why a call has no answer, in a few words: `connection refused`. The libraries below report "transport error", and the cause
/// is at the end of the error chain.
#[must_use]
pub fn in_words(error: &(dyn Error + 'static)) -> String {
    let io = causes(error).filter_map(|cause| cause.downcast_ref::<io::Error>()).last();
    if let Some(io) = io {
        let words = IO_WORDS.iter().find(|(kind, _)| *kind == io.kind());
        return words.map_or_else(|| io.to_string(), |(_, words)| (*words).to_owned());
    }
    let Some(deepest) = causes(error).last() else { return error.to_string() };
    match deepest.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => deepest.to_string(),
    }
}

/// Whether a status was made on this side, because there was no connection or it broke. Only such a status has a source: one that came
/// from the peer has none.
#[must_use]
pub fn is_ours(status: &Status) -> bool {
    status.source().is_some()
}

/// Iterates over an error and its causes.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// A connection that reports which protocol the peer speaks, if it is not HTTP/2.
pub type Http2Stream = Join<FirstByte, OwnedWriteHalf>;

/// What the peer sends. Looks at the first byte.
#[derive(Debug)]
pub struct FirstByte {
    stream: OwnedReadHalf,
    is_sure: bool,
}

impl AsyncRead for FirstByte {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let (false, Some(first)) = (self.is_sure, buf.filled().get(before)) {
            let speaks = match first {
                0 => None, // the length of a SETTINGS frame
                0x15 => Some("the server speaks TLS, and this connection does not"),
                b'H' => Some("the server speaks HTTP/1, not HTTP/2"),
                _ => Some("the server does not speak HTTP/2"),
            };
            if let Some(what) = speaks {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
            }
            self.is_sure = true;
        }
        Poll::Ready(Ok(()))
    }
}
