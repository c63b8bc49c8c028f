//! The databases of the coordinator and of the services, created for this run only. Each is an SQLite file, or a database on an
//! existing MySQL or MariaDB server.

use std::{collections::BTreeMap, path::Path, str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use handfast_shop::store::{Store, Stores, without_password};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, mysql::MySqlConnectOptions};

use super::process::{INVENTORY, NAMES, ORDER, POINTS};

/// How long the server may take to respond.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The server's URL from the command line: `mysql://user:password@host:3306`.
#[derive(Clone)]
pub(crate) struct Server(String);

/// The databases of one run.
#[derive(Debug)]
pub(crate) struct Databases {
    server: Option<Server>,
    stores: BTreeMap<&'static str, Store>,
    /// Whether databases may have been created on the server.
    made: bool,
}

impl Databases {
    /// Chooses the locations and creates nothing. [`Databases::make`] creates databases on a server; an SQLite file is created
    /// when it is first opened.
    pub(crate) fn new(server: Option<Server>, folder: &Path) -> Self {
        let run = rand::random::<u32>();
        let store = |name: &str| match &server {
            None => Store::Sqlite(folder.join(format!("{name}.db"))),
            Some(server) => {
                Store::MySql(server.database(&format!("handfast_shop_{run:08x}_{name}")))
            }
        };
        let stores = NAMES.into_iter().map(|name| (name, store(name))).collect();
        Self { server, stores, made: false }
    }

    /// The location of one database.
    pub(crate) fn store(&self, name: &str) -> &Store {
        &self.stores[name]
    }

    /// The locations of the three services' databases.
    pub(crate) fn of_services(&self) -> Stores {
        let [order, inventory, points] =
            [ORDER, INVENTORY, POINTS].map(|name| self.stores[name].clone());
        Stores { order, inventory, points }
    }

    /// Creates the databases that are on a server.
    pub(crate) async fn make(&mut self) -> anyhow::Result<()> {
        let Some(server) = &self.server else { return Ok(()) };
        let connection = server.connect().await?;
        self.made = true;
        self.each("CREATE DATABASE", connection).await
    }

    /// Drops the databases and all their data.
    pub(crate) async fn drop(&self) -> anyhow::Result<()> {
        let Some(server) = self.server.as_ref().filter(|_| self.made) else { return Ok(()) };
        self.each("DROP DATABASE IF EXISTS", server.connect().await?).await
    }

    async fn each(&self, verb: &str, mut connection: MySqlConnection) -> anyhow::Result<()> {
        for store in self.stores.values() {
            if let Store::MySql(url) = store {
                let options: MySqlConnectOptions = url.parse()?;
                let name = options.get_database().unwrap_or_default();
                let sql = AssertSqlSafe(format!("{verb} {name}")); // a name of ours
                let done = sqlx::raw_sql(sql).execute(&mut connection).await;
                done.with_context(|| format!("{verb} {name}"))?;
            }
        }
        connection.close().await?;
        Ok(())
    }
}

impl Server {
    async fn connect(&self) -> anyhow::Result<MySqlConnection> {
        let connecting = MySqlConnection::connect(&self.0);
        let shown = without_password(&self.0);
        match tokio::time::timeout(ANSWER_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(sqlx::Error::Io(error))) => bail!("cannot reach the server {shown}: {error}"),
            Ok(Err(sqlx::Error::Database(no))) => bail!("the server {shown}: {}", no.message()),
            Ok(Err(error)) => bail!("cannot talk to the server {shown}: {error}"),
            Err(_) => bail!("the server {shown} does not answer within {ANSWER_TIMEOUT:?}"),
        }
    }

    /// The URL of a database on this server.
    fn database(&self, name: &str) -> String {
        let (server, parameters) = self.0.split_once('?').unwrap_or((&self.0, ""));
        let question = if parameters.is_empty() { "" } else { "?" };
        format!("{}/{name}{question}{parameters}", server.trim_end_matches('/'))
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.starts_with("mysql://") && !text.starts_with("mariadb://") {
            return Err("a server is mysql://user:password@host:3306".to_owned());
        }
        let options: MySqlConnectOptions =
            text.parse().map_err(|error| format!("it is no URL: {error}"))?;
        if options.get_database().is_some_and(|name| !name.is_empty()) {
            return Err("name the server alone: the shop makes databases of its own there, and drops them at the end".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&without_password(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_of_a_server_keeps_what_the_url_says() {
        let url = |server: &str| server.parse::<Server>().unwrap().database("points");
        assert_eq!(url("mysql://root@127.0.0.1:3306"), "mysql://root@127.0.0.1:3306/points");
        assert_eq!(
            url("mysql://a:b@db/?ssl-mode=required"),
            "mysql://a:b@db/points?ssl-mode=required"
        );
        for wrong in ["sqlite:a.db", "mysql://root@127.0.0.1:3306/orders", "127.0.0.1"] {
            assert!(wrong.parse::<Server>().is_err(), "{wrong}");
        }
    }
}
