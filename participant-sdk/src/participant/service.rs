//! Serves a participant over gRPC: `handfast.v1.ParticipantService`, as defined in `participant.proto`.

use std::sync::Arc;

use handfast_proto::{
    calls::{BranchAnswers, serve_branches},
    gather::{Budget, Gather},
    id::{InvalidBranchId, InvalidXid},
    limits,
    v1::{
        ActionInfo, BranchContext, BranchStreamRequest, CancelBranchRequest, CancelBranchResponse,
        ConfirmBranchRequest, ConfirmBranchResponse, InquireBranchRequest, InquireBranchResponse,
        ListActionsRequest, ListActionsResponse, Payload, TryBranchRequest, TryBranchResponse,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tonic::{Request, Response, Status, Streaming};

use super::Participant;
use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    context,
    remote::Local as _,
};

/// The SDK's name and version, as reported to the coordinator.
const SDK: &str = concat!("handfast-rust/", env!("CARGO_PKG_VERSION"));

impl Participant {
    /// The participant as a tonic service, for `Server::builder().add_service(…)`. A request uses memory only for the bytes that
    /// have arrived, not for the length that it announces.
    ///
    /// Starts the participant's upkeep if it knows its coordinator; see
    /// [`ParticipantBuilder::coordinator`](crate::ParticipantBuilder::coordinator).
    ///
    /// # Panics
    ///
    /// When it knows its coordinator and this is not called within a tokio runtime.
    #[must_use]
    pub fn into_service(self) -> Gather<ParticipantServiceServer<Self>> {
        let service = ParticipantServiceServer::new(self.with_upkeep())
            .max_decoding_message_size(limits::REQUEST_BYTES_MAX)
            .max_encoding_message_size(limits::RESPONSE_BYTES_MAX);
        Gather::new(service, Budget::default(), |_| None)
    }
}

#[tonic::async_trait]
impl ParticipantService for Participant {
    async fn try_branch(
        &self,
        request: Request<TryBranchRequest>,
    ) -> Result<Response<TryBranchResponse>, Status> {
        context::within_call(request, async |request| {
            let TryBranchRequest { context, payload } = request;
            let branch = Branch::from_context(context, Phase::Try)?;
            let payload = payload.unwrap_or_default();
            let (bytes, max) = (payload.content_type.len(), limits::CONTENT_TYPE_BYTES_MAX);
            if bytes > max {
                let message = format!("has {bytes} bytes, and may have {max}");
                let answer = Answer::Invalid { field: "payload.content_type", message };
                return Err(answer.into_result().expect_err("it is invalid"));
            }
            let data = self.handle(&branch, &payload.data).await.into_result()?;
            let content_type = self.reply_content_type(&branch.action).to_owned();
            Ok(TryBranchResponse { reply: Some(Payload { data, content_type }) })
        })
        .await
    }

    async fn confirm_branch(
        &self,
        request: Request<ConfirmBranchRequest>,
    ) -> Result<Response<ConfirmBranchResponse>, Status> {
        phase_two(self, request.into_inner().context, Phase::Confirm).await?;
        Ok(Response::new(ConfirmBranchResponse {}))
    }

    async fn cancel_branch(
        &self,
        request: Request<CancelBranchRequest>,
    ) -> Result<Response<CancelBranchResponse>, Status> {
        phase_two(self, request.into_inner().context, Phase::Cancel).await?;
        Ok(Response::new(CancelBranchResponse {}))
    }

    async fn list_actions(
        &self,
        _: Request<ListActionsRequest>,
    ) -> Result<Response<ListActionsResponse>, Status> {
        let actions = self.content_types().map(|(action, types)| ActionInfo {
            action: action.to_owned(),
            args_content_type: types.args.to_owned(),
            reply_content_type: types.reply.to_owned(),
        });
        Ok(Response::new(ListActionsResponse {
            participant: self.name().to_owned(),
            actions: actions.collect(),
            sdk: SDK.to_owned(),
            inquires: self.inquires(),
        }))
    }

    async fn inquire_branch(
        &self,
        request: Request<InquireBranchRequest>,
    ) -> Result<Response<InquireBranchResponse>, Status> {
        let InquireBranchRequest { xid, branch_id } = request.into_inner();
        let invalid = |field, error: &dyn ToString| {
            let answer = Answer::Invalid { field, message: error.to_string() };
            answer.into_result().expect_err("it is invalid")
        };
        let xid = xid.parse().map_err(|error: InvalidXid| invalid("xid", &error))?;
        let branch_id = branch_id.parse();
        let branch_id = branch_id.map_err(|error: InvalidBranchId| invalid("branch_id", &error))?;
        if !self.inquires() {
            return Err(Status::unimplemented("this participant does not know its coordinator"));
        }
        self.ask_now(xid, &branch_id).await;
        Ok(Response::new(InquireBranchResponse {}))
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        Ok(serve_branches(Arc::new(self.clone()), request))
    }
}

/// Confirm and Cancel pass on no payload: the fence has the payload of the Try.
async fn phase_two(
    participant: &Participant,
    context: Option<BranchContext>,
    phase: Phase,
) -> Result<(), Status> {
    let branch = Branch::from_context(context, phase)?;
    participant.handle(&branch, &[]).await.into_result()?;
    Ok(())
}

#[cfg(test)]
#[cfg(feature = "sqlite")]
mod tests {
    use std::time::Duration;

    use handfast_proto::{
        calls::{BranchAnswer, BranchCall, BranchRequest, ToParticipant},
        reason,
        stream::Line,
        time::timestamp,
        v1::participant_service_client::ParticipantServiceClient,
    };
    use hyper_util::rt::TokioIo;
    use tonic::{
        Code,
        transport::{Channel, Endpoint, Server},
    };
    use tonic_types::StatusExt as _;

    use super::*;
    use crate::{
        Refusal,
        fence::{
            fixture::{STOCK, branch, payload, payload_that},
            tests::sqlite::shop::Shop,
        },
    };

    type Client = Line<ToParticipant>;

    /// Two identical shops: the calls to one share a stream, the calls to the other are unary. Both must give the same answers.
    async fn both_ways() -> [(Shop, Client); 2] {
        let (one, other) = (Shop::in_memory().await, Shop::in_memory().await);
        let lines = [Line::new(serve(&one).await), Line::without_streams(serve(&other).await)];
        let [streams, alone] = lines;
        [(one, streams), (other, alone)]
    }

    /// Serves a participant with a real tonic server over an in-memory connection.
    async fn serve(shop: &Shop) -> Channel {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let incoming = futures_util::stream::iter([Ok::<_, std::io::Error>(theirs)]);
        let server = Server::builder()
            .add_service(shop.participant().into_service())
            .serve_with_incoming(incoming);
        tokio::spawn(server);
        let mut ours = Some(ours);
        let connect = tower::service_fn(move |_| {
            let ours = ours.take().map(TokioIo::new);
            async move { ours.ok_or_else(|| std::io::Error::other("connected already")) }
        });
        let endpoint = Endpoint::from_static("http://inventory");
        endpoint.connect_with_connector(connect).await.unwrap()
    }

    fn context(n: u64) -> Option<BranchContext> {
        let branch = branch(n, Phase::Try);
        Some(BranchContext {
            xid: branch.xid.to_string(),
            branch_id: branch.branch_id.to_string(),
            action: branch.action,
            attempt: 1,
            ..BranchContext::default()
        })
    }

    async fn call(client: &Client, call: BranchRequest) -> Result<BranchAnswer, Status> {
        client.call(BranchCall { call, may_join: false }, Duration::from_secs(60)).await
    }

    async fn try_it(
        client: &Client,
        context: Option<BranchContext>,
        data: Vec<u8>,
    ) -> Result<Payload, Status> {
        let payload = Some(Payload { data: data.into(), content_type: String::new() });
        let request = TryBranchRequest { context, payload };
        Ok(call(client, BranchRequest::TryBranch(request)).await?.reply.expect("a reply"))
    }

    async fn confirm(client: &Client, context: Option<BranchContext>) -> Result<(), Status> {
        let request = ConfirmBranchRequest { context, payload: None };
        call(client, BranchRequest::ConfirmBranch(request)).await.map(|_| ())
    }

    async fn cancel(client: &Client, context: Option<BranchContext>) -> Result<(), Status> {
        let request = CancelBranchRequest { context, payload: None };
        call(client, BranchRequest::CancelBranch(request)).await.map(|_| ())
    }

    fn payload_of(quantity: i64) -> Payload {
        Payload { data: payload(quantity).into(), content_type: String::new() }
    }

    fn told<T>(result: Result<T, Status>) -> (Code, String) {
        let status = result.err().expect("an error");
        let info = status.get_details_error_info();
        (status.code(), info.map_or(String::new(), |info| info.reason))
    }

    fn says(code: Code, reason: &str) -> (Code, String) {
        (code, reason.to_owned())
    }

    #[tokio::test]
    async fn a_branch_is_tried_and_confirmed_with_what_try_got() {
        for (shop, client) in &both_ways().await {
            let reply = try_it(client, context(1), payload(2)).await.unwrap();
            assert_eq!(
                (&reply.data[..], reply.content_type.as_str()),
                (&b"\"8 left\""[..], "application/json")
            );
            assert_eq!(try_it(client, context(1), payload(2)).await.unwrap(), reply);

            let other = Some(Payload { data: payload(7).into(), content_type: String::new() });
            for _ in 0..2 {
                let request = ConfirmBranchRequest { context: context(1), payload: other.clone() };
                call(client, BranchRequest::ConfirmBranch(request)).await.unwrap();
            }
            assert_eq!(shop.shelf().await, (STOCK - 2, 0, 2));
            let opposite = cancel(client, context(1)).await;
            assert_eq!(told(opposite), says(Code::FailedPrecondition, reason::OPPOSITE_DONE));
        }
    }

    #[tokio::test]
    async fn every_answer_has_the_code_of_the_contract() {
        for (_, client) in &both_ways().await {
            let refused = try_it(client, context(1), payload_that(2, "refuse")).await.unwrap_err();
            let refusal = Refusal::from_status(&refused).unwrap();
            assert_eq!(refusal.to_string(), "OUT_OF_STOCK: none left");
            assert_eq!(
                (refusal.domain.as_str(), refusal.metadata["left"].as_str()),
                ("inventory", "8")
            );

            let failed = try_it(client, context(1), payload_that(2, "fail")).await.unwrap_err();
            assert_eq!((failed.code(), failed.message()), (Code::Unknown, "the disk is on fire"));
            let long = try_it(client, context(1), payload_that(2, "long")).await.unwrap_err();
            assert_eq!(long.code(), Code::Unknown);
            assert!(long.message().starts_with("the reply has 65538 bytes"), "{long:?}");

            let never = confirm(client, context(1)).await;
            assert_eq!(told(never), says(Code::FailedPrecondition, reason::NEVER_TRIED));
            cancel(client, context(1)).await.unwrap();
            let late = try_it(client, context(1), payload(2)).await;
            assert_eq!(told(late), says(Code::Aborted, reason::CANCELLED_BEFORE));
            let opposite = confirm(client, context(1)).await;
            assert_eq!(told(opposite), says(Code::FailedPrecondition, reason::OPPOSITE_DONE));

            try_it(client, context(2), payload(2)).await.unwrap();
            let differs = try_it(client, context(2), payload(3)).await;
            assert_eq!(told(differs), says(Code::FailedPrecondition, reason::PAYLOAD_DIFFERS));

            let expired = context(3).map(|context| {
                let expires_at = Some(timestamp(1_700_000_000_000));
                BranchContext { expires_at, ..context }
            });
            let expired = try_it(client, expired, payload(2)).await;
            assert_eq!(told(expired), says(Code::Aborted, reason::EXPIRED));

            let unknown = context(3).map(|context| {
                let action = "inventory.count".to_owned();
                BranchContext { action, ..context }
            });
            let unknown = try_it(client, unknown, payload(2)).await;
            assert_eq!(told(unknown), says(Code::Unimplemented, reason::ACTION_UNKNOWN));

            for data in [b"{}".to_vec(), vec![b' '; limits::PAYLOAD_BYTES_MAX + 1]] {
                let invalid = try_it(client, context(3), data).await;
                assert_eq!(told(invalid), says(Code::InvalidArgument, reason::INVALID_FIELD));
            }
            let mut typed = payload_of(2);
            typed.content_type = "t".repeat(limits::CONTENT_TYPE_BYTES_MAX + 1);
            let request = TryBranchRequest { context: context(3), payload: Some(typed) };
            let invalid = call(client, BranchRequest::TryBranch(request)).await;
            assert_eq!(told(invalid), says(Code::InvalidArgument, reason::INVALID_FIELD));
            let no_context = confirm(client, None).await;
            assert_eq!(told(no_context), says(Code::InvalidArgument, reason::INVALID_FIELD));
        }
    }

    #[tokio::test]
    async fn phase_two_is_repeated_or_asks_for_a_person() {
        for (shop, client) in &both_ways().await {
            try_it(client, context(1), payload_that(2, "attention")).await.unwrap();
            for result in [confirm(client, context(1)).await, cancel(client, context(1)).await] {
                let status = result.as_ref().unwrap_err();
                assert_eq!(status.message(), "the shelf has fallen over");
                assert_eq!(told(result), says(Code::FailedPrecondition, reason::NEEDS_ATTENTION));
            }
            let break_it = "UPDATE handfast_fence SET payload = ?";
            sqlx::query(break_it).bind(payload_that(2, "fail")).execute(&shop.pool).await.unwrap();
            for result in [confirm(client, context(1)).await, cancel(client, context(1)).await] {
                let status = result.unwrap_err();
                assert_eq!(
                    (status.code(), status.message()),
                    (Code::Unavailable, "the disk is on fire")
                );
            }
            assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));
        }
    }

    #[tokio::test]
    async fn a_long_refusal_fits_the_headers_of_a_grpc_client() {
        for (_, client) in &both_ways().await {
            let refused = try_it(client, context(1), payload_that(2, "refuse long")).await;
            let refusal = Refusal::from_status(&refused.unwrap_err()).unwrap();
            assert_eq!(refusal.reason, "OUT_OF_STOCK");
            assert!(refusal.message.starts_with("库存不足") && !refusal.metadata.is_empty());
        }
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_leaves_nothing_behind() {
        for (shop, client) in &both_ways().await {
            let mut other = shop.pool.acquire().await.unwrap();
            let request = TryBranchRequest {
                context: context(1),
                payload: Some(Payload { data: payload(2).into(), content_type: String::new() }),
            };
            let request = BranchCall { call: BranchRequest::TryBranch(request), may_join: false };
            let status = client.call(request, Duration::from_millis(100)).await.unwrap_err();
            assert!(
                matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded),
                "{status:?}"
            );
            sqlx::query("UPDATE shelf SET sold = 0").execute(&mut *other).await.unwrap();
            drop(other);
            cancel(client, context(1)).await.unwrap();
            assert_eq!(shop.shelf().await, (STOCK, 0, 0));
            // On a busy machine the Try may have arrived first and been cancelled.
            let state = shop.state(1).await.unwrap();
            assert!(["suspended", "cancelled"].contains(&state.as_str()), "{state}");
        }
    }

    #[tokio::test]
    async fn what_is_served_can_be_asked() {
        let mut client = ParticipantServiceClient::new(serve(&Shop::in_memory().await).await);
        let answer = client.list_actions(ListActionsRequest {}).await.unwrap().into_inner();
        assert_eq!((answer.participant.as_str(), answer.sdk.as_str()), ("inventory", SDK));
        assert_eq!(
            answer.actions,
            [ActionInfo {
                action: "inventory.deduct".to_owned(),
                args_content_type: "application/json".to_owned(),
                reply_content_type: "application/json".to_owned(),
            }]
        );
    }
}
