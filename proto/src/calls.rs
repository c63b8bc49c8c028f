//! The two services whose calls share a [`stream`]: calls to the coordinator, and calls to participants.

use std::{sync::Arc, time::Duration};

use futures_util::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{MetadataMap, MetadataValue},
    transport::Channel,
};

use crate::{
    limits, metadata,
    stream::{self, Streamed},
    v1::{
        self as pb, branch_stream_response, call_stream_request, call_stream_response,
        coordinator_service_client::CoordinatorServiceClient,
        participant_service_client::ParticipantServiceClient,
        participant_service_server::ParticipantService,
    },
};

/// Calls to the coordinator.
#[derive(Debug, Clone, Copy)]
pub struct ToCoordinator;

impl Streamed for ToCoordinator {
    type Call = call_stream_request::Call;
    type Answer = call_stream_response::Answer;
    type Request = pb::CallStreamRequest;
    type Response = pb::CallStreamResponse;

    fn bytes(call: &Self::Call) -> usize {
        call.encoded_len()
    }

    async fn open(
        channel: Channel,
        requests: impl Stream<Item = Self::Request> + Send + 'static,
    ) -> Result<Streaming<Self::Response>, Status> {
        Ok(coordinator(channel).call_stream(requests).await?.into_inner())
    }

    async fn unary(
        channel: Channel,
        call: Self::Call,
        timeout: Duration,
    ) -> Result<Self::Answer, Status> {
        use call_stream_request::Call;
        use call_stream_response::Answer;
        let mut client = coordinator(channel);
        Ok(match call {
            Call::Begin(call) => Answer::Begin(of(client.begin(with(call, timeout)).await?)),
            Call::RegisterBranch(call) => {
                Answer::RegisterBranch(of(client.register_branch(with(call, timeout)).await?))
            }
            Call::Decide(call) => Answer::Decide(of(client.decide(with(call, timeout)).await?)),
            Call::Execute(call) => Answer::Execute(of(client.execute(with(call, timeout)).await?)),
            Call::GetTransaction(call) => {
                Answer::GetTransaction(of(client.get_transaction(with(call, timeout)).await?))
            }
            Call::WaitTransaction(call) => {
                Answer::WaitTransaction(of(client.wait_transaction(with(call, timeout)).await?))
            }
            Call::InquireBranches(call) => {
                Answer::InquireBranches(of(client.inquire_branches(with(call, timeout)).await?))
            }
        })
    }

    fn request(number: u64, timeout_millis: u32, call: Self::Call) -> Self::Request {
        pb::CallStreamRequest { number, timeout_millis, call: Some(call) }
    }

    fn answer(response: Self::Response) -> (u64, Result<Self::Answer, Status>) {
        let answer = match response.answer {
            Some(call_stream_response::Answer::Failure(failure)) => Err(failure.into()),
            Some(answer) => Ok(answer),
            None => Err(makes_no_sense()),
        };
        (response.number, answer)
    }
}

fn coordinator(channel: Channel) -> CoordinatorServiceClient<Channel> {
    CoordinatorServiceClient::new(channel)
        .max_encoding_message_size(limits::REQUEST_BYTES_MAX)
        .max_decoding_message_size(limits::RESPONSE_BYTES_MAX)
}

/// Calls to a participant.
#[derive(Debug, Clone, Copy)]
pub struct ToParticipant;

/// A call to a participant.
#[derive(Debug, Clone)]
pub struct BranchCall {
    /// The request.
    pub call: BranchRequest,
    /// Whether the participant may register branches of its own below this one.
    pub may_join: bool,
}

/// A request to a participant: Try, Confirm or Cancel.
pub use pb::branch_stream_request::Call as BranchRequest;

/// A participant's answer.
#[derive(Debug, Clone, Default)]
pub struct BranchAnswer {
    /// The reply to a Try.
    pub reply: Option<pb::Payload>,
    /// Branches that were registered below this one and whose Try succeeded. The ids are not validated.
    pub nested_branch_ids: Vec<String>,
}

impl Streamed for ToParticipant {
    type Call = BranchCall;
    type Answer = BranchAnswer;
    type Request = pb::BranchStreamRequest;
    type Response = pb::BranchStreamResponse;

    fn bytes(call: &BranchCall) -> usize {
        call.call.encoded_len()
    }

    async fn open(
        channel: Channel,
        requests: impl Stream<Item = Self::Request> + Send + 'static,
    ) -> Result<Streaming<Self::Response>, Status> {
        Ok(participant(channel).branch_stream(requests).await?.into_inner())
    }

    async fn unary(
        channel: Channel,
        BranchCall { call, may_join }: BranchCall,
        timeout: Duration,
    ) -> Result<BranchAnswer, Status> {
        let mut client = participant(channel);
        match call {
            BranchRequest::TryBranch(call) => {
                let mut request = joinable(call, may_join);
                request.set_timeout(timeout);
                let response = client.try_branch(request).await?;
                let nested_branch_ids = nested(response.metadata());
                Ok(BranchAnswer { reply: within_limits(of(response).reply)?, nested_branch_ids })
            }
            BranchRequest::ConfirmBranch(call) => {
                client.confirm_branch(with(call, timeout)).await?;
                Ok(BranchAnswer::default())
            }
            BranchRequest::CancelBranch(call) => {
                client.cancel_branch(with(call, timeout)).await?;
                Ok(BranchAnswer::default())
            }
        }
    }

    fn request(
        number: u64,
        timeout_millis: u32,
        BranchCall { call, may_join }: BranchCall,
    ) -> Self::Request {
        pb::BranchStreamRequest { number, timeout_millis, call: Some(call), may_join }
    }

    fn answer(response: Self::Response) -> (u64, Result<BranchAnswer, Status>) {
        use branch_stream_response::Answer;
        let reply = match response.answer {
            Some(Answer::Failure(failure)) => Err(failure.into()),
            Some(Answer::TryBranch(answer)) => within_limits(answer.reply),
            Some(Answer::ConfirmBranch(_) | Answer::CancelBranch(_)) => Ok(None),
            None => Err(makes_no_sense()),
        };
        let nested_branch_ids = response.nested_branch_ids;
        (response.number, reply.map(|reply| BranchAnswer { reply, nested_branch_ids }))
    }
}

/// A reply above the limit of the contract is an error. It is not stored, and it never reaches an initiator.
fn within_limits(reply: Option<pb::Payload>) -> Result<Option<pb::Payload>, Status> {
    let Some(pb::Payload { data, content_type }) = &reply else { return Ok(reply) };
    for (what, bytes, max) in [
        ("reply", data.len(), limits::PAYLOAD_BYTES_MAX),
        ("content type of the reply", content_type.len(), limits::CONTENT_TYPE_BYTES_MAX),
    ] {
        if bytes > max {
            return Err(Status::internal(format!(
                "the {what} has {bytes} bytes, and may have {max}"
            )));
        }
    }
    Ok(reply)
}

/// Serves `BranchStream`. Each call on the stream goes to the unary method of `service`; calls run concurrently.
pub fn serve_branches<P: ParticipantService>(
    service: Arc<P>,
    request: Request<Streaming<pb::BranchStreamRequest>>,
) -> Response<BranchAnswers> {
    let failed = |number, status: Status| {
        let answer = Some(branch_stream_response::Answer::Failure(status.into()));
        pb::BranchStreamResponse { number, answer, nested_branch_ids: Vec::new() }
    };
    let refuse =
        move |request: pb::BranchStreamRequest| failed(request.number, stream::too_many_calls());
    let answer = move |request: pb::BranchStreamRequest| {
        let (service, number) = (service.clone(), request.number);
        // Each call has its own task, so that one that computes long or panics does not disturb the others. The task is
        // cancelled when its stream ends, as a unary call is when its connection ends.
        let answer = tokio::spawn(async move { serve_branch(&*service, request).await });
        let answer = AbortOnDropHandle::new(answer);
        async move {
            answer.await.unwrap_or_else(|_| {
                failed(number, Status::internal("the participant's code panicked"))
            })
        }
    };
    let answers = stream::serve(request.into_inner(), std::future::pending(), answer, refuse);
    Response::new(answers)
}

/// The response stream of [`serve_branches`].
pub type BranchAnswers = stream::Answers<pb::BranchStreamResponse>;

async fn serve_branch<P: ParticipantService>(
    service: &P,
    request: pb::BranchStreamRequest,
) -> pb::BranchStreamResponse {
    use branch_stream_response::Answer;
    let pb::BranchStreamRequest { number, timeout_millis, call, may_join } = request;
    let mut nested_branch_ids = Vec::new();
    let answer = async {
        Ok(match call {
            None => return Err(Status::invalid_argument("call: is missing, or not known here")),
            Some(BranchRequest::TryBranch(call)) => {
                let response = service.try_branch(joinable(call, may_join)).await?;
                nested_branch_ids = nested(response.metadata());
                Answer::TryBranch(of(response))
            }
            Some(BranchRequest::ConfirmBranch(call)) => {
                Answer::ConfirmBranch(of(service.confirm_branch(Request::new(call)).await?))
            }
            Some(BranchRequest::CancelBranch(call)) => {
                Answer::CancelBranch(of(service.cancel_branch(Request::new(call)).await?))
            }
        })
    };
    let answer = stream::within(timeout_millis, answer).await;
    let answer = Some(answer.unwrap_or_else(|status| Answer::Failure(status.into())));
    pb::BranchStreamResponse { number, answer, nested_branch_ids }
}

/// A Try request. If `may_join` is set, its metadata names the branch below which the participant may register branches.
fn joinable(call: pb::TryBranchRequest, may_join: bool) -> Request<pb::TryBranchRequest> {
    let below = call.context.as_ref().filter(|_| may_join);
    // Invalid ids are left out of the metadata. The service refuses the call later and names the field.
    let below = below.and_then(|context| {
        let at_decision = context.record() == pb::Record::AtDecision;
        Some((context.xid.parse().ok()?, context.branch_id.parse().ok()?, at_decision))
    });
    let mut request = Request::new(call);
    if let Some((xid, branch_id, at_decision)) = below {
        let metadata = request.metadata_mut();
        metadata.insert(metadata::XID, xid);
        metadata.insert(metadata::BRANCH_ID, branch_id);
        if at_decision {
            metadata.insert(metadata::AT_DECISION, MetadataValue::from_static("1"));
        }
    }
    request
}

/// The branches that the metadata of a Try's response names as registered below it.
fn nested(response: &MetadataMap) -> Vec<String> {
    let ids = response.get_all(metadata::BRANCHES).iter().filter_map(|ids| ids.to_str().ok());
    ids.flat_map(|ids| ids.split(',').map(str::to_owned)).collect()
}

fn participant(channel: Channel) -> ParticipantServiceClient<Channel> {
    ParticipantServiceClient::new(channel)
        .max_encoding_message_size(limits::REQUEST_BYTES_MAX)
        .max_decoding_message_size(2 * limits::PAYLOAD_BYTES_MAX)
}

fn with<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn of<T>(response: Response<T>) -> T {
    response.into_inner()
}

fn makes_no_sense() -> Status {
    Status::internal("an answer with nothing in it")
}
