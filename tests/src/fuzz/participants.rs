//! Fuzzes all calls of a participant, with arbitrary metadata. The calls pass through the SDK's service and its context layer.
//! The action accepts all arguments that it can decode, so every refusal comes from the SDK.

use handfast::{
    Action, Branch, ContextLayer, Contract, Failed, Fence, Json, Participant, Refusal, TryError, Tx,
};
use handfast_proto::v1 as pb;
use prost::Message as _;
use sqlx::{Sqlite, SqlitePool, sqlite::SqlitePoolOptions};
use tonic::Code;
use tower::Layer as _;

use super::{Round, random::Random, wire};

pub(super) const ACTION: &str = "fuzz.deduct";
const XIDS: [&str; 4] =
    ["3-1-7-0a0b0c0d", "3-1-8-0a0b0c0d", "0-1-1-00000000", "65535-4294967295-1-ffffffff"];
const IDS: [&str; 4] = ["1", "2", "1.1", "stock"];

struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = ACTION;
    type Args = Json<i64>;
    type Reply = Json<i64>;
}

struct Willing;

impl Action for Willing {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        _: &mut Tx<Sqlite>,
        _: &Branch,
        Json(pieces): &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        if *pieces < 0 {
            return Err(Refusal::new("OUT_OF_STOCK")
                .message("too few")
                .with("wanted", pieces)
                .into());
        }
        Ok(Json(*pieces))
    }

    async fn on_confirm(
        &self,
        _: &mut Tx<Sqlite>,
        _: &Branch,
        _: &Json<i64>,
    ) -> Result<(), Failed> {
        Ok(())
    }

    async fn on_cancel(&self, _: &mut Tx<Sqlite>, _: &Branch, _: &Json<i64>) -> Result<(), Failed> {
        Ok(())
    }
}

/// Opens a participant whose fence is an in-memory SQLite database.
pub(super) async fn open() -> (Participant, Fence<Sqlite>, SqlitePool) {
    let pool = SqlitePoolOptions::new().max_connections(1).connect("sqlite::memory:").await;
    let pool = pool.expect("memory is there");
    let fence = Fence::new(pool.clone());
    fence.create_table_if_missing().await.expect("the fence");
    (Participant::builder("fuzz").action(&fence, Willing).build(), fence, pool)
}

pub(super) async fn play(round: &mut Round) {
    let (participant, _fence, _pool) = open().await;
    let mut service = ContextLayer.layer(participant.into_service());
    let xids = XIDS.map(str::to_owned);
    while round.next() {
        let (path, message) = request(&mut round.random);
        let metadata = wire::metadata(&mut round.random, &xids);
        let body = wire::frames(&mut round.random, &message);
        let call = wire::call(&mut service, path, &metadata, body);
        let Some(answered) = round.answered(path, call).await else { continue };
        round.accepted(answered.code == Code::Ok);
        wire::judge(round, path, answered.code, &answered.message);
        for frame in answered.frames.iter().filter(|_| path.ends_with("BranchStream")) {
            if let Ok(pb::BranchStreamResponse {
                answer: Some(pb::branch_stream_response::Answer::Failure(failure)),
                ..
            }) = pb::BranchStreamResponse::decode(&frame[..])
            {
                wire::judge(round, path, Code::from(failure.code), &failure.message);
            }
        }
    }
}

fn request(random: &mut Random) -> (&'static str, Vec<Vec<u8>>) {
    let (context, payload) = (context(random), payload(random));
    match random.below(8) {
        0..=2 => {
            let request = pb::TryBranchRequest { context, payload };
            ("/handfast.v1.ParticipantService/TryBranch", vec![request.encode_to_vec()])
        }
        3 | 4 => {
            let request = pb::ConfirmBranchRequest { context, payload };
            ("/handfast.v1.ParticipantService/ConfirmBranch", vec![request.encode_to_vec()])
        }
        5 => {
            let request = pb::CancelBranchRequest { context, payload };
            ("/handfast.v1.ParticipantService/CancelBranch", vec![request.encode_to_vec()])
        }
        6 => ("/handfast.v1.ParticipantService/ListActions", vec![random.some_bytes()]),
        _ => {
            let calls = (0..random.below(5)).map(|_| on_stream(random).encode_to_vec()).collect();
            ("/handfast.v1.ParticipantService/BranchStream", calls)
        }
    }
}

fn on_stream(random: &mut Random) -> pb::BranchStreamRequest {
    use pb::branch_stream_request::Call;
    let (context, payload) = (context(random), payload(random));
    let call = match random.below(4) {
        0 => Some(Call::TryBranch(pb::TryBranchRequest { context, payload })),
        1 => Some(Call::ConfirmBranch(pb::ConfirmBranchRequest { context, payload })),
        2 => Some(Call::CancelBranch(pb::CancelBranchRequest { context, payload })),
        _ => None,
    };
    pb::BranchStreamRequest {
        number: random.number().cast_unsigned(),
        timeout_millis: random.of(&[0, 0, 1, u32::MAX]),
        call,
        may_join: random.once_in(2),
    }
}

fn context(random: &mut Random) -> Option<pb::BranchContext> {
    let in_time = prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 };
    let expires_at = match random.below(6) {
        0 => None,
        1 => Some(prost_types::Timestamp {
            seconds: random.number(),
            nanos: i32::try_from(random.number()).unwrap_or(i32::MIN),
        }),
        _ => Some(in_time),
    };
    (!random.once_in(20)).then(|| pb::BranchContext {
        xid: random.text_of(&XIDS),
        branch_id: random.text_of(&IDS),
        action: random.text_of(&[ACTION]),
        attempt: random.of(&[0, 1, u32::MAX]),
        expires_at,
        labels: random.texts(),
        record: random.of(&[0, 1, 2, 3]),
    })
}

fn payload(random: &mut Random) -> Option<pb::Payload> {
    let data = match random.below(4) {
        0 => random.some_bytes(),
        1 => random.payload(&[65_536, 65_537]),
        _ => random.number().to_string().into_bytes(),
    };
    let content_type = random.text_of(&["application/json"]);
    (!random.once_in(10)).then(|| pb::Payload { data: data.into(), content_type })
}
