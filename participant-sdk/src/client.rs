//! Whom an initiator talks to: the coordinator ([`Handfast`]) and participants ([`Remote`]).

use std::{error::Error as _, fmt, sync::Arc, time::Duration};

use backon::BackoffBuilder as _;
use handfast_proto::{
    Xid,
    address::InvalidAddress,
    calls::{ToCoordinator, ToParticipant},
    connection::{DEADLINE_MARGIN, endpoint},
    reason,
    stream::Line,
    v1::{self as pb, call_stream_request::Call, call_stream_response::Answer},
};
use tokio::time::Instant;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{
    error::{BoxError, chain},
    execute::ExecuteBuilder,
    global::Global,
    outcome::Outcome,
    participant::Participant,
    propagation::Context,
    transaction::TransactionBuilder,
};

/// First and longest pause before a call is repeated.
const REPEAT_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// How long one attempt of a call to the coordinator may take, beside what it is asked to wait.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a question about an outcome is repeated.
pub(crate) const ASK_PATIENCE: Duration = Duration::from_secs(10);

/// The coordinator, as initiators and nested services see it. Cheap to clone; connects when it is first used, and again when
/// the connection is lost.
#[derive(Clone)]
pub struct Handfast {
    calls: Line<ToCoordinator>,
    /// Calls that wait for long have a connection of their own: they would use up the places of the other one.
    waits: Line<ToCoordinator>,
}

/// There is no answer to a question about a transaction. Ask again.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator does not say what became of {asked}: {cause}")]
pub struct Unanswered {
    /// What was asked about: an xid, or a key.
    asked: String,
    /// Why there is no answer.
    #[source]
    cause: BoxError,
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
        let alone = |line: Line<_>| Line::without_streams(line.channel().clone());
        Self { calls: alone(self.calls), waits: alone(self.waits) }
    }

    /// Begins to describe a global transaction of this name (`checkout`), to be run with the Trys called from here.
    pub fn transaction(&self, name: impl Into<String>) -> TransactionBuilder {
        TransactionBuilder::new(self.clone(), name.into())
    }

    /// Begins to describe a global transaction of this name that the coordinator runs, Trys included.
    pub fn execute(&self, name: impl Into<String>) -> ExecuteBuilder {
        ExecuteBuilder::new(self.clone(), name.into())
    }

    /// Joins the global transaction that a call came with, to register branches of one's own and to call further services.
    /// What is registered and tried with success is reported to the caller with the response, if the service has the
    /// [`ContextLayer`](crate::ContextLayer).
    #[must_use]
    pub fn join(&self, context: &Context) -> Global {
        Global::joined(self.clone(), context)
    }

    /// What became of a global transaction. For whoever was told [`Unknown`](crate::TransactionError::Unknown).
    ///
    /// A decision that is told is the truth for ever; [`Outcome::Undecided`] carries no promise: ask again.
    ///
    /// # Errors
    ///
    /// When there was no answer within ten seconds.
    pub async fn outcome(&self, xid: Xid) -> Result<Outcome, Unanswered> {
        self.ask(pb::get_transaction_request::By::Xid(xid.to_string()), xid.to_string()).await
    }

    /// The same for the transaction of an idempotency key. A key that nobody has used, or whose transaction was deleted after its
    /// retention, is [`Outcome::NeverRecorded`] or [`Outcome::Forgotten`]; here the two cannot be told apart, and it is the second.
    ///
    /// # Errors
    ///
    /// When there was no answer within ten seconds.
    pub async fn outcome_of_key(&self, key: &str) -> Result<Outcome, Unanswered> {
        self.ask(
            pb::get_transaction_request::By::IdempotencyKey(key.to_owned()),
            format!("key {key}"),
        )
        .await
    }

    async fn ask(
        &self,
        by: pb::get_transaction_request::By,
        asked: String,
    ) -> Result<Outcome, Unanswered> {
        match self.get(by, Instant::now() + ASK_PATIENCE).await {
            Ok(transaction) => Ok(Outcome::of(&transaction)),
            Err(status) => match Reason::of(&status) {
                Reason::NeverRecorded => Ok(Outcome::NeverRecorded),
                Reason::Forgotten | Reason::KeyUnknown => Ok(Outcome::Forgotten),
                Reason::KeyTaken
                | Reason::AlreadyDecided
                | Reason::BranchesDiffer
                | Reason::Other => Err(Unanswered { asked, cause: status_error(status) }),
            },
        }
    }

    pub(crate) async fn begin(
        &self,
        request: pb::BeginRequest,
        deadline: Instant,
    ) -> Result<pb::BeginResponse, Status> {
        let call = Call::Begin(request);
        let Answer::Begin(response) =
            self.repeated(&self.calls, call, ATTEMPT_TIMEOUT, deadline).await?
        else {
            return Err(makes_no_sense());
        };
        Ok(response)
    }

    pub(crate) async fn register(
        &self,
        request: pb::RegisterBranchRequest,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let call = Call::RegisterBranch(request);
        transaction(self.repeated(&self.calls, call, ATTEMPT_TIMEOUT, deadline).await?)
    }

    pub(crate) async fn decide(
        &self,
        request: pb::DecideRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let line = if wait.is_zero() { &self.calls } else { &self.waits };
        let timeout = ATTEMPT_TIMEOUT.saturating_add(wait);
        transaction(self.repeated(line, Call::Decide(request), timeout, deadline).await?)
    }

    pub(crate) async fn run_execute(
        &self,
        request: pb::ExecuteRequest,
        wait: Duration,
        deadline: Instant,
    ) -> Result<pb::ExecuteResponse, Status> {
        let (call, timeout) = (Call::Execute(request), ATTEMPT_TIMEOUT.saturating_add(wait));
        let Answer::Execute(response) = self.repeated(&self.waits, call, timeout, deadline).await?
        else {
            return Err(makes_no_sense());
        };
        Ok(response)
    }

    pub(crate) async fn get(
        &self,
        by: pb::get_transaction_request::By,
        deadline: Instant,
    ) -> Result<pb::Transaction, Status> {
        let call = Call::GetTransaction(pb::GetTransactionRequest { by: Some(by) });
        transaction(self.repeated(&self.calls, call, ATTEMPT_TIMEOUT, deadline).await?)
    }

    async fn repeated(
        &self,
        line: &Line<ToCoordinator>,
        call: Call,
        attempt_timeout: Duration,
        deadline: Instant,
    ) -> Result<Answer, Status> {
        let ask = |timeout| line.call(call.clone(), timeout);
        repeated(attempt_timeout, deadline, ask).await
    }
}

impl fmt::Debug for Handfast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handfast")
    }
}

/// What an answer says of the transaction that was asked about.
fn transaction(answer: Answer) -> Result<pb::Transaction, Status> {
    let (Answer::RegisterBranch(pb::RegisterBranchResponse { transaction })
    | Answer::Decide(pb::DecideResponse { transaction })
    | Answer::GetTransaction(pb::GetTransactionResponse { transaction })) = answer
    else {
        return Err(makes_no_sense());
    };
    transaction.ok_or_else(|| Status::internal("the coordinator's answer has no transaction in it"))
}

/// The moment after so long, or after some decades, if that is later than any clock goes.
pub(crate) fn from_now(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or(now + Duration::from_secs(30 * 365 * 24 * 3600))
}

/// Asks, and asks again while there is no answer that settles it, until `deadline`. Only for what may be repeated: everything
/// that the coordinator offers. The last error is reported; but once an attempt had no answer at all, nobody may conclude from
/// a later "too busy" that nothing has happened, and so the last of those without an answer is.
async fn repeated<T, F>(
    attempt_timeout: Duration,
    deadline: Instant,
    ask: impl Fn(Duration) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut pauses = backon::ExponentialBuilder::default()
        .with_min_delay(REPEAT_PAUSES[0])
        .with_max_delay(REPEAT_PAUSES[1])
        .without_max_times()
        .with_jitter()
        .build();
    let mut unanswered = None;
    loop {
        let attempt_ends = deadline.min(from_now(attempt_timeout));
        let timeout = attempt_ends.saturating_duration_since(Instant::now());
        let error =
            match tokio::time::timeout_at(attempt_ends, ask(timeout + DEADLINE_MARGIN)).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer in time"),
            };
        let pause = pauses.next().unwrap_or(REPEAT_PAUSES[1]);
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

/// Whether an answer leaves open what happened, or says to come again.
pub(crate) fn may_be_repeated(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled => {
            true
        }
        // Made on this side: the connection broke.
        Code::Unknown | Code::Internal => status.source().is_some(),
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

/// Whether an answer leaves open what happened: it may have been done.
pub(crate) fn leaves_open(status: &Status) -> bool {
    may_be_repeated(status) && status.code() != Code::ResourceExhausted
}

fn makes_no_sense() -> Status {
    Status::internal("the coordinator has answered another question")
}

/// What the coordinator's errors are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    NeverRecorded,
    Forgotten,
    KeyUnknown,
    KeyTaken,
    AlreadyDecided,
    BranchesDiffer,
    Other,
}

impl Reason {
    pub(crate) fn of(status: &Status) -> Self {
        match status.get_details_error_info() {
            Some(info) if info.domain == reason::DOMAIN => match info.reason.as_str() {
                reason::NEVER_RECORDED => Self::NeverRecorded,
                reason::FORGOTTEN => Self::Forgotten,
                reason::KEY_UNKNOWN => Self::KeyUnknown,
                reason::KEY_TAKEN => Self::KeyTaken,
                reason::ALREADY_DECIDED => Self::AlreadyDecided,
                reason::BRANCHES_DIFFER => Self::BranchesDiffer,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// A status as an error for people: its words, and what is behind a "transport error".
pub(crate) fn status_error(status: Status) -> BoxError {
    let code = status.code();
    let text = match status.source() {
        Some(source) => chain(source),
        None => status.message().to_owned(),
    };
    format!("{code:?}: {text}").into()
}

/// A participant, as its callers see it: what it is called, where it is, and how to reach it from here. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    name: Arc<str>,
    target: Arc<str>,
    pub(crate) reach: Reach,
}

#[derive(Clone)]
pub(crate) enum Reach {
    Line(Line<ToParticipant>),
    /// In this process: no network between.
    Here(Participant),
}

impl Remote {
    /// The participant of this name at `url`: `http://127.0.0.1:7001`. The coordinator calls it there too, unless its
    /// configuration has another address for the name. Does not wait for a connection. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn connect(name: &str, url: &str) -> Result<Self, InvalidAddress> {
        Ok(Self::with_channel(name, url, endpoint(&url.parse()?).connect_lazy()))
    }

    /// The participant of this name, called from here through `channel` and by the coordinator at `target`.
    #[must_use]
    pub fn with_channel(name: &str, target: &str, channel: Channel) -> Self {
        Self { name: name.into(), target: target.into(), reach: Reach::Line(Line::new(channel)) }
    }

    /// The same participant, with every call from here made by itself. By default calls share a stream, if the participant has
    /// streams; a load balancer in between spreads calls over several instances only if they are made by themselves.
    #[must_use]
    pub fn without_streams(self) -> Self {
        let reach = match self.reach {
            Reach::Line(line) => Reach::Line(Line::without_streams(line.channel().clone())),
            here @ Reach::Here(_) => here,
        };
        Self { reach, ..self }
    }

    /// A participant in this process: a service that takes part in what it begins, or joins. `target` is where the coordinator
    /// calls it.
    #[must_use]
    pub fn here(participant: &Participant, target: &str) -> Self {
        let name = participant.name().into();
        Self { name, target: target.into(), reach: Reach::Here(participant.clone()) }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the coordinator calls it.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({} at {})", self.name, self.target)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// What is reported in the end, when these are the answers, one after the other.
    async fn check(answers: &[Code], reported: Code) {
        let left = Mutex::new(answers.iter().copied());
        let ask = |_| {
            let code = left.lock().unwrap().next();
            async move { Err::<(), _>(Status::new(code.unwrap_or(Code::Ok), "")) }
        };
        // Time for two answers.
        let deadline = Instant::now() + REPEAT_PAUSES[0] * 3;
        let error = repeated(ATTEMPT_TIMEOUT, deadline, ask).await.unwrap_err();
        assert_eq!(error.code(), reported, "{answers:?}");
    }

    #[tokio::test]
    async fn after_no_answer_too_busy_is_no_answer_either() {
        check(&[Code::Unavailable, Code::ResourceExhausted], Code::Unavailable).await;
        check(&[Code::ResourceExhausted, Code::ResourceExhausted], Code::ResourceExhausted).await;
        check(&[Code::Unavailable, Code::InvalidArgument], Code::InvalidArgument).await;
    }
}
