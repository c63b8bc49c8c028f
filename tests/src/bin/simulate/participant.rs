//! The participants: programs that reserve amounts of their accounts.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use handfast::{
    Branch, Context, ContextLayer, Contract, Failed, Handfast, Json, Participant, Refusal, Remote,
    TryError, testing::MemoryAction,
};
use handfast_coordinator::transaction::{self, BranchState, Decision, State};
use handfast_tests::gift::{
    WrapRequest, WrapResponse,
    gift_service_server::{GiftService, GiftServiceServer},
};
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status};

use crate::{
    account::{Account, Effects},
    network::url,
    world::World,
};

/// How often a participant inquires about overdue reservations and cleans up its fence.
const INQUIRY: Duration = Duration::from_secs(3);

/// The action that reserves an amount.
pub(crate) struct Reserve;

impl Contract for Reserve {
    const NAME: &'static str = "account.reserve";
    type Args = Json<Wish>;
    type Reply = Json<i64>;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wish {
    /// The order that it is for.
    pub(crate) order: u64,
    pub(crate) amount: i64,
    pub(crate) how: How,
}

/// The result of Try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum How {
    Well,
    Refuse,
    Fail,
}

/// The action on an account.
pub(crate) struct Reserving {
    account: Arc<Account>,
    world: Arc<World>,
}

impl Reserving {
    /// Counts an effect on a branch and checks the counts.
    fn change(&self, branch: &Branch, wish: &Wish, change: impl FnOnce(&mut Effects)) {
        let mut books = self.account.books();
        let effects = books.effects.entry((branch.xid, branch.branch_id.clone())).or_default();
        effects.order = wish.order;
        change(effects);
        let (effects, name) = (*effects, &self.account.name);
        drop(books);
        let Branch { xid, branch_id, phase, .. } = branch;
        self.world.chronicle.note(format_args!("{name} {phase} {xid} {branch_id} {effects:?}"));
        let Effects { reserved, confirmed, released, .. } = effects;
        if reserved > 1 || confirmed > 1 || released > 1 {
            self.broken("I3", branch, effects);
        }
        if confirmed > 0 && released > 0 {
            self.broken("I1", branch, effects);
        }
    }

    fn broken(&self, invariant: &str, branch: &Branch, effects: Effects) {
        let Branch { xid, branch_id, .. } = branch;
        let text = format!("{xid} {branch_id} at {}: {effects:?}", self.account.name);
        self.world.chronicle.violation(invariant, text);
    }

    /// Whether a participant has acknowledged the Cancel of this branch. An inquiry releases what is reserved after it, so that at the
    /// end of a run nobody would see it.
    fn is_cancelled(&self, branch: &Branch) -> bool {
        let Some(global) = self.world.database.recorded(branch.xid) else { return false };
        let is_acknowledged = |other: &transaction::Branch| {
            other.spec.branch_id == branch.branch_id && other.state == BranchState::Acknowledged
        };
        match global.state {
            State::Cancelled => true,
            State::Cancelling => global.branches.iter().any(is_acknowledged),
            State::Trying | State::Confirming | State::Confirmed => false,
        }
    }

    /// Makes some calls of phase two fail.
    fn stumble(&self) -> Result<(), Failed> {
        let failures = self.world.failures_of_phase_two();
        match self.account.books().rng.u32(..100) < failures {
            true => Err(std::io::Error::other("try again"))?,
            false => Ok(()),
        }
    }
}

impl MemoryAction for Reserving {
    type Contract = Reserve;

    fn on_try(&self, branch: &Branch, Json(wish): &Json<Wish>) -> Result<Json<i64>, TryError> {
        match wish.how {
            How::Well => {}
            How::Refuse => return Err(Refusal::new("TOO_MUCH").into()),
            How::Fail => Err(std::io::Error::other("the disk is on fire"))?,
        }
        if self.is_cancelled(branch) {
            let text = format!("{} {} was tried after its Cancel", branch.xid, branch.branch_id);
            self.world.chronicle.violation("I9", text);
        }
        self.change(branch, wish, |effects| {
            effects.reserved += 1;
            effects.at_decision = branch.at_decision;
        });
        let mut books = self.account.books();
        (books.free, books.held) = (books.free - wish.amount, books.held + wish.amount);
        Ok(Json(wish.amount))
    }

    fn on_confirm(&self, branch: &Branch, Json(wish): &Json<Wish>) -> Result<(), Failed> {
        let decision = self.world.database.decision(branch.xid);
        if decision != Some(Decision::Confirm) {
            let text = format!("{} is to confirm, and durable is {decision:?}", branch.xid);
            self.world.chronicle.violation("I8", text);
        }
        self.stumble()?;
        self.change(branch, wish, |effects| effects.confirmed += 1);
        let mut books = self.account.books();
        (books.held, books.used) = (books.held - wish.amount, books.used + wish.amount);
        Ok(())
    }

    fn on_cancel(&self, branch: &Branch, Json(wish): &Json<Wish>) -> Result<(), Failed> {
        self.stumble()?;
        self.change(branch, wish, |effects| effects.released += 1);
        let mut books = self.account.books();
        (books.held, books.free) = (books.held - wish.amount, books.free + wish.amount);
        Ok(())
    }
}

/// An ordinary service beside the account. It registers a branch in the transaction of its caller.
struct Nested {
    handfast: Handfast,
    here: Remote,
}

#[tonic::async_trait]
impl GiftService for Nested {
    async fn wrap(&self, request: Request<WrapRequest>) -> Result<Response<WrapResponse>, Status> {
        let context =
            Context::of(&request).ok_or_else(|| Status::internal("not in a transaction"))?;
        let wish: Wish = serde_json::from_str(&request.into_inner().mishap)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let global = self.handfast.join(&context);
        let reserved = global.call::<Reserve>(&self.here, Json(wish)).await;
        reserved.map_err(|error| Status::aborted(error.to_string()))?;
        Ok(Response::new(WrapResponse {}))
    }
}

/// The program on a participant's host.
pub(crate) async fn run(account: Arc<Account>, world: Arc<World>) -> turmoil::Result {
    let action = Reserving { account: account.clone(), world: world.clone() };
    let handfast = world.handfast();
    let participant = Participant::builder(account.name.as_str())
        .memory_action(&account.fence, action)
        .asks(&handfast)
        .build();
    let here = Remote::here(&participant, &url(&account.name));
    let nested = Nested { handfast: handfast.clone(), here };
    let server = tonic::transport::Server::builder()
        .layer(ContextLayer)
        .add_service(participant.clone().into_service())
        .add_service(GiftServiceServer::new(nested));
    let incoming = world.network.listen().await?.boxed();
    let serving = server.serve_with_incoming(incoming);
    let caring = async {
        loop {
            tokio::time::sleep(INQUIRY).await;
            if let Ok(given_back) = participant.ask(&handfast).await {
                for _ in 0..given_back {
                    world.chronicle.count("reservation of a lost transaction given back");
                }
            }
            if let Ok(inquiry) = participant.inquire(&handfast).await {
                for _ in 0..inquiry.cancelled {
                    world.chronicle.count("overdue reservation given back");
                }
            }
            for _ in 0..account.fence.clean_up() {
                world.chronicle.count("fence row cleaned up");
            }
        }
    };
    tokio::select! {
        biased;
        served = serving => Ok(served?),
        () = caring => Ok(()),
    }
}
