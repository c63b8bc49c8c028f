//! The services on a coordinator with a store in memory and participants that always agree. Shows what the calls promise, and
//! that bad input gets one clear error that names the field and the limit, and changes nothing.

mod addresses;
mod bad_input;
mod execute;
mod promises;

use std::collections::BTreeMap;

use handfast_proto::{limits, reason, time::wire_duration};
use tokio::sync::mpsc;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::*;
use crate::{
    clock::ManualClock,
    coordinator::Running,
    dispatch::{CallRequest, Dispatch, Later, Returned, address::AllowList},
    partition::Settings,
    store::memory::MemoryStore,
    transaction::{Outcome, StuckAfter, Timestamp, retry::RetryPolicy},
};

/// Participants that accept every call. A Try is answered with its own payload.
#[derive(Debug)]
struct Willing;

impl Dispatch for Willing {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        let CallRequest { xid, branch, phase, spec, .. } = call;
        let reply = spec.payload.clone();
        let returned = returned.clone();
        tokio::spawn(async move {
            drop(
                returned
                    .send(Returned { xid, branch, phase, outcome: Outcome::Done { reply } })
                    .await,
            );
        });
        Ok(())
    }
}

struct Rig {
    store: Arc<MemoryStore>,
    services: Services,
    clock: ManualClock,
    _running: Running,
}

impl Rig {
    async fn new() -> Self {
        Self::with(Arc::new(Willing)).await
    }

    async fn with(participants: Arc<dyn Dispatch>) -> Self {
        let clock = ManualClock::at(Timestamp(1_700_000_000_000));
        let settings = Settings {
            retry: RetryPolicy {
                initial: Duration::from_millis(200),
                max: Duration::from_secs(60),
            },
            call_timeout: Duration::from_secs(5),
            call_timeout_max: Duration::from_secs(60),
            open_max: 1000,
            open_bytes_max: 1_000_000_000,
            stuck_after: StuckAfter { attempts: 3, time: Duration::from_secs(120) },
            log_labels: Arc::default(),
            record_after: Duration::from_millis(500),
        };
        let store = Arc::new(MemoryStore::default());
        let retention = Duration::from_secs(3600);
        let (coordinator, running) = Coordinator::start(
            store.clone(),
            participants,
            Arc::new(clock.clone()),
            settings,
            retention,
        )
        .await
        .unwrap();
        let targets = Targets {
            participants: BTreeMap::from([(
                "inventory".to_owned(),
                "http://10.0.0.1:7001".parse().unwrap(),
            )]),
            allow: AllowList::parse(["loopback"]).unwrap(),
            calls_max: 64,
            streams: true,
        };
        let services = Services::new(coordinator, Arc::new(targets), Duration::from_secs(30));
        Self { store, services, clock, _running: running }
    }

    async fn begin(&self, request: pb::BeginRequest) -> Result<pb::BeginResponse, Status> {
        self.services.begin(Request::new(request)).await.map(Response::into_inner)
    }

    async fn begun(&self, ids: &[&str]) -> String {
        self.begin(begin(ids)).await.unwrap().transaction.unwrap().xid
    }

    async fn register(
        &self,
        xid: &str,
        branches: Vec<pb::BranchSpec>,
    ) -> Result<pb::Transaction, Status> {
        let request = pb::RegisterBranchRequest { xid: xid.to_owned(), branches };
        let response = self.services.register_branch(Request::new(request)).await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn decide(&self, request: pb::DecideRequest) -> Result<pb::Transaction, Status> {
        let response = self.services.decide(Request::new(request)).await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn confirm(&self, xid: &str, tried: &[&str]) -> Result<pb::Transaction, Status> {
        let tried_branch_ids = tried.iter().map(|id| (*id).to_owned()).collect();
        let (xid, decision) = (xid.to_owned(), pb::Decision::Confirm.into());
        self.decide(pb::DecideRequest { xid, decision, tried_branch_ids, ..Default::default() })
            .await
    }

    async fn cancel(&self, xid: &str) -> Result<pb::Transaction, Status> {
        let (xid, decision) = (xid.to_owned(), pb::Decision::Cancel.into());
        let reason = "no longer wanted".to_owned();
        self.decide(pb::DecideRequest { xid, decision, reason, ..Default::default() }).await
    }

    async fn get(&self, xid: &str) -> Result<pb::Transaction, Status> {
        let by = Some(pb::get_transaction_request::By::Xid(xid.to_owned()));
        let response = self
            .services
            .get_transaction(Request::new(pb::GetTransactionRequest { by, ..Default::default() }))
            .await?;
        Ok(response.into_inner().transaction.unwrap())
    }

    async fn completed(&self, xid: &str) -> pb::Transaction {
        let until = pb::Until::Completed.into();
        let request = pb::WaitTransactionRequest { xid: xid.to_owned(), until, wait: None };
        self.services
            .wait_transaction(Request::new(request))
            .await
            .unwrap()
            .into_inner()
            .transaction
            .unwrap()
    }

    async fn open(&self) -> usize {
        let show = pb::list_transactions_request::Show::Open.into();
        let request = pb::ListTransactionsRequest { show, ..Default::default() };
        self.services
            .list_transactions(Request::new(request))
            .await
            .unwrap()
            .into_inner()
            .transactions
            .len()
    }
}

fn spec(branch_id: &str) -> pb::BranchSpec {
    pb::BranchSpec {
        branch_id: branch_id.to_owned(),
        action: "inventory.deduct".to_owned(),
        participant: "inventory".to_owned(),
        ..Default::default()
    }
}

fn begin(ids: &[&str]) -> pb::BeginRequest {
    let branches = ids.iter().map(|id| spec(id)).collect();
    pb::BeginRequest { name: "checkout".to_owned(), branches, ..Default::default() }
}

fn payload(bytes: usize) -> Option<pb::Payload> {
    Some(pb::Payload { data: vec![7; bytes].into(), content_type: "text/plain".to_owned() })
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().expect("every error says why, for programs");
    assert_eq!(info.domain, reason::DOMAIN);
    info.reason
}

fn detail(status: &Status, key: &str) -> String {
    status.get_details_error_info().unwrap().metadata[key].clone()
}

/// Checks that the result is INVALID_ARGUMENT, names the field, and says what would be right.
#[track_caller]
fn invalid(result: Result<impl std::fmt::Debug, Status>, field: &str, says: &str) {
    let status = result.expect_err("it was taken");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(reason(&status), reason::INVALID_FIELD);
    let details = status.get_details_bad_request().unwrap();
    assert_eq!(details.field_violations[0].field, field, "{}", status.message());
    assert!(status.message().contains(says), "{:?} does not say {says:?}", status.message());
}
