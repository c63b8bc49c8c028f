//! Fuzzes all calls of the coordinator through its real rpc layer. The store is in memory and the participants answer at random.
//! The clock moves forward with each input, so that phase one times out and retries happen.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use handfast_coordinator::{
    clock::ManualClock,
    coordinator::{Coordinator, Running},
    dispatch::{CallRequest, Dispatch, Later, Returned, Targets, address::AllowList},
    partition::Settings,
    rpc::Services,
    store::{Store, memory::MemoryStore},
    transaction::{AttemptError, Outcome, Refusal, StuckAfter, Timestamp, retry::RetryPolicy},
};
use handfast_proto::v1::{self as pb, call_stream_request, get_transaction_request};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Code;

use super::{Round, random::Random, wire};

/// The caller gives up on a call after this time, if the call is one that may wait.
const PATIENCE: Duration = Duration::from_millis(10);
/// Xids kept for later requests about the same transactions.
const REMEMBERED: usize = 64;

/// Participants that give a different answer each time.
#[derive(Debug, Default)]
struct Moody(AtomicU64);

impl Dispatch for Moody {
    fn submit(&self, call: CallRequest, returned: &mpsc::Sender<Returned>) -> Result<(), Later> {
        let mood = self.0.fetch_add(1, Ordering::Relaxed);
        let error = || AttemptError {
            code: "UNAVAILABLE".to_owned(),
            message: "gone".to_owned(),
            at: call.expires_at,
        };
        let outcome = match mood % 7 {
            0 => return Err(Later(Duration::from_secs(mood % 20))),
            1 => Outcome::Refused(Refusal {
                reason: "OUT_OF_STOCK".to_owned(),
                domain: call.spec.participant.clone(),
                message: String::new(),
                metadata: BTreeMap::new(),
            }),
            2 => Outcome::Unknown { error: error(), timed_out: true, hopeless: false },
            3 => Outcome::Unknown { error: error(), timed_out: false, hopeless: true },
            _ => Outcome::Done { reply: call.spec.payload.clone() },
        };
        let (xid, branch, phase) = (call.xid, call.branch, call.phase);
        let returned = returned.clone();
        tokio::spawn(async move {
            drop(returned.send(Returned { xid, branch, phase, outcome }).await);
        });
        Ok(())
    }
}

/// A coordinator and its services.
pub(super) struct Rig {
    pub(super) services: Services,
    pub(super) clock: ManualClock,
    _running: Running,
}

impl Rig {
    pub(super) async fn new(store: Arc<dyn Store>) -> Self {
        let clock = ManualClock::at(Timestamp(1_800_000_000_000));
        let second = Duration::from_secs(1);
        let settings = Settings {
            retry: RetryPolicy { initial: second / 5, max: 60 * second },
            call_timeout: second,
            call_timeout_max: 60 * second,
            open_max: 2000,
            open_bytes_max: 1_000_000_000,
            stuck_after: StuckAfter { attempts: 3, time: 120 * second },
            log_labels: Arc::default(),
            record_after: Duration::from_millis(500),
        };
        let (clocks, moody) = (Arc::new(clock.clone()), Arc::new(Moody::default()));
        let started = Coordinator::start(store, moody, clocks, settings, 60 * second).await;
        let (coordinator, running) = started.expect("the store answers");
        let targets = Targets {
            participants: BTreeMap::from([(
                "inventory".to_owned(),
                "http://10.0.0.1:7001".parse().expect("an address"),
            )]),
            allow: AllowList::parse(["loopback"]).expect("a rule"),
            calls_max: 64,
            streams: true,
        };
        let services = Services::new(coordinator, Arc::new(targets), 30 * second);
        Self { services, clock, _running: running }
    }
}

pub(super) async fn play(round: &mut Round) {
    let rig = Rig::new(Arc::new(MemoryStore::default())).await;
    let mut initiators = rig.services.for_initiators();
    let mut operators = rig.services.for_operators();
    let mut xids: Vec<String> = Vec::new();
    while round.next() {
        let mut ask = Asking { random: &mut round.random, xids: &xids };
        let (path, may_wait, messages) = ask.call();
        let metadata = wire::metadata(&mut round.random, &xids);
        let body = wire::frames(&mut round.random, &messages);
        let answered = async {
            if path.contains("Admin") {
                wire::call(&mut operators, path, &metadata, body).await
            } else {
                wire::call(&mut initiators, path, &metadata, body).await
            }
        };
        let answered = if may_wait {
            tokio::time::timeout(PATIENCE, answered).await.ok()
        } else {
            round.answered(path, answered).await
        };
        if let Some(answered) = answered {
            round.accepted(answered.code == Code::Ok);
            wire::judge(round, path, answered.code, &answered.message);
            if path.ends_with("CallStream") {
                judge_stream(round, &answered.frames);
            }
            if path.ends_with("/Begin") && answered.code == Code::Ok {
                let begun = answered.frames.first().map(|it| pb::BeginResponse::decode(&it[..]));
                let xid = begun.and_then(Result::ok).and_then(|it| it.transaction).map(|it| it.xid);
                xids.extend(xid);
                if xids.len() > REMEMBERED {
                    xids.remove(0);
                }
            }
        }
        let by = round.random.of(&[0, 0, 0, 10, 1000, 40_000]);
        rig.clock.advance(Duration::from_millis(by));
        tokio::task::yield_now().await;
    }
}

fn judge_stream(round: &mut Round, frames: &[bytes::Bytes]) {
    for frame in frames {
        match pb::CallStreamResponse::decode(&frame[..]) {
            Ok(pb::CallStreamResponse {
                answer: Some(pb::call_stream_response::Answer::Failure(failure)),
                ..
            }) => wire::judge(round, "CallStream", Code::from(failure.code), &failure.message),
            Ok(_) => {}
            Err(error) => round.found(format!("CallStream answers what nobody can read: {error}")),
        }
    }
}

/// Generates requests.
struct Asking<'r> {
    random: &'r mut Random,
    xids: &'r [String],
}

impl Asking<'_> {
    /// The path of a call, whether the call may wait, and its messages.
    fn call(&mut self) -> (&'static str, bool, Vec<Vec<u8>>) {
        let one = |message: Vec<u8>| vec![message];
        match self.random.below(16) {
            0..=2 => {
                ("/handfast.v1.CoordinatorService/Begin", false, one(self.begin().encode_to_vec()))
            }
            3 | 4 => (
                "/handfast.v1.CoordinatorService/RegisterBranch",
                false,
                one(self.register().encode_to_vec()),
            ),
            5 | 6 => {
                ("/handfast.v1.CoordinatorService/Decide", true, one(self.decide().encode_to_vec()))
            }
            7 => (
                "/handfast.v1.CoordinatorService/Execute",
                true,
                one(self.execute().encode_to_vec()),
            ),
            8 => (
                "/handfast.v1.CoordinatorService/GetTransaction",
                false,
                one(self.get().encode_to_vec()),
            ),
            9 => (
                "/handfast.v1.CoordinatorService/WaitTransaction",
                true,
                one(self.wait().encode_to_vec()),
            ),
            15 => (
                "/handfast.v1.CoordinatorService/InquireBranches",
                false,
                one(self.inquire().encode_to_vec()),
            ),
            10 => (
                "/handfast.v1.AdminService/ListTransactions",
                false,
                one(self.list().encode_to_vec()),
            ),
            11 => {
                let retry = pb::RetryTransactionRequest { xid: self.xid() };
                ("/handfast.v1.AdminService/RetryTransaction", false, one(retry.encode_to_vec()))
            }
            12 => {
                let resolve = pb::ResolveBranchRequest {
                    xid: self.xid(),
                    branch_id: self.branch_id(),
                    reason: self.random.text_of(&["by hand"]),
                    operator: self.random.text_of(&["ann"]),
                };
                ("/handfast.v1.AdminService/ResolveBranch", false, one(resolve.encode_to_vec()))
            }
            13 => {
                let resolve = pb::ResolveTransactionRequest {
                    xid: self.xid(),
                    decision: self.random.of(&[0, 1, 2, 3]),
                    reason: self.random.text_of(&["by the fences"]),
                    operator: self.random.text_of(&["ann"]),
                };
                let resolve = one(resolve.encode_to_vec());
                ("/handfast.v1.AdminService/ResolveTransaction", false, resolve)
            }
            _ => {
                let calls = (0..self.random.below(5)).map(|_| self.on_stream().encode_to_vec());
                ("/handfast.v1.CoordinatorService/CallStream", true, calls.collect())
            }
        }
    }

    fn on_stream(&mut self) -> pb::CallStreamRequest {
        use call_stream_request::Call;
        let call = match self.random.below(8) {
            0 => Some(Call::Begin(self.begin())),
            1 => Some(Call::RegisterBranch(self.register())),
            2 => Some(Call::Decide(self.decide())),
            3 => Some(Call::Execute(self.execute())),
            4 => Some(Call::GetTransaction(self.get())),
            5 => Some(Call::WaitTransaction(self.wait())),
            6 => Some(Call::InquireBranches(self.inquire())),
            _ => None,
        };
        let number = self.random.number().cast_unsigned();
        pb::CallStreamRequest { number, timeout_millis: self.random.of(&[0, 1, 5, u32::MAX]), call }
    }

    fn xid(&mut self) -> String {
        if self.xids.is_empty() || self.random.once_in(8) {
            return self.random.text_of(&[
                "0-1-1-00000000",
                "15-4294967295-1-ffffffff",
                "3-1-7-0a0b0c0d",
            ]);
        }
        let mut xid = self.random.of(self.xids).into_bytes();
        if self.random.once_in(20) {
            self.random.bend(&mut xid);
        }
        String::from_utf8_lossy(&xid).into_owned()
    }

    fn branch_id(&mut self) -> String {
        self.random.text_of(&["1", "2", "3", "1.1", "stock"])
    }

    fn branches(&mut self) -> Vec<pb::BranchSpec> {
        let n = if self.random.once_in(30) { 70 } else { self.random.below(4) };
        (0..n).map(|_| self.branch()).collect()
    }

    fn branch(&mut self) -> pb::BranchSpec {
        let payload = self.random.once_in(3).then(|| pb::Payload {
            data: self.random.payload(&[0, 10, 65_536, 65_537]).into(),
            content_type: self.random.text_of(&["application/json", ""]),
        });
        pb::BranchSpec {
            branch_id: self.branch_id(),
            action: self.random.text_of(&["inventory.deduct", "points.add"]),
            participant: self.random.text_of(&["inventory", "points"]),
            target: self.random.text_of(&["http://127.0.0.1:7001", "", "http://10.1.1.1:80"]),
            payload,
            carry_payload: self.random.once_in(3),
            try_timeout: self.random.duration(),
            inquires: self.random.once_in(2),
        }
    }

    fn begin(&mut self) -> pb::BeginRequest {
        pb::BeginRequest {
            name: self.random.text_of(&["checkout"]),
            timeout: self.random.duration(),
            labels: if self.random.once_in(4) { self.random.texts() } else { Default::default() },
            idempotency_key: self.random.text_of(&["", "", "order-1", "order-2"]),
            branches: self.branches(),
            fingerprint: self.fingerprint(),
            record: self.random.of(&[0, 1, 2, 2, 3, -1]),
        }
    }

    fn fingerprint(&mut self) -> Vec<u8> {
        let bytes = self.random.of(&[0, 0, 0, 1, 64, 65]);
        vec![7; usize::try_from(bytes).unwrap_or(0)]
    }

    fn register(&mut self) -> pb::RegisterBranchRequest {
        pb::RegisterBranchRequest { xid: self.xid(), branches: self.branches() }
    }

    fn decide(&mut self) -> pb::DecideRequest {
        let refusal = self.random.once_in(4).then(|| pb::Refusal {
            reason: self.random.text(),
            domain: self.random.text(),
            message: self.random.text(),
            metadata: self.random.texts(),
        });
        let result = self.random.once_in(4).then(|| pb::Payload {
            data: self.random.payload(&[0, 1, 4096, 4097]).into(),
            content_type: self.random.text_of(&["application/json"]),
        });
        pb::DecideRequest {
            xid: self.xid(),
            decision: self.random.of(&[0, 1, 1, 2, 2, 7, -1]),
            tried_branch_ids: (0..self.random.below(4)).map(|_| self.branch_id()).collect(),
            reason: self.random.text_of(&["", "changed my mind"]),
            refusal,
            refused_branch_id: self.random.text_of(&["", "1"]),
            unknown_branch_id: self.random.text_of(&["", "1"]),
            result,
            until: self.random.of(&[0, 1, 2, 9]),
            wait: self.random.duration(),
        }
    }

    fn execute(&mut self) -> pb::ExecuteRequest {
        let pb::BeginRequest {
            name, timeout, labels, idempotency_key, branches, fingerprint, ..
        } = self.begin();
        pb::ExecuteRequest {
            name,
            timeout,
            labels,
            idempotency_key,
            branches,
            in_order: self.random.once_in(2),
            until: self.random.of(&[0, 1, 2, -5]),
            wait: self.random.duration(),
            fingerprint,
        }
    }

    fn get(&mut self) -> pb::GetTransactionRequest {
        use get_transaction_request::By;
        let by = match self.random.below(4) {
            0 => None,
            1 => Some(By::IdempotencyKey(self.random.text_of(&["order-1", "order-9"]))),
            _ => Some(By::Xid(self.xid())),
        };
        pb::GetTransactionRequest { by, fingerprint: self.fingerprint() }
    }

    fn inquire(&mut self) -> pb::InquireBranchesRequest {
        let n = if self.random.once_in(30) { 257 } else { self.random.below(4) };
        let branch = |_| pb::InquiredBranch { xid: self.xid(), branch_id: self.branch_id() };
        pb::InquireBranchesRequest { branches: (0..n).map(branch).collect() }
    }

    fn wait(&mut self) -> pb::WaitTransactionRequest {
        pb::WaitTransactionRequest {
            xid: self.xid(),
            until: self.random.of(&[0, 1, 2, 3]),
            wait: self.random.duration(),
        }
    }

    fn list(&mut self) -> pb::ListTransactionsRequest {
        pb::ListTransactionsRequest {
            show: self.random.of(&[0, 1, 2, 3, 4, -1]),
            name: self.random.text_of(&["", "checkout"]),
            limit: self.random.of(&[0, 1, 50, 1000, 1001, u32::MAX]),
            page: self.random.text_of(&["", "0/3-7-1042-9f3c01d2", "-1/x"]),
            labels: BTreeMap::from([(
                self.random.text_of(&["", "order", "\"\\"]),
                self.random.text_of(&["", "1042"]),
            )]),
        }
    }
}
