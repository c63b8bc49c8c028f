//! The state of the walk, and the operations that all steps share.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, bail};
use handfast::Outcome as Known;
use handfast_proto::v1::{
    ListTransactionsRequest, admin_service_client::AdminServiceClient,
    list_transactions_request::Show,
};
use handfast_shop::{
    Order,
    audit::{self, Answer},
    books::{self, Books},
    v1::{Outcome, PlaceOrderRequest, PlaceOrderResponse},
};
use tokio::time::Instant;

use super::{events::What, ledger, process::COORDINATOR, screen::Screen, timeline, world::World};

/// The initial stock, without the SKUs of the burst.
const STOCK: [(&str, i64); 3] = [("keyboard", 100), ("mouse", 100), ("monitor", 2)];
/// The SKUs of the burst: few, so that orders compete for the same rows.
pub(crate) const BURST_SKUS: [&str; 3] = ["lamp", "mug", "pen"];
/// The customers.
pub(crate) const CUSTOMERS: [&str; 4] = ["ada", "ben", "cleo", "dan"];

/// How long the coordinator may take to report the outcome of an order, and to finish open transactions.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause between two polls.
const PAUSE: Duration = Duration::from_millis(100);

/// The state of the walk.
#[derive(Debug)]
pub(crate) struct Walk<'w> {
    pub(crate) world: &'w mut World,
    pub(crate) screen: Screen,
    /// The tables before the first order.
    before: Books,
    /// What customers were told, by order id.
    pub(crate) answers: BTreeMap<i64, Answer>,
    /// What was not as it should be.
    violations: Vec<String>,
    latest_order: i64,
}

impl<'w> Walk<'w> {
    /// Creates the stock for the steps, and for a burst of this many orders.
    pub(crate) async fn begin(
        world: &'w mut World,
        screen: Screen,
        burst_orders: u32,
    ) -> anyhow::Result<Self> {
        // An order of the burst takes two pieces on average. This stock covers four fifths of them, so about one in five is
        // refused.
        let each = i64::from(burst_orders) * 2 * 4 / 5 / i64::try_from(BURST_SKUS.len())?;
        let burst = BURST_SKUS.map(|sku| (sku, each.max(1)));
        books::fill(&world.stores(), &[&STOCK[..], &burst].concat(), &CUSTOMERS).await?;
        let before = Books::read(&world.stores()).await?;
        let (answers, violations) = (BTreeMap::new(), Vec::new());
        Ok(Self { world, screen, before, answers, violations, latest_order: 1000 })
    }

    /// Creates an order; does not place it.
    pub(crate) fn new_order(&mut self, customer: &str, sku: &str, quantity: i64) -> Order {
        self.latest_order += 1;
        let amount_cents = price_cents(sku) * quantity;
        let (customer, sku) = (customer.to_owned(), sku.to_owned());
        Order { id: self.latest_order, customer, sku, quantity, amount_cents }
    }

    /// Asks the order service to place the order, and records the answer. If the outcome is unknown, polls the coordinator until
    /// it is known.
    pub(crate) async fn place(
        &mut self,
        request: PlaceOrderRequest,
    ) -> anyhow::Result<PlaceOrderResponse> {
        let id = request.order_id;
        let response = self.world.orders()?.place_order(request).await?.into_inner();
        self.note(id, &response).await?;
        Ok(response)
    }

    /// Records what a customer was told.
    pub(crate) async fn note(
        &mut self,
        id: i64,
        response: &PlaceOrderResponse,
    ) -> anyhow::Result<()> {
        let answer = match answer(response) {
            Some(answer) => answer,
            None => self.ask(id).await?,
        };
        self.answers.insert(id, answer);
        Ok(())
    }

    /// Polls the coordinator with the order's idempotency key until it knows the outcome.
    pub(crate) async fn ask(&self, id: i64) -> anyhow::Result<Answer> {
        let handfast = self.world.handfast()?;
        let patience_ends = Instant::now() + PATIENCE;
        while Instant::now() < patience_ends {
            match handfast.outcome_of_key(&key(id)).await {
                Ok(Known::Confirmed { .. }) => return Ok(Answer::Placed),
                Ok(Known::Cancelled { .. } | Known::NeverRecorded | Known::Forgotten) => {
                    return Ok(Answer::Cancelled);
                }
                Ok(_) | Err(_) => tokio::time::sleep(PAUSE).await, // not yet
            }
        }
        bail!("order {id}: within {PATIENCE:?} the coordinator has not said what became of it");
    }

    /// Records a violation unless `holds` is true.
    pub(crate) fn expect(&mut self, holds: bool, violation: impl Into<String>) {
        if !holds {
            self.violations.push(violation.into());
        }
    }

    /// The xid of the next transaction that begins after event index `from`.
    pub(crate) async fn begun(&self, from: usize) -> anyhow::Result<String> {
        let begun = |event: &super::events::Event| matches!(event.what, What::Begun { .. });
        let event = self.world.events.wait(from, "a transaction begins", begun).await?;
        Ok(event.xid().unwrap_or_default().to_owned())
    }

    /// Waits until the transaction has ended and all its events have arrived, and draws it.
    pub(crate) async fn draw(&self, xid: &str) -> anyhow::Result<()> {
        let events = &self.world.events;
        let finished =
            |what: &What| matches!(what, What::Finished { xid: finished, .. } if finished == xid);
        events.wait(0, "the transaction finishes", |event| finished(&event.what)).await?;
        let begun = events.of(xid).into_iter().find_map(|event| match event.what {
            What::Begun { branches, .. } => Some(branches),
            What::Called(_) | What::Decided { .. } | What::Finished { .. } | What::Done(_) => None,
        });
        // Each process has its own pipe, so a participant's last log lines may arrive after the coordinator's.
        for branch in 1..=begun.unwrap_or(0) {
            let branch = branch.to_string();
            let over = |what: &What| match what {
                What::Called(call) => {
                    let results =
                        ["branch confirmed", "branch cancelled", "repeat", "empty rollback"];
                    call.xid == xid
                        && call.branch_id == branch
                        && call.phase != "try"
                        && results.contains(&call.result.as_str())
                }
                What::Begun { .. }
                | What::Decided { .. }
                | What::Finished { .. }
                | What::Done(_) => false,
            };
            events.wait(0, "a participant is done", |event| over(&event.what)).await?;
        }
        self.draw_now(xid);
        Ok(())
    }

    /// Draws the transaction as it is.
    pub(crate) fn draw_now(&self, xid: &str) {
        for line in timeline::draw(&self.world.events.of(xid), self.screen.paint) {
            self.screen.inner(&line);
        }
    }

    /// Prints the conclusion of a step.
    pub(crate) fn conclude(&self, text: &str) {
        self.screen.inner(&format!("→ {text}"));
    }

    /// Prints the tables, and runs the audit. Returns the violations.
    pub(crate) async fn end(&mut self) -> anyhow::Result<Vec<String>> {
        self.settle().await?;
        let after = Books::read(&self.world.stores()).await?;
        let mut violations = self.violations.clone();
        violations.extend(audit::audit(&self.before, &after, &self.answers));

        let (screen, paint) = (self.screen, self.screen.paint);
        screen.title("The ledger: what was there before → what is there now");
        for line in ledger::draw(&self.before, &after, paint) {
            screen.inner(&line);
        }
        screen.title("The audit, from the databases of the three services");
        if violations.is_empty() {
            for line in [
                "of each SKU, available + frozen + sold is what it was",
                "nothing is left frozen, pending or tried",
                "each order's services agree: placed in all three, or in none",
                "what each customer was told is true",
            ] {
                screen.inner(&format!("{} {line}", paint.good("✓")));
            }
        }
        for violation in &violations {
            screen.inner(&format!("{} {violation}", paint.bad("✗")));
        }
        Ok(violations)
    }

    /// Waits until the coordinator has no open transaction.
    async fn settle(&self) -> anyhow::Result<()> {
        let mut operator = AdminServiceClient::new(self.world.channel(COORDINATOR)?);
        let patience_ends = Instant::now() + PATIENCE;
        loop {
            let show = Show::Open.into();
            let request = ListTransactionsRequest { show, limit: 1, ..Default::default() };
            let open = operator.list_transactions(request).await;
            let open = open.context("cannot ask the coordinator what is open")?.into_inner();
            let Some(first) = open.transactions.first() else { return Ok(()) };
            if Instant::now() > patience_ends {
                bail!("within {PATIENCE:?} transaction {} has not come to its end", first.xid);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Translates the order service's response. `None`: the service does not know the outcome.
pub(crate) fn answer(response: &PlaceOrderResponse) -> Option<Answer> {
    match response.outcome() {
        Outcome::Placed => Some(Answer::Placed),
        Outcome::Refused => Some(Answer::Refused),
        Outcome::Cancelled => Some(Answer::Cancelled),
        Outcome::Unknown | Outcome::Unspecified => None,
    }
}

/// The request that places this order.
pub(crate) fn request(order: Order) -> PlaceOrderRequest {
    let Order { id, customer, sku, quantity, amount_cents } = order;
    PlaceOrderRequest {
        order_id: id,
        customer,
        sku,
        quantity,
        amount_cents,
        patience_ms: 0,
        execute: false,
    }
}

fn key(order_id: i64) -> String {
    format!("order-{order_id}")
}

fn price_cents(sku: &str) -> i64 {
    match sku {
        "keyboard" => 7900,
        "mouse" => 2900,
        "monitor" => 24_900,
        "lamp" => 4500,
        "mug" => 900,
        _ => 200,
    }
}

/// `158.00`
pub(crate) fn money(cents: i64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}
