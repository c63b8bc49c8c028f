//! The same load for a server that speaks DTM's HTTP protocol (DTM itself, dtmrs). The requests are those of a DTM client:
//! prepare; for each branch, registerBranch and then its Try; submit. This program is the participant and answers all calls at once.
//!
//! The comparison favours that server. Its clients skip newGid (we make the gid), and its participants keep no fence.
//! How it logs and what it reads back is left to its own settings.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, Response, Uri, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use serde_json::json;
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    latency::Decided,
    ledger::{Ledger, Name},
};

/// At most this many bytes of a response are read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Runs transactions against a server that speaks DTM's protocol.
#[derive(Debug)]
pub(crate) struct DtmInitiator {
    client: Client<HttpConnector, Full<Bytes>>,
    /// `http://host:port/api/dtmsvr`
    server: String,
    /// Address of the participant that receives Trys and Confirms.
    participant: SocketAddr,
    branches: u16,
    ledger: Arc<Ledger>,
    /// Prefix of all transaction names in this run. The server has never seen a name with it.
    run: u32,
    next: AtomicU64,
}

/// The participant of all DTM branches. Stops when it is dropped.
#[derive(Debug)]
pub(crate) struct DtmParticipant(JoinHandle<()>);

impl Drop for DtmParticipant {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Returns an initiator for `server`, and the participant of all its branches.
pub(crate) async fn start(
    server: &str,
    branches: u16,
    ledger: Arc<Ledger>,
) -> anyhow::Result<(DtmInitiator, DtmParticipant)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let participant = listener.local_addr()?;
    let serving = tokio::spawn(serve(listener, ledger.clone()));
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let initiator = DtmInitiator {
        client: Client::builder(TokioExecutor::new()).build(connector),
        server: server.trim_end_matches('/').to_owned(),
        participant,
        branches,
        ledger,
        run: rand::random(),
        next: AtomicU64::new(0),
    };
    Ok((initiator, DtmParticipant(serving)))
}

impl DtmInitiator {
    /// Runs a transaction until the server answers submit.
    pub(crate) async fn decide(&self, meant: Instant) -> anyhow::Result<Decided> {
        // The ledger picks a shard from the bits above the lowest 32, so the number goes there.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = (Name::from(self.run) << 96) | (Name::from(number) << 32);
        let gid = format!("{name:032x}");
        let global = json!({ "gid": gid, "trans_type": "tcc" });
        self.ask("prepare", &global).await?;
        let begun = Instant::now();
        for branch in 1..=self.branches {
            let branch_id = format!("{branch:02}");
            let url = |op: &str| format!("http://{}/{op}", self.participant);
            let registered = json!({
                "gid": gid, "trans_type": "tcc", "branch_id": branch_id, "data": "1",
                "confirm": url("confirm"), "cancel": url("cancel"),
            });
            self.ask("registerBranch", &registered).await?;
            let query = format!("gid={gid}&trans_type=tcc&branch_id={branch_id}&op=try");
            self.post(&format!("{}?{query}", url("try")), Bytes::from_static(b"1")).await?;
        }
        let tried = Instant::now();
        let completion = self.ledger.expect(name, self.branches);
        self.ask("submit", &global).await?;
        let (begun, tried) = (Some(begun), Some(tried));
        Ok(Decided { meant, begun, tried, decided: Instant::now(), completion })
    }

    async fn ask(&self, what: &str, body: &serde_json::Value) -> anyhow::Result<()> {
        let url = format!("{}/{what}", self.server);
        self.post(&url, body.to_string().into()).await.with_context(|| what.to_owned())
    }

    async fn post(&self, url: &str, body: Bytes) -> anyhow::Result<()> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(url.parse::<Uri>()?)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = self.client.request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
        let text = String::from_utf8_lossy(&body);
        if !status.is_success() || text.contains("FAILURE") {
            bail!("{status}: {text}");
        }
        Ok(())
    }
}

async fn serve(listener: TcpListener, ledger: Arc<Ledger>) {
    while let Ok((stream, _)) = listener.accept().await {
        drop(stream.set_nodelay(true)); // slower without
        let ledger = ledger.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, ledger.clone()));
            // A connection error is ignored here: the caller that waits for the response sees it.
            drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

/// Answers every call with success and counts Confirms.
async fn answer(
    request: Request<Incoming>,
    ledger: Arc<Ledger>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let uri = request.uri().clone();
    drop(request.into_body().collect().await); // so that the connection can be used again
    let query = uri.query().unwrap_or_default();
    let field = |name| {
        let fields = query.split('&').filter_map(|field| field.split_once('='));
        fields.into_iter().find_map(|(found, value)| (found == name).then_some(value))
    };
    let name = field("gid").and_then(|gid| Name::from_str_radix(gid, 16).ok());
    let branch = field("branch_id").and_then(|branch| branch.parse().ok());
    if let ("/confirm", Some(name), Some(branch)) = (uri.path(), name, branch) {
        ledger.confirmed(name, branch);
    }
    Ok(Response::new(Full::new(Bytes::from_static(br#"{"dtm_result":"SUCCESS"}"#))))
}
