//! The participants: they do no work of their own, and report each Confirm to the ledger. What is left is what taking part costs: a
//! call, and a fence.

use std::{marker::PhantomData, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use handfast::{
    Action, Branch, Contract, Failed, Fence, Json, Participant, Remote, TryError, Tx,
    fence::FenceDb,
    testing::{MemoryAction, MemoryFence},
};
use handfast_tests::database;
use sqlx::{
    MySqlPool, SqlitePool,
    mysql::MySqlPoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tonic::transport::server::TcpIncoming;

use super::{
    hanging::Hanging,
    ledger::{Ledger, Name},
    options::{Place, Transport, Trys},
};

/// Connections of one participant to its database.
const POOL: u32 = 8;
/// How long what a participant has confirmed is kept in memory, and how often it looks: a fence of a benchmark must not grow for ever.
const KEPT: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(1)];

/// What is asked of a participant.
#[derive(Debug)]
pub(crate) struct Work;

impl Contract for Work {
    const NAME: &'static str = "bench.work";
    type Args = Json<u32>;
    type Reply = ();
}

struct Reports<Db> {
    ledger: Arc<Ledger>,
    db: PhantomData<fn() -> Db>,
}

impl<Db> Reports<Db> {
    fn new(ledger: &Arc<Ledger>) -> Self {
        Self { ledger: ledger.clone(), db: PhantomData }
    }

    fn confirmed(&self, branch: &Branch) {
        let number = branch.branch_id.to_string().parse().expect("1, 2, 3, …: the initiator is us");
        self.ledger.confirmed(name_of(branch.xid), number);
    }
}

/// An xid in the ledger.
pub(crate) fn name_of(xid: handfast::Xid) -> Name {
    Name::from_be_bytes(xid.to_bytes())
}

impl<Db: FenceDb> Action for Reports<Db> {
    type Contract = Work;
    type Db = Db;

    async fn on_try(&self, _: &mut Tx<Db>, _: &Branch, _: &Json<u32>) -> Result<(), TryError> {
        Ok(())
    }

    async fn on_confirm(
        &self,
        _: &mut Tx<Db>,
        branch: &Branch,
        _: &Json<u32>,
    ) -> Result<(), Failed> {
        self.confirmed(branch);
        Ok(())
    }

    async fn on_cancel(&self, _: &mut Tx<Db>, _: &Branch, _: &Json<u32>) -> Result<(), Failed> {
        Ok(())
    }
}

impl MemoryAction for Reports<()> {
    type Contract = Work;

    fn on_try(&self, _: &Branch, _: &Json<u32>) -> Result<(), TryError> {
        Ok(())
    }

    fn on_confirm(&self, branch: &Branch, _: &Json<u32>) -> Result<(), Failed> {
        self.confirmed(branch);
        Ok(())
    }

    fn on_cancel(&self, _: &Branch, _: &Json<u32>) -> Result<(), Failed> {
        Ok(())
    }
}

/// A participant that listens.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) remote: Remote,
    tasks: Vec<JoinHandle<()>>,
    database: Option<database::Database>,
}

impl Served {
    /// The `n`th. While `hangs` says so it answers no Confirm.
    pub(crate) async fn start(
        n: u16,
        fence: &Place,
        (trys, transport): (Trys, Transport),
        ledger: &Arc<Ledger>,
        folder: &Path,
        hangs: Option<watch::Receiver<bool>>,
    ) -> anyhow::Result<Self> {
        let name = format!("participant-{n}");
        let builder = Participant::builder(name.as_str());
        let (mut tasks, mut database) = (Vec::new(), None);
        let participant = match fence {
            Place::Memory => {
                let fence = MemoryFence::default().retention(KEPT[0]);
                let cleaned = fence.clone();
                tasks.push(tokio::spawn(async move {
                    loop {
                        tokio::time::sleep(KEPT[1]).await;
                        let _deleted = cleaned.clean_up();
                    }
                }));
                builder.memory_action(&fence, Reports::new(ledger)).build()
            }
            Place::Sqlite(_) => {
                let fence = Fence::new(sqlite(&folder.join(format!("{name}.db"))).await?);
                fence.create_table_if_missing().await?;
                builder.action(&fence, Reports::new(ledger)).build()
            }
            Place::MySql(server) => {
                let made = database::Database::empty(server).await;
                let fence = Fence::new(mysql(&made.url()).await?);
                fence.create_table_if_missing().await?;
                database = Some(made);
                builder.action(&fence, Reports::new(ledger)).build()
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let remote = match trys {
            Trys::Network if transport == Transport::Unary => {
                Remote::connect(&name, &url)?.without_streams()
            }
            Trys::Network => Remote::connect(&name, &url)?,
            Trys::Local => Remote::here(&participant, &url),
        };
        let mut server = tonic::transport::Server::builder();
        let router = match hangs {
            None => server.add_service(participant.into_service()),
            Some(hangs) => server.add_service(Hanging::new(participant, hangs).into_service()),
        };
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serve = router.serve_with_incoming(incoming);
        tasks.push(tokio::spawn(async move { serve.await.expect("it serves") }));
        Ok(Self { remote, tasks, database })
    }

    pub(crate) async fn stop(self) {
        for task in &self.tasks {
            task.abort();
        }
        if let Some(database) = self.database {
            database.drop().await;
        }
    }
}

/// As durable as the coordinator's own.
async fn sqlite(file: &Path) -> anyhow::Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(20));
    let pool = SqlitePoolOptions::new().max_connections(POOL).connect_with(options);
    pool.await.with_context(|| format!("cannot open {}", file.display()))
}

async fn mysql(url: &str) -> anyhow::Result<MySqlPool> {
    let pool = MySqlPoolOptions::new().max_connections(POOL).connect(url);
    pool.await.context("cannot connect for a participant's fence")
}
