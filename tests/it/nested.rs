//! Services that call services. An ordinary gRPC call carries the transaction in its metadata. The called service registers a
//! branch of its own, and that branch is confirmed with the others.

use handfast::{Context, ContextLayer, Handfast, Json, PropagateLayer, Remote, TransactionError};
use handfast_tests::{
    gift::{
        WrapRequest, WrapResponse,
        gift_service_client::GiftServiceClient,
        gift_service_server::{GiftService, GiftServiceServer},
    },
    process::Coordinator,
    wait_for,
    warehouse::{Deduct, PIECES, Warehouse},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Endpoint, server::TcpIncoming},
};
use tower::{Layer as _, ServiceBuilder};

/// A service that wraps gifts. It learns of the transaction only from the call's metadata.
struct Gifts {
    handfast: Handfast,
    /// The participant for this service's own branches: the paper.
    paper: Remote,
    /// Another service, called within the same transaction, that wraps the card.
    cards: Option<Client>,
}

type Client = GiftServiceClient<handfast::PropagateService<tonic::transport::Channel>>;

#[tonic::async_trait]
impl GiftService for Gifts {
    async fn wrap(&self, request: Request<WrapRequest>) -> Result<Response<WrapResponse>, Status> {
        let context = Context::of(&request)
            .ok_or_else(|| Status::failed_precondition("gifts are wrapped in transactions only"))?;
        assert_eq!(Context::current().unwrap().xid(), context.xid());
        let WrapRequest { sheets, mishap } = request.into_inner();
        let global = self.handfast.join(&context);
        let failed = |error: &dyn std::error::Error| Status::aborted(error.to_string());
        global.call::<Deduct>(&self.paper, Json(sheets)).await.map_err(|error| failed(&error))?;
        if let Some(cards) = &self.cards {
            let further = WrapRequest { sheets: 1, mishap: String::new() };
            global.scope(async { cards.clone().wrap(further).await }).await?;
        }
        match mishap.as_str() {
            "fail afterwards" => Err(Status::internal("the ribbon is torn")),
            _ => Ok(Response::new(WrapResponse {})),
        }
    }
}

/// Serves `gifts`. With `strip`, a layer in between removes the metadata from responses.
async fn serve(gifts: Gifts, strip: bool) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let loses = tower::util::MapResponseLayer::new(
        move |mut response: http::Response<tonic::body::Body>| {
            if strip {
                response.headers_mut().remove("handfast-branches");
            }
            response
        },
    );
    let server = tonic::transport::Server::builder()
        .layer(ServiceBuilder::new().layer(loses).layer(ContextLayer).into_inner())
        .add_service(GiftServiceServer::new(gifts));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let channel = Endpoint::from_shared(url).unwrap().connect_lazy();
    GiftServiceClient::new(PropagateLayer.layer(channel))
}

struct Rig {
    _folder: tempfile::TempDir,
    coordinator: Coordinator,
    goods: Warehouse,
    paper: Warehouse,
    cards: Warehouse,
    gifts: Client,
    /// The same service behind a layer that removes the metadata from responses.
    lossy: Client,
}

impl Rig {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
        let goods = Warehouse::open("goods", folder.path()).await;
        let paper = Warehouse::open("paper", folder.path()).await;
        let cards = Warehouse::open("cards", folder.path()).await;
        let handfast = coordinator.handfast();
        let wraps_cards = Gifts { handfast: handfast.clone(), paper: cards.remote(), cards: None };
        let wraps_cards = serve(wraps_cards, false).await;
        let gifts = || Gifts {
            handfast: handfast.clone(),
            paper: Remote::here(&paper.participant, &paper.url()),
            cards: Some(wraps_cards.clone()),
        };
        let (plain, lossy) = (serve(gifts(), false).await, serve(gifts(), true).await);
        Self { _folder: folder, coordinator, goods, paper, cards, gifts: plain, lossy }
    }

    async fn sold(&self) -> [i64; 3] {
        [self.goods.stock().await.2, self.paper.stock().await.2, self.cards.stock().await.2]
    }

    async fn nothing_is_held_or_sold(&self) {
        let untouched = (PIECES, 0, 0);
        let given_back = wait_for("everything is given back", async || {
            let stocks =
                [self.goods.stock().await, self.paper.stock().await, self.cards.stock().await];
            (stocks == [untouched; 3]).then_some(())
        });
        given_back.await;
    }
}

fn wrap(mishap: &str) -> WrapRequest {
    WrapRequest { sheets: 2, mishap: mishap.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nested_services_registered_is_confirmed_with_the_rest() {
    let rig = Rig::new().await;
    let (goods, mut gifts) = (rig.goods.remote(), rig.gifts.clone());
    let done = rig.coordinator.handfast().transaction("order").run(async |global| {
        global.call::<Deduct>(&goods, Json(1)).await?;
        gifts.wrap(wrap("")).await?; // in this closure's task, so it is part of the transaction
        Ok(())
    });
    let done = done.await.unwrap();
    assert!(done.completed);
    assert_eq!(rig.sold().await, [1, 2, 1]);
    // Three programs registered branches. Each branch id extends the id of the caller's branch.
    let mut client = handfast_proto::v1::coordinator_service_client::CoordinatorServiceClient::new(
        rig.coordinator.channel(),
    );
    let by = Some(handfast_proto::v1::get_transaction_request::By::Xid(done.xid.to_string()));
    let found = client
        .get_transaction(handfast_proto::v1::GetTransactionRequest { by, ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    let ids: Vec<_> =
        found.transaction.unwrap().branches.into_iter().map(|branch| branch.branch_id).collect();
    assert_eq!(ids, ["1", "2.1", "2.2.1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_can_be_attached_to_a_call_in_another_task() {
    let rig = Rig::new().await;
    let open = rig.coordinator.handfast().transaction("order").begin().await.unwrap();
    let (request, mut gifts) = (open.attach(Request::new(wrap(""))), rig.gifts.clone());
    tokio::spawn(async move { gifts.wrap(request).await }).await.unwrap().unwrap();
    assert!(open.confirm().await.unwrap().completed);
    assert_eq!(rig.sold().await, [0, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nested_service_that_fails_after_its_try_cancels_it_all_also_if_that_is_swallowed() {
    let rig = Rig::new().await;
    let (goods, mut gifts) = (rig.goods.remote(), rig.gifts.clone());
    let run = rig.coordinator.handfast().transaction("order").run(async |global| {
        global.call::<Deduct>(&goods, Json(1)).await?;
        gifts.wrap(wrap("fail afterwards")).await.unwrap_err();
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error, TransactionError::Cancelled { .. }), "{error:?}");
    assert!(error.to_string().contains("ribbon"), "{error}");
    rig.nothing_is_held_or_sold().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nested_refusal_cancels_it_all() {
    let rig = Rig::new().await;
    let (goods, mut gifts) = (rig.goods.remote(), rig.gifts.clone());
    let run = rig.coordinator.handfast().transaction("order").run(async |global| {
        global.call::<Deduct>(&goods, Json(1)).await?;
        gifts.wrap(WrapRequest { sheets: PIECES + 1, mishap: String::new() }).await?;
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(error.to_string().contains("OUT_OF_STOCK"), "{error}");
    rig.nothing_is_held_or_sold().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_nobody_reported_is_not_confirmed_unseen() {
    let rig = Rig::new().await;
    let (goods, mut lossy) = (rig.goods.remote(), rig.lossy.clone());
    let run = rig.coordinator.handfast().transaction("order").run(async |global| {
        global.call::<Deduct>(&goods, Json(1)).await?;
        lossy.wrap(wrap("")).await?;
        Ok(())
    });
    let error = run.await.unwrap_err();
    assert!(error.to_string().contains("2.1"), "which branch? {error}");
    rig.nothing_is_held_or_sold().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outside_of_a_transaction_calls_are_ordinary() {
    let rig = Rig::new().await;
    let status = rig.gifts.clone().wrap(wrap("")).await.unwrap_err();
    assert!(status.message().contains("in transactions only"), "{status:?}");
}
