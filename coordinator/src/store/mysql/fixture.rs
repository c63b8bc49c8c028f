//! Databases for tests, on servers that are already running.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::{Connection, MySqlStore, migrate, schema::migrate_to};

/// The variable with the servers: URLs without a database, separated by commas. `scripts/test` starts servers and sets it.
const SERVERS: &str = "TEST_MYSQL_SERVERS";

/// All servers to test with. Without the variable there are none, and the tests pass without checking anything.
pub(in crate::store) fn servers() -> Vec<String> {
    let servers = std::env::var(SERVERS).unwrap_or_default();
    let servers: Vec<_> = servers
        .split(',')
        .map(str::trim)
        .filter(|url| !url.is_empty())
        .map(str::to_owned)
        .collect();
    if servers.is_empty() {
        println!("not tested: {SERVERS} names no server; scripts/test starts some");
    }
    servers
}

/// A separate database for one test.
pub(in crate::store) struct Database {
    server: String,
    name: String,
}

impl Database {
    /// Makes a database with the tables.
    pub(in crate::store) async fn new(server: &str) -> Self {
        let database = Self::empty(server).await;
        migrate(&database.url()).await.unwrap();
        database
    }

    /// Makes a database with the tables of an older version.
    pub(super) async fn of_version(server: &str, version: usize) -> Self {
        let database = Self::empty(server).await;
        migrate_to(&database.url(), version).await.unwrap();
        database
    }

    /// A database with the same name on another server, with tables.
    pub(super) async fn namesake(&self, server: &str) -> Self {
        let namesake = Self { server: server.to_owned(), name: self.name.clone() };
        namesake.execute(&format!("CREATE DATABASE {}", namesake.name)).await;
        migrate(&namesake.url()).await.unwrap();
        namesake
    }

    /// The host and port of its server.
    pub(super) fn address(&self) -> &str {
        self.server.rsplit_once('@').map_or("", |(_, address)| address)
    }

    pub(super) async fn empty(server: &str) -> Self {
        let name = format!("handfast_test_{:016x}", rand::random::<u64>());
        let database = Self { server: server.to_owned(), name };
        database.execute(&format!("CREATE DATABASE {}", database.name)).await;
        database
    }

    pub(super) fn url(&self) -> String {
        format!("{}/{}", self.server, self.name)
    }

    pub(in crate::store) async fn store(&self) -> MySqlStore {
        MySqlStore::open(&self.url(), true).await.unwrap()
    }

    /// The same database, with fewer privileges.
    pub(super) async fn store_of_a_user_who_may_only_read(&self) -> MySqlStore {
        let (_, server) = self.server.split_once('@').expect("mysql://user@host:port");
        let user = &self.name[self.name.len() - 16..];
        self.execute(&format!("CREATE USER '{user}'@'127.0.0.1' IDENTIFIED BY 'secret'")).await;
        self.execute(&format!("GRANT SELECT ON {}.* TO '{user}'@'127.0.0.1'", self.name)).await;
        let url = format!("mysql://{user}:secret@{server}/{}", self.name);
        MySqlStore::open(&url, true).await.unwrap()
    }

    /// A separate database with the present content, such as a replica that is never updated.
    pub(super) async fn copy(&self) -> Self {
        let copy = Self::new(&self.server).await;
        for table in
            ["partition", "epoch", "global_transaction", "branch", "idempotency", "resolution"]
        {
            let (from, to) = (&self.name, &copy.name);
            let sql = format!(
                "DELETE FROM {to}.`{table}`; INSERT INTO {to}.`{table}` SELECT * FROM {from}.`{table}`"
            );
            self.execute(&sql).await;
        }
        copy
    }

    /// A plain connection that belongs to no store.
    pub(super) async fn connect(&self) -> Connection {
        Connection::connect(&self.url()).await.unwrap()
    }

    /// Opens the same database through a proxy that delivers the server's answers in small pieces.
    pub(super) async fn store_with_slow_answers(&self) -> MySqlStore {
        const PIECE: usize = 64;
        const PAUSE: Duration = Duration::from_millis(1);
        let (user, server) = self.server.split_once('@').expect("mysql://user@host:port");
        let server = server.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{user}@{}/{}", listener.local_addr().unwrap(), self.name);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let upstream = TcpStream::connect(&server).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = upstream.into_split();
                tokio::spawn(async move {
                    drop(tokio::io::copy(&mut from_client, &mut to_server).await);
                });
                tokio::spawn(async move {
                    let mut piece = [0; PIECE];
                    while let Ok(bytes @ 1..) = from_server.read(&mut piece).await {
                        if to_client.write_all(&piece[..bytes]).await.is_err() {
                            break;
                        }
                        tokio::time::sleep(PAUSE).await;
                    }
                });
            }
        });
        MySqlStore::open(&url, true).await.unwrap()
    }

    pub(super) async fn execute(&self, sql: &str) {
        let mut connection = Connection::connect(&self.server).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }

    pub(in crate::store) async fn drop(self) {
        self.execute(&format!("DROP DATABASE {}", self.name)).await;
    }
}
