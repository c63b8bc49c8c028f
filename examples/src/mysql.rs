//! The services on MySQL and MariaDB. The same service code is compiled once per database (see sqlite.rs); this module compiles
//! it for MySQL. The code uses only SQL that all of these databases accept. Your own service has one database: write `Sqlite` or
//! `MySql` where the code says `Db`, and leave this module out.

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

/// Connections in each service's pool. Further calls wait for a free connection.
const CONNECTIONS: u32 = 16;
/// How long a call waits for a connection. Shorter than the call's deadline, so that the caller gets an error that names the
/// cause.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// The location of a service's database.
pub(crate) type Location = str;

/// Opens the database of a service.
///
/// # Errors
///
/// When it cannot be reached.
pub async fn open(url: &str) -> sqlx::Result<MySqlPool> {
    let pool = MySqlPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(TURN_TIMEOUT);
    pool.connect(url).await
}

/// Opens a service's database, which must exist already.
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

    /// One database on each server in TEST_MYSQL_SERVERS. `scripts/test` starts the servers and sets the variable.
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
        /// Deletes all rows and returns the same database. Creating a new database takes too long.
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
        /// Drops the database from a separate thread, because `drop` cannot await.
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
