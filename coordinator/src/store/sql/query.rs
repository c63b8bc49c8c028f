//! Statements with values, and how each database runs them.

use handfast_proto::Xid;
use sqlx::{
    Arguments as _, AssertSqlSafe, Database, Encode, Executor, FromRow, IntoArguments, Type,
    database::HasStatementCache, mysql::MySqlRow, sqlite::SqliteRow,
};

use crate::transaction::Timestamp;

/// A statement and the values of its `?` placeholders.
#[derive(Debug)]
pub(in crate::store) struct Query {
    pub(in crate::store) sql: String,
    pub(in crate::store) values: Vec<Cell>,
    /// Whether the connection keeps the statement prepared. That does not pay for a text whose length varies.
    pub(in crate::store) persistent: bool,
}

impl Query {
    pub(in crate::store) fn new(sql: &str) -> Self {
        Self { sql: sql.to_owned(), values: Vec::new(), persistent: true }
    }

    /// Adds the value of the next `?` in the text.
    pub(in crate::store) fn bind(mut self, value: impl Into<Cell>) -> Self {
        self.values.push(value.into());
        self
    }

    pub(in crate::store) fn push(&mut self, sql: &str) -> &mut Self {
        self.sql.push_str(sql);
        self
    }

    /// Adds a `?` and its value.
    pub(in crate::store) fn push_bind(&mut self, value: impl Into<Cell>) -> &mut Self {
        self.sql.push('?');
        self.values.push(value.into());
        self
    }

    /// Adds `?, ?, …)` and the values.
    pub(in crate::store) fn push_list(
        &mut self,
        values: impl IntoIterator<Item = impl Into<Cell>>,
    ) {
        for (n, value) in values.into_iter().enumerate() {
            self.push(if n == 0 { "" } else { ", " }).push_bind(value);
        }
        self.push(")");
    }
}

/// [`Dialect::fetch`] for any database whose types sqlx can convert.
pub(in crate::store) async fn fetch<Db, T>(
    connection: &mut Db::Connection,
    Query { sql, values, persistent }: Query,
) -> Result<Vec<T>, sqlx::Error>
where
    Db: Database<Arguments: IntoArguments<Db>> + HasStatementCache,
    for<'c> &'c mut Db::Connection: Executor<'c, Database = Db>,
    T: for<'r> FromRow<'r, Db::Row> + Send + Unpin,
    Option<i64>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<String>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<Vec<u8>>: for<'q> Encode<'q, Db> + Type<Db>,
{
    let query = sqlx::query_as_with(AssertSqlSafe(sql), arguments::<Db>(values)?);
    query.persistent(persistent).fetch_all(connection).await
}

/// [`Dialect::execute`] for any database whose types sqlx can convert.
pub(in crate::store) async fn execute<Db>(
    connection: &mut Db::Connection,
    Query { sql, values, persistent }: Query,
) -> Result<Db::QueryResult, sqlx::Error>
where
    Db: Database<Arguments: IntoArguments<Db>> + HasStatementCache,
    for<'c> &'c mut Db::Connection: Executor<'c, Database = Db>,
    Option<i64>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<String>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<Vec<u8>>: for<'q> Encode<'q, Db> + Type<Db>,
{
    let query = sqlx::query_with(AssertSqlSafe(sql), arguments::<Db>(values)?);
    query.persistent(persistent).execute(connection).await
}

/// The values in the database's own form.
fn arguments<Db: Database>(values: Vec<Cell>) -> Result<Db::Arguments, sqlx::Error>
where
    Option<i64>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<String>: for<'q> Encode<'q, Db> + Type<Db>,
    Option<Vec<u8>>: for<'q> Encode<'q, Db> + Type<Db>,
{
    let mut arguments = Db::Arguments::default();
    for value in values {
        let added = match value {
            Cell::Int(value) => arguments.add(value),
            Cell::Text(value) => arguments.add(value),
            Cell::Bytes(value) => arguments.add(value),
        };
        added.map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// Types that can be read from a row of any of the databases.
pub(in crate::store) trait FromAnyRow:
    for<'r> FromRow<'r, MySqlRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin
{
}

impl<T> FromAnyRow for T where
    T: for<'r> FromRow<'r, MySqlRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin
{
}

/// The value of one column of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Cell {
    Int(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

impl From<u16> for Cell {
    fn from(value: u16) -> Self {
        Self::Int(Some(value.into()))
    }
}

impl From<u32> for Cell {
    fn from(value: u32) -> Self {
        Self::Int(Some(value.into()))
    }
}

impl From<Timestamp> for Cell {
    fn from(value: Timestamp) -> Self {
        Self::Int(Some(value.0))
    }
}

impl From<Xid> for Cell {
    fn from(value: Xid) -> Self {
        Self::Bytes(Some(value.to_bytes().to_vec()))
    }
}

impl From<&str> for Cell {
    fn from(value: &str) -> Self {
        Self::Text(Some(value.to_owned()))
    }
}

impl From<i64> for Cell {
    fn from(value: i64) -> Self {
        Self::Int(Some(value))
    }
}

impl From<Option<i64>> for Cell {
    fn from(value: Option<i64>) -> Self {
        Self::Int(value)
    }
}

impl From<bool> for Cell {
    fn from(value: bool) -> Self {
        Self::Int(Some(value.into()))
    }
}

impl From<String> for Cell {
    fn from(value: String) -> Self {
        Self::Text(Some(value))
    }
}

impl From<Option<String>> for Cell {
    fn from(value: Option<String>) -> Self {
        Self::Text(value)
    }
}

impl From<Vec<u8>> for Cell {
    fn from(value: Vec<u8>) -> Self {
        Self::Bytes(Some(value))
    }
}

impl From<Option<Vec<u8>>> for Cell {
    fn from(value: Option<Vec<u8>>) -> Self {
        Self::Bytes(value)
    }
}
