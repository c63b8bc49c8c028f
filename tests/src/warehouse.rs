//! A participant with its own database, served on a real socket.

use std::{net::SocketAddr, path::Path, time::Duration};

use handfast::{
    Action, Branch, Contract, Failed, Fence, Json, Participant, Refusal, Remote, TryError, Tx,
};
use sqlx::{
    Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::server::TcpIncoming;

/// Initial number of pieces of each kind of goods.
pub const PIECES: i64 = 1_000_000;

/// Takes pieces out of the warehouse.
#[derive(Debug)]
pub struct Deduct;

impl Contract for Deduct {
    const NAME: &'static str = "warehouse.deduct";
    type Args = Json<i64>;
    type Reply = Json<i64>;
}

struct Stock;

impl Action for Stock {
    type Contract = Deduct;
    type Db = Sqlite;

    async fn on_try(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<Json<i64>, TryError> {
        let sql = "UPDATE stock SET free = free - ?1, held = held + ?1 WHERE free >= ?1";
        if sqlx::query(sql).bind(n).execute(&mut **tx).await?.rows_affected() == 0 {
            return Err(Refusal::new("OUT_OF_STOCK").with("wanted", n).into());
        }
        Ok(Json(sqlx::query_scalar("SELECT free FROM stock").fetch_one(&mut **tx).await?))
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sql = "UPDATE stock SET held = held - ?1, sold = sold + ?1";
        sqlx::query(sql).bind(n).execute(&mut **tx).await?;
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Sqlite>,
        _: &Branch,
        Json(n): &Json<i64>,
    ) -> Result<(), Failed> {
        let sql = "UPDATE stock SET held = held - ?1, free = free + ?1";
        sqlx::query(sql).bind(n).execute(&mut **tx).await?;
        Ok(())
    }
}

/// A warehouse that is being served, with its database.
#[derive(Debug)]
pub struct Warehouse {
    name: &'static str,
    /// The participant that answers calls.
    pub participant: Participant,
    /// The warehouse's database.
    pub db: SqlitePool,
    /// The address where the warehouse listens.
    pub address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Warehouse {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Warehouse {
    /// Opens a warehouse with this participant name. Its database is a file in `folder`.
    ///
    /// # Panics
    ///
    /// If the database cannot be opened, or the socket cannot be bound.
    pub async fn open(name: &'static str, folder: &Path) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(folder.join(format!("{name}.db")))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(Duration::from_secs(20));
        let db = SqlitePool::connect_with(options).await.expect("a database");
        let schema = "CREATE TABLE stock (free INTEGER NOT NULL, held INTEGER NOT NULL, sold INTEGER NOT NULL)";
        sqlx::raw_sql(schema).execute(&db).await.expect("the schema runs");
        sqlx::query("INSERT INTO stock VALUES (?, 0, 0)")
            .bind(PIECES)
            .execute(&db)
            .await
            .expect("a row");
        let fence = Fence::new(db.clone());
        fence.create_table_if_missing().await.expect("the fence");
        let participant = Participant::builder(name).action(&fence, Stock).build();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = tonic::transport::Server::builder()
            .add_service(participant.clone().into_service())
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
        let server = tokio::spawn(async move { server.await.expect("it serves") });
        Self { name, participant, db, address, server }
    }

    /// The warehouse's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The warehouse as initiators address it.
    ///
    /// # Panics
    ///
    /// Never: the address is valid.
    #[must_use]
    pub fn remote(&self) -> Remote {
        Remote::connect(self.name, &self.url()).expect("an address")
    }

    /// Numbers of free, held and sold pieces.
    ///
    /// # Panics
    ///
    /// If the database cannot be read.
    pub async fn stock(&self) -> (i64, i64, i64) {
        sqlx::query_as("SELECT free, held, sold FROM stock")
            .fetch_one(&self.db)
            .await
            .expect("a row")
    }
}
