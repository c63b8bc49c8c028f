//! Several coordinators: a coordinator that is silent or on standby does not delay the call.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use handfast_proto::v1::coordinator_service_server::CoordinatorServiceServer;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;

use super::wire::Notes;
use crate::Handfast;

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn serve(notes: Notes) -> String {
    let (listener, url) = listen().await;
    let server = tonic::transport::Server::builder()
        .add_service(CoordinatorServiceServer::new(notes))
        .serve_with_incoming(TcpIncoming::from(listener));
    tokio::spawn(server);
    url
}

/// A proxy that swallows streams stands before each of them. Calls by themselves pass.
#[tokio::test]
async fn coordinators_whose_streams_are_blocked_are_not_taken_for_silent() {
    let opened = Arc::<AtomicUsize>::default();
    let blocked = || Notes::with_silent_streams(opened.clone());
    let urls = [serve(blocked()).await, serve(blocked()).await];
    let handfast = Handfast::connect(&urls.join(",")).unwrap();
    let began = Instant::now();
    for _ in 0..3 {
        drop(handfast.transaction("order").begin().await.unwrap());
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(opened.load(Ordering::Relaxed) <= 2, "{opened:?} streams were opened");
}

#[tokio::test]
async fn a_silent_coordinator_or_a_standby_does_not_hold_up_the_others() {
    let serving = serve(Notes::default()).await;
    let standby = serve(Notes::standby()).await;
    // This server accepts connections and never answers.
    let (_frozen, frozen) = listen().await;
    let (gone, dead) = listen().await;
    drop(gone);
    for others in [vec![&frozen], vec![&standby], vec![&dead], vec![&frozen, &standby, &dead]] {
        // The client starts with a random coordinator, so try several times.
        for _ in 0..3 {
            let mut urls: Vec<_> = others.iter().map(|url| url.as_str()).collect();
            urls.insert(1, &serving);
            let handfast = Handfast::connect(&urls.join(", ")).unwrap();
            for _ in 0..2 {
                let began = Instant::now();
                handfast.transaction("order").run(async |_| Ok(())).await.unwrap();
                assert!(
                    began.elapsed() < Duration::from_secs(8),
                    "{urls:?}: {:?}",
                    began.elapsed()
                );
            }
        }
    }
}

#[tokio::test]
async fn a_list_with_something_that_is_no_address_is_refused() {
    for urls in ["", "http://127.0.0.1:1,", "http://127.0.0.1:1,x"] {
        assert!(Handfast::connect(urls).is_err(), "{urls}");
    }
}
