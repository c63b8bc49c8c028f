//! The walk itself: what it knows, and what every step needs.

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

use super::{
    burst::BURST_SKUS,
    events::What,
    ledger,
    screen::Screen,
    timeline,
    world::{COORDINATOR, World},
};

/// What is on the shelves at the beginning, beside what the burst needs.
const STOCK: [(&str, i64); 3] = [("keyboard", 100), ("mouse", 100), ("monitor", 2)];
/// Who orders.
pub(crate) const CUSTOMERS: [&str; 4] = ["ada", "ben", "cleo", "dan"];

/// How long the coordinator may take to know what became of an order, and to finish what is open.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked.
const PAUSE: Duration = Duration::from_millis(100);

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Walk<'w> {
    pub(crate) world: &'w mut World,
    pub(crate) screen: Screen,
    /// Before the first order.
    before: Books,
    /// What customers were told, by order.
    pub(crate) answers: BTreeMap<i64, Answer>,
    /// What went otherwise than it should.
    violations: Vec<String>,
    latest_order: i64,
}

impl<'w> Walk<'w> {
    /// Fills the shelves for the steps, and for a burst of so many orders.
    pub(crate) async fn begin(
        world: &'w mut World,
        screen: Screen,
        burst_orders: u32,
    ) -> anyhow::Result<Self> {
        // An order of the burst takes two pieces on average; so about one in five finds the shelf empty.
        let each = i64::from(burst_orders) * 2 * 4 / 5 / i64::try_from(BURST_SKUS.len())?;
        let burst = BURST_SKUS.map(|sku| (sku, each.max(1)));
        books::fill(&world.stores(), &[&STOCK[..], &burst].concat(), &CUSTOMERS).await?;
        let before = Books::read(&world.stores()).await?;
        let (answers, violations) = (BTreeMap::new(), Vec::new());
        Ok(Self { world, screen, before, answers, violations, latest_order: 1000 })
    }

    /// A new order, which nobody has placed yet.
    pub(crate) fn new_order(&mut self, customer: &str, sku: &str, quantity: i64) -> Order {
        self.latest_order += 1;
        let amount_cents = price_cents(sku) * quantity;
        let (customer, sku) = (customer.to_owned(), sku.to_owned());
        Order { id: self.latest_order, customer, sku, quantity, amount_cents }
    }

    /// Asks the order service to place it, and notes what it says. If that is not known, asks the coordinator until it is.
    pub(crate) async fn place(
        &mut self,
        request: PlaceOrderRequest,
    ) -> anyhow::Result<PlaceOrderResponse> {
        let id = request.order_id;
        let response = self.world.orders()?.place_order(request).await?.into_inner();
        self.note(id, &response).await?;
        Ok(response)
    }

    /// Notes what a customer was told.
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

    /// Asks the coordinator by the order's key, until it knows.
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

    /// Notes a violation unless it `holds`.
    pub(crate) fn expect(&mut self, holds: bool, violation: impl Into<String>) {
        if !holds {
            self.violations.push(violation.into());
        }
    }

    /// The transaction that begins next, after `from`.
    pub(crate) async fn begun(&self, from: usize) -> anyhow::Result<String> {
        let begun = |event: &super::events::Event| matches!(event.what, What::Begun { .. });
        let event = self.world.events.wait(from, "a transaction begins", begun).await?;
        Ok(event.xid().unwrap_or_default().to_owned())
    }

    /// Waits until the transaction is over and everybody has said so, and draws it.
    pub(crate) async fn draw(&self, xid: &str) -> anyhow::Result<()> {
        let events = &self.world.events;
        let finished =
            |what: &What| matches!(what, What::Finished { xid: finished, .. } if finished == xid);
        events.wait(0, "the transaction finishes", |event| finished(&event.what)).await?;
        let begun = events.of(xid).into_iter().find_map(|event| match event.what {
            What::Begun { branches, .. } => Some(branches),
            What::Called(_) | What::Decided { .. } | What::Finished { .. } | What::Done(_) => None,
        });
        // Each process has a pipe of its own, so the last words of a participant may come after those of the coordinator.
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
        for line in timeline::draw(&events.of(xid), self.screen.paint) {
            self.screen.inner(&line);
        }
        Ok(())
    }

    /// Says what came of a step.
    pub(crate) fn conclude(&self, text: &str) {
        self.screen.inner(&format!("→ {text}"));
    }

    /// The ledger and the audit. Returns what is wrong.
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

    /// Waits until the coordinator has nothing open.
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

/// What the order service says. `None`: it does not know.
pub(crate) fn answer(response: &PlaceOrderResponse) -> Option<Answer> {
    match response.outcome() {
        Outcome::Placed => Some(Answer::Placed),
        Outcome::Refused => Some(Answer::Refused),
        Outcome::Cancelled => Some(Answer::Cancelled),
        Outcome::Unknown | Outcome::Unspecified => None,
    }
}

/// An order, as the order service takes it.
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
