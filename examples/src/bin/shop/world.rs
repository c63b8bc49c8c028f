//! The processes: a coordinator and three services on free local ports, their databases, and the proxies in front of two of the
//! services. [`World::stop`] removes all of them.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use handfast::Handfast;
use handfast_shop::{
    store::{Store, Stores},
    v1::order_service_client::OrderServiceClient,
};
use tempfile::TempDir;
use tokio::{process::Command, sync::mpsc};
use tonic::transport::{Channel, Endpoint};

use super::{
    binaries::Binaries,
    databases::{Databases, Server},
    events::{Event, Events, What},
    network::Network,
    process::{COORDINATOR, INVENTORY, NAMES, ORDER, POINTS, Process},
};

/// Ports are chosen from this range. It lies below the system's range for outgoing connections, so a port stays free while its
/// process is down.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How many random ports are tried before giving up.
const PORT_ATTEMPTS_MAX: usize = 1000;

/// All processes and what they need. Fields are dropped in this order, so the folder comes last.
#[derive(Debug)]
pub(crate) struct World {
    processes: BTreeMap<&'static str, Process>,
    /// The proxies in front of inventory and points, while calls go through them.
    networks: Option<Networks>,
    addresses: BTreeMap<&'static str, SocketAddr>,
    /// All events that the processes have logged.
    pub(crate) events: Events,
    deaths: mpsc::Sender<&'static str>,
    binaries: Binaries,
    databases: Databases,
    folder: TempDir,
}

#[derive(Debug)]
pub(crate) struct Networks {
    pub(crate) inventory: Network,
    pub(crate) points: Network,
}

impl World {
    /// Creates a world in which nothing runs yet. The receiver yields the name of each process that exits unexpectedly.
    pub(crate) fn new(
        binaries: Binaries,
        server: Option<Server>,
    ) -> anyhow::Result<(Self, mpsc::Receiver<&'static str>)> {
        let folder = tempfile::Builder::new().prefix("handfast-shop-").tempdir();
        let folder = folder.context("cannot make a temporary folder (TMPDIR says where)")?;
        let (deaths, died) = mpsc::channel(NAMES.len());
        let world = Self {
            processes: BTreeMap::new(),
            networks: None,
            addresses: NAMES.into_iter().zip(free_addresses()?).collect(),
            events: Events::default(),
            deaths,
            binaries,
            databases: Databases::new(server, folder.path()),
            folder,
        };
        Ok((world, died))
    }

    /// Creates the databases, and starts all processes.
    pub(crate) async fn start(&mut self) -> anyhow::Result<()> {
        self.databases.make().await?;
        self.migrate().await?;
        self.networks = Some(Networks {
            inventory: Network::to(self.channel(INVENTORY)?, &self.events)?,
            points: Network::to(self.channel(POINTS)?, &self.events)?,
        });
        for name in NAMES {
            self.start_process(name).await?;
        }
        Ok(())
    }

    /// Sends SIGKILL to one process.
    pub(crate) async fn kill(&mut self, name: &'static str) -> anyhow::Result<()> {
        let process = self.processes.remove(name);
        process.with_context(|| format!("{name} is not running"))?.kill().await?;
        self.events.add(Event::now(What::Done(format!("{name} is killed (SIGKILL)"))));
        Ok(())
    }

    /// Restarts a killed process: same program, same address, same database.
    pub(crate) async fn start_again(&mut self, name: &'static str) -> anyhow::Result<()> {
        self.start_process(name).await?;
        self.events.add(Event::now(What::Done(format!("{name} is started again"))));
        Ok(())
    }

    /// The proxies, to schedule faults on them.
    pub(crate) fn networks(&self) -> anyhow::Result<&Networks> {
        self.networks.as_ref().context("the services are called directly now")
    }

    /// From now on the order service calls the other services directly, without the proxies, which would only cost time.
    pub(crate) async fn call_directly(&mut self) -> anyhow::Result<()> {
        if self.networks.take().is_some() {
            self.kill(ORDER).await?;
            self.start_process(ORDER).await?;
        }
        Ok(())
    }

    /// Stops all processes. The order service comes first, because it begins the transactions.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        for name in NAMES.into_iter().rev() {
            if let Some(process) = self.processes.remove(name) {
                process.kill().await?;
            }
        }
        self.databases.drop().await?;
        self.folder.close().context("cannot remove the temporary folder")
    }

    /// How a process exited, and the last lines of its log.
    pub(crate) async fn obituary(&mut self, name: &str) -> String {
        match self.processes.get_mut(name) {
            Some(process) => process.obituary().await,
            None => format!("{name} has died"),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn store(&self, name: &str) -> &Store {
        self.databases.store(name)
    }

    pub(crate) fn stores(&self) -> Stores {
        self.databases.of_services()
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://{}", self.addresses[name])
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.binaries.path(name)
    }

    /// A channel to one process. It connects on first use, and reconnects when the connection is lost.
    pub(crate) fn channel(&self, name: &str) -> anyhow::Result<Channel> {
        let endpoint = Endpoint::from_shared(self.url(name))?;
        Ok(endpoint.connect_timeout(Duration::from_secs(2)).tcp_nodelay(true).connect_lazy())
    }

    pub(crate) fn handfast(&self) -> anyhow::Result<Handfast> {
        Ok(Handfast::connect(&self.url(COORDINATOR))?)
    }

    pub(crate) fn orders(&self) -> anyhow::Result<OrderServiceClient<Channel>> {
        Ok(OrderServiceClient::new(self.channel(ORDER)?))
    }

    async fn start_process(&mut self, name: &'static str) -> anyhow::Result<()> {
        let (folder, events) = (self.folder.path(), &self.events);
        let process =
            Process::start(name, self.command(name), folder, events, &self.deaths).await?;
        self.processes.insert(name, process);
        Ok(())
    }

    /// Creates the coordinator's tables on MySQL. On SQLite the coordinator creates them itself; the services always create
    /// their own.
    async fn migrate(&self) -> anyhow::Result<()> {
        if let Store::Sqlite(_) = self.store(COORDINATOR) {
            return Ok(());
        }
        let mut migrate = clean(self.program("handfast"));
        migrate.args(["migrate", "--store", &self.store(COORDINATOR).url()]);
        let output = migrate.kill_on_drop(true).output().await?;
        if !output.status.success() {
            bail!("handfast migrate: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    fn command(&self, name: &str) -> Command {
        let store = self.store(name);
        let mut command = if name == COORDINATOR {
            let mut command = clean(self.program("handfast"));
            // The walk shows what the coordinator logs, so this level must be on.
            let log = "info,handfast_coordinator::partition=debug";
            command.args(["serve", "--log-format", "json", "--log", log]);
            // On a slow machine half a second may pass before the step that kills it before a record.
            command.env("HANDFAST_TRANSACTION_RECORD_AFTER", "30s");
            if let Store::MySql(_) = store {
                // The previous coordinator was killed by this program, so the new one need not wait to see whether it is still
                // alive.
                command.arg("--take-over=always");
            }
            command
        } else {
            let mut command = clean(self.program(name));
            command.args(["--coordinator", &self.url(COORDINATOR)]);
            command
        };
        command.args(["--store", &store.url()]);
        command.arg(format!("--listen={}", self.addresses[name]));
        if name == ORDER {
            let urls = match &self.networks {
                Some(networks) => {
                    [networks.inventory.url().to_owned(), networks.points.url().to_owned()]
                }
                None => [self.url(INVENTORY), self.url(POINTS)],
            };
            command.args(["--inventory", &urls[0], "--points", &urls[1]]);
        }
        command
    }
}

/// Clears this shell's coordinator settings, so that the demo runs the same everywhere.
fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("HANDFAST_") {
            command.env_remove(variable);
        }
    }
    command
}

/// Local addresses that are not in use.
fn free_addresses() -> anyhow::Result<Vec<SocketAddr>> {
    let mut held = Vec::new(); // until all are found, so that they differ
    for _ in 0..PORT_ATTEMPTS_MAX {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(PORTS)));
        if let Ok(listener) = TcpListener::bind(address) {
            held.push((address, listener));
        }
        if held.len() == NAMES.len() {
            return Ok(held.into_iter().map(|(address, _)| address).collect());
        }
    }
    bail!("there are no free ports between {} and {} on this machine", PORTS.start, PORTS.end)
}
