//! A small shop with a fence, for the tests of this crate: one shelf, on SQLite.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use handfast_proto::reason;
use serde::{Deserialize, Serialize};
use sqlx::{
    Pool, Sqlite, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions},
};

use super::Entered;
use crate::{
    Action, Answer, Branch, Contract, Failed, Fence, Json, Participant, Payload as _, Phase,
    Refusal, TryError, Tx, Xid,
};

pub(crate) const STOCK: i64 = 10;

/// What is asked for. `how` makes the shop misbehave: `refuse`, `fail`, `attention`, `long`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Deduct {
    pub(crate) quantity: i64,
    pub(crate) how: String,
}

pub(crate) struct DeductStock;

impl Contract for DeductStock {
    const NAME: &'static str = "inventory.deduct";
    type Args = Json<Deduct>;
    type Reply = Json<String>;
}

pub(crate) fn payload(quantity: i64) -> Vec<u8> {
    payload_that(quantity, "")
}

pub(crate) fn payload_that(quantity: i64, how: &str) -> Vec<u8> {
    Json(Deduct { quantity, how: how.to_owned() }).encode().unwrap().to_vec()
}

/// Branch 1 of the `n`th transaction.
pub(crate) fn branch(n: u64, phase: Phase) -> Branch {
    let xid = Xid { partition: 3, epoch: 7, sequence: n, nonce: 0x9f3c_01d2 };
    Branch::new(xid, "1".parse().unwrap(), DeductStock::NAME, phase)
}

/// Free, held, sold.
pub(crate) type Shelf = (i64, i64, i64);

pub(crate) const UNTOUCHED: Shelf = (STOCK, 0, 0);
const TRIED: Shelf = (STOCK - 2, 2, 0);
const CONFIRMED: Shelf = (STOCK - 2, 0, 2);

/// What came before, what is asked, the answer, the shelf after it, the row after it.
type Cell = (&'static [Phase], Phase, &'static str, Shelf, Option<&'static str>);

/// The fence's table, for a branch that takes two.
pub(crate) const CELLS: [Cell; 15] = {
    use Phase::{Cancel, Confirm, Try};
    [
        (&[], Try, "Done", TRIED, Some("tried")),
        (&[], Confirm, reason::NEVER_TRIED, UNTOUCHED, None),
        (&[], Cancel, "Done", UNTOUCHED, Some("suspended")),
        (&[Try], Try, "Done", TRIED, Some("tried")),
        (&[Try], Confirm, "Done", CONFIRMED, Some("confirmed")),
        (&[Try], Cancel, "Done", UNTOUCHED, Some("cancelled")),
        (&[Try, Confirm], Try, "Done", CONFIRMED, Some("confirmed")),
        (&[Try, Confirm], Confirm, "Done", CONFIRMED, Some("confirmed")),
        (&[Try, Confirm], Cancel, reason::OPPOSITE_DONE, CONFIRMED, Some("confirmed")),
        (&[Try, Cancel], Try, reason::CANCELLED_BEFORE, UNTOUCHED, Some("cancelled")),
        (&[Try, Cancel], Confirm, reason::OPPOSITE_DONE, UNTOUCHED, Some("cancelled")),
        (&[Try, Cancel], Cancel, "Done", UNTOUCHED, Some("cancelled")),
        (&[Cancel], Try, reason::CANCELLED_BEFORE, UNTOUCHED, Some("suspended")),
        (&[Cancel], Confirm, reason::OPPOSITE_DONE, UNTOUCHED, Some("suspended")),
        (&[Cancel], Cancel, "Done", UNTOUCHED, Some("suspended")),
    ]
};

/// `Done`, or the reason of a no.
pub(crate) fn word(answer: &Answer) -> &str {
    match answer {
        Answer::Done(_) => "Done",
        Answer::Refused(refusal) | Answer::TooLate(refusal) | Answer::NotServed(refusal) => {
            &refusal.reason
        }
        Answer::Unknown(_) => "Unknown",
        Answer::Retry(_) => "Retry",
        Answer::Invalid { field, .. } => field,
    }
}

/// Which of the three ways into the SDK a test takes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    Enter,
    Run,
    Action,
}

pub(crate) const LEVELS: [Level; 3] = [Level::Enter, Level::Run, Level::Action];

#[derive(Clone)]
pub(crate) struct Shop {
    pub(crate) pool: Pool<Sqlite>,
    pub(crate) fence: Fence<Sqlite>,
    /// How often the author's code ran.
    pub(crate) runs: Arc<AtomicUsize>,
    pub(crate) directory: Option<Arc<tempfile::TempDir>>,
}

impl Shop {
    /// A database file, and as many connections as a service has.
    pub(crate) async fn open() -> Self {
        Self::with_connections(8).await
    }

    pub(crate) async fn with_connections(connections: u32) -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let pool = connect(directory.path(), connections).await;
        Self::fill(pool, Some(directory)).await
    }

    /// A database that is its only connection.
    pub(crate) async fn in_memory() -> Self {
        let pool = SqlitePoolOptions::new().max_connections(1);
        Self::fill(pool.connect("sqlite::memory:").await.unwrap(), None).await
    }

    async fn fill(pool: Pool<Sqlite>, directory: Option<Arc<tempfile::TempDir>>) -> Self {
        let fence = Fence::new(pool.clone());
        fence.create_table_if_missing().await.unwrap();
        sqlx::raw_sql("CREATE TABLE shelf (free INTEGER CHECK (free >= 0), held INTEGER CHECK (held >= 0), sold INTEGER)")
            .execute(&pool)
            .await
            .unwrap();
        let shelf = "INSERT INTO shelf VALUES (?, 0, 0)";
        sqlx::query(shelf).bind(STOCK).execute(&pool).await.unwrap();
        Self { pool, fence, runs: Arc::default(), directory }
    }

    /// Another program that serves the same.
    pub(crate) async fn second_process(&self) -> Self {
        let directory = self.directory.as_ref().expect("a file");
        let pool = connect(directory.path(), 8).await;
        Self { fence: Fence::new(pool.clone()), pool, ..self.clone() }
    }

    pub(crate) fn participant(&self) -> Participant {
        Participant::builder("inventory").action(&self.fence, self.clone()).build()
    }

    /// Delivers one call at one level. The work is the same at each.
    pub(crate) async fn deliver(&self, level: Level, branch: &Branch, payload: &[u8]) -> Answer {
        match level {
            Level::Enter => {
                self.enter(branch, payload).await.unwrap_or_else(|error| match branch.phase {
                    Phase::Try => Answer::from(error),
                    Phase::Confirm | Phase::Cancel => Answer::Retry(format!("{error:?}")),
                })
            }
            Level::Run => {
                let work = async |tx: &mut Tx<Sqlite>| {
                    let kept = tx.payload().clone();
                    let reply = self.work(tx, branch.phase, &kept).await?;
                    tx.reply(reply);
                    Ok::<_, TryError>(())
                };
                self.fence.run(branch, payload, work).await
            }
            Level::Action => self.participant().handle(branch, payload).await,
        }
    }

    async fn enter(&self, branch: &Branch, payload: &[u8]) -> Result<Answer, TryError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let answer = match self.fence.enter(&mut transaction, branch, payload).await? {
            Entered::Run { payload } => {
                let reply = self.work(&mut transaction, branch.phase, &payload).await?;
                if branch.phase == Phase::Try {
                    self.fence.save_reply(&mut transaction, branch, &reply).await?;
                }
                Answer::Done(if branch.phase == Phase::Try {
                    reply.into()
                } else {
                    Default::default()
                })
            }
            Entered::Answer { answer, .. } => answer,
        };
        transaction.commit().await?;
        Ok(answer)
    }

    /// Moves goods along the shelf. Of a Try the reply says how many are left.
    async fn work(
        &self,
        connection: &mut SqliteConnection,
        phase: Phase,
        payload: &[u8],
    ) -> Result<Vec<u8>, TryError> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let Json(Deduct { quantity, how }) = Json::decode(payload).map_err(TryError::Unknown)?;
        let sql = match phase {
            Phase::Try => "UPDATE shelf SET free = free - ?1, held = held + ?1 RETURNING free",
            Phase::Confirm => "UPDATE shelf SET held = held - ?1, sold = sold + ?1 RETURNING free",
            Phase::Cancel => "UPDATE shelf SET held = held - ?1, free = free + ?1 RETURNING free",
        };
        let (left,): (i64,) =
            sqlx::query_as(sql).bind(quantity).fetch_one(&mut *connection).await?;
        match (how.as_str(), phase) {
            ("refuse", Phase::Try) => {
                Err(Refusal::new("OUT_OF_STOCK").message("none left").with("left", left).into())
            }
            ("refuse long", Phase::Try) => {
                let mut refusal = Refusal::new("OUT_OF_STOCK").message("库存不足".repeat(2000));
                for n in 0..40 {
                    refusal = refusal.with(format!("key-{n}"), "值".repeat(100));
                }
                Err(refusal.into())
            }
            ("fail", _) => Err(std::io::Error::other("the disk is on fire").into()),
            ("long", Phase::Try) => Ok(Json("x".repeat(64 * 1024)).encode().unwrap().to_vec()),
            ("end", _) => {
                // What an author might do by mistake; and what SQLite does by itself when the disk is full.
                sqlx::raw_sql("ROLLBACK").execute(connection).await?;
                Ok(Vec::new())
            }
            _ => Ok(Json(format!("{left} left")).encode().unwrap().to_vec()),
        }
    }

    pub(crate) async fn shelf(&self) -> Shelf {
        sqlx::query_as("SELECT free, held, sold FROM shelf").fetch_one(&self.pool).await.unwrap()
    }

    /// The state of branch 1 of the `n`th transaction, in words.
    pub(crate) async fn state(&self, n: u64) -> Option<String> {
        sqlx::query_scalar("SELECT state FROM handfast_fence_readable WHERE xid = ?")
            .bind(branch(n, Phase::Try).xid.to_string())
            .fetch_optional(&self.pool)
            .await
            .unwrap()
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }
}

async fn connect(directory: &Path, connections: u32) -> Pool<Sqlite> {
    let options = SqliteConnectOptions::new()
        .filename(directory.join("shop.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    SqlitePoolOptions::new().max_connections(connections).connect_with(options).await.unwrap()
}

impl Action for Shop {
    type Contract = DeductStock;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<Json<String>, TryError> {
        let reply = self.work(tx, branch.phase, &args.encode().unwrap()).await?;
        Ok(Json::decode(&reply).unwrap_or_default())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        self.phase_two(tx, branch, args).await
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        self.phase_two(tx, branch, args).await
    }
}

impl Shop {
    async fn phase_two(
        &self,
        tx: &mut Tx<Sqlite>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        if args.0.how == "attention" {
            return Err(Failed::NeedsAttention("the shelf has fallen over".to_owned()));
        }
        match self.work(tx, branch.phase, &args.encode().unwrap()).await {
            Ok(_) => Ok(()),
            Err(TryError::Unknown(error)) => Err(Failed::Retry(error)),
            Err(TryError::Refused(refusal)) => panic!("{refusal}"),
        }
    }
}
