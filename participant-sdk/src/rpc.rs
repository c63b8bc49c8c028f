//! The connection to the coordinator: its calls, and how long and how often each is repeated.
//!
//! Everything that the coordinator offers may be repeated, so a call whose answer is lost is made again.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use backon::BackoffBuilder as _;
use handfast_proto::{
    Xid,
    address::InvalidAddress,
    calls::ToCoordinator,
    connection::{self, DEADLINE_MARGIN},
    stream::Line,
    time::{Pauses, wire_duration},
    v1::{self as pb, call_stream_request::Call, call_stream_response::Answer},
};
use tokio::time::Instant;
use tonic::{Code, Status, transport::Channel};

use crate::{
    dial::Addresses,
    status::{leaves_open, may_be_repeated},
};

/// The pauses before a call is repeated.
const RETRY_PAUSES: Pauses =
    Pauses { first: Duration::from_millis(50), longest: Duration::from_secs(1) };
/// How long one attempt of a call to the coordinator may take, beside what it is asked to wait.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for the first attempt if there are several coordinators. It doubles after each round through all
/// addresses without an answer.
const FIRST_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection is kept at least this long, so that many calls that fail together leave it only once.
const LEAVE_AFTER: Duration = Duration::from_millis(100);

/// The coordinator, as initiators and nested services see it. Cheap to clone; connects when it is first used, and again when
/// the connection is lost.
#[derive(Clone)]
pub struct Handfast {
    connections: Arc<Mutex<Connections>>,
    /// `None`: the channels are the caller's own.
    addresses: Option<Addresses>,
}

/// Both connections to the coordinator that is used now.
#[derive(Clone)]
struct Connections {
    calls: Line<ToCoordinator>,
    /// For calls that wait long. On the connection of the others they would use up its streams.
    waits: Line<ToCoordinator>,
    /// The number of the address that they begin with.
    start: usize,
    since: Instant,
}

#[derive(Clone, Copy)]
enum Which {
    Calls,
    Waits,
}

impl Handfast {
    /// The coordinator at `urls`: `http://127.0.0.1:7420`. For a coordinator with standbys give all addresses, with commas between
    /// them, or one name with several addresses. Calls go to one of them, and to the next one when that one is silent or does not
    /// serve. Does not wait for a connection. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When one of them is no address.
    pub fn connect(urls: &str) -> Result<Self, InvalidAddress> {
        let addresses = urls.split(',').map(|url| url.trim().parse()).collect::<Result<_, _>>()?;
        let addresses = Addresses::new(addresses);
        let start = usize::from(rand::random::<u16>());
        let connections = Connections::new(
            Line::new(addresses.channel(start)),
            Line::new(addresses.channel(start)),
            start,
        );
        Ok(Self { connections, addresses: Some(addresses) })
    }

    /// The coordinator behind channels of your own: one for calls, one for calls that wait for a transaction to complete.
    #[must_use]
    pub fn from_channels(calls: Channel, waits: Channel) -> Self {
        let connections = Connections::new(Line::new(calls), Line::new(waits), 0);
        Self { connections, addresses: None }
    }

    /// The same coordinator, with every call made by itself. By default calls share streams, which costs a fraction; where there
    /// are none (something in between does not let them pass), calls are made by themselves anyway.
    #[must_use]
    pub fn without_streams(self) -> Self {
        let Connections { calls, waits, start, .. } = self.connections();
        let connections = Connections::new(calls.to_unary(), waits.to_unary(), start);
        Self { connections, ..self }
    }

    fn connections(&self) -> Connections {
        self.connections.lock().expect("nothing panics while it is locked").clone()
    }

    /// Leaves the coordinator that the address with the number `start` has led to, for the next one.
    fn leave(&self, start: usize) {
        let Some(addresses) = self.addresses.as_ref().filter(|found| found.count() > 1) else {
            return;
        };
        let mut now = self.connections.lock().expect("nothing panics while it is locked");
        if now.start == start && now.since.elapsed() >= LEAVE_AFTER {
            now.start = start.wrapping_add(1);
            now.since = Instant::now();
            now.calls = now.calls.with_channel(addresses.channel(now.start));
            now.waits = now.waits.with_channel(addresses.channel(now.start));
        }
    }

    /// Makes a call, and makes it again while it has no clear answer, until `deadline`. The coordinator is asked to `wait`.
    async fn call(
        &self,
        which: Which,
        call: Call,
        wait: Duration,
        deadline: Instant,
    ) -> Result<Answer, Status> {
        let several = self.addresses.as_ref().map_or(1, Addresses::count);
        let first = if several > 1 { FIRST_ATTEMPT_TIMEOUT } else { ATTEMPT_TIMEOUT };
        let attempt_timeout = move |silent: usize| {
            let doublings = (silent / several.max(1)).min(8);
            first.saturating_mul(1 << doublings).min(ATTEMPT_TIMEOUT).saturating_add(wait)
        };
        let attempt = |timeout| {
            let connections = self.connections();
            let call = call.clone();
            async move {
                let line = match which {
                    Which::Calls => &connections.calls,
                    Which::Waits => &connections.waits,
                };
                let ends = from_now(timeout);
                let answer =
                    tokio::time::timeout_at(ends, line.call(call, timeout + DEADLINE_MARGIN));
                let answer = answer
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
                // Silent, or not serving. A connection that broke is made again by the channel itself, with the next address.
                if let Err(status) = &answer
                    && matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable)
                    && !connection::is_ours(status)
                {
                    self.leave(connections.start);
                }
                answer
            }
        };
        with_retries(attempt_timeout, deadline, attempt).await
    }

    pub(crate) async fn begin(
        &self,
        request: pb::BeginRequest,
        deadline: Instant,
    ) -> Result<pb::BeginResponse, Status> {
        let begin = Call::Begin(request);
        let answer = self.call(Which::Calls, begin, Duration::ZERO, deadline).await?;
        let Answer::Begin(response) = answer else { return Err(wrong_kind()) };
        Ok(response)
    }

    pub(crate) async fn register(
        &self,
        request: pb::RegisterBranchRequest,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let register = Call::RegisterBranch(request);
        transaction(self.call(Which::Calls, register, Duration::ZERO, deadline).await?)
    }

    pub(crate) async fn decide(
        &self,
        request: pb::DecideRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let which = if wait.is_zero() { Which::Calls } else { Which::Waits };
        transaction(self.call(which, Call::Decide(request), wait, deadline).await?)
    }

    /// Waits until every branch of a decided transaction has acknowledged, or `wait` is over.
    pub(crate) async fn wait_completed(
        &self,
        xid: Xid,
        wait: Duration,
    ) -> Result<pb::Transaction, Status> {
        let request = pb::WaitTransactionRequest {
            xid: xid.to_string(),
            until: pb::Until::Completed.into(),
            wait: Some(wire_duration(wait)),
        };
        let deadline = from_now(ATTEMPT_TIMEOUT.saturating_add(wait));
        let call = Call::WaitTransaction(request);
        transaction(self.call(Which::Waits, call, wait, deadline).await?)
    }

    pub(crate) async fn run_execute(
        &self,
        request: pb::ExecuteRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::ExecuteResponse, Status> {
        let answer = self.call(Which::Waits, Call::Execute(request), wait, deadline).await?;
        let Answer::Execute(response) = answer else { return Err(wrong_kind()) };
        Ok(response)
    }

    pub(crate) async fn get(
        &self,
        by: pb::get_transaction_request::By,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        self.get_same(by, Vec::new(), deadline).await
    }

    /// The transaction of an idempotency key, if it has this fingerprint.
    pub(crate) async fn get_same(
        &self,
        by: pb::get_transaction_request::By,
        fingerprint: Vec<u8>,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let get = pb::GetTransactionRequest { by: Some(by), fingerprint };
        let get = Call::GetTransaction(get);
        transaction(self.call(Which::Calls, get, Duration::ZERO, deadline).await?)
    }
}

impl Handfast {
    /// What these branches may do with their reservations, in order.
    pub(crate) async fn inquire(
        &self,
        branches: Vec<pb::InquiredBranch>,
        deadline: Instant,
    ) -> Result<Vec<pb::Inquiry>, Status> {
        let asked = branches.len();
        let inquire = Call::InquireBranches(pb::InquireBranchesRequest { branches });
        let answer = self.call(Which::Calls, inquire, Duration::ZERO, deadline).await?;
        let Answer::InquireBranches(response) = answer else { return Err(wrong_kind()) };
        if response.answers.len() != asked {
            return Err(wrong_kind());
        }
        Ok(response.answers().collect())
    }
}

impl fmt::Debug for Handfast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handfast")
    }
}

impl Connections {
    fn new(
        calls: Line<ToCoordinator>,
        waits: Line<ToCoordinator>,
        start: usize,
    ) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { calls, waits, start, since: Instant::now() }))
    }
}

/// The transaction in an answer to a call that is about one.
fn transaction(answer: Answer) -> Result<pb::Transaction, Status> {
    let (Answer::RegisterBranch(pb::RegisterBranchResponse { transaction })
    | Answer::Decide(pb::DecideResponse { transaction })
    | Answer::GetTransaction(pb::GetTransactionResponse { transaction })
    | Answer::WaitTransaction(pb::WaitTransactionResponse { transaction })) = answer
    else {
        return Err(wrong_kind());
    };
    transaction.ok_or_else(|| Status::internal("the coordinator's answer has no transaction in it"))
}

fn wrong_kind() -> Status {
    Status::internal("the coordinator's answer is for a call of another method")
}

/// The moment after `after`; some decades from now, if that is later than a clock can tell.
pub(crate) fn from_now(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or(now + Duration::from_secs(30 * 365 * 24 * 3600))
}

/// Makes a call, and makes it again with backoff until it has a clear answer, or until `deadline`.
///
/// The last error is returned, with one exception. Once an attempt had no answer, the call may have been carried out, and a later
/// RESOURCE_EXHAUSTED must not tell the caller that nothing has happened. Then the last error of the first kind is returned.
async fn with_retries<T, F>(
    attempt_timeout: impl Fn(usize) -> Duration,
    deadline: Instant,
    attempt: impl Fn(Duration) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut pauses = backon::ExponentialBuilder::default()
        .with_min_delay(RETRY_PAUSES.first)
        .with_max_delay(RETRY_PAUSES.longest)
        .without_max_times()
        .with_jitter()
        .build();
    let (mut unanswered, mut silent) = (None, 0);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match attempt(attempt_timeout(silent).min(left)).await {
            Ok(response) => return Ok(response),
            Err(status) => status,
        };
        silent += usize::from(error.code() == Code::DeadlineExceeded);
        let pause = pauses.next().unwrap_or(RETRY_PAUSES.longest);
        if !may_be_repeated(&error) {
            return Err(error);
        }
        if leaves_open(&error) {
            unanswered = Some(error.clone());
        }
        if Instant::now() + pause >= deadline {
            return Err(unanswered.unwrap_or(error));
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which error is returned, when these are the answers to the attempts.
    async fn check(answers: &[Code], reported: Code) {
        let left = Mutex::new(answers.iter().copied());
        let ask = |_| {
            let code = left.lock().unwrap().next();
            async move { Err::<(), _>(Status::new(code.unwrap_or(Code::Ok), "")) }
        };
        // Time for two attempts.
        let deadline = Instant::now() + RETRY_PAUSES.first * 3;
        let error = with_retries(|_| ATTEMPT_TIMEOUT, deadline, ask).await.unwrap_err();
        assert_eq!(error.code(), reported, "{answers:?}");
    }

    #[tokio::test]
    async fn after_no_answer_too_busy_is_no_answer_either() {
        check(&[Code::Unavailable, Code::ResourceExhausted], Code::Unavailable).await;
        check(&[Code::ResourceExhausted, Code::ResourceExhausted], Code::ResourceExhausted).await;
        check(&[Code::Unavailable, Code::InvalidArgument], Code::InvalidArgument).await;
    }
}
