//! Checks what the SDK sends, with a fake coordinator that records every request.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::{
    stream,
    v1::{
        self as pb,
        coordinator_service_server::{CoordinatorService, CoordinatorServiceServer},
    },
};
use tonic::{Request, Response, Status, Streaming};
use tower_layer::Layer as _;
use tower_service::Service as _;

use super::{super::network::Network, *};
use crate::{Handfast, PropagateLayer, Remote};

/// A fake coordinator that records every request and accepts it.
#[derive(Clone, Default)]
pub(super) struct Notes {
    calls: Arc<Mutex<Vec<String>>>,
    /// How many calls are still to be refused as unavailable, before they are recorded.
    unavailable: Arc<Mutex<usize>>,
    /// Streams are never accepted. How many were opened. `None`: they are refused.
    silent_streams: Option<Arc<AtomicUsize>>,
}

impl Notes {
    /// A coordinator that refuses every call, like a standby.
    pub(super) fn standby() -> Self {
        Self { unavailable: Arc::new(Mutex::new(usize::MAX)), ..Self::default() }
    }

    /// A coordinator behind a proxy that swallows streams. Counts them.
    pub(super) fn with_silent_streams(opened: Arc<AtomicUsize>) -> Self {
        Self { silent_streams: Some(opened), ..Self::default() }
    }

    fn note(&self, call: String) -> Result<pb::Transaction, Status> {
        let mut unavailable = self.unavailable.lock().unwrap();
        if *unavailable > 0 {
            *unavailable -= 1;
            self.calls.lock().unwrap().push("(unavailable)".to_owned());
            return Err(Status::unavailable("later"));
        }
        self.calls.lock().unwrap().push(call);
        let state = pb::TransactionState::Confirmed.into();
        Ok(pb::Transaction { xid: "3-7-1042-9f3c01d2".to_owned(), state, ..Default::default() })
    }
}

fn ids(branches: &[pb::BranchSpec]) -> String {
    branches.iter().map(|branch| branch.branch_id.as_str()).collect::<Vec<_>>().join(",")
}

#[tonic::async_trait]
impl CoordinatorService for Notes {
    async fn begin(
        &self,
        request: Request<pb::BeginRequest>,
    ) -> Result<Response<pb::BeginResponse>, Status> {
        let transaction = self.note(format!("begin {}", ids(&request.get_ref().branches)))?;
        Ok(Response::new(pb::BeginResponse { transaction: Some(transaction), existed: false }))
    }

    async fn register_branch(
        &self,
        request: Request<pb::RegisterBranchRequest>,
    ) -> Result<Response<pb::RegisterBranchResponse>, Status> {
        let transaction = self.note(format!("register {}", ids(&request.get_ref().branches)))?;
        Ok(Response::new(pb::RegisterBranchResponse { transaction: Some(transaction) }))
    }

    async fn decide(
        &self,
        request: Request<pb::DecideRequest>,
    ) -> Result<Response<pb::DecideResponse>, Status> {
        let request = request.into_inner();
        let transaction =
            self.note(format!("{:?} {}", request.decision(), request.tried_branch_ids.join(",")))?;
        let transaction = pb::Transaction { decision: request.decision, ..transaction };
        Ok(Response::new(pb::DecideResponse { transaction: Some(transaction) }))
    }

    async fn execute(
        &self,
        _: Request<pb::ExecuteRequest>,
    ) -> Result<Response<pb::ExecuteResponse>, Status> {
        Err(Status::resource_exhausted("too many calls"))
    }

    async fn get_transaction(
        &self,
        _: Request<pb::GetTransactionRequest>,
    ) -> Result<Response<pb::GetTransactionResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn wait_transaction(
        &self,
        _: Request<pb::WaitTransactionRequest>,
    ) -> Result<Response<pb::WaitTransactionResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn inquire_branches(
        &self,
        _: Request<pb::InquireBranchesRequest>,
    ) -> Result<Response<pb::InquireBranchesResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type CallStreamStream = stream::Answers<pb::CallStreamResponse>;

    async fn call_stream(
        &self,
        _: Request<Streaming<pb::CallStreamRequest>>,
    ) -> Result<Response<Self::CallStreamStream>, Status> {
        if let Some(opened) = &self.silent_streams {
            opened.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<()>().await;
        }
        Err(Status::unimplemented("calls come one by one"))
    }
}

async fn rig() -> (Notes, Handfast, Remote) {
    let (network, notes) = (Network::default(), Notes::default());
    let incoming = network.host("coordinator");
    let service = CoordinatorServiceServer::new(notes.clone());
    tokio::spawn(
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming),
    );
    let handfast =
        Handfast::from_channels(network.connect("coordinator"), network.connect("coordinator"));
    let db = Box::leak(Box::new(Database::new(SCHEMA).await)); // as long as the test
    let inventory = participant("inventory", db, Inventory).await;
    (notes, handfast, Remote::here(&inventory, "http://127.0.0.1:7001"))
}

impl Notes {
    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

/// The first attempt goes over a stream and may be carried out. That the coordinator has no room for a repeat proves nothing.
#[tokio::test(start_paused = true)]
async fn an_execute_that_may_have_arrived_is_not_told_as_not_begun() {
    for (silent_streams, may_run) in [(Some(Arc::default()), true), (None, false)] {
        let network = Network::default();
        let notes = Notes { silent_streams, ..Notes::default() };
        let incoming = network.host("coordinator");
        let service = CoordinatorServiceServer::new(notes);
        tokio::spawn(
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming),
        );
        let channel = || network.connect("coordinator");
        let handfast = Handfast::from_channels(channel(), channel());
        let remote = Remote::with_channel("inventory", "http://127.0.0.1:7001", channel());
        let told = handfast.execute("order").call::<Deduct>(&remote, &Json(1)).run().await;
        let told = told.unwrap_err();
        let is_unknown = matches!(told, TransactionError::Unknown { .. });
        let is_not_begun = matches!(told, TransactionError::NotBegun { .. });
        assert_eq!((is_unknown, is_not_begun), (may_run, !may_run), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_awaited_together_are_registered_together_and_with_begin() {
    let (notes, handfast, inventory) = rig().await;
    let run = handfast.transaction("order").run(async |global| {
        tokio::try_join!(
            global.call::<Deduct>(&inventory, Json(1)),
            global.call::<Deduct>(&inventory, Json(1)),
            global.call::<Deduct>(&inventory, Json(1)),
        )?;
        global.call::<Deduct>(&inventory, Json(1)).await?;
        tokio::try_join!(
            global.call::<Deduct>(&inventory, Json(1)),
            global.call::<Deduct>(&inventory, Json(1)),
        )?;
        Ok(())
    });
    run.await.unwrap();
    let expected = ["begin 1,2,3", "register 4", "register 5,6", "Confirm 1,2,3,4,5,6"];
    assert_eq!(notes.calls(), expected);
}

#[tokio::test]
async fn whatever_the_coordinator_offers_may_be_asked_for_again() {
    let (notes, handfast, inventory) = rig().await;
    *notes.unavailable.lock().unwrap() = 2;
    let run = handfast.transaction("order").run(async |global| {
        global.call::<Deduct>(&inventory, Json(1)).await?;
        *notes.unavailable.lock().unwrap() = 2;
        Ok(())
    });
    run.await.unwrap();
    let twice = "(unavailable)";
    assert_eq!(notes.calls(), [twice, twice, "begin 1", twice, twice, "Confirm 1"]);
}

#[tokio::test]
async fn a_refused_try_asks_for_cancel_and_names_no_branches() {
    let (notes, handfast, inventory) = rig().await;
    let run = handfast.transaction("order").run(async |global| {
        global.call::<Deduct>(&inventory, Json(11)).await?;
        Ok(())
    });
    run.await.unwrap_err();
    assert_eq!(notes.calls(), ["begin 1", "Cancel "]);
}

#[tokio::test]
async fn branch_ids_follow_the_order_of_the_calls_not_of_their_polls() {
    let (notes, handfast, inventory) = rig().await;
    let run = handfast.transaction("order").run(async |global| {
        let first = global.call::<Deduct>(&inventory, Json(1));
        let second = global.call::<Deduct>(&inventory, Json(1));
        second.await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
        first.await?;
        Ok(())
    });
    run.await.unwrap();
    assert_eq!(notes.calls(), ["begin 2", "register 1", "Confirm 1,2"]);
}

/// An ordinary call gets its branch id when it is created. Otherwise, two calls that wait for the same Begin could swap their
/// ids in a retry, and the ids of nested branches would change with them.
#[tokio::test]
async fn ordinary_calls_have_branch_ids_in_the_order_of_the_calls() {
    let (notes, handfast, _) = rig().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let inner = tower::service_fn(move |request: http::Request<String>| {
        let id = request.headers()["handfast-branch-id"].to_str().unwrap().to_owned();
        noted.lock().unwrap().push(format!("{} {id}", request.body()));
        std::future::ready(Ok::<_, std::io::Error>(http::Response::new(())))
    });
    let run = handfast.transaction("order").run(async |_| {
        let call = |name: &str| {
            let mut client = PropagateLayer.layer(inner.clone());
            client.call(http::Request::new(name.to_owned()))
        };
        let (first, second) = (call("first"), call("second"));
        second.await.unwrap();
        first.await.unwrap();
        Ok(())
    });
    run.await.unwrap();
    assert_eq!(*seen.lock().unwrap(), ["second 2", "first 1"]);
    assert_eq!(notes.calls()[0], "begin ");
}
