//! The processes and databases of one run: a store, a coordinator and participants. Each run gets new ones.

use std::sync::Arc;

use anyhow::Context as _;
use handfast::Handfast;
use handfast_tests::database::Database;
use tempfile::TempDir;
use tokio::sync::watch;

use super::{
    coordinator::{Coordinator, Recorded},
    dtm::{self, DtmParticipant},
    initiator::{Initiator, SdkInitiator},
    ledger::Ledger,
    meter::Server,
    options::{Column, Load, Options, Storage, Subject, Transport},
    participants::Served,
};

pub(crate) struct World {
    /// `None` when another server is measured.
    pub(crate) coordinator: Option<Coordinator>,
    /// Process id of the measured server, if known.
    pub(crate) pid: Option<u32>,
    pub(crate) ledger: Arc<Ledger>,
    /// Each initiator has its own connection.
    pub(crate) initiators: Vec<Initiator>,
    /// The initiator whose transactions need the participant that may hang.
    pub(crate) hindered: Option<Initiator>,
    /// Tells that participant whether to hang.
    pub(crate) hangs: watch::Sender<bool>,
    /// The store's database server.
    pub(crate) server: Option<Server>,
    participants: Vec<Served>,
    peer: Option<DtmParticipant>,
    database: Option<Database>,
    folder: TempDir,
}

impl World {
    pub(crate) async fn start(options: &Options, column: &Column) -> anyhow::Result<Self> {
        match &column.subject {
            Subject::Handfast(store) => Self::ours(options, column, store).await,
            Subject::Dtm { url, pid, store } => Self::theirs(column, url, *pid, store).await,
        }
    }

    async fn theirs(
        column: &Column,
        url: &str,
        pid: Option<u32>,
        store: &Storage,
    ) -> anyhow::Result<Self> {
        let ledger = Arc::new(Ledger::new());
        let (initiator, peer) = dtm::start(url, column.branches, ledger.clone()).await?;
        let server = match store {
            Storage::MySql(url) => Some(Server::connect(url).await?),
            Storage::Memory | Storage::Sqlite(_) => None,
        };
        Ok(Self {
            coordinator: None,
            pid,
            ledger,
            initiators: vec![Initiator::Dtm(Arc::new(initiator))],
            hindered: None,
            hangs: watch::Sender::new(false),
            server,
            participants: Vec::new(),
            peer: Some(peer),
            database: None,
            folder: tempfile::tempdir()?,
        })
    }

    async fn ours(options: &Options, column: &Column, store: &Storage) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("handfast-bench-").tempdir()?;
        let (mut server, mut database) = (None, None);
        let store = match store {
            Storage::Memory => "memory:".to_owned(),
            Storage::Sqlite(None) => format!("sqlite:{}", folder.path().join("store.db").display()),
            Storage::Sqlite(Some(path)) => {
                let none = !std::path::Path::new(path).exists();
                anyhow::ensure!(none, "{path} is there already; the store must be new");
                format!("sqlite:{path}")
            }
            Storage::MySql(url) => {
                server = Some(Server::connect(url).await?);
                database.insert(Database::migrated(url).await).url()
            }
        };
        let settings = settings(options, column);
        let coordinator =
            Coordinator::start(&store, &settings, &options.log, folder.path()).await?;

        let ledger = Arc::new(Ledger::new());
        let handfast = Handfast::connect(&coordinator.url)?;
        let (hangs, hanging) = watch::channel(false);
        let mut participants = Vec::new();
        for n in 0..=column.branches {
            // One participant more than there are branches. The last one may hang; some transactions use it instead of the first.
            let hanging = (n == column.branches).then(|| hanging.clone());
            let folder = folder.path();
            let served =
                Served::start(n, options, column, &handfast, &ledger, folder, hanging).await;
            participants.push(served.context("a participant cannot be started")?);
        }
        let remotes: Vec<_> = participants.iter().map(|served| served.remote.clone()).collect();
        let initiator = |remotes: &[handfast::Remote]| {
            let handfast = Handfast::connect(&coordinator.url)?;
            let handfast = match options.transport {
                Transport::Stream => handfast,
                Transport::Unary => handfast.without_streams(),
            };
            anyhow::Ok(Initiator::Sdk(SdkInitiator {
                handfast,
                remotes: remotes.into(),
                ledger: ledger.clone(),
                drive: options.drive,
                record: column.record,
                orders: Arc::default(),
            }))
        };
        let initiators = (0..options.connections)
            .map(|_| initiator(&remotes[..column.branches.into()]))
            .collect::<anyhow::Result<_>>()?;
        let hindered = Some(initiator(&remotes[1..])?);
        Ok(Self {
            pid: Some(coordinator.pid),
            coordinator: Some(coordinator),
            ledger,
            initiators,
            hindered,
            hangs,
            server,
            participants,
            peer: None,
            database,
            folder,
        })
    }

    /// Pieces sold by all participants together. `None` if they sell nothing.
    pub(crate) async fn sold(&self, goods: u32) -> anyhow::Result<Option<i64>> {
        let mut all = None;
        for goods_of_one in self.participants.iter().filter_map(|served| served.goods.as_ref()) {
            *all.get_or_insert(0) += goods_of_one.sold(goods).await?;
        }
        Ok(all)
    }

    /// Stops everything in order and returns the coordinator's totals.
    pub(crate) async fn stop(self, keep: bool) -> anyhow::Result<Option<Recorded>> {
        let recorded = match self.coordinator {
            Some(coordinator) => coordinator.stop().await.map(Some),
            None => Ok(None),
        };
        drop(self.peer);
        for participant in self.participants {
            participant.stop().await;
        }
        if let Some(database) = self.database {
            database.drop().await;
        }
        if keep {
            eprintln!("kept: {}", self.folder.keep().display());
        }
        recorded
    }
}

/// The coordinator's configuration keys, in addition to its flags.
fn settings(options: &Options, column: &Column) -> Vec<(String, String)> {
    let mut settings = vec![("retention".to_owned(), options.retention.to_string())];
    if options.transport == Transport::Unary {
        settings.push(("calls.streams".to_owned(), "false".to_owned()));
    }
    if *column.subject.store() == Storage::Memory {
        settings.push(("store_unsafe".to_owned(), "true".to_owned()));
    }
    if let Load::Held(held) = column.load {
        settings.push(("limits.open".to_owned(), (held + 1000).to_string()));
    }
    settings.extend(options.setting.iter().cloned());
    settings
}
