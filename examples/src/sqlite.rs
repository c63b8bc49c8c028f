//! The services on SQLite. The same service code is compiled once per database (see mysql.rs); this module compiles it for
//! SQLite.

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

/// The location of a service's database.
pub(crate) type Location = Path;

/// Opens the database of a service.
///
/// # Errors
///
/// When the file cannot be opened as a database.
pub async fn open(file: &Path) -> sqlx::Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    // SQLite has one writer at a time. The pool serves waiters in order; SQLite's file lock does not.
    SqlitePoolOptions::new().max_connections(1).connect_with(options).await
}

/// Opens a service's database, which must exist already.
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

    /// Returns one database. The server modules return one for each server.
    pub(crate) async fn databases(schema: &'static str) -> Vec<Database> {
        vec![Database { schema, latest: Mutex::default() }]
    }

    impl Database {
        /// Creates a new, empty database file.
        pub(crate) async fn emptied(&self) -> SqlitePool {
            let database = handfast::testing::Database::new(self.schema).await;
            let pool = database.pool();
            *self.latest.lock().unwrap() = Some(database);
            pool
        }
    }
}
