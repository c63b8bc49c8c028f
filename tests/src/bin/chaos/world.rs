//! The shop's services and a coordinator as processes, with a proxy in front of the coordinator, each service and the database server.

use std::{
    collections::BTreeMap,
    env,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_shop::store::Service;
use handfast_tests::{database::free_port, process::binary};
use tokio::process::Command;

use crate::{databases::Databases, life::Life, proxy::Proxy, tally::Tally};

/// All services.
pub(crate) const SERVICES: [Service; 3] = [Service::Order, Service::Inventory, Service::Points];

/// Settings of the coordinator that differ from its defaults: after an outage that ends it tries again soon, so that much happens
/// in little time.
const SETTINGS: [(&str, &str); 2] =
    [("HANDFAST_RETRY_MAX", "3s"), ("HANDFAST_SHUTDOWN_GRACE", "5s")];

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct World {
    /// All logs and stores are in it.
    pub(crate) folder: PathBuf,
    pub(crate) databases: Databases,
    pub(crate) links: Links,
    pub(crate) tally: Arc<Tally>,
    /// Time between two switches from one database server of a group to another.
    pub(crate) switch_every: Option<Duration>,
    listen: BTreeMap<Service, SocketAddr>,
    lives: AtomicUsize,
}

/// The proxies.
#[derive(Debug)]
pub(crate) struct Links {
    /// Initiators to coordinator.
    pub(crate) coordinator: Proxy,
    /// Initiators and coordinator to each service.
    pub(crate) services: BTreeMap<Service, Proxy>,
    /// Coordinator to database, services to database; `None`: there is no server.
    pub(crate) databases: Option<[Proxy; 2]>,
}

impl World {
    /// Makes databases and proxies, and starts no process.
    pub(crate) async fn make(
        store: &str,
        switch_every: Option<Duration>,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let databases = Databases::make(store, folder).await?;
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut listen = BTreeMap::new();
        let mut services = BTreeMap::new();
        for service in SERVICES {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
            listen.insert(service, address);
            services.insert(service, Proxy::new(address).await?);
        }
        let links = Links {
            coordinator: Proxy::new(nowhere).await?,
            services,
            databases: match databases.address().await? {
                Some(server) => Some([Proxy::new(server).await?, Proxy::new(server).await?]),
                None => None,
            },
        };
        Ok(Self {
            folder: folder.to_owned(),
            databases,
            links,
            tally: Arc::default(),
            switch_every,
            listen,
            lives: AtomicUsize::new(0),
        })
    }

    /// How much more time a coordinator has before the next fault if database servers are switched. A coordinator that starts after the
    /// switch has no connection to the old server, so it would show nothing.
    pub(crate) fn peace(&self) -> Duration {
        self.switch_every.unwrap_or_default() * 2
    }

    /// Starts a coordinator with these flags. `crash`: the crash point where it dies.
    pub(crate) fn coordinator(&self, flags: &[&str], crash: Option<&str>) -> anyhow::Result<Life> {
        let via = self.links.databases.as_ref().map(|[coordinator, _]| coordinator);
        let mut command = command("handfast", crash);
        command.args(["serve", "--log-format", "json", "--listen", "127.0.0.1:0"]);
        command.args(["--store", &self.databases.coordinator(via)]).args(flags).envs(SETTINGS);
        let services = self.links.services.iter();
        let services: Vec<_> = services
            .map(|(service, proxy)| format!("{service}=http://{}", proxy.address()))
            .collect();
        command.env("HANDFAST_PARTICIPANTS", services.join(","));
        Life::begin(&mut command, &self.log("coordinator"))
    }

    /// Starts a service. `crash`: the crash point where it dies.
    pub(crate) fn service(&self, service: Service, crash: Option<&str>) -> anyhow::Result<Life> {
        let via = self.links.databases.as_ref().map(|[_, services]| services);
        let mut command = command(&service.to_string(), crash);
        command
            .arg(format!("--listen={}", self.listen[&service]))
            .args(["--store", &self.databases.service(service, via).url()])
            .args(["--coordinator", &self.coordinator_url()]);
        if service == Service::Order {
            command.args(["--inventory", &self.url(Service::Inventory)]);
            command.args(["--points", &self.url(Service::Points)]);
        }
        Life::begin(&mut command, &self.log(&service.to_string()))
    }

    /// Where initiators reach the coordinator.
    pub(crate) fn coordinator_url(&self) -> String {
        format!("http://{}", self.links.coordinator.address())
    }

    /// Where everybody reaches a service.
    pub(crate) fn url(&self, service: Service) -> String {
        format!("http://{}", self.links.services[&service].address())
    }

    fn log(&self, name: &str) -> PathBuf {
        let life = self.lives.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!("{life:04}-{name}.log"))
    }
}

/// A program of ours, with nothing of this shell's settings.
fn command(program: &str, crash: Option<&str>) -> Command {
    let mut command = Command::new(binary(program));
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("HANDFAST_") {
            command.env_remove(variable);
        }
    }
    command.envs(crash.map(|crash| ("CRASH_POINT", crash)));
    command
}
