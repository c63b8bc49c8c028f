//! Databases for tests, on servers that somebody else has started.

use sqlx::{AssertSqlSafe, Connection as _};

use super::{Connection, MySqlStore, migrate};

/// Which servers: URLs without a database, separated by commas. `scripts/test` starts some, and sets it.
const SERVERS: &str = "TEST_MYSQL_SERVERS";

/// All servers to test with. None, without that variable: then there is nothing to see here.
pub(in super::super) fn servers() -> Vec<String> {
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

/// A database of its own.
pub(in super::super) struct Database {
    server: String,
    name: String,
}

impl Database {
    /// Makes one, with the tables.
    pub(in super::super) async fn new(server: &str) -> Self {
        let name = format!("handfast_test_{:016x}", rand::random::<u64>());
        let database = Self { server: server.to_owned(), name };
        database.execute(&format!("CREATE DATABASE {}", database.name)).await;
        migrate(&database.url()).await.unwrap();
        database
    }

    fn url(&self) -> String {
        format!("{}/{}", self.server, self.name)
    }

    pub(in super::super) async fn store(&self) -> MySqlStore {
        MySqlStore::open(&self.url(), true).await.unwrap()
    }

    /// A connection of nobody's.
    pub(super) async fn connect(&self) -> Connection {
        Connection::connect(&self.url()).await.unwrap()
    }

    async fn execute(&self, sql: &str) {
        let mut connection = Connection::connect(&self.server).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }

    pub(in super::super) async fn drop(self) {
        self.execute(&format!("DROP DATABASE {}", self.name)).await;
    }
}
