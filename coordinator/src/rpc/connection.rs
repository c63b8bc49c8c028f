//! Limits of one connection: the time for its handshake, and the resources of its calls. Without them, long waits could use up
//! the connection's streams, and every short call on it would hang.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use handfast_proto::gather::Share;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Request, Status, transport::server::Connected};

use super::status::too_many_waits;

/// Calls in flight on one connection.
pub const STREAMS_MAX: u32 = 1024;
/// Calls of one connection that may wait for a transaction to complete.
pub(super) const WAITS_MAX: usize = 512;

/// How long a client may take for its part of the handshake. After the handshake, HTTP/2's keep-alive detects dead clients.
pub const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Length of the preface that every HTTP/2 client sends first: `PRI * HTTP/2.0` and so on.
const PREFACE_BYTES: usize = 24;

/// A connection with its limits.
#[derive(Debug)]
pub struct Connection<IO> {
    io: IO,
    allowance: Allowance,
    /// `None` once the preface has been read.
    handshake: Option<Handshake>,
    /// One of `limits.connections`. Given back when this is dropped.
    _permit: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
struct Handshake {
    bytes_left: usize,
    deadline: Pin<Box<Sleep>>,
    /// When this completes, a connection whose client has sent nothing is closed, so that it does not delay a shutdown.
    closing: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Handshake {
    /// The error, if the handshake has failed.
    fn failed(&mut self, cx: &mut Context<'_>) -> Option<io::Error> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return Some(io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 preface in time"));
        }
        let closing = self.closing.as_mut()?.as_mut().poll(cx);
        closing.is_ready().then(|| io::Error::new(io::ErrorKind::ConnectionAborted, "stopping"))
    }
}

impl<IO> Connection<IO> {
    /// A new connection. It keeps `permit` until it is closed. Must be called within a tokio runtime.
    pub fn new(io: IO, permit: Option<OwnedSemaphorePermit>) -> Self {
        let handshake = Handshake {
            bytes_left: PREFACE_BYTES,
            deadline: Box::pin(sleep(HANDSHAKE_WITHIN)),
            closing: None,
        };
        let allowance =
            Allowance { waits: Arc::new(Semaphore::new(WAITS_MAX)), unfinished: Share::default() };
        Self { io, allowance, handshake: Some(handshake), _permit: permit }
    }

    /// Closes the connection when `closing` is cancelled, unless the client has sent its HTTP/2 preface by then.
    #[must_use]
    pub(crate) fn until(mut self, closing: CancellationToken) -> Self {
        if let Some(handshake) = &mut self.handshake {
            handshake.closing = Some(Box::pin(closing.cancelled_owned()));
        }
        self
    }
}

/// What the calls of one connection may use together.
#[derive(Debug, Clone)]
pub struct Allowance {
    waits: Arc<Semaphore>,
    unfinished: Share,
}

impl Allowance {
    /// The bytes of messages that have not fully arrived.
    pub(super) fn unfinished(&self) -> Share {
        self.unfinished.clone()
    }
}

impl<IO> Connected for Connection<IO> {
    type ConnectInfo = Allowance;

    fn connect_info(&self) -> Allowance {
        self.allowance.clone()
    }
}

/// Takes a permit to wait from the connection of `request`.
pub(super) fn waiting_permit<T>(
    request: &Request<T>,
) -> Result<Option<OwnedSemaphorePermit>, Status> {
    match request.extensions().get::<Allowance>() {
        None => Ok(None), // called without a connection
        Some(Allowance { waits, .. }) => {
            waits.clone().try_acquire_owned().map(Some).map_err(|_| too_many_waits(WAITS_MAX))
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Some(handshake) = &mut self.handshake {
            let read = buf.filled().len() - before;
            handshake.bytes_left = handshake.bytes_left.saturating_sub(read);
            if handshake.bytes_left == 0 {
                self.handshake = None;
            } else if let Some(failed) = handshake.failed(cx) {
                return Poll::Ready(Err(failed));
            }
        }
        polled
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
