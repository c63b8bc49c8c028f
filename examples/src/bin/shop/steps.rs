//! The nine steps: what each step shows, and what its outcome must be.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use handfast::{Contract, Json, Payload, Remote, TransactionError};
use handfast_proto::v1::{
    self as pb, coordinator_service_client::CoordinatorServiceClient,
    participant_service_client::ParticipantServiceClient,
};
use handfast_shop::{
    DeductStock, EarnPoints, Order,
    audit::Answer,
    v1::{Outcome, PlaceOrderRequest, PlaceOrderResponse},
};
use tonic::Code;

use super::{
    burst::{self, Size},
    events::{Call, Event, What},
    network::{Fault, HELD_UP},
    process::{COORDINATOR, INVENTORY, ORDER, POINTS},
    walk::{Walk, money, request},
};

/// The number of steps.
pub(crate) const STEPS: u8 = 9;
/// A timeout that is never reached in the walk.
const VERY_LONG: Duration = Duration::from_secs(60);

impl Walk<'_> {
    /// Runs one step.
    pub(crate) async fn step(&mut self, step: u8, burst: Size) -> anyhow::Result<()> {
        match step {
            1 => self.succeeds().await,
            2 => self.is_refused().await,
            3 => self.confirm_fails().await,
            4 => self.cancel_overtakes_try().await,
            5 => self.coordinator_dies_after_the_decision().await,
            6 => self.coordinator_dies_before_the_decision().await,
            7 => self.is_executed().await,
            8 => self.is_lost_before_it_is_recorded().await,
            _ => self.burst(burst).await,
        }
        .with_context(|| format!("step {step}"))
    }

    async fn succeeds(&mut self) -> anyhow::Result<()> {
        self.title(1, "An order that succeeds", &[
            "The order service has three services reserve something, all at once: that is Try. Everything",
            "is reserved, so the coordinator records the decision, and has each service use what it has",
            "reserved: that is Confirm.",
        ]);
        let order = self.new_order("ada", "keyboard", 2);
        self.say(&order);
        let response = self.place(request(order)).await?;
        self.draw(&response.xid).await?;
        self.conclude(&outcome(&response));
        self.expect(response.outcome() == Outcome::Placed, "step 1: the order is not placed");
        Ok(())
    }

    async fn is_refused(&mut self) -> anyhow::Result<()> {
        self.title(2, "An order that is refused", &[
            "There are two monitors, and three are wanted. Inventory says no, and why, and that decides:",
            "Cancel. What the others have reserved is given back. (The network makes inventory answer",
            "last here, so that there is something to give back.)",
        ]);
        let order = self.new_order("ben", "monitor", 3);
        self.say(&order);
        let late = Fault::Delay(Duration::from_millis(50));
        self.world.networks()?.inventory.next("try", late, 1);
        let response = self.place(request(order)).await?;
        self.draw(&response.xid).await?;
        self.conclude(&outcome(&response));
        let refused = response.outcome() == Outcome::Refused && response.reason == "OUT_OF_STOCK";
        self.expect(refused, "step 2: the order is not refused for lack of stock");
        Ok(())
    }

    async fn confirm_fails(&mut self) -> anyhow::Result<()> {
        self.title(3, "A confirm that fails three times", &[
            "Everything is reserved, and it is decided. Then points cannot be reached. Nobody asks whether",
            "to go on: the decision stands, and points is asked again, after growing pauses, until it has",
            "confirmed.",
        ]);
        let order = self.new_order("cleo", "mouse", 1);
        self.say(&order);
        self.world.networks()?.points.next("confirm", Fault::Fail, 3);
        let response = self.place(request(order)).await?;
        self.draw(&response.xid).await?;
        self.conclude(&outcome(&response));
        let failed = self.world.networks()?.points.left() == 0;
        self.expect(failed, "step 3: the confirm was not asked for again until it was done");
        self.expect(response.outcome() == Outcome::Placed, "step 3: the order is not placed");
        Ok(())
    }

    async fn cancel_overtakes_try(&mut self) -> anyhow::Result<()> {
        self.title(4, "A cancel that overtakes its try", &[
            "The walk itself orders here. Points reserves; the Try for inventory hangs in the network, and",
            "the customer gives up. Inventory is told to cancel what it has never seen: it notes that, and",
            "does nothing (empty rollback). When the Try comes after all, it is turned away (suspension).",
            "Without that note, two mice would stay frozen for ever.",
        ]);
        let order = self.new_order("dan", "mouse", 2);
        self.say(&order);
        let mut coordinator = CoordinatorServiceClient::new(self.world.channel(COORDINATOR)?);
        let mut points = ParticipantServiceClient::new(self.world.channel(POINTS)?);
        let mut inventory = ParticipantServiceClient::new(self.world.channel(INVENTORY)?);

        let branch = |branch_id: &str, action: &str, participant: &str| pb::BranchSpec {
            branch_id: branch_id.to_owned(),
            action: action.to_owned(),
            participant: participant.to_owned(),
            target: self.world.url(participant),
            ..pb::BranchSpec::default()
        };
        let begin = pb::BeginRequest {
            name: "checkout".to_owned(),
            idempotency_key: order.key(),
            labels: BTreeMap::from([("order".to_owned(), order.id.to_string())]),
            branches: vec![
                branch("1", EarnPoints::NAME, POINTS),
                branch("2", DeductStock::NAME, INVENTORY),
            ],
            ..pb::BeginRequest::default()
        };
        let begun = coordinator.begin(begin).await?.into_inner().transaction.unwrap_or_default();
        let xid = begun.xid.clone();
        points.try_branch(try_request::<EarnPoints>(&begun, "1", &Json(order.points()))?).await?;
        let cancel = pb::DecideRequest {
            xid: xid.clone(),
            decision: pb::Decision::Cancel.into(),
            reason: "the customer gave up".to_owned(),
            until: pb::Until::Completed.into(),
            ..pb::DecideRequest::default()
        };
        coordinator.decide(cancel).await?;
        let late = try_request::<DeductStock>(&begun, "2", &Json(order.stock()))?;
        let late = inventory.try_branch(late).await;

        self.answers.insert(order.id, Answer::Cancelled);
        let suspended = |event: &Event| matches!(&event.what, What::Called(call) if call.result == "suspension");
        self.world.events.wait(0, "inventory turns the late Try away", suspended).await?;
        self.draw(&xid).await?;
        let turned_away = matches!(&late, Err(status) if status.code() == Code::Aborted);
        match late {
            Err(status) => self.conclude(&format!("the late Try: {}", status.message())),
            Ok(_) => self.conclude("the late Try has reserved something"),
        }
        self.expect(turned_away, "step 4: the late Try was not turned away");
        Ok(())
    }

    async fn coordinator_dies_after_the_decision(&mut self) -> anyhow::Result<()> {
        self.title(5, "The coordinator is killed after the decision", &[
            "Points is slow to confirm, and meanwhile the coordinator gets SIGKILL. It is started again on",
            "the same database. There it finds the decision, and carries it out. Who has confirmed before",
            "says so again; nothing happens twice.",
        ]);
        let order = self.new_order("ada", "mouse", 1);
        self.say(&order);
        self.world.networks()?.points.next("confirm", Fault::Delay(VERY_LONG), 1);
        let from = self.world.events.len();
        let (id, placing) = (order.id, self.place_meanwhile(request(order))?);
        let xid = self.begun(from).await?;
        let decided = |event: &Event| matches!(&event.what, What::Decided { xid: decided, .. } if *decided == xid);
        self.world.events.wait(from, "the decision", decided).await?;
        let held = |call: &Call| call.result == HELD_UP;
        self.called(from, &xid, "the Confirm for points", held).await?;
        self.world.kill(COORDINATOR).await?;
        self.world.start_again(COORDINATOR).await?;
        let response = placing.await??;
        self.note(id, &response).await?;
        self.draw(&xid).await?;
        self.conclude(&outcome(&response));
        self.expect(response.outcome() == Outcome::Placed, "step 5: the order is not placed");
        Ok(())
    }

    async fn coordinator_dies_before_the_decision(&mut self) -> anyhow::Result<()> {
        self.title(6, "The coordinator is killed before the decision, and the initiator with it", &[
            "Order and inventory have reserved; the Try for points hangs in the network. Now coordinator",
            "and order service both get SIGKILL: whoever wanted this order is gone. When its time is up,",
            "after three seconds, the coordinator cancels it.",
        ]);
        let order = self.new_order("ben", "keyboard", 1);
        self.say(&order);
        self.world.networks()?.points.next("try", Fault::Delay(VERY_LONG), 1);
        let from = self.world.events.len();
        let id = order.id;
        let placing =
            self.place_meanwhile(PlaceOrderRequest { patience_ms: 3000, ..request(order) })?;
        let xid = self.begun(from).await?;
        for (branch, result) in [("1", "branch tried"), ("2", "branch tried"), ("3", HELD_UP)] {
            let there = |call: &Call| call.branch_id == branch && call.result == result;
            self.called(from, &xid, "the Trys", there).await?;
        }
        self.world.kill(COORDINATOR).await?;
        self.world.kill(ORDER).await?;
        self.world.start_again(COORDINATOR).await?;
        self.world.start_again(ORDER).await?;
        let told = placing.await?;
        self.draw(&xid).await?;
        // The customer got no answer, so we ask the coordinator.
        let answer = self.ask(id).await?;
        self.answers.insert(id, answer);
        self.conclude("the customer has heard nothing; asked by the order's key, the coordinator says: cancelled");
        self.expect(told.is_err(), "step 6: a service that is dead has answered");
        self.expect(answer == Answer::Cancelled, "step 6: the order is not cancelled");
        Ok(())
    }

    async fn is_executed(&mut self) -> anyhow::Result<()> {
        self.title(7, "The same order as in step 1, driven by the coordinator", &[
            "One call (Execute) brings all three branches, with what each is to do. The coordinator calls",
            "the Trys itself, decides, and goes on as ever: for initiators that cannot, or do not want to,",
            "call anybody themselves.",
        ]);
        let order = self.new_order("ada", "keyboard", 2);
        self.say(&order);
        let response = self.place(PlaceOrderRequest { execute: true, ..request(order) }).await?;
        self.draw(&response.xid).await?;
        self.conclude(&outcome(&response));
        self.expect(response.outcome() == Outcome::Placed, "step 7: the order is not placed");
        Ok(())
    }

    async fn is_lost_before_it_is_recorded(&mut self) -> anyhow::Result<()> {
        self.title(8, "An order that is lost before it is recorded", &[
            "The walk itself orders here, and has the order recorded with its decision. So nothing of it is",
            "written when the coordinator gets SIGKILL. The next one has never heard of it, and calls nobody.",
            "The walk hears that, and has inventory and points ask. They give back what they have reserved.",
        ]);
        let order = self.new_order("cleo", "mouse", 1);
        self.say(&order);
        let handfast = self.world.handfast()?;
        let inventory = Remote::with_channel(
            INVENTORY,
            &self.world.url(INVENTORY),
            self.world.channel(INVENTORY)?,
        );
        let points =
            Remote::with_channel(POINTS, &self.world.url(POINTS), self.world.channel(POINTS)?);
        // A coordinator that has just started answers from memory once it has written something.
        handfast.transaction("greeting").run(async |_| Ok(())).await?;
        let open = handfast
            .transaction("checkout")
            .label("order", order.id)
            .timeout(VERY_LONG)
            .record_at_decision()
            .begin()
            .await?;
        let xid = open.xid().await?.to_string();
        tokio::try_join!(
            open.call::<DeductStock>(&inventory, Json(order.stock())),
            open.call::<EarnPoints>(&points, Json(order.points())),
        )?;
        let from = self.world.events.len();
        self.world.kill(COORDINATOR).await?;
        self.world.start_again(COORDINATOR).await?;
        let told = open.confirm().await;
        for branch in ["1", "2"] {
            let given_back =
                |call: &Call| call.branch_id == branch && call.result == "branch cancelled";
            self.called(from, &xid, "what was reserved is given back", given_back).await?;
        }
        self.answers.insert(order.id, Answer::Cancelled);
        self.draw_now(&xid);
        let is_cancelled = matches!(told, Err(TransactionError::Cancelled { .. }));
        match told {
            Err(error) => self.conclude(&error.to_string()),
            Ok(_) => self.conclude("it is confirmed"),
        }
        self.expect(is_cancelled, "step 8: the order is not cancelled");
        Ok(())
    }

    async fn burst(&mut self, size: Size) -> anyhow::Result<()> {
        let Size { orders, concurrency, kills } = size;
        let orders = format!(
            "{orders} orders for three things, {concurrency} at a time. Not all can have what they want."
        );
        let kills = match kills {
            0 => None,
            1 => Some("Meanwhile the coordinator gets SIGKILL, once.".to_owned()),
            kills => Some(format!("Meanwhile the coordinator gets SIGKILL, {kills} times.")),
        };
        let words: Vec<_> =
            [Some(orders.as_str()), kills.as_deref()].into_iter().flatten().collect();
        self.title(9, "A burst of orders", &words);
        burst::run(self, size).await
    }

    fn title(&self, step: u8, title: &str, words: &[&str]) {
        self.screen.title(&format!("{step}  {title}"));
        for line in words {
            self.screen.inner(line);
        }
    }

    fn say(&self, order: &Order) {
        let Order { id, customer, sku, quantity, amount_cents } = order;
        let text =
            format!("order {id}: {customer} wants {quantity} × {sku} for {}", money(*amount_cents));
        self.screen.inner(&self.screen.paint.dim(&text));
    }

    /// Waits for a call of this transaction that `fits`. Events since index `from` count too.
    async fn called(
        &self,
        from: usize,
        xid: &str,
        name: &str,
        fits: impl Fn(&Call) -> bool,
    ) -> anyhow::Result<()> {
        let fits = |event: &Event| matches!(&event.what, What::Called(call) if call.xid == xid && fits(call));
        self.world.events.wait(from, name, fits).await?;
        Ok(())
    }

    /// Places an order in the background.
    fn place_meanwhile(
        &self,
        request: PlaceOrderRequest,
    ) -> anyhow::Result<tokio::task::JoinHandle<Result<PlaceOrderResponse, tonic::Status>>> {
        let mut orders = self.world.orders()?;
        Ok(tokio::spawn(async move { Ok(orders.place_order(request).await?.into_inner()) }))
    }
}

fn try_request<C: Contract>(
    begun: &pb::Transaction,
    branch_id: &str,
    args: &C::Args,
) -> anyhow::Result<pb::TryBranchRequest> {
    let data = args.encode().map_err(anyhow::Error::from_boxed)?;
    let content_type = C::Args::CONTENT_TYPE.to_owned();
    let context = pb::BranchContext {
        xid: begun.xid.clone(),
        branch_id: branch_id.to_owned(),
        action: C::NAME.to_owned(),
        attempt: 1,
        expires_at: begun.expires_at,
        labels: begun.labels.clone(),
        record: begun.record,
    };
    Ok(pb::TryBranchRequest {
        context: Some(context),
        payload: Some(pb::Payload { data, content_type }),
    })
}

/// The customer's answer, in words.
fn outcome(response: &PlaceOrderResponse) -> String {
    let PlaceOrderResponse { reason, message, left, .. } = response;
    match (response.outcome(), left) {
        (Outcome::Placed, Some(left)) => format!("placed; {left} are left"),
        (Outcome::Placed, None) => "placed".to_owned(),
        (Outcome::Refused, _) => format!("refused: {reason} ({message})"),
        (Outcome::Cancelled, _) => format!("cancelled: {message}"),
        (Outcome::Unknown | Outcome::Unspecified, _) => format!("not known yet: {message}"),
    }
}
