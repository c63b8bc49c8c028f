//! Calls that share a stream do not disturb each other. The end of a stream is never taken for the answer to a call.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use handfast_proto::{
    calls::{
        BranchAnswer, BranchAnswers, BranchCall, BranchRequest, ToParticipant, serve_branches,
    },
    limits,
    stream::{AGE, CALLS_MAX, Line, Streamed as _},
    v1::{
        self as pb,
        participant_service_server::{ParticipantService, ParticipantServiceServer},
    },
};
use tokio::{
    sync::{Notify, oneshot},
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::testing::network::Network;

/// A timeout that is never reached here.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A participant that behaves as the action's name says.
#[derive(Clone)]
struct Odd {
    /// If set, opening a stream fails with this code.
    no_streams: Arc<Mutex<Option<Code>>>,
    /// How many streams are still to end upon their first call.
    broken: Arc<AtomicUsize>,
    /// Ends the open stream.
    end_stream: Arc<Notify>,
    /// How long accepting a stream takes.
    accepts_after: Duration,
}

impl Odd {
    fn without_streams(code: Option<Code>) -> Self {
        Self { no_streams: Arc::new(Mutex::new(code)), ..Self::sound() }
    }

    fn sound() -> Self {
        Self {
            no_streams: Arc::default(),
            broken: Arc::default(),
            end_stream: Arc::default(),
            accepts_after: Duration::ZERO,
        }
    }
}

#[tonic::async_trait]
impl ParticipantService for Odd {
    async fn try_branch(
        &self,
        request: Request<pb::TryBranchRequest>,
    ) -> Result<Response<pb::TryBranchResponse>, Status> {
        let action = request.into_inner().context.unwrap_or_default().action;
        match action.as_str() {
            "never" => std::future::pending().await,
            "slow" => {
                tokio::time::sleep(Duration::from_secs(3)).await;
                Ok(Response::new(pb::TryBranchResponse { reply: None }))
            }
            "panic" => panic!("the action says so"),
            "full" => Err(Status::resource_exhausted("too many calls")),
            "refuse" => Err(Status::failed_precondition("no")),
            "long" | "odd" => {
                let long = action == "long";
                let data = vec![b' '; if long { limits::PAYLOAD_BYTES_MAX + 1 } else { 1 }].into();
                let content_type = if long {
                    String::new()
                } else {
                    "t".repeat(limits::CONTENT_TYPE_BYTES_MAX + 1)
                };
                let reply = Some(pb::Payload { data, content_type });
                Ok(Response::new(pb::TryBranchResponse { reply }))
            }
            _ => Ok(Response::new(pb::TryBranchResponse { reply: None })),
        }
    }

    async fn confirm_branch(
        &self,
        _: Request<pb::ConfirmBranchRequest>,
    ) -> Result<Response<pb::ConfirmBranchResponse>, Status> {
        Ok(Response::new(pb::ConfirmBranchResponse {}))
    }

    async fn cancel_branch(
        &self,
        _: Request<pb::CancelBranchRequest>,
    ) -> Result<Response<pb::CancelBranchResponse>, Status> {
        Ok(Response::new(pb::CancelBranchResponse {}))
    }

    async fn list_actions(
        &self,
        _: Request<pb::ListActionsRequest>,
    ) -> Result<Response<pb::ListActionsResponse>, Status> {
        Ok(Response::new(pb::ListActionsResponse::default()))
    }

    async fn inquire_branch(
        &self,
        _: Request<pb::InquireBranchRequest>,
    ) -> Result<Response<pb::InquireBranchResponse>, Status> {
        Err(Status::unimplemented("it does not ask"))
    }

    type BranchStreamStream = BranchAnswers;

    async fn branch_stream(
        &self,
        request: Request<Streaming<pb::BranchStreamRequest>>,
    ) -> Result<Response<BranchAnswers>, Status> {
        tokio::time::sleep(self.accepts_after).await;
        let no_streams = *self.no_streams.lock().unwrap();
        if let Some(code) = no_streams {
            return Err(Status::new(code, "no streams here"));
        }
        let one_less = |broken: usize| broken.checked_sub(1);
        if self.broken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            let breaks = request.into_inner().map(|_| Err(Status::failed_precondition("not you")));
            return Ok(Response::new(Box::pin(breaks)));
        }
        let end = self.end_stream.clone();
        let answers = serve_branches(Arc::new(self.clone()), request).into_inner();
        let answers = answers.take_until(Box::pin(async move { end.notified().await }));
        Ok(Response::new(Box::pin(answers)))
    }
}

/// Starts the participant. The sender asks it to stop; the task ends once it has stopped.
fn serve(network: &Network, odd: Odd) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel();
    let serving = tonic::transport::Server::builder()
        .add_service(ParticipantServiceServer::new(odd))
        .serve_with_incoming_shutdown(network.host("odd"), async { drop(stopped.await) });
    (stop, tokio::spawn(async { serving.await.unwrap() }))
}

async fn try_it(line: &Line<ToParticipant>, action: &str) -> Result<BranchAnswer, Status> {
    with_payload(line, action, 0, TIMEOUT).await
}

async fn with_payload(
    line: &Line<ToParticipant>,
    action: &str,
    bytes: usize,
    timeout: Duration,
) -> Result<BranchAnswer, Status> {
    let action = action.to_owned();
    let context = Some(pb::BranchContext { action, ..pb::BranchContext::default() });
    let payload = Some(pb::Payload { data: vec![0; bytes].into(), content_type: String::new() });
    let call = BranchRequest::TryBranch(pb::TryBranchRequest { context, payload });
    line.call(BranchCall { call, may_join: true }, timeout).await
}

fn is_broken(status: &Status) -> bool {
    status.code() == Code::Unavailable && std::error::Error::source(status).is_some()
}

#[tokio::test]
async fn calls_of_one_stream_do_not_wait_for_each_other() {
    let network = Network::default();
    let _serving = serve(&network, Odd::sound());
    let line = Line::new(network.connect("odd"));
    let never = tokio::spawn({
        let line = line.clone();
        async move { try_it(&line, "never").await }
    });
    try_it(&line, "fast").await.unwrap();
    assert_eq!(try_it(&line, "refuse").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(try_it(&line, "panic").await.unwrap_err().code(), Code::Internal);
    let late = with_payload(&line, "never", 0, Duration::from_millis(20)).await;
    assert_eq!(late.unwrap_err().code(), Code::DeadlineExceeded, "by the participant's own clock");
    // Only the oversized call fails.
    let large = with_payload(&line, "fast", limits::REQUEST_BYTES_MAX, TIMEOUT).await;
    large.unwrap_err();
    try_it(&line, "fast").await.unwrap();
    assert_eq!(format!("{line:?}"), "Line(a stream)");
    assert!(!never.is_finished());
    never.abort();
}

#[tokio::test]
async fn a_stream_that_breaks_leaves_its_calls_without_an_answer() {
    let network = Network::default();
    let broken = Arc::new(AtomicUsize::new(1));
    let _serving = serve(&network, Odd { broken: broken.clone(), ..Odd::sound() });
    let line = Line::new(network.connect("odd"));
    let (one, other) = tokio::join!(try_it(&line, "fast"), try_it(&line, "fast"));
    for lost in [one, other] {
        let lost = lost.unwrap_err();
        assert!(is_broken(&lost), "what befell the stream is no answer to a call: {lost:?}");
    }
    // If streams bring no answers, the line makes unary calls for a while.
    try_it(&line, "fast").await.unwrap();
    assert_eq!(format!("{line:?}"), "Line(unary)");
}

#[tokio::test]
async fn after_a_stream_that_broke_calls_go_over_another() {
    let network = Network::default();
    let odd = Odd::sound();
    let _serving = serve(&network, odd.clone());
    let line = Line::new(network.connect("odd"));
    try_it(&line, "fast").await.unwrap();
    odd.end_stream.notify_one();
    // Until the line notices that the stream has ended, it still sends calls on it.
    let mut lost = 0;
    while let Err(status) = try_it(&line, "fast").await {
        lost += 1;
        assert!(is_broken(&status) && lost < 100, "{status:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(format!("{line:?}"), "Line(a stream)");
}

/// Callers that have given up count until their calls are answered. On a stream that broke they never are.
#[tokio::test]
async fn a_stream_that_broke_gives_back_the_room_of_its_calls() {
    let network = Network::default();
    let odd = Odd::sound();
    let _serving = serve(&network, odd.clone());
    let line = Line::new(network.connect("odd"));
    try_it(&line, "fast").await.unwrap();
    let mut given_up = JoinSet::new();
    for _ in 0..CALLS_MAX {
        let line = line.clone();
        given_up.spawn(async move { drop(try_it(&line, "never").await) });
    }
    let in_time = Duration::from_millis(200);
    tokio::time::sleep(in_time).await; // each makes its call
    tokio::time::timeout(in_time, try_it(&line, "fast")).await.expect_err("there is no room");
    given_up.shutdown().await;
    tokio::time::timeout(in_time, try_it(&line, "fast")).await.expect_err("there is no room yet");
    odd.end_stream.notify_one();
    let again = async {
        while let Err(status) = try_it(&line, "fast").await {
            assert!(is_broken(&status), "{status:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again).await.expect("there is room again");
}

#[tokio::test]
async fn a_participant_without_streams_gets_unary_calls() {
    for code in [Code::Unimplemented, Code::FailedPrecondition, Code::Internal] {
        let network = Network::default();
        let _serving = serve(&network, Odd::without_streams(Some(code)));
        let line = Line::new(network.connect("odd"));
        let [one, other] = [try_it(&line, "fast"), try_it(&line, "refuse")];
        let (one, other) = tokio::join!(one, other);
        one.unwrap();
        assert_eq!(other.unwrap_err().message(), "no", "the call's own answer");
        assert_eq!(format!("{line:?}"), "Line(unary)");
    }
}

/// A peer that has not accepted the stream may have taken the call from it. "Too many calls" is then the answer to a repeat only.
#[tokio::test(start_paused = true)]
async fn a_call_that_may_have_arrived_is_not_told_that_nothing_was_done() {
    for (odd, may_have_arrived) in [
        (Odd { accepts_after: Duration::MAX, ..Odd::sound() }, true),
        (Odd::without_streams(Some(Code::Unavailable)), true),
        (Odd::without_streams(Some(Code::Unimplemented)), false),
    ] {
        let network = Network::default();
        let _serving = serve(&network, odd);
        let line = Line::new(network.connect("odd"));
        let status = try_it(&line, "full").await.unwrap_err();
        assert_eq!(is_broken(&status), may_have_arrived, "{status:?}");
        assert!(status.message().contains("too many calls"), "{status:?}");
    }
}

/// Many servers send the headers of a stream with its first answer only.
#[tokio::test(start_paused = true)]
async fn a_peer_that_works_before_it_accepts_a_stream_has_a_part_of_the_time_for_it() {
    for (time, stream) in [(60, true), (6, true), (2, false)] {
        let network = Network::default();
        let _serving =
            serve(&network, Odd { accepts_after: Duration::from_secs(1), ..Odd::sound() });
        let line = Line::new(network.connect("odd"));
        with_payload(&line, "fast", 0, Duration::from_secs(time)).await.unwrap();
        let took = if stream { "Line(a stream)" } else { "Line(unary)" };
        assert_eq!(format!("{line:?}"), took, "{time} s");
    }
}

/// A standby or an overloaded server answers so. Streams are well worth another try when it has become ready.
#[tokio::test]
async fn a_peer_that_is_not_available_now_is_not_taken_for_one_without_streams() {
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        let network = Network::default();
        let odd = Odd::without_streams(Some(code));
        let _serving = serve(&network, odd.clone());
        let line = Line::new(network.connect("odd"));
        try_it(&line, "fast").await.unwrap();
        *odd.no_streams.lock().unwrap() = None;
        try_it(&line, "fast").await.unwrap();
        assert_eq!(format!("{line:?}"), "Line(a stream)", "{code:?}");
    }
}

#[tokio::test]
async fn a_reply_over_the_limits_of_the_contract_is_no_clear_answer() {
    for no_streams in [None, Some(Code::Unimplemented)] {
        let network = Network::default();
        let _serving = serve(&network, Odd::without_streams(no_streams));
        let line = Line::new(network.connect("odd"));
        for (action, told) in [
            ("long", "the reply has 65537 bytes, and may have 65536"),
            ("odd", "the content type of the reply has 129 bytes, and may have 128"),
        ] {
            let status = try_it(&line, action).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, told));
        }
    }
}

#[tokio::test]
async fn without_anybody_there_the_call_has_no_answer() {
    let line: Line<ToParticipant> = Line::new(Network::default().connect("odd"));
    for _ in 0..2 {
        assert!(is_broken(&try_it(&line, "fast").await.unwrap_err()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_in_good_order_is_not_held_up_by_idle_streams() {
    let network = Network::default();
    let (stop, serving) = serve(&network, Odd::sound());
    let line = Line::new(network.connect("odd"));
    try_it(&line, "fast").await.unwrap();
    let began = tokio::time::Instant::now();
    stop.send(()).unwrap();
    tokio::time::timeout(AGE * 3, serving).await.expect("it ends").unwrap();
    assert!(began.elapsed() < AGE * 2);
    // The line then connects to the replacement.
    let _again = serve(&network, Odd::sound());
    try_it(&line, "fast").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_old_stream_answers_what_it_took_while_a_new_one_takes_further_calls() {
    let network = Network::default();
    let _serving = serve(&network, Odd::sound());
    let line = Line::new(network.connect("odd"));
    let slow = with_payload(&line, "never", 0, AGE * 4);
    tokio::pin!(slow);
    for _ in 0..3 {
        tokio::select! {
            early = &mut slow => panic!("{early:?}"),
            () = tokio::time::sleep(AGE) => {}
        }
        try_it(&line, "fast").await.unwrap();
    }
    assert_eq!(slow.await.unwrap_err().code(), Code::DeadlineExceeded);
}

/// HTTP/2 closes a connection when small frames pile up unread.
#[tokio::test(start_paused = true)]
async fn many_small_calls_that_wait_do_not_end_the_connection() {
    let network = Network::default();
    let _serving = serve(&network, Odd::sound());
    let line = Line::new(network.connect("odd"));
    let mut calls = JoinSet::new();
    for _ in 0..6_000 {
        let line = line.clone();
        calls.spawn(async move { with_payload(&line, "never", 0, Duration::from_secs(1)).await });
        tokio::task::yield_now().await; // each in a frame of its own
    }
    while let Some(answer) = calls.join_next().await {
        let status = answer.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn small_calls_whose_callers_give_up_do_not_end_the_connection() {
    let network = Network::default();
    let _serving = serve(&network, Odd::sound());
    let line = Line::new(network.connect("odd"));
    let slow = tokio::spawn({
        let line = line.clone();
        async move { try_it(&line, "slow").await }
    });
    for _ in 0..100 {
        let mut calls: Vec<_> = (0..100).map(|_| Box::pin(try_it(&line, "never"))).collect();
        for call in &mut calls {
            assert!(futures_util::poll!(call).is_pending());
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    slow.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_call_too_many_on_a_stream_is_refused_and_the_others_are_answered() {
    let network = Network::default();
    let _serving = serve(&network, Odd::sound());
    // A caller that exceeds the limit of unanswered calls.
    let (requests, receiver) = tokio::sync::mpsc::unbounded_channel();
    let channel = network.connect("odd");
    let responses = ToParticipant::open(channel, UnboundedReceiverStream::new(receiver));
    for number in 0..1_030 {
        let action = if number == 0 { "slow" } else { "never" }.to_owned();
        let context = Some(pb::BranchContext { action, ..pb::BranchContext::default() });
        let call = BranchRequest::TryBranch(pb::TryBranchRequest { context, payload: None });
        let call = BranchCall { call, may_join: false };
        requests.send(ToParticipant::request(number, 0, call)).unwrap();
    }
    let mut responses = responses.await.unwrap();
    for _ in 0..6 {
        let (number, answer) = ToParticipant::answer(responses.message().await.unwrap().unwrap());
        assert!(number >= 1_024);
        assert_eq!(answer.unwrap_err().code(), Code::ResourceExhausted);
    }
    let (number, answer) = ToParticipant::answer(responses.message().await.unwrap().unwrap());
    answer.unwrap();
    assert_eq!(number, 0);
}
