//! The fence's table: its schema, and the check that the existing table fits this version.

use sqlx::Error;
use tracing::{info, warn};

use super::{Fence, db::FenceDb, tx::Tx};
use crate::error::chain;

/// The table, its index and its readable view, for SQLite: `schema/sqlite.sql`.
pub const SCHEMA_SQLITE: &str = include_str!("../../schema/sqlite.sql");
/// The same for MySQL and MariaDB: `schema/mysql.sql`.
pub const SCHEMA_MYSQL: &str = include_str!("../../schema/mysql.sql");
/// The same for PostgreSQL: `schema/postgres.sql`.
pub const SCHEMA_POSTGRES: &str = include_str!("../../schema/postgres.sql");

/// The only difference of a table that an earlier version made.
const NO_ASKS: &str = "column asks is missing";

/// The fence's table cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The database of the pool has no such table.
    #[error(
        "no table `handfast_fence` here ({database}): call `fence.create_table_if_missing()`, or run {schema_file} of crate \
         `handfast`"
    )]
    Missing {
        /// The kind of database, for the message.
        database: &'static str,
        /// The file that creates it.
        schema_file: &'static str,
    },
    /// The table exists, but does not fit this version.
    #[error(
        "table `handfast_fence` is not as this version of Handfast needs it: {differences}. Compare it with {schema_file} of \
         crate `handfast`; `fence.create_table_if_missing()` makes a new one, and adds what is new to one of an earlier version"
    )]
    Differs {
        /// The differences, in words.
        differences: String,
        /// The file with the right schema.
        schema_file: &'static str,
    },
    /// The database failed or did not respond.
    #[error("cannot look at table `handfast_fence`")]
    Database(#[from] Error),
}

impl<DB: FenceDb> Fence<DB> {
    /// Checks that the table exists with all columns and the right primary key. Call it when your program starts. Otherwise a
    /// wrong table shows only when the first call fails. A table of an earlier version may lack an index: a log line says how to
    /// add it.
    ///
    /// # Errors
    ///
    /// When the table is missing or wrong; the error says what to do. When the database does not respond.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn verify(&self) -> Result<(), TableError> {
        self.check_columns().await?;
        if !self.has_tried_index().await? {
            no_tried_index::<DB>(None);
        }
        Ok(())
    }

    async fn has_tried_index(&self) -> Result<bool, Error> {
        let mut connection = self.pool.acquire().await?;
        DB::has_tried_index(&mut connection).await
    }

    async fn check_columns(&self) -> Result<(), TableError> {
        let mut connection = self.pool.acquire().await?;
        let found = DB::columns(&mut connection).await?;
        if found.is_empty() {
            return Err(TableError::Missing { database: DB::NAME, schema_file: DB::SCHEMA_FILE });
        }
        let mut differences = Vec::new();
        for (name, kind) in DB::COLUMNS {
            match found.iter().find(|(found, ..)| found == name) {
                None => differences.push(format!("column {name} is missing")),
                Some((_, found, _)) if !found.eq_ignore_ascii_case(kind) => {
                    differences.push(format!("column {name} is {found}, not {kind}"));
                }
                Some(_) => {}
            }
        }
        // With another primary key, the fence would not find the rows of repeated calls, and MySQL would report no error.
        let in_key = |name: &str| found.iter().any(|(found, _, key)| *key && found == name);
        let key_columns = found.iter().filter(|(_, _, key)| *key).count();
        if key_columns != 2 || !in_key("xid") || !in_key("branch_id") {
            differences.push("its primary key is not (xid, branch_id)".to_owned());
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(TableError::Differs {
            differences: differences.join(", "),
            schema_file: DB::SCHEMA_FILE,
        })
    }

    /// Creates the table, its indexes and its readable view, unless the table exists. To a table of an earlier version it adds the
    /// column and the index that are missing, while other programs use the table; if it cannot add the index, a log line says so.
    /// Programs with the earlier version go on with the table. Several processes may call it at
    /// the same time. Once the table exists, a database user without the right to create tables may call it too.
    ///
    /// # Errors
    ///
    /// As [`Fence::verify`], which runs at the end.
    ///
    /// # Cancel safety
    ///
    /// The table may or may not have been created; call again.
    pub async fn create_table_if_missing(&self) -> Result<(), TableError> {
        let found = self.check_columns().await;
        let sql = match &found {
            Ok(()) => {
                self.add_tried_index().await?;
                return Ok(());
            }
            Err(TableError::Missing { .. }) => DB::SCHEMA,
            Err(TableError::Differs { differences, .. }) if differences == NO_ASKS => DB::ADD_ASKS,
            Err(TableError::Differs { .. } | TableError::Database(_)) => return found,
        };
        let mut tx = Tx::begin(&self.pool).await?;
        match DB::define(&mut tx, sql).await {
            Ok(()) => tx.commit().await?,
            Err(error) => {
                tx.rollback_after(&error).await;
                // Another process may have done the same meanwhile.
                self.check_columns().await.map_err(|_| error)?;
            }
        }
        self.add_tried_index().await?;
        Ok(())
    }

    /// Adds the index over what is tried, if it is missing. The fence works without it, so a database that does not let us add it is no
    /// error.
    async fn add_tried_index(&self) -> Result<(), Error> {
        if self.has_tried_index().await? {
            return Ok(());
        }
        let mut connection = Tx::not_begun(&self.pool).await?;
        info!("adding an index to the fence's table, for inquiries");
        if let Err(error) = DB::add_tried_index(&mut connection).await {
            no_tried_index::<DB>(Some(&error));
        }
        Ok(())
    }
}

fn no_tried_index<DB: FenceDb>(error: Option<&Error>) {
    let (error, statement) = (error.map(|error| chain(error)), DB::ADD_TRIED_INDEX);
    warn!(
        statement,
        error,
        "the fence's table has no index for inquiries, which read all of it until this statement is run"
    );
}

#[cfg(test)]
#[cfg(any(feature = "sqlite", feature = "mysql", feature = "postgres"))]
mod tests {
    use super::*;

    /// The check expects exactly the columns that the schema creates.
    fn check<DB: FenceDb>() {
        let columns: Vec<Vec<String>> = (DB::SCHEMA.lines())
            .skip_while(|line| !line.starts_with("CREATE TABLE"))
            .skip(1)
            .map(|line| line.split([' ', '(', ',']).filter(|word| !word.is_empty()))
            .map(|words| words.take(2).map(str::to_lowercase).collect())
            .take(DB::COLUMNS.len())
            .collect();
        let expected = DB::COLUMNS.map(|(name, kind)| vec![name.to_owned(), kind.to_owned()]);
        assert_eq!(columns, expected, "{}", DB::NAME);
    }

    #[test]
    #[cfg(feature = "sqlite")]
    fn sqlite() {
        check::<sqlx::Sqlite>();
    }

    #[test]
    #[cfg(feature = "mysql")]
    fn mysql() {
        use crate::fence::{LOCK_WAIT, db::Statements as _};
        check::<sqlx::MySql>();
        assert!(sqlx::MySql::BEGIN.contains(&format!("LEAST({},", LOCK_WAIT.as_secs())));
    }

    #[test]
    #[cfg(feature = "postgres")]
    fn postgres() {
        use crate::fence::{LOCK_WAIT, db::Statements as _};
        check::<sqlx::Postgres>();
        assert!(
            sqlx::Postgres::BEGIN.contains(&format!("lock_timeout = '{}s'", LOCK_WAIT.as_secs()))
        );
    }
}
