//! The load. Each customer places one order after the other, through the order service or as an initiator, and notes what it was told.
//! A customer that gets no answer retries with the same key.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use handfast::{Handfast, Json, Outcome, Remote, TransactionError};
use handfast_shop::{
    CreateOrder, DeductStock, EarnPoints, Order,
    audit::Answer,
    store::Service,
    v1::{self, PlaceOrderRequest, order_service_client::OrderServiceClient},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

use crate::{tally::Tally, world::World};

/// One in so many customers is an initiator. The others call the order service.
const THEMSELVES_ONE_OF: usize = 3;
/// The customers' names.
pub(crate) const CUSTOMERS: [&str; 4] = ["ada", "ben", "cleo", "dan"];
/// What they order. Of the last there are few, so most orders of it are refused.
pub(crate) const STOCK: [(&str, i64); 4] =
    [("lamp", 10_000_000), ("mug", 10_000_000), ("pen", 10_000_000), ("unicorn", 25)];
/// How often a customer tries to place one order, if there is no answer.
const ATTEMPTS: usize = 3;
/// How long phase one may take. Often too short for what happens here.
const TIMEOUT_MS: std::ops::Range<u64> = 300..4000;
/// How long an initiator asks for a decision.
const PATIENCE: Duration = Duration::from_secs(4);
/// How much longer than phase one a customer waits for an answer of the order service.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long the coordinator is asked what became of a key, once everything is healed.
const RESOLVED_WITHIN: Duration = Duration::from_secs(60);

/// Counts of all customers.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    next: AtomicI64,
    pub(crate) placed: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) unknown: AtomicU64,
}

/// What the customer was told, by order. `None`: there was no answer.
pub(crate) type Told = BTreeMap<i64, Option<Answer>>;

/// The clients of one customer.
#[derive(Clone)]
struct Doors {
    shop: OrderServiceClient<Channel>,
    handfast: Handfast,
    order: Remote,
    inventory: Remote,
    points: Remote,
}

impl Doors {
    fn of(world: &World) -> anyhow::Result<Self> {
        let remote = |service: Service| Remote::connect(&service.to_string(), &world.url(service));
        let shop = Endpoint::from_shared(world.url(Service::Order))?;
        let shop = shop.connect_timeout(Duration::from_secs(2)).tcp_nodelay(true).connect_lazy();
        Ok(Self {
            shop: OrderServiceClient::new(shop),
            handfast: Handfast::connect(&world.coordinator_url())?,
            order: remote(Service::Order)?,
            inventory: remote(Service::Inventory)?,
            points: remote(Service::Points)?,
        })
    }
}

/// Places orders until the run is over. Returns what customers were told.
pub(crate) async fn order(
    world: &World,
    progress: Arc<Progress>,
    seed: u64,
    at_a_time: usize,
) -> anyhow::Result<Told> {
    let mut customers = JoinSet::new();
    for n in 0..at_a_time {
        // Connections of their own, so that one that is lost is not everybody's.
        let (doors, progress) = (Doors::of(world)?, progress.clone());
        let rng = StdRng::seed_from_u64(seed.wrapping_add(n as u64));
        let tally = world.tally.clone();
        let through_service = n % THEMSELVES_ONE_OF > 0;
        customers.spawn(customer(doors, through_service, progress, tally, rng));
    }
    let mut told = Told::new();
    while let Some(of_one) = customers.join_next().await {
        told.extend(of_one?);
    }
    Ok(told)
}

async fn customer(
    doors: Doors,
    through_service: bool,
    progress: Arc<Progress>,
    tally: Arc<Tally>,
    mut rng: StdRng,
) -> Told {
    let mut told = Told::new();
    while !tally.is_over() {
        let (sku, _) = STOCK[[0, 1, 2, 0, 1, 2, 0, 1, 2, 3][rng.random_range(0..10)]];
        let quantity = rng.random_range(1..=3);
        let order = Order {
            id: progress.next.fetch_add(1, Ordering::Relaxed) + 1,
            customer: CUSTOMERS[rng.random_range(0..CUSTOMERS.len())].to_owned(),
            sku: sku.to_owned(),
            quantity,
            amount_cents: quantity * 900,
        };
        let phase_one = Duration::from_millis(rng.random_range(TIMEOUT_MS));
        let execute = rng.random_bool(0.3);
        let mut answer = None;
        for attempt in 1..=ATTEMPTS {
            let first = attempt == 1;
            answer = if through_service {
                through_the_service(&doors, &order, phase_one, execute, first).await
            } else {
                by_itself(&doors, &order, phase_one, execute, first).await
            };
            if answer.is_some() || tally.is_over() {
                break;
            }
            sleep(Duration::from_millis(rng.random_range(20..500))).await;
        }
        progress.note(answer).fetch_add(1, Ordering::Relaxed);
        told.insert(order.id, answer);
    }
    told
}

impl Progress {
    fn note(&self, answer: Option<Answer>) -> &AtomicU64 {
        match answer {
            Some(Answer::Placed) => &self.placed,
            Some(Answer::Refused) => &self.refused,
            Some(Answer::Cancelled) => &self.cancelled,
            None => &self.unknown,
        }
    }
}

async fn through_the_service(
    doors: &Doors,
    order: &Order,
    phase_one: Duration,
    execute: bool,
    first: bool,
) -> Option<Answer> {
    let Order { id, customer, sku, quantity, amount_cents } = order.clone();
    let request = PlaceOrderRequest {
        order_id: id,
        customer,
        sku,
        quantity,
        amount_cents,
        patience_ms: i64::try_from(phase_one.as_millis()).expect("a few seconds"),
        execute,
    };
    let mut shop = doors.shop.clone();
    let answer = timeout(phase_one + ANSWER_WITHIN, shop.place_order(request)).await;
    let response = answer.ok()?.ok()?.into_inner();
    match response.outcome() {
        v1::Outcome::Placed => Some(Answer::Placed),
        v1::Outcome::Refused => Some(Answer::Refused),
        // Without an xid, this call began nothing. An earlier one may have.
        v1::Outcome::Cancelled if response.xid.is_empty() && !first => None,
        v1::Outcome::Cancelled => Some(Answer::Cancelled),
        v1::Outcome::Unknown | v1::Outcome::Unspecified => None,
    }
}

async fn by_itself(
    doors: &Doors,
    order: &Order,
    phase_one: Duration,
    execute: bool,
    first: bool,
) -> Option<Answer> {
    let (stock, points) = (order.stock(), order.points());
    let ended = if execute {
        let executing = doors
            .handfast
            .execute("checkout")
            .idempotency_key(order.key())
            .timeout(phase_one)
            .until_decided()
            .call::<CreateOrder>(&doors.order, &Json(order.clone()))
            .call::<DeductStock>(&doors.inventory, &Json(stock))
            .call::<EarnPoints>(&doors.points, &Json(points))
            .run();
        // One that gives up is told nothing.
        timeout(phase_one + ANSWER_WITHIN, executing).await.ok()?.map(drop)
    } else {
        let transaction = doors
            .handfast
            .transaction("checkout")
            .idempotency_key(order.key())
            .timeout(phase_one)
            .patience(PATIENCE)
            .until_decided();
        let at_decision = order.id % 2 == 0;
        let transaction = if at_decision { transaction.record_at_decision() } else { transaction };
        let ended = transaction.run(async |global| {
            tokio::try_join!(
                global.call::<CreateOrder>(&doors.order, Json(order.clone())),
                global.call::<DeductStock>(&doors.inventory, Json(stock)),
                global.call::<EarnPoints>(&doors.points, Json(points)),
            )?;
            Ok(())
        });
        ended.await.map(drop)
    };
    match ended {
        Ok(()) => Some(Answer::Placed),
        Err(TransactionError::Refused { .. }) => Some(Answer::Refused),
        Err(TransactionError::Cancelled { .. } | TransactionError::TimedOut { .. }) => {
            Some(Answer::Cancelled)
        }
        Err(TransactionError::NotBegun { .. }) if first => Some(Answer::Cancelled),
        Err(_) => None,
    }
}

/// Asks the coordinator about the orders without an answer. Returns how many are confirmed and how many cancelled.
pub(crate) async fn resolve(world: &World, told: &mut Told) -> anyhow::Result<[u64; 2]> {
    let handfast = Handfast::connect(&world.coordinator_url())?;
    let mut resolved = [0, 0];
    for (id, answer) in told.iter_mut().filter(|(_, answer)| answer.is_none()) {
        let key = format!("order-{id}");
        let limit = Instant::now() + RESOLVED_WITHIN;
        let outcome = loop {
            match handfast.outcome_of_key(&key).await {
                Ok(Outcome::Undecided) if Instant::now() < limit => {}
                Ok(outcome) => break outcome,
                Err(error) if Instant::now() >= limit => return Err(error.into()),
                Err(_) => {}
            }
            sleep(Duration::from_millis(20)).await;
        };
        let (known, n) = match outcome {
            Outcome::Confirmed { .. } => (Answer::Placed, 0),
            // Of a key that nobody knows no transaction has begun.
            Outcome::Cancelled { .. }
            | Outcome::NeverRecorded
            | Outcome::Forgotten
            | Outcome::KeyUnknown => (Answer::Cancelled, 1),
            Outcome::Undecided | _ => anyhow::bail!("{key} is not decided"),
        };
        resolved[n] += 1;
        *answer = Some(known);
    }
    Ok(resolved)
}
