//! Fuzzes stored rows, in a real SQLite file and a real fence. A reader must report a damaged row and continue with the other rows.

use std::{sync::Arc, time::Duration};

use handfast_coordinator::store::sqlite::SqliteStore;
use handfast_proto::{Xid, v1 as pb};
use prost::Message as _;
use sqlx::{Connection as _, QueryBuilder, Sqlite, SqliteConnection, sqlite::SqliteConnectOptions};
use tonic::{Code, Request};

use super::{Round, participants, random::Random, requests::Rig, wire};

/// A value to store in a column. Its type may differ from the column's.
#[derive(Clone)]
enum Value {
    Null,
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
}

/// Usually `good`; sometimes a value of any type.
fn value(random: &mut Random, good: Value) -> Value {
    if !random.once_in(30) {
        return good;
    }
    match random.below(5) {
        0 => Value::Null,
        1 => Value::Text(random.text()),
        2 => Value::Bytes(random.some_bytes()),
        _ => Value::Int(random.number()),
    }
}

fn time(random: &mut Random) -> Value {
    let near = 1_800_000_000_000 + random.number() % 100_000;
    Value::Int(if random.once_in(6) { random.number() } else { near })
}

async fn insert(
    connection: &mut SqliteConnection,
    table: &str,
    columns: &[(&str, Value)],
) -> Result<(), sqlx::Error> {
    let names: Vec<_> = columns.iter().map(|(name, _)| *name).collect();
    let mut query = QueryBuilder::<Sqlite>::new("INSERT OR IGNORE INTO ");
    query.push(table).push(" (").push(names.join(", ")).push(") VALUES (");
    let mut values = query.separated(", ");
    for (_, value) in columns {
        match value.clone() {
            Value::Null => values.push("NULL"),
            Value::Int(value) => values.push_bind(value),
            Value::Text(value) => values.push_bind(value),
            Value::Bytes(value) => values.push_bind(value),
        };
    }
    query.push(")").build().persistent(false).execute(connection).await.map(drop)
}

/// Fuzzes the store of a whole coordinator. It loads the rows that are due by itself, and is then asked about all of them.
pub(super) async fn of_store(round: &mut Round) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("fuzz.db");
    let store = SqliteStore::open(&file).await.expect("a new store");
    let options = SqliteConnectOptions::new()
        .filename(&file)
        .busy_timeout(Duration::from_secs(20))
        .synchronous(sqlx::sqlite::SqliteSynchronous::Off);
    let mut vandal = SqliteConnection::connect_with(&options).await.expect("it opens twice");
    let rig = Rig::new(Arc::new(store)).await;
    let (mut initiators, mut operators) =
        (rig.services.for_initiators(), rig.services.for_operators());
    let mut sequence = 0;
    while round.next() {
        sequence += 1;
        let partition = u16::try_from(round.random.below(16)).expect("small");
        let xid = Xid { partition, epoch: 0, sequence, nonce: 7 };
        let mut tx = vandal.begin_with("BEGIN IMMEDIATE").await.expect("a local transaction");
        for (table, columns) in rows(&mut round.random, xid) {
            // A row that breaks a constraint of the schema is skipped.
            drop(insert(&mut tx, table, &columns).await);
        }
        tx.commit().await.expect("it commits");
        rig.clock.advance(Duration::from_millis(round.random.of(&[0, 100, 60_000])));
        let by = Some(pb::get_transaction_request::By::Xid(xid.to_string()));
        let get = pb::GetTransactionRequest { by, ..Default::default() }.encode_to_vec();
        let path = "/handfast.v1.CoordinatorService/GetTransaction";
        let body = frame(&get);
        let Some(got) = round.answered(path, wire::call(&mut initiators, path, &[], body)).await
        else {
            continue;
        };
        round.accepted(got.code == Code::Ok);
        judge(round, path, &got);
        if round.random.once_in(50) {
            let path = "/handfast.v1.AdminService/ListTransactions";
            let list = pb::ListTransactionsRequest { show: 1, limit: 20, ..Default::default() };
            let body = frame(&list.encode_to_vec());
            let list = wire::call(&mut operators, path, &[], body);
            if let Some(list) = round.answered(path, list).await {
                judge(round, path, &list);
            }
        }
    }
}

/// INTERNAL or DATA_LOSS is the right answer when the record is damaged.
fn judge(round: &mut Round, path: &str, answered: &wire::Answered) {
    if !answered.message.contains("the transaction's record is damaged") {
        wire::judge(round, path, answered.code, &answered.message);
    }
}

fn frame(message: &[u8]) -> bytes::Bytes {
    let len = u32::try_from(message.len()).expect("small").to_be_bytes();
    [&[0], &len[..], message].concat().into()
}

type Row = (&'static str, Vec<(&'static str, Value)>);

fn rows(random: &mut Random, xid: Xid) -> Vec<Row> {
    let key = || Value::Bytes(xid.to_bytes().to_vec());
    let state = 1 + i64::try_from(random.below(5)).expect("small");
    let decided = if state > 1 { time(random) } else { Value::Null };
    let finished = if state > 3 { time(random) } else { Value::Null };
    let due = if state > 3 { Value::Null } else { time(random) };
    let cause = if state == 3 || state == 5 { Value::Int(1) } else { Value::Null };
    let reason =
        if state == 3 || state == 5 { Value::Text("changed".to_owned()) } else { Value::Null };
    let labels = serde_json::to_string(&random.texts()).expect("texts become JSON");
    let (begun, expires) = (time(random), time(random));
    let drive = 1 + i64::try_from(random.below(3)).expect("small");
    let refusal = if random.once_in(6) {
        let words = "{\"reason\":\"NO\",\"domain\":\"x\",\"message\":\"\",\"metadata\":{}}";
        let mut refusal = words.as_bytes().to_vec();
        random.bend(&mut refusal);
        Value::Text(String::from_utf8_lossy(&refusal).into_owned())
    } else {
        Value::Null
    };
    let transaction = [
        ("name", Value::Text("checkout".to_owned())),
        ("drive", Value::Int(drive)),
        ("state", Value::Int(state)),
        ("labels", Value::Text(labels)),
        ("begun_at", begun),
        ("expires_at", expires),
        ("decided_at", decided),
        ("finished_at", finished),
        ("due_at", due),
        ("cancel_cause", cause),
        ("cancel_reason", reason),
        ("refusal", refusal),
    ];
    let mut damaged = |(name, good)| (name, value(random, good));
    let mut columns: Vec<_> = transaction.into_iter().map(&mut damaged).collect();
    columns.insert(0, ("xid", key()));
    let mut rows = vec![("global_transaction", columns)];
    for position in 0..random.below(4) {
        let branch = [
            ("branch_id", Value::Text((position + 1).to_string())),
            ("action", Value::Text("inventory.deduct".to_owned())),
            ("participant", Value::Text("inventory".to_owned())),
            ("target", Value::Text("http://127.0.0.1:7001".to_owned())),
            ("payload", Value::Null),
            ("payload_type", Value::Null),
            ("state", Value::Int(1)),
            ("attempts", Value::Int(random.number())),
            ("needs_attention", Value::Int(0)),
            ("due_at", time(random)),
        ];
        let mut damaged = |(name, good)| (name, value(random, good));
        let mut columns: Vec<_> = branch.into_iter().map(&mut damaged).collect();
        columns.push(("xid", key()));
        columns.push(("position", Value::Int(i64::try_from(position).expect("small"))));
        rows.push(("branch", columns));
    }
    rows
}

/// Fuzzes the fence of a participant. Each call concerns the damaged rows.
pub(super) async fn of_fence(round: &mut Round) {
    use pb::participant_service_server::ParticipantService as _;
    let (participant, fence, pool) = participants::open().await;
    let mut sequence = 0;
    while round.next() {
        sequence += 1;
        let xid = Xid { partition: 1, epoch: 1, sequence, nonce: 7 };
        let row = fence_row(&mut round.random, xid);
        let mut connection = pool.acquire().await.expect("there is one");
        drop(insert(&mut connection, "handfast_fence", &row).await);
        drop(connection);
        let seconds = round.random.of(&[4_000_000_000, 1, -1, i64::MAX]);
        let context = Some(pb::BranchContext {
            xid: xid.to_string(),
            branch_id: "1".to_owned(),
            action: participants::ACTION.to_owned(),
            attempt: 1,
            expires_at: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            labels: Default::default(),
            record: 2 - i32::from(round.random.once_in(2)),
        });
        let payload = None;
        let phase = round.random.below(3);
        let call = async {
            match phase {
                0 => {
                    let payload =
                        Some(pb::Payload { data: "1".into(), content_type: String::new() });
                    let request = pb::TryBranchRequest { context, payload };
                    participant.try_branch(Request::new(request)).await.map(drop)
                }
                1 => {
                    let request = pb::ConfirmBranchRequest { context, payload };
                    participant.confirm_branch(Request::new(request)).await.map(drop)
                }
                _ => {
                    let request = pb::CancelBranchRequest { context, payload };
                    participant.cancel_branch(Request::new(request)).await.map(drop)
                }
            }
        };
        let Some(answered) = round.answered("a branch", call).await else { continue };
        round.accepted(answered.is_ok());
        // The caller cannot repair a damaged row, so any status code is right. An error without a message is a fault.
        if answered.is_err_and(|status| status.message().is_empty()) {
            round.found("an error without a word".to_owned());
        }
        if round.random.once_in(100)
            && round.answered("clean up", fence.clean_up()).await.is_some_and(|it| it.is_err())
        {
            round.found("the clean-up stops at a damaged row".to_owned());
        }
    }
}

fn fence_row(random: &mut Random, xid: Xid) -> Vec<(&'static str, Value)> {
    let mut branch_id = vec![0; 32];
    branch_id[0] = b'1';
    let good = [
        ("state", Value::Int(1 + i64::try_from(random.below(4)).expect("small"))),
        ("action", Value::Text(participants::ACTION.to_owned())),
        ("payload", Value::Bytes(b"1".to_vec())),
        ("reply", Value::Bytes(b"1".to_vec())),
        ("digest", Value::Bytes(random.bytes(32))),
        ("expires_at", time(random)),
        ("created_at", time(random)),
        ("changed_at", time(random)),
        ("seen", Value::Int(1 + random.number().rem_euclid(3))),
    ];
    let mut row: Vec<_> =
        good.into_iter().map(|(name, good)| (name, value(random, good))).collect();
    row.push(("xid", Value::Bytes(xid.to_bytes().to_vec())));
    row.push(("branch_id", Value::Bytes(branch_id)));
    row
}
