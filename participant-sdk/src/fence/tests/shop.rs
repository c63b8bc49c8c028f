//! A small shop with a fence, for the tests of this crate. It has one shelf. The code is compiled for each database.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sqlx::{AssertSqlSafe, Pool};

use super::{BEGIN, Db, Home, sql};
use crate::{
    Action, ActionInBatches, Answer, Branch, Failed, Fence, Json, Participant, Payload as _, Phase,
    Refusal, Tried, TryError, Tx,
    fence::{
        Entered,
        fixture::{Deduct, DeductStock, Level, STOCK, Shelf, branch},
    },
    participant::batches::in_sequence,
};

type Connection = <Db as sqlx::Database>::Connection;

#[derive(Clone)]
pub(crate) struct Shop {
    pub(crate) pool: Pool<Db>,
    pub(crate) fence: Fence<Db>,
    /// How often the author's code ran.
    pub(crate) runs: Arc<AtomicUsize>,
    /// How often the author's code ran for a batch.
    pub(crate) batches: Arc<AtomicUsize>,
    /// The shop's database. `None`: the database lives in the only connection.
    pub(crate) home: Option<Home>,
}

impl Shop {
    /// Opens a shop in a database that is empty, or was used by another test.
    pub(crate) async fn open(pool: Pool<Db>, home: Option<Home>) -> Self {
        let fence = Fence::new(pool.clone());
        fence.create_table_if_missing().await.unwrap();
        let shelf = "CREATE TABLE IF NOT EXISTS shelf (free BIGINT CHECK (free >= 0), held BIGINT CHECK (held >= 0), sold BIGINT)";
        sqlx::raw_sql(shelf).execute(&pool).await.unwrap();
        let shelf = format!(
            "DELETE FROM handfast_fence; DELETE FROM shelf; INSERT INTO shelf VALUES ({STOCK}, 0, 0)"
        );
        sqlx::raw_sql(AssertSqlSafe(shelf)).execute(&pool).await.unwrap();
        Self { pool, fence, runs: Arc::default(), batches: Arc::default(), home }
    }

    /// A second process that serves the same shop.
    pub(crate) async fn second_process(&self) -> Self {
        let pool = self.home.as_ref().expect("a database of its own").connect(8).await;
        Self { fence: Fence::new(pool.clone()), pool, ..self.clone() }
    }

    pub(crate) fn participant(&self) -> Participant {
        Participant::builder("inventory").action(&self.fence, self.clone()).build()
    }

    /// The shop's participant, with batches.
    pub(crate) fn participant_in_batches(&self) -> Participant {
        Participant::builder("inventory").action_in_batches(&self.fence, self.clone()).build()
    }

    /// Delivers one call through this level of the SDK. The work is the same at each level.
    pub(crate) async fn deliver(&self, level: Level, branch: &Branch, payload: &[u8]) -> Answer {
        match level {
            Level::Enter => {
                self.enter(branch, payload).await.unwrap_or_else(|error| match branch.phase {
                    Phase::Try => Answer::from(error),
                    Phase::Confirm | Phase::Cancel => Answer::Retry(format!("{error:?}")),
                })
            }
            Level::Run => {
                let work = async |tx: &mut Tx<Db>| {
                    let kept = tx.payload().clone();
                    let reply = self.work(tx, branch.phase, &kept).await?;
                    tx.reply(reply);
                    Ok::<_, TryError>(())
                };
                self.fence.run(branch, payload, work).await
            }
            Level::Action => self.participant().handle(branch, payload).await,
            Level::Batch if branch.phase == Phase::Try => {
                self.participant_in_batches().handle(branch, payload).await
            }
            Level::Batch => self.together(std::slice::from_ref(branch)).await.remove(0),
        }
    }

    /// Delivers Confirms or Cancels as if they had waited together.
    pub(crate) async fn together(&self, branches: &[Branch]) -> Vec<Answer> {
        self.participant_in_batches().handle_together(branches).await
    }

    async fn enter(&self, branch: &Branch, payload: &[u8]) -> Result<Answer, TryError> {
        let mut transaction = self.pool.begin_with(BEGIN).await?;
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

    /// Moves pieces on the shelf. The reply of a Try is the number of free pieces.
    async fn work(
        &self,
        connection: &mut Connection,
        phase: Phase,
        payload: &[u8],
    ) -> Result<Vec<u8>, TryError> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let Json(Deduct { quantity, how }) = Json::decode(payload).map_err(TryError::Unknown)?;
        let (from, to) = match phase {
            Phase::Try => ("free", "held"),
            Phase::Confirm => ("held", "sold"),
            Phase::Cancel => ("held", "free"),
        };
        let sql = "UPDATE shelf SET {from} = {from} - {n}, {to} = {to} + {n}";
        let sql =
            sql.replace("{from}", from).replace("{to}", to).replace("{n}", &quantity.to_string());
        sqlx::query(AssertSqlSafe(sql)).execute(&mut *connection).await?;
        let left: i64 =
            sqlx::query_scalar("SELECT free FROM shelf").fetch_one(&mut *connection).await?;
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
            ("panic", Phase::Confirm | Phase::Cancel) => panic!("as planned"),
            ("end", _) => {
                // A mistake that an author might make. SQLite does the same by itself when the disk is full.
                sqlx::raw_sql("ROLLBACK").execute(connection).await?;
                Ok(Vec::new())
            }
            _ => Ok(Json(format!("{left} left")).encode().unwrap().to_vec()),
        }
    }

    pub(crate) async fn shelf(&self) -> Shelf {
        sqlx::query_as("SELECT free, held, sold FROM shelf").fetch_one(&self.pool).await.unwrap()
    }

    /// The recorded state of branch 1 of the `n`th transaction.
    pub(crate) async fn state(&self, n: u64) -> Option<String> {
        sqlx::query_scalar(sql("SELECT state FROM handfast_fence_readable WHERE xid = ?"))
            .bind(branch(n, Phase::Try).xid.to_string())
            .fetch_optional(&self.pool)
            .await
            .unwrap()
    }

    /// Replaces the payload that the `n`th transaction's Try has stored for Confirm and Cancel.
    pub(crate) async fn change_payload(&self, n: u64, payload: Vec<u8>) {
        let change = sqlx::query(sql("UPDATE handfast_fence SET payload = ? WHERE xid = ?"));
        let xid = branch(n, Phase::Try).xid.to_bytes();
        let changed = change.bind(payload).bind(&xid[..]).execute(&self.pool).await.unwrap();
        assert_eq!(changed.rows_affected(), 1);
    }

    pub(crate) fn batches(&self) -> usize {
        self.batches.load(Ordering::SeqCst)
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }
}

impl Action for Shop {
    type Contract = DeductStock;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<Json<String>, TryError> {
        let reply = self.work(tx, branch.phase, &args.encode().unwrap()).await?;
        Ok(Json::decode(&reply).unwrap_or_default())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        self.phase_two(tx, branch, args).await
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Db>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        self.phase_two(tx, branch, args).await
    }
}

impl ActionInBatches for Shop {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<Deduct>>],
    ) -> Result<(), Failed> {
        self.batches.fetch_add(1, Ordering::SeqCst);
        in_sequence(self, tx, tried).await
    }
}

impl Shop {
    async fn phase_two(
        &self,
        tx: &mut Tx<Db>,
        branch: &Branch,
        args: &Json<Deduct>,
    ) -> Result<(), Failed> {
        if args.0.how == "attention" {
            return Err(Failed::NeedsAttention("the shelf has fallen over".to_owned()));
        }
        if args.0.how == "hang" {
            self.runs.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        match self.work(tx, branch.phase, &args.encode().unwrap()).await {
            Ok(_) => Ok(()),
            Err(TryError::Unknown(error)) => Err(Failed::Retry(error)),
            Err(TryError::Refused(refusal)) => panic!("{refusal}"),
        }
    }
}
