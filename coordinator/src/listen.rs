//! Accepts connections up to a limit, and sets the limits of each. Reserves file descriptors for calls to participants and for
//! the store.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{Stream, stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tracing::{info, warn};

use crate::rpc::{Connection, STREAMS_MAX};

/// Size of the headers of one request.
const HEADERS_BYTES_MAX: u32 = 16 * 1024;
/// How long a connection may be idle before it is pinged.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the client may take to answer a ping before the connection is closed.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed for lack of file descriptors or memory. It would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often the log reports refused connections.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// The least number of file descriptors that are reserved. If there are many, a quarter is reserved.
const RESERVE_MIN: u64 = 64;

/// The limit of connections: the configured one, if there are enough file descriptors. Raises this process's own limit of file
/// descriptors to the highest that the system allows.
pub(crate) fn connections_max(configured: usize) -> usize {
    let Some(descriptors) = raise_limit() else { return configured };
    let reserve = RESERVE_MIN.max(descriptors / 4);
    let possible = usize::try_from(descriptors.saturating_sub(reserve)).unwrap_or(usize::MAX);
    let connections = configured.min(possible.max(1));
    if connections < configured {
        warn!(
            descriptors,
            reserve,
            connections,
            configured,
            "too few file descriptors for limits.connections; raise the hard limit (ulimit -Hn, LimitNOFILE)"
        );
    } else {
        info!(descriptors, reserve, connections, "limits");
    }
    connections
}

/// Raises the soft limit of file descriptors to the hard one, and returns it; `None` if there is none.
fn raise_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            warn!(%error, "cannot raise the limit of file descriptors");
            limit.current
        }
    }
}

/// A server with the limits that gRPC does not set by itself.
pub(crate) fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .concurrency_limit_per_connection(STREAMS_MAX as usize)
        // After this process was suspended, many calls may have been cancelled by their callers. That is not an attack.
        .http2_max_pending_accept_reset_streams(Some(STREAMS_MAX as usize))
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// Permits for open connections. Clones share them: connections of the lobby that stay open after it has closed still count.
#[derive(Debug, Clone)]
pub(crate) struct Permits {
    free: Arc<Semaphore>,
    connections_max: usize,
}

impl Permits {
    /// For `connections_max` connections at a time.
    pub(crate) fn new(connections_max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(connections_max)), connections_max }
    }
}

/// Accepts a connection for each permit; further connections are closed at once. When `closing` is cancelled, connections whose
/// client has sent nothing are closed.
pub(crate) fn incoming(
    listener: TcpListener,
    permits: Permits,
    closing: CancellationToken,
) -> impl Stream<Item = io::Result<Connection<TcpStream>>> {
    let accepting = Accepting {
        listener,
        permits,
        closing,
        refused: Seldom::default(),
        failed: Seldom::default(),
    };
    stream::unfold(accepting, async |mut accepting| {
        let connection = accepting.next().await;
        Some((Ok(connection), accepting))
    })
}

struct Accepting {
    listener: TcpListener,
    permits: Permits,
    closing: CancellationToken,
    refused: Seldom,
    failed: Seldom,
}

impl Accepting {
    async fn next(&mut self) -> Connection<TcpStream> {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    if let Ok(permit) = self.permits.free.clone().try_acquire_owned() {
                        let _is_slower_without = stream.set_nodelay(true);
                        return Connection::new(stream, Some(permit)).until(self.closing.clone());
                    }
                    if let Some(times) = self.refused.tell() {
                        let connections_max = self.permits.connections_max;
                        warn!(
                            times,
                            connections_max,
                            "connections were refused: there are as many as there may be (limits.connections)"
                        );
                    }
                }
                // The error concerns one connection, not the listener.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => {
                    if let Some(times) = self.failed.tell() {
                        warn!(times, %error, "cannot accept connections; trying again");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Limits how often a repeated event is logged.
#[derive(Debug, Default)]
struct Seldom {
    times: u64,
    told_at: Option<Instant>,
}

impl Seldom {
    /// Counts the event. If it should be logged now, returns how often it has happened since it was last logged.
    fn tell(&mut self) -> Option<u64> {
        self.times += 1;
        if self.told_at.is_some_and(|at| at.elapsed() < TOLD_EVERY) {
            return None;
        }
        self.told_at = Some(Instant::now());
        Some(std::mem::take(&mut self.times))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::StreamExt as _;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
        time::{Instant, timeout},
    };

    use super::*;
    use crate::rpc::HANDSHAKE_WITHIN;

    /// The client's end of a connection to a server with only the health service.
    fn connect() -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1024);
        let (_, health) = tonic_health::server::health_reporter();
        let incoming = stream::iter([Ok::<_, Infallible>(Connection::new(theirs, None))]);
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
            .add_service(health)
            .serve_with_incoming(incoming);
        tokio::spawn(server);
        ours
    }

    /// How long it takes until the server closes the connection.
    async fn hung_up_after(mut client: DuplexStream) -> Duration {
        let began = Instant::now();
        let mut bytes = Vec::new();
        let ended = timeout(Duration::from_secs(3600), client.read_to_end(&mut bytes)).await;
        drop(ended.expect("it is never closed"));
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_say_that_it_speaks_http_2_is_hung_up_on() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for said in [&b""[..], &preface[..10], &preface[..23]] {
            let mut client = connect();
            client.write_all(said).await.unwrap();
            let after = hung_up_after(client).await;
            assert!(after <= HANDSHAKE_WITHIN + Duration::from_secs(1), "{after:?}: {said:?}");
        }
        // A slow client, which sends one byte a second.
        let (mut reads, mut writes) = tokio::io::split(connect());
        let writing = tokio::spawn(async move {
            for byte in preface {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if writes.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
        });
        let began = Instant::now();
        drop(reads.read_to_end(&mut Vec::new()).await);
        assert!(began.elapsed() <= HANDSHAKE_WITHIN + Duration::from_secs(1));
        writing.abort();
        // A client that sends the preface and then nothing: it does not answer the keep-alive ping.
        let mut client = connect();
        client.write_all(preface).await.unwrap();
        client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap(); // SETTINGS
        let after = hung_up_after(client).await;
        assert!(
            after > HANDSHAKE_WITHIN && after <= Duration::from_secs(41),
            "{after:?}: it was to be asked first"
        );
    }

    /// Otherwise a client could open `limits.connections` in the lobby, and as many once more when it has closed.
    #[tokio::test]
    async fn a_connection_that_stays_open_keeps_its_permit() {
        let permits = Permits::new(1);
        let mut opened = Vec::new();
        for is_accepted in [true, false] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let closing = CancellationToken::new();
            let accepting = Box::pin(incoming(listener, permits.clone(), closing));
            let mut client = TcpStream::connect(address).await.unwrap();
            let mut byte = [0];
            tokio::select! {
                (accepted, _) = accepting.into_future() => {
                    assert!(is_accepted);
                    opened.push(accepted.unwrap().unwrap());
                }
                closed = client.read(&mut byte) => {
                    assert!(!is_accepted && closed.is_ok_and(|bytes| bytes == 0));
                }
            }
        }
    }

    #[test]
    fn what_happens_often_is_told_seldom_with_a_count() {
        let mut seldom = Seldom::default();
        assert_eq!(seldom.tell(), Some(1));
        assert_eq!((0..99).filter_map(|_| seldom.tell()).count(), 0);
        seldom.told_at = Instant::now().into_std().checked_sub(TOLD_EVERY);
        assert_eq!(seldom.tell(), Some(100));
    }
}
