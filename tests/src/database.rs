//! Databases on servers of MySQL and MariaDB that somebody else has started.

use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use crate::process;

/// All servers to test with: what `TEST_MYSQL_SERVERS` names, URLs without a database, separated by commas. `scripts/test` starts
/// some, and sets it; without it there is nothing to see.
#[must_use]
pub fn servers() -> Vec<String> {
    let servers = std::env::var("TEST_MYSQL_SERVERS").unwrap_or_default();
    servers.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

/// A database of its own, for a coordinator's store.
#[derive(Debug)]
pub struct Database {
    server: String,
    name: String,
}

impl Database {
    /// Makes one without tables.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn empty(server: &str) -> Self {
        let name = format!("handfast_test_{:016x}", rand::random::<u64>());
        let database = Self { server: server.to_owned(), name };
        database.on_server(&format!("CREATE DATABASE {}", database.name)).await;
        database
    }

    /// Makes one with the tables.
    ///
    /// # Panics
    ///
    /// When the server, or `handfast migrate`, does not let us.
    pub async fn migrated(server: &str) -> Self {
        let database = Self::empty(server).await;
        let output = process::handfast(&["migrate", "--store", &database.url()]).await;
        assert!(output.status.success(), "{output:?}");
        database
    }

    /// As `--store` takes it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}/{}", self.server, self.name)
    }

    /// Runs SQL in it.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn execute(&self, sql: &str) {
        let mut connection = MySqlConnection::connect(&self.url()).await.expect("it is there");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("it is SQL");
    }

    /// Deletes it.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn drop(self) {
        self.on_server(&format!("DROP DATABASE {}", self.name)).await;
    }

    async fn on_server(&self, sql: &str) {
        let mut connection = MySqlConnection::connect(&self.server).await.expect("it is there");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("it lets us");
    }
}
