//! The tables and their version. Only `migrate` changes them. A coordinator checks the version when it starts, and refuses one
//! that it does not know.

use sqlx::{AssertSqlSafe, Connection as _};

use super::{
    Addresses, Connection,
    home::Home,
    server::{OpenError, SchemaError},
};

/// The steps from each version to the next, oldest first. A released step never changes. A step that was killed half-way is run
/// again, so it must be repeatable: it makes only what is missing.
const MIGRATIONS: [&str; 3] =
    [include_str!("schema.sql"), include_str!("schema-2.sql"), include_str!("schema-3.sql")];
const VERSION: usize = MIGRATIONS.len();

/// How long a migration waits for a concurrent one.
const MIGRATION_WAIT_SECONDS: u32 = 60;

/// The table that records which steps were done.
const VERSIONS: &str = "CREATE TABLE IF NOT EXISTS handfast_schema (
    version    INT NOT NULL PRIMARY KEY COMMENT 'of the tables of this coordinator, after this step',
    applied_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP COMMENT 'when',
    program    VARCHAR(64) NOT NULL COMMENT 'which version of the program has done it'
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'steps of handfast migrate'";

/// Checks that the tables have this program's version.
pub(super) async fn check(connection: &mut Connection) -> Result<(), OpenError> {
    let found = found(connection).await?;
    if found > VERSION {
        return Err(SchemaError::Newer { found, known: VERSION }.into());
    }
    if found < VERSION {
        return Err(SchemaError::Older { found, needed: VERSION }.into());
    }
    Ok(())
}

async fn found(connection: &mut Connection) -> Result<usize, sqlx::Error> {
    let there: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'handfast_schema'",
    )
    .fetch_one(&mut *connection)
    .await?;
    if there == 0 {
        return Ok(0);
    }
    let version: Option<i64> =
        sqlx::query_scalar("SELECT CAST(MAX(version) AS SIGNED) FROM handfast_schema")
            .fetch_one(connection)
            .await?;
    Ok(version.and_then(|version| usize::try_from(version).ok()).unwrap_or(0))
}

/// The SQL that [`migrate`] would run, step by step. Empty if there is nothing to do.
///
/// # Errors
///
/// See [`OpenError`].
pub async fn pending(url: &str) -> Result<Vec<&'static str>, OpenError> {
    let mut connection = Home::of(Addresses::parse(url)?).connect_once().await?;
    let found = found(&mut connection).await?;
    drop(connection.close().await);
    if found > VERSION {
        return Err(SchemaError::Newer { found, known: VERSION }.into());
    }
    Ok(MIGRATIONS[found..].to_vec())
}

/// Makes the tables, or migrates them to this program's version. Returns the version before and after. A repeat does nothing.
/// Concurrent calls wait for each other.
///
/// # Errors
///
/// See [`OpenError`]. Finished steps stay, and the next run continues after them.
pub async fn migrate(url: &str) -> Result<(usize, usize), OpenError> {
    migrate_to(url, VERSION).await
}

pub(super) async fn migrate_to(url: &str, version: usize) -> Result<(usize, usize), OpenError> {
    let mut connection = Home::of(Addresses::parse(url)?).connect_once().await?;
    // The name of a lock has at most 64 characters, like that of a database.
    let locked: Option<i64> = sqlx::query_scalar(
        "SELECT CAST(GET_LOCK(CONCAT('handfast_', LEFT(SHA2(DATABASE(), 256), 32)), ?) AS SIGNED)",
    )
    .bind(MIGRATION_WAIT_SECONDS)
    .fetch_one(&mut connection)
    .await?;
    if locked != Some(1) {
        return Err(SchemaError::Busy { waited_seconds: MIGRATION_WAIT_SECONDS }.into());
    }
    let from = found(&mut connection).await?;
    if from > VERSION {
        return Err(SchemaError::Newer { found: from, known: VERSION }.into());
    }
    sqlx::raw_sql(VERSIONS).execute(&mut connection).await?;
    for (n, sql) in MIGRATIONS.iter().enumerate().take(version).skip(from) {
        sqlx::raw_sql(AssertSqlSafe(*sql)).execute(&mut connection).await?;
        sqlx::query("INSERT INTO handfast_schema (version, program) VALUES (?, ?)")
            .bind(i64::try_from(n + 1).unwrap_or(i64::MAX))
            .bind(env!("CARGO_PKG_VERSION"))
            .execute(&mut connection)
            .await?;
    }
    drop(connection.close().await); // and with it the lock
    Ok((from, version.max(from)))
}
