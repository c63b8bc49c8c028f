//! The load: orders over several participants, in every way that the SDK offers, with and without keys and mishaps.

use std::{sync::Arc, time::Duration};

use futures_util::future::try_join_all;
use handfast::{
    Confirmed, Global, Handfast, Json, Outcome, PropagateLayer, PropagateService, Remote,
    TransactionError, WorkError, Xid,
};
use handfast_coordinator::transaction::Decision;
use handfast_proto::v1::{self as pb, participant_service_client::ParticipantServiceClient};
use handfast_tests::gift::{WrapRequest, gift_service_client::GiftServiceClient};
use tonic::transport::Channel;
use tower::Layer as _;

use crate::{
    network::url,
    participant::{How, Reserve, Wish},
    world::{self, World},
};

/// A nudge that gets no answer is given up.
const NUDGE_TIMEOUT: Duration = Duration::from_millis(500);

/// An order. It is the same whenever it is repeated.
#[derive(Debug, Clone)]
struct Plan {
    order: u64,
    drive: Drive,
    keyed: bool,
    at_decision: bool,
    /// Somebody makes the participants ask before it is decided.
    is_nudged: bool,
    /// Participant and wish of each branch.
    branches: Vec<(usize, Wish)>,
    timeout: Duration,
    patience: Duration,
    until_decided: bool,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drive {
    /// The Try calls run in parallel.
    Parallel,
    /// The Try calls run one after another.
    InTurn,
    /// The last branch is registered by a nested service.
    Nested,
    /// Begin, the Try calls and Confirm are separate calls of the SDK.
    ByHand,
    /// The coordinator makes the Try calls.
    Execute,
    ExecuteInOrder,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Well,
    /// The closure fails after its calls.
    WorkFails,
    /// The initiator gives up after this time.
    GivenUp(Duration),
}

impl Plan {
    fn of(order: u64, world: &World) -> Self {
        let mut rng = fastrand::Rng::with_seed(world.seed.wrapping_mul(1_000_003) ^ order);
        let drives = [
            Drive::Parallel,
            Drive::Parallel,
            Drive::InTurn,
            Drive::Nested,
            Drive::ByHand,
            Drive::Execute,
            Drive::ExecuteInOrder,
        ];
        let mut branches: Vec<_> = (0..rng.usize(1..=3))
            .map(|_| {
                let wish = Wish { order, amount: rng.i64(1..10), how: How::Well };
                (rng.usize(..world.mix.participants), wish)
            })
            .collect();
        let mut end = End::Well;
        if rng.u32(..100) < world.mix.mishaps {
            let unlucky = rng.usize(..branches.len());
            match rng.u32(..4) {
                0 => branches[unlucky].1.how = How::Refuse,
                1 => branches[unlucky].1.how = How::Fail,
                2 => end = End::WorkFails,
                _ => end = End::GivenUp(Duration::from_millis(rng.u64(1..1500))),
            }
        }
        let drive = drives[rng.usize(..drives.len())];
        // It has numbers of its own, so that the orders are otherwise what they were before.
        let mut recording = fastrand::Rng::with_seed(world.seed ^ order ^ 0x7265_636f);
        Self {
            order,
            drive,
            at_decision: recording.u32(..100) < world.mix.at_decision,
            is_nudged: recording.u32(..4) == 0,
            keyed: rng.bool() || matches!(drive, Drive::Execute | Drive::ExecuteInOrder),
            branches,
            timeout: Duration::from_millis(rng.u64(1000..8000)),
            patience: Duration::from_secs([1, 5, 20][rng.usize(..3)]),
            until_decided: rng.bool(),
            end,
        }
    }

    fn key(&self) -> String {
        format!("order-{}", self.order)
    }
}

/// The clients of a worker.
#[derive(Clone)]
struct Tools {
    world: Arc<World>,
    handfast: Handfast,
    remotes: Vec<Remote>,
    nested: Vec<GiftServiceClient<PropagateService<Channel>>>,
}

/// The program on an initiator's host.
pub(crate) async fn run(world: Arc<World>) -> turmoil::Result {
    let channel = |host: &str| world.network.channel(host);
    let names: Vec<_> = (0..world.mix.participants).map(world::participant).collect();
    let tools = Tools {
        handfast: world.handfast(),
        remotes: (names.iter())
            .map(|name| Remote::with_channel(name, &url(name), channel(name)))
            .collect(),
        nested: (names.iter())
            .map(|name| GiftServiceClient::new(PropagateLayer.layer(channel(name))))
            .collect(),
        world: world.clone(),
    };
    for _ in 0..world.mix.workers {
        let (work, rng) = (world.work(), world.rng());
        tokio::spawn(worker(tools.clone(), rng, work));
    }
    std::future::pending().await
}

async fn worker(tools: Tools, mut rng: fastrand::Rng, _work: world::Work) {
    let [shortest, longest] = tools.world.mix.pauses;
    loop {
        tokio::time::sleep(Duration::from_millis(rng.u64(shortest..longest))).await;
        if tools.world.is_draining() {
            return;
        }
        match rng.u32(..8) {
            0 => {
                if let Some(xid) = tools.world.known(&mut rng) {
                    tools.ask(xid).await;
                }
            }
            1 | 2 => {
                let earlier = tools.world.earlier_order(&mut rng);
                let order = earlier.unwrap_or_else(|| tools.world.new_order());
                tools.place(order, &mut rng).await;
            }
            _ => {
                let order = tools.world.new_order();
                tools.place(order, &mut rng).await;
            }
        }
    }
}

impl Tools {
    /// Runs an order and notes the outcome that it is told.
    async fn place(&self, order: u64, rng: &mut fastrand::Rng) {
        let plan = Plan::of(order, &self.world);
        if plan.keyed {
            self.world.has_key(order);
        }
        self.world.chronicle.note(format_args!(
            "order {order} {:?} keyed {} {:?}",
            plan.drive, plan.keyed, plan.end
        ));
        let running = self.run(&plan);
        let result = match plan.end {
            End::GivenUp(after) => match tokio::time::timeout(after, running).await {
                Ok(result) => result,
                Err(_) => return self.world.chronicle.count("orders given up"),
            },
            End::Well | End::WorkFails => running.await,
        };
        let whom = format!("to order {order}");
        match result {
            Ok((xid, completed)) => {
                self.world.chronicle.count("told confirmed");
                self.world.knows(xid);
                self.world.told(xid, Decision::Confirm, &whom);
                if completed {
                    self.world.told_completed(xid);
                }
            }
            Err(TransactionError::Unknown { xid, .. }) => {
                self.world.chronicle.count("told unknown");
                if let Some(xid) = xid {
                    self.world.knows(xid);
                    if rng.bool() {
                        self.ask(xid).await;
                    }
                } else if plan.keyed && rng.bool() {
                    drop(self.handfast.outcome_of_key(&plan.key()).await);
                }
            }
            Err(TransactionError::NotBegun { .. }) => self.world.chronicle.count("told not begun"),
            Err(error) => {
                let kind = if matches!(error, TransactionError::Refused { .. }) {
                    "told refused"
                } else if matches!(error, TransactionError::TimedOut { .. }) {
                    "told timed out"
                } else {
                    "told cancelled"
                };
                self.world.chronicle.count(kind);
                if let Some(xid) = error.xid() {
                    self.world.knows(xid);
                    self.world.told(xid, Decision::Cancel, &whom);
                }
            }
        }
    }

    async fn ask(&self, xid: Xid) {
        match self.handfast.outcome(xid).await {
            Ok(Outcome::Confirmed { completed }) => {
                self.world.told(xid, Decision::Confirm, "to an inquiry");
                if completed {
                    self.world.told_completed(xid);
                }
            }
            Ok(Outcome::Cancelled { .. }) => {
                self.world.told(xid, Decision::Cancel, "to an inquiry");
            }
            Ok(Outcome::NeverRecorded) => self.world.told_never(xid),
            Ok(_) => {}
            Err(_) => self.world.chronicle.count("inquiries without an answer"),
        }
    }

    async fn run(&self, plan: &Plan) -> Result<(Xid, bool), TransactionError> {
        match plan.drive {
            Drive::Execute | Drive::ExecuteInOrder => self.execute(plan).await,
            Drive::ByHand => self.by_hand(plan).await,
            Drive::Parallel | Drive::InTurn | Drive::Nested => {
                let done: Confirmed<()> = self
                    .describe(plan)
                    .run(async |global| {
                        self.calls(plan, global).await?;
                        match plan.end {
                            End::WorkFails => Err(WorkError::from("the closure fails on purpose")),
                            End::Well | End::GivenUp(_) => Ok(()),
                        }
                    })
                    .await?;
                Ok((done.xid, done.completed))
            }
        }
    }

    fn describe(&self, plan: &Plan) -> handfast::TransactionBuilder {
        let mut builder =
            self.handfast.transaction("order").timeout(plan.timeout).patience(plan.patience);
        if plan.keyed {
            builder = builder.idempotency_key(plan.key());
        }
        if plan.at_decision {
            builder = builder.record_at_decision();
        }
        if plan.until_decided { builder.until_decided() } else { builder }
    }

    async fn calls(&self, plan: &Plan, global: &Global) -> Result<(), WorkError> {
        let call = |(to, wish): &(usize, Wish)| {
            global.call::<Reserve>(&self.remotes[*to], Json(wish.clone()))
        };
        match plan.drive {
            Drive::Parallel | Drive::ByHand => {
                try_join_all(plan.branches.iter().map(call)).await?;
            }
            Drive::InTurn => {
                for branch in &plan.branches {
                    call(branch).await?;
                }
            }
            Drive::Nested => {
                let (last, first) = plan.branches.split_last().expect("there is at least one");
                try_join_all(first.iter().map(call)).await?;
                let mishap = serde_json::to_string(&last.1)?;
                self.nested[last.0].clone().wrap(WrapRequest { sheets: 0, mishap }).await?;
            }
            Drive::Execute | Drive::ExecuteInOrder => {}
        }
        Ok(())
    }

    async fn by_hand(&self, plan: &Plan) -> Result<(Xid, bool), TransactionError> {
        let open = self.describe(plan).begin().await?;
        if let Ok(xid) = open.xid().await {
            self.world.knows(xid);
        }
        // A call that fails cancels the transaction, whatever is asked for afterwards.
        drop(self.calls(plan, &open).await);
        if plan.is_nudged
            && let Ok(xid) = open.xid().await
        {
            self.nudge(plan, xid).await;
        }
        let done = open.confirm().await?;
        Ok((done.xid, done.completed))
    }

    /// Makes the participants ask, although nothing is lost as far as anybody knows. They must not take that for an answer.
    async fn nudge(&self, plan: &Plan, xid: Xid) {
        for (n, (to, _)) in plan.branches.iter().enumerate() {
            let channel = self.world.network.channel(&world::participant(*to));
            let mut participant = ParticipantServiceClient::new(channel);
            let (xid, branch_id) = (xid.to_string(), (n + 1).to_string());
            let nudge = participant.inquire_branch(pb::InquireBranchRequest { xid, branch_id });
            drop(tokio::time::timeout(NUDGE_TIMEOUT, nudge).await);
        }
    }

    async fn execute(&self, plan: &Plan) -> Result<(Xid, bool), TransactionError> {
        let mut builder =
            self.handfast.execute("order").timeout(plan.timeout).idempotency_key(plan.key());
        for (to, wish) in &plan.branches {
            builder = builder.call::<Reserve>(&self.remotes[*to], &Json(wish.clone()));
        }
        if plan.drive == Drive::ExecuteInOrder {
            builder = builder.in_order();
        }
        if plan.until_decided {
            builder = builder.until_decided();
        }
        let done = builder.run().await?;
        Ok((done.xid, done.completed))
    }
}
