//! The services on MySQL and MariaDB. Their text is the same for each database (see sqlite.rs): it keeps to SQL that all of them
//! know, and is compiled for this one here. A service of your own has one database, says `Sqlite` or `MySql` where those say `Db`,
//! and needs none of this.

use std::time::Duration;

pub use sqlx::MySql as Db;
use sqlx::{Connection as _, MySqlConnection, MySqlPool, mysql::MySqlPoolOptions};

#[path = "inventory.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
pub mod inventory;
#[path = "order.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
pub mod order;
#[path = "points.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
pub mod points;

#[path = "tables.rs"]
#[allow(clippy::duplicate_mod, reason = "one text, compiled for each database")]
pub(crate) mod tables;

/// Connections of one service: more calls than these wait for their turn.
const CONNECTIONS: u32 = 16;
/// How long. Less than the deadline of a call, so that who waits hears why.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a database is.
pub(crate) type Place = str;

/// Opens the database of a service.
///
/// # Errors
///
/// When it cannot be reached.
pub async fn open(url: &str) -> sqlx::Result<MySqlPool> {
    let pool = MySqlPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(TURN_TIMEOUT);
    pool.connect(url).await
}

/// Opens the database of a service that is there already.
pub(crate) async fn connect(url: &str) -> sqlx::Result<MySqlConnection> {
    MySqlConnection::connect(url).await
}

/// Databases for the tests of a service.
#[cfg(test)]
pub(crate) mod testing {
    use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, MySqlPool};

    #[derive(Debug)]
    pub(crate) struct Database {
        server: String,
        name: String,
        pool: MySqlPool,
    }

    /// One on each server that TEST_MYSQL_SERVERS names: `scripts/test` starts some, and sets it.
    pub(crate) async fn databases(schema: &'static str) -> Vec<Database> {
        let servers = std::env::var("TEST_MYSQL_SERVERS").unwrap_or_default();
        let mut databases = Vec::new();
        for server in servers.split(',').map(str::trim).filter(|url| !url.is_empty()) {
            let (server, name) =
                (server.to_owned(), format!("handfast_test_{:016x}", rand::random::<u64>()));
            execute(&server, &format!("CREATE DATABASE {name}")).await;
            let pool = super::open(&format!("{server}/{name}")).await.unwrap();
            sqlx::raw_sql(schema).execute(&pool).await.unwrap();
            databases.push(Database { server, name, pool });
        }
        databases
    }

    async fn execute(url: &str, sql: &str) {
        let mut connection = MySqlConnection::connect(url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }

    impl Database {
        /// The same database, without a row: to make a new one takes too long.
        pub(crate) async fn emptied(&self) -> MySqlPool {
            let mut connection = self.pool.acquire().await.unwrap();
            let tables: Vec<String> = sqlx::query_scalar(
                "SELECT table_name AS name FROM information_schema.tables \
                 WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'",
            )
            .fetch_all(&mut *connection)
            .await
            .unwrap();
            let deletes: String =
                tables.iter().map(|table| format!("DELETE FROM {table}; ")).collect();
            let sql = format!(
                "SET foreign_key_checks = 0; BEGIN; {deletes} COMMIT; SET foreign_key_checks = 1"
            );
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await.unwrap();
            self.pool.clone()
        }
    }

    impl Drop for Database {
        /// From a thread of its own: what is dropped cannot wait.
        fn drop(&mut self) {
            let (server, sql) = (self.server.clone(), format!("DROP DATABASE {}", self.name));
            let dropped = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.unwrap().block_on(execute(&server, &sql));
            });
            dropped.join().unwrap();
        }
    }
}
