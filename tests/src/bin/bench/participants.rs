//! The participants report each Confirm to the ledger. They do no work of their own, or only an UPDATE of one row.
//! The benchmark therefore measures the cost of taking part: a call and a fence.

use std::{collections::BTreeMap, marker::PhantomData, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use handfast::{
    Action, ActionInBatches, Branch, Contract, Failed, Fence, Handfast, Json, Participant,
    ParticipantBuilder, Remote, Tried, TryError, Tx,
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
    goods::{self, Goods, Shelves},
    hanging::Hanging,
    ledger::{Ledger, Name},
    options::{Column, Options, PhaseTwo, Record, Storage, Transport, Trys},
};

/// Pool size: database connections of one participant.
const POOL: u32 = 8;
/// Retention of the memory fence, and the interval of its clean-up. Without a clean-up the fence would grow without limit.
const KEPT: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(1)];

/// The contract of all participants.
#[derive(Debug)]
pub(crate) struct Work;

impl Contract for Work {
    const NAME: &'static str = "bench.work";
    type Args = Json<u32>;
    type Reply = ();
}

struct Reports<Db> {
    ledger: Arc<Ledger>,
    /// Kinds of goods to sell. 0: nothing is sold.
    goods: u32,
    db: PhantomData<fn() -> Db>,
}

impl<Db> Reports<Db> {
    fn new(ledger: &Arc<Ledger>, goods: u32) -> Self {
        Self { ledger: ledger.clone(), goods, db: PhantomData }
    }

    fn confirmed(&self, branch: &Branch) {
        let number = branch.branch_id.to_string().parse().expect("1, 2, 3, …: the initiator is us");
        self.ledger.confirmed(name_of(branch.xid), number);
    }
}

/// The ledger's name for an xid.
pub(crate) fn name_of(xid: handfast::Xid) -> Name {
    Name::from_be_bytes(xid.to_bytes())
}

impl<Db: Shelves> Action for Reports<Db> {
    type Contract = Work;
    type Db = Db;

    async fn on_try(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(n): &Json<u32>,
    ) -> Result<(), TryError> {
        if self.goods > 0 {
            Db::change(tx, goods::HOLD, 1, n % self.goods).await?;
        }
        Ok(())
    }

    async fn on_confirm(
        &self,
        tx: &mut Tx<Db>,
        branch: &Branch,
        Json(n): &Json<u32>,
    ) -> Result<(), Failed> {
        if self.goods > 0 {
            Db::change(tx, goods::SELL, 1, n % self.goods).await?;
        }
        self.confirmed(branch);
        Ok(())
    }

    async fn on_cancel(
        &self,
        tx: &mut Tx<Db>,
        _: &Branch,
        Json(n): &Json<u32>,
    ) -> Result<(), Failed> {
        if self.goods > 0 {
            Db::change(tx, goods::GIVE_BACK, 1, n % self.goods).await?;
        }
        Ok(())
    }
}

impl<Db: Shelves> ActionInBatches for Reports<Db> {
    async fn on_confirm_many(
        &self,
        tx: &mut Tx<Db>,
        tried: &[Tried<Json<u32>>],
    ) -> Result<(), Failed> {
        let mut pieces = BTreeMap::new();
        for Tried { args: Json(n), .. } in tried.iter().filter(|_| self.goods > 0) {
            *pieces.entry(n % self.goods).or_insert(0) += 1;
        }
        for (sku, pieces) in pieces {
            Db::change(tx, goods::SELL, pieces, sku).await?;
        }
        for Tried { branch, .. } in tried {
            self.confirmed(branch);
        }
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

/// A participant that is listening.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) remote: Remote,
    pub(crate) goods: Option<Goods>,
    tasks: Vec<JoinHandle<()>>,
    database: Option<database::Database>,
}

impl Served {
    /// Starts participant number `n`. It answers no Confirm while `hangs` is true.
    pub(crate) async fn start(
        n: u16,
        options: &Options,
        column: &Column,
        coordinator: &Handfast,
        ledger: &Arc<Ledger>,
        folder: &Path,
        hangs: Option<watch::Receiver<bool>>,
    ) -> anyhow::Result<Self> {
        let (name, phase_two) = (format!("participant-{n}"), column.phase_two);
        let builder = Participant::builder(name.as_str());
        let builder = match column.record {
            Record::Begin => builder,
            // Only a participant that asks about its branches can take part before the transaction is recorded.
            Record::Decision => builder.coordinator(coordinator),
        };
        let (mut tasks, mut database, mut goods) = (Vec::new(), None, None);
        let participant = match &options.fence {
            Storage::Memory => {
                let fence = MemoryFence::default().retention(KEPT[0]);
                let cleaned = fence.clone();
                tasks.push(tokio::spawn(async move {
                    loop {
                        tokio::time::sleep(KEPT[1]).await;
                        let _deleted = cleaned.clean_up();
                    }
                }));
                builder.memory_action(&fence, Reports::new(ledger, 0)).build()
            }
            Storage::Sqlite(_) => {
                let pool = sqlite(&folder.join(format!("{name}.db"))).await?;
                goods = Some(Goods::Sqlite(pool.clone()));
                let fence = Fence::new(pool);
                fence.create_table_if_missing().await?;
                let reports = Reports::new(ledger, options.goods);
                action(builder, phase_two, &fence, reports).build()
            }
            Storage::MySql(server) => {
                let made = database::Database::empty(server).await;
                let pool = mysql(&made.url()).await?;
                goods = Some(Goods::MySql(pool.clone()));
                let fence = Fence::new(pool);
                fence.create_table_if_missing().await?;
                database = Some(made);
                let reports = Reports::new(ledger, options.goods);
                action(builder, phase_two, &fence, reports).build()
            }
        };
        let goods = goods.filter(|_| options.goods > 0);
        if let Some(goods) = &goods {
            goods.stock_up(options.goods).await?;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let remote = match options.trys {
            Trys::Network if options.transport == Transport::Unary => {
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
        Ok(Self { remote, goods, tasks, database })
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

fn action<Db: Shelves>(
    builder: ParticipantBuilder,
    phase_two: Option<PhaseTwo>,
    fence: &Fence<Db>,
    reports: Reports<Db>,
) -> ParticipantBuilder {
    match phase_two {
        None | Some(PhaseTwo::Batches) => builder.action_in_batches(fence, reports),
        Some(PhaseTwo::OneByOne) => builder.action(fence, reports),
    }
}

/// Opens the database with the same durability settings as the coordinator's store.
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
