//! Where the data is: in SQLite files, on one server of MySQL or MariaDB, which may be ours to kill, or on a group of servers, one of
//! which is the current one. Also reads the data at the end.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use handfast_shop::store::{Service, Store, Stores};
use handfast_tests::{
    database::{Group, Kind, Server, USER},
    process,
};
use sqlx::{
    AssertSqlSafe, Connection as _, FromRow, MySqlConnection, SqliteConnection,
    mysql::MySqlRow,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use crate::proxy::Proxy;

/// How long a query of this test may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Databases {
    location: Location,
}

#[derive(Debug)]
enum Location {
    Folder(PathBuf),
    Server {
        /// `user:password` and `host:port`.
        login: (String, String),
        /// The prefix of each database's name.
        prefix: String,
        own: Option<Server>,
    },
    Group {
        group: Group,
        /// The member that new connections go to.
        current: AtomicU16,
    },
}

const NAMES: [&str; 4] = ["coordinator", "order", "inventory", "points"];
/// The prefix of database names on servers that we started.
const PREFIX: &str = "chaos_";

impl Databases {
    /// Makes the databases: `sqlite` in `folder`; `mysql`, `mariadb` or a kind of group on servers that are started in `folder`; or on
    /// the server of a URL.
    pub(crate) async fn make(store: &str, folder: &Path) -> anyhow::Result<Self> {
        let location = match store {
            group if Kind::named(group).is_some() => {
                let kind = Kind::named(group).expect("it is one");
                let group = Group::start_in(kind, folder.join("servers")).await?;
                Location::Group { group, current: AtomicU16::new(0) }
            }
            "sqlite" => return Ok(Self { location: Location::Folder(folder.to_owned()) }),
            "mysql" | "mariadb" => {
                let own = Server::start_in(store, folder.join("server")).await;
                let login = login(&own.url())?;
                Location::Server { login, prefix: PREFIX.to_owned(), own: Some(own) }
            }
            url => {
                let prefix = format!("handfast_chaos_{:08x}_", rand::random::<u32>());
                Location::Server { login: login(url)?, prefix, own: None }
            }
        };
        let databases = Self { location };
        databases.for_each_database("CREATE").await?;
        let migrated =
            process::handfast(&["migrate", "--store", &databases.coordinator(None)]).await;
        anyhow::ensure!(migrated.status.success(), "{migrated:?}");
        Ok(databases)
    }

    /// Drops the databases, if the server was there before the run.
    pub(crate) async fn drop(&self) -> anyhow::Result<()> {
        match &self.location {
            Location::Server { own: None, .. } => self.for_each_database("DROP").await,
            Location::Server { .. } | Location::Group { .. } | Location::Folder(_) => Ok(()),
        }
    }

    async fn for_each_database(&self, what: &str) -> anyhow::Result<()> {
        let Some(((who, at), prefix)) = self.login() else { return Ok(()) };
        let mut server = MySqlConnection::connect(&format!("mysql://{who}@{at}")).await?;
        for name in NAMES {
            let sql = format!("{what} DATABASE {prefix}{name}");
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut server).await?;
        }
        Ok(())
    }

    /// The login for the server that new connections go to, and the prefix of database names there.
    fn login(&self) -> Option<((String, String), &str)> {
        match &self.location {
            Location::Folder(_) => None,
            Location::Server { login, prefix, .. } => Some((login.clone(), prefix)),
            Location::Group { group, current } => {
                let at = group.address(current.load(Ordering::Relaxed)).to_string();
                Some(((USER.to_owned(), at), PREFIX))
            }
        }
    }

    /// The group of servers, and which member is the current one.
    pub(crate) fn group(&self) -> Option<(&Group, &AtomicU16)> {
        match &self.location {
            Location::Group { group, current } => Some((group, current)),
            Location::Server { .. } | Location::Folder(_) => None,
        }
    }

    /// The server that may be killed.
    pub(crate) fn own_server(&self) -> Option<&Server> {
        match &self.location {
            Location::Server { own, .. } => own.as_ref(),
            Location::Group { .. } | Location::Folder(_) => None,
        }
    }

    /// Whether there is a server at all.
    pub(crate) fn is_server(&self) -> bool {
        matches!(self.location, Location::Server { .. } | Location::Group { .. })
    }

    /// Where the server is.
    pub(crate) async fn address(&self) -> anyhow::Result<Option<SocketAddr>> {
        let Some(((_, at), _)) = self.login() else { return Ok(None) };
        let mut found = tokio::net::lookup_host(&at).await?;
        Ok(Some(found.next().with_context(|| format!("{at} is nowhere"))?))
    }

    /// The URL of the coordinator's store.
    pub(crate) fn coordinator(&self, via: Option<&Proxy>) -> String {
        self.store("coordinator", via).url()
    }

    /// The store of one service.
    pub(crate) fn service(&self, service: Service, via: Option<&Proxy>) -> Store {
        self.store(&service.to_string(), via)
    }

    /// The stores of all services.
    pub(crate) fn services(&self) -> Stores {
        Stores {
            order: self.service(Service::Order, None),
            inventory: self.service(Service::Inventory, None),
            points: self.service(Service::Points, None),
        }
    }

    fn store(&self, name: &str, via: Option<&Proxy>) -> Store {
        if let Location::Folder(folder) = &self.location {
            return Store::Sqlite(folder.join(format!("{name}.db")));
        }
        let ((who, at), prefix) = self.login().expect("a server has a login");
        let at = via.map_or(at, |proxy| proxy.address().to_string());
        // In the clear, so that the proxy knows COMMIT when it sees it.
        Store::MySql(format!("mysql://{who}@{at}/{prefix}{name}?ssl-mode=disabled"))
    }

    /// Runs a query in the database of the coordinator (`None`) or of a service.
    pub(crate) async fn rows<R>(
        &self,
        service: Option<Service>,
        sql: &'static str,
    ) -> anyhow::Result<Vec<R>>
    where
        R: for<'r> FromRow<'r, MySqlRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        let name = service.map_or_else(|| NAMES[0].to_owned(), |service| service.to_string());
        let read = async {
            match self.store(&name, None) {
                Store::Sqlite(file) => {
                    let options = SqliteConnectOptions::new().filename(file).read_only(true);
                    let mut db = SqliteConnection::connect_with(&options).await?;
                    sqlx::query_as(sql).fetch_all(&mut db).await
                }
                Store::MySql(url) => {
                    let mut db = MySqlConnection::connect(&url).await?;
                    sqlx::query_as(sql).fetch_all(&mut db).await
                }
            }
        };
        let rows = tokio::time::timeout(PATIENCE, read).await;
        rows.context("a database does not answer")?
            .with_context(|| format!("cannot read the database of {name}"))
    }
}

/// `user:password` and `host:port` of a URL.
fn login(url: &str) -> anyhow::Result<(String, String)> {
    let wrong = "--store is sqlite, mysql, mariadb, replication, galera, group-replication, or mysql://user:password@host:port";
    let rest = url.strip_prefix("mysql://").context(wrong)?;
    let authority = rest.split(['/', '?']).next().context(wrong)?;
    let (who, at) = authority.rsplit_once('@').context(wrong)?;
    Ok((who.to_owned(), at.to_owned()))
}
