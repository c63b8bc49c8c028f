//! A SQLite database for one test.

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tempfile::TempDir;

/// A SQLite database in a temporary folder, with a pool of a few connections. Fast rather than durable; gone when it is
/// dropped. Panics when it cannot be made: it is for tests.
#[derive(Debug)]
pub struct Database {
    pool: SqlitePool,
    _folder: TempDir,
}

impl Database {
    /// A new one, in which `schema` was run.
    ///
    /// # Panics
    ///
    /// When the schema does not run.
    pub async fn new(schema: &'static str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("test.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Off);
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await
            .expect("SQLite opens it");
        sqlx::raw_sql(schema).execute(&pool).await.expect("the schema runs");
        Self { pool, _folder: folder }
    }

    /// Its pool.
    #[must_use]
    pub fn pool(&self) -> SqlitePool {
        self.pool.clone()
    }
}
