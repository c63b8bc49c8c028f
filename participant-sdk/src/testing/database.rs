//! A SQLite database for one test.

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tempfile::TempDir;

/// A temporary SQLite database with a pool of a few connections. It is fast rather than durable, and is deleted when dropped.
/// Panics when it cannot be created, because it is only for tests.
#[derive(Debug)]
pub struct Database {
    pool: SqlitePool,
    _folder: TempDir,
}

impl Database {
    /// Creates a database and runs `schema` in it.
    ///
    /// # Panics
    ///
    /// When the database cannot be created or the schema fails.
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

    /// The connection pool.
    #[must_use]
    pub fn pool(&self) -> SqlitePool {
        self.pool.clone()
    }
}
