//! The services on SQLite. Their text is the same for each database (see mysql.rs), and is compiled for this one here.

use std::path::Path;

pub use sqlx::Sqlite as Db;
use sqlx::{
    Connection as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions},
};

#[path = "inventory.rs"]
pub mod inventory;
#[path = "order.rs"]
pub mod order;
#[path = "points.rs"]
pub mod points;

#[path = "tables.rs"]
pub(crate) mod tables;

/// Where a database is.
pub(crate) type Place = Path;

/// Opens the database of a service.
///
/// # Errors
///
/// When it is none.
pub async fn open(file: &Path) -> sqlx::Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    // SQLite has one writer at a time. Waiting for a turn in the pool is fair; waiting for the file's lock is not.
    SqlitePoolOptions::new().max_connections(1).connect_with(options).await
}

/// Opens the database of a service that is there already.
pub(crate) async fn connect(file: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(file)).await
}

/// A database for the tests of a service.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Mutex;

    use sqlx::SqlitePool;

    #[derive(Debug)]
    pub(crate) struct Database {
        schema: &'static str,
        latest: Mutex<Option<handfast::testing::Database>>,
    }

    /// One is enough here; elsewhere there is one for each kind of server.
    pub(crate) async fn databases(schema: &'static str) -> Vec<Database> {
        vec![Database { schema, latest: Mutex::default() }]
    }

    impl Database {
        /// A new file.
        pub(crate) async fn emptied(&self) -> SqlitePool {
            let database = handfast::testing::Database::new(self.schema).await;
            let pool = database.pool();
            *self.latest.lock().unwrap() = Some(database);
            pool
        }
    }
}
