//! Connecting to one of several coordinators. Each connection goes to the next address in turn, so that one that does not answer, or
//! does not serve, does not hold up the others.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task,
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use handfast_proto::{
    address::Address,
    connection::{self, Http2Stream, endpoint},
};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tonic::transport::{Channel, Uri};
use tower_service::Service;

/// How long one of several names may take to be looked up. All look-ups and one connection must fit into the time for a connection.
const ONE_OF_SEVERAL_NAMES_TIMEOUT: Duration = Duration::from_millis(700);
/// How long connecting to one address may take before the next one is tried.
const ONE_TIMEOUT: Duration = Duration::from_secs(1);

/// The addresses of a coordinator and its standbys. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Addresses {
    addresses: Arc<Vec<Address>>,
    /// How many IP addresses there were when a connection was made last.
    found: Arc<AtomicUsize>,
}

impl Addresses {
    /// `addresses` must not be empty.
    pub(crate) fn new(addresses: Vec<Address>) -> Self {
        let found = Arc::new(AtomicUsize::new(addresses.len()));
        Self { addresses: Arc::new(addresses), found }
    }

    /// How many there are, as far as is known.
    pub(crate) fn count(&self) -> usize {
        self.found.load(Ordering::Relaxed)
    }

    /// A channel whose first connection goes to the address with the number `start`, and each further one to the next.
    pub(crate) fn channel(&self, start: usize) -> Channel {
        let next = Arc::new(AtomicUsize::new(start));
        let connector = Connector { addresses: self.clone(), next };
        endpoint(&self.addresses[0]).connect_with_connector_lazy(connector)
    }

    async fn connect(&self, start: usize) -> io::Result<TokioIo<Http2Stream>> {
        let mut failed = io::Error::from(io::ErrorKind::NotFound);
        let mut found = Vec::new();
        // All at once: a name whose look-up hangs must not hold up the others.
        let several = self.addresses.len() > 1;
        let look_up = async |address| {
            let look_up = connection::look_up(address);
            match several {
                true => timeout(ONE_OF_SEVERAL_NAMES_TIMEOUT, look_up).await?,
                false => look_up.await,
            }
        };
        for looked_up in join_all(self.addresses.iter().map(look_up)).await {
            match looked_up {
                Ok(addresses) => found.extend(addresses),
                Err(error) => failed = error,
            }
        }
        self.found.store(found.len(), Ordering::Relaxed);
        for n in 0..found.len() {
            let address = found[start.wrapping_add(n) % found.len()];
            match timeout(ONE_TIMEOUT, connection::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = error,
                Err(_) => failed = io::Error::from(io::ErrorKind::TimedOut),
            }
        }
        Err(failed)
    }
}

#[derive(Clone)]
struct Connector {
    addresses: Addresses,
    next: Arc<AtomicUsize>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Http2Stream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Http2Stream>>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<io::Result<()>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let addresses = self.addresses.clone();
        Box::pin(async move { addresses.connect(start).await })
    }
}
