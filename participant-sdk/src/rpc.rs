//! The connection to the coordinator: its calls, and how long and how often each is repeated.
//!
//! Everything that the coordinator offers may be repeated, so a call whose answer is lost is made again.

use std::{fmt, time::Duration};

use backon::BackoffBuilder as _;
use handfast_proto::{
    address::InvalidAddress,
    calls::ToCoordinator,
    connection::{DEADLINE_MARGIN, endpoint},
    stream::Line,
    v1::{self as pb, call_stream_request::Call, call_stream_response::Answer},
};
use tokio::time::Instant;
use tonic::{Status, transport::Channel};

use crate::status::{leaves_open, may_be_repeated};

/// First and longest pause before a call is repeated.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// How long one attempt of a call to the coordinator may take, beside what it is asked to wait.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// The coordinator, as initiators and nested services see it. Cheap to clone; connects when it is first used, and again when
/// the connection is lost.
#[derive(Clone)]
pub struct Handfast {
    calls: Line<ToCoordinator>,
    /// For calls that wait long. On the connection of the others they would use up its streams.
    waits: Line<ToCoordinator>,
}

impl Handfast {
    /// The coordinator at `url`: `http://127.0.0.1:7420`. Does not wait for a connection. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn connect(url: &str) -> Result<Self, InvalidAddress> {
        let endpoint = endpoint(&url.parse()?);
        Ok(Self::from_channels(endpoint.connect_lazy(), endpoint.connect_lazy()))
    }

    /// The coordinator behind channels of your own: one for calls, one for calls that wait for a transaction to complete.
    #[must_use]
    pub fn from_channels(calls: Channel, waits: Channel) -> Self {
        Self { calls: Line::new(calls), waits: Line::new(waits) }
    }

    /// The same coordinator, with every call made by itself. By default calls share streams, which costs a fraction; where there
    /// are none (something in between does not let them pass), calls are made by themselves anyway.
    #[must_use]
    pub fn without_streams(self) -> Self {
        let unary = |line: Line<_>| Line::without_streams(line.channel().clone());
        Self { calls: unary(self.calls), waits: unary(self.waits) }
    }

    pub(crate) async fn begin(
        &self,
        request: pb::BeginRequest,
        deadline: Instant,
    ) -> Result<pb::BeginResponse, Status> {
        let begin = Call::Begin(request);
        let answer = call(&self.calls, begin, ATTEMPT_TIMEOUT, deadline).await?;
        let Answer::Begin(response) = answer else { return Err(wrong_kind()) };
        Ok(response)
    }

    pub(crate) async fn register(
        &self,
        request: pb::RegisterBranchRequest,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let register = Call::RegisterBranch(request);
        transaction(call(&self.calls, register, ATTEMPT_TIMEOUT, deadline).await?)
    }

    pub(crate) async fn decide(
        &self,
        request: pb::DecideRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let line = if wait.is_zero() { &self.calls } else { &self.waits };
        let timeout = ATTEMPT_TIMEOUT.saturating_add(wait);
        transaction(call(line, Call::Decide(request), timeout, deadline).await?)
    }

    pub(crate) async fn run_execute(
        &self,
        request: pb::ExecuteRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::ExecuteResponse, Status> {
        let timeout = ATTEMPT_TIMEOUT.saturating_add(wait);
        let answer = call(&self.waits, Call::Execute(request), timeout, deadline).await?;
        let Answer::Execute(response) = answer else { return Err(wrong_kind()) };
        Ok(response)
    }

    pub(crate) async fn get(
        &self,
        by: pb::get_transaction_request::By,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let get = Call::GetTransaction(pb::GetTransactionRequest { by: Some(by) });
        transaction(call(&self.calls, get, ATTEMPT_TIMEOUT, deadline).await?)
    }
}

impl fmt::Debug for Handfast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handfast")
    }
}

async fn call(
    line: &Line<ToCoordinator>,
    call: Call,
    attempt_timeout: Duration,
    deadline: Instant,
) -> Result<Answer, Status> {
    with_retries(attempt_timeout, deadline, |timeout| line.call(call.clone(), timeout)).await
}

/// The transaction in an answer to a call that is about one.
fn transaction(answer: Answer) -> Result<pb::Transaction, Status> {
    let (Answer::RegisterBranch(pb::RegisterBranchResponse { transaction })
    | Answer::Decide(pb::DecideResponse { transaction })
    | Answer::GetTransaction(pb::GetTransactionResponse { transaction })) = answer
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
    attempt_timeout: Duration,
    deadline: Instant,
    attempt: impl Fn(Duration) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut pauses = backon::ExponentialBuilder::default()
        .with_min_delay(RETRY_PAUSES[0])
        .with_max_delay(RETRY_PAUSES[1])
        .without_max_times()
        .with_jitter()
        .build();
    let mut unanswered = None;
    loop {
        let attempt_ends = deadline.min(from_now(attempt_timeout));
        let timeout = attempt_ends.saturating_duration_since(Instant::now()) + DEADLINE_MARGIN;
        let error = match tokio::time::timeout_at(attempt_ends, attempt(timeout)).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded("no answer in time"),
        };
        let pause = pauses.next().unwrap_or(RETRY_PAUSES[1]);
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
    use std::sync::Mutex;

    use tonic::Code;

    use super::*;

    /// Which error is returned, when these are the answers to the attempts.
    async fn check(answers: &[Code], reported: Code) {
        let left = Mutex::new(answers.iter().copied());
        let ask = |_| {
            let code = left.lock().unwrap().next();
            async move { Err::<(), _>(Status::new(code.unwrap_or(Code::Ok), "")) }
        };
        // Time for two attempts.
        let deadline = Instant::now() + RETRY_PAUSES[0] * 3;
        let error = with_retries(ATTEMPT_TIMEOUT, deadline, ask).await.unwrap_err();
        assert_eq!(error.code(), reported, "{answers:?}");
    }

    #[tokio::test]
    async fn after_no_answer_too_busy_is_no_answer_either() {
        check(&[Code::Unavailable, Code::ResourceExhausted], Code::Unavailable).await;
        check(&[Code::ResourceExhausted, Code::ResourceExhausted], Code::ResourceExhausted).await;
        check(&[Code::Unavailable, Code::InvalidArgument], Code::InvalidArgument).await;
    }
}
