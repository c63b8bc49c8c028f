//! Answers callers before the coordinator owns its store: while it starts, and while it is a standby. The process is alive but
//! not ready. Every call except health checks is answered UNAVAILABLE.

use std::{io, net};

use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes, transport::Error};

use crate::{listen, rpc::health::set_ready};

/// Serves until [`Lobby::close`].
#[derive(Debug)]
pub(crate) struct Lobby {
    listener: net::TcpListener,
    closing: CancellationToken,
    serving: JoinHandle<Result<(), Error>>,
}

impl Lobby {
    /// Starts to accept connections of `listener`.
    pub(crate) async fn open(listener: TcpListener, connections_max: usize) -> io::Result<Self> {
        let listener = listener.into_std()?;
        let closing = CancellationToken::new();
        let incoming = TcpListener::from_std(listener.try_clone()?)?;
        let incoming = listen::incoming(incoming, connections_max, closing.clone());
        let serving = listen::server()
            .add_routes(routes().await)
            .serve_with_incoming_shutdown(Box::pin(incoming), closing.clone().cancelled_owned());
        Ok(Self { listener, closing, serving: tokio::spawn(serving) })
    }

    /// Closes all connections. The clients then reconnect to the coordinator itself.
    pub(crate) async fn close(self) -> io::Result<TcpListener> {
        self.closing.cancel();
        self.serving.abort();
        drop(self.serving.await);
        TcpListener::from_std(self.listener)
    }
}

async fn routes() -> Routes {
    let (reporter, health) = tonic_health::server::health_reporter();
    set_ready(&reporter, false).await;
    let turned_away = async || {
        let status = Status::unavailable(
            "this coordinator is a standby, or is starting: it does not own the store",
        );
        status.into_http::<Body>()
    };
    Routes::from(Routes::new(health).into_axum_router().fallback(turned_away))
}
