//! Answers callers before the coordinator owns its store: while it starts, and while it is a standby. The process is alive but
//! not ready. Every call except health checks is answered UNAVAILABLE.

use std::{io, net};

use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, body::Body, service::Routes, transport::Error};

use crate::{
    listen::{self, Permits},
    rpc::{EachCall, health::set_ready},
};

/// Serves until [`Lobby::close`].
#[derive(Debug)]
pub(crate) struct Lobby {
    listener: net::TcpListener,
    closing: CancellationToken,
    serving: JoinHandle<Result<(), Error>>,
}

impl Lobby {
    /// Starts to accept connections of `listener`.
    pub(crate) async fn open(listener: TcpListener, permits: Permits) -> io::Result<Self> {
        let listener = listener.into_std()?;
        let closing = CancellationToken::new();
        let incoming = TcpListener::from_std(listener.try_clone()?)?;
        let incoming = listen::incoming(incoming, permits, closing.clone());
        // A watch of the health would never end by itself.
        let each_call = EachCall::new(TaskTracker::new(), closing.clone());
        let serving = listen::server()
            .layer(each_call)
            .add_routes(routes().await)
            .serve_with_incoming_shutdown(Box::pin(incoming), closing.clone().cancelled_owned());
        Ok(Self { listener, closing, serving: tokio::spawn(serving) })
    }

    /// Ends all streams and asks clients to close their connections. They then connect to the coordinator itself. A connection
    /// that stays open keeps its permit.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::transport::Endpoint;
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };

    use super::*;

    /// It would hold its connection, and the client would never learn that the coordinator is ready.
    #[tokio::test]
    async fn a_watch_of_the_health_ends_with_the_lobby() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let lobby = Lobby::open(listener, Permits::new(10)).await.unwrap();
        let channel = Endpoint::from_shared(url).unwrap().connect_lazy();
        let watching = HealthClient::new(channel).watch(HealthCheckRequest::default()).await;
        let mut watched = watching.unwrap().into_inner();
        let first = watched.message().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::NotServing);
        lobby.close().await.unwrap();
        let next = tokio::time::timeout(Duration::from_secs(5), watched.message()).await;
        let status = next.expect("it ends").unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    }
}
