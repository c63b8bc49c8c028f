//! Calls of initiators that share a stream. Each call is passed to the method of the same name.

use std::{sync::Arc, time::Duration};

use handfast_proto::{
    stream::{self, within},
    v1::{
        CallStreamRequest, CallStreamResponse, call_stream_request::Call,
        call_stream_response::Answer, coordinator_service_server::CoordinatorService,
    },
};
use tonic::{Request, Response, Status, Streaming};

use super::{Services, connection::Allowance, request::invalid};

/// The answers on a stream.
pub(super) type Answers = stream::Answers<CallStreamResponse>;

/// Answers the calls on a stream until the caller or the coordinator ends it.
pub(super) fn serve(
    services: &Services,
    request: Request<Streaming<CallStreamRequest>>,
) -> Answers {
    let services = Arc::new(services.clone());
    let allowance = request.extensions().get::<Allowance>().cloned();
    let closing = services.closing.clone().cancelled_owned();
    let refuse = |CallStreamRequest { number, .. }| {
        let answer = Some(Answer::Failure(stream::too_many_calls().into()));
        CallStreamResponse { number, answer }
    };
    let answer = move |request| answer(services.clone(), allowance.clone(), request);
    stream::serve(request.into_inner(), closing, answer, refuse)
}

async fn answer(
    services: Arc<Services>,
    allowance: Option<Allowance>,
    request: CallStreamRequest,
) -> CallStreamResponse {
    let CallStreamRequest { number, timeout_millis, call } = request;
    let timeout = (timeout_millis > 0).then(|| Duration::from_millis(timeout_millis.into()));
    let limits = WaitLimits { allowance, timeout };
    let answer = within(timeout_millis, ask(&services, limits, call)).await;
    let answer = Some(answer.unwrap_or_else(|status| Answer::Failure(status.into())));
    CallStreamResponse { number, answer }
}

async fn ask(
    services: &Services,
    limits: WaitLimits,
    call: Option<Call>,
) -> Result<Answer, Status> {
    let Some(call) = call else {
        return invalid("call", "is missing, or this coordinator does not know it")?;
    };
    Ok(match call {
        Call::Begin(call) => Answer::Begin(of(services.begin(Request::new(call)).await?)),
        Call::RegisterBranch(call) => {
            Answer::RegisterBranch(of(services.register_branch(Request::new(call)).await?))
        }
        Call::Decide(call) => Answer::Decide(of(services.decide(limits.request(call)).await?)),
        Call::Execute(call) => Answer::Execute(of(services.execute(limits.request(call)).await?)),
        Call::GetTransaction(call) => {
            Answer::GetTransaction(of(services.get_transaction(Request::new(call)).await?))
        }
        Call::WaitTransaction(call) => {
            Answer::WaitTransaction(of(services.wait_transaction(limits.request(call)).await?))
        }
        Call::InquireBranches(call) => {
            Answer::InquireBranches(of(services.inquire_branches(Request::new(call)).await?))
        }
    })
}

/// What limits how long a call may wait.
struct WaitLimits {
    /// How many calls of the connection may wait.
    allowance: Option<Allowance>,
    timeout: Option<Duration>,
}

impl WaitLimits {
    /// Makes the request of a call that may wait.
    fn request<T>(self, call: T) -> Request<T> {
        let mut request = Request::new(call);
        if let Some(allowance) = self.allowance {
            request.extensions_mut().insert(allowance);
        }
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        request
    }
}

fn of<T>(response: Response<T>) -> T {
    response.into_inner()
}
