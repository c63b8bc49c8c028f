//! Limits of one connection. Without them, calls that wait for long would use up its streams, and every short call on it would hang.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::{Request, Status, transport::server::Connected};

use super::status::too_many_waits;

/// Calls under way on one connection.
pub const STREAMS_MAX: u32 = 1024;
/// Of those, calls that wait for a transaction to come to its end.
pub(super) const WAITS_MAX: usize = 512;

/// A connection, and its allowance of calls that wait.
#[derive(Debug)]
pub struct Connection<IO> {
    io: IO,
    waits: Allowance,
    /// One of `limits.connections`; given back when this is dropped.
    _permit: Option<OwnedSemaphorePermit>,
}

impl<IO> Connection<IO> {
    /// A new connection. It keeps `permit` until it is closed.
    pub fn new(io: IO, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self { io, waits: Allowance(Arc::new(Semaphore::new(WAITS_MAX))), _permit: permit }
    }
}

/// How many calls of this connection may wait.
#[derive(Debug, Clone)]
pub struct Allowance(Arc<Semaphore>);

impl<IO> Connected for Connection<IO> {
    type ConnectInfo = Allowance;

    fn connect_info(&self) -> Allowance {
        self.waits.clone()
    }
}

/// Takes a permit to wait, of the connection that `request` came on.
pub(super) fn waiting_permit<T>(
    request: &Request<T>,
) -> Result<Option<OwnedSemaphorePermit>, Status> {
    match request.extensions().get::<Allowance>() {
        None => Ok(None), // called without a connection
        Some(Allowance(waits)) => {
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
        Pin::new(&mut self.io).poll_read(cx, buf)
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
