//! The optional business data of participants with a database: a table of goods. All transactions update the same rows.
//! At the end the pieces must add up.

use handfast::fence::FenceDb;
use sqlx::{
    Database, Error, MySql, MySqlConnection, MySqlPool, Sqlite, SqliteConnection, SqlitePool,
};

/// Pieces of each kind of goods at the start. A run never sells this many.
const PIECES: i64 = 1_000_000_000;

const MAKE: &str = "CREATE TABLE goods
    (sku BIGINT NOT NULL PRIMARY KEY, free BIGINT NOT NULL, held BIGINT NOT NULL, sold BIGINT NOT NULL)";
const STOCK_UP: &str = "INSERT INTO goods VALUES (?, ?, 0, 0)";
const SUMS: &str = "SELECT CAST(SUM(free) AS SIGNED), CAST(SUM(held) AS SIGNED), CAST(SUM(sold) AS SIGNED) FROM goods";

/// The statements of Try, Confirm and Cancel.
pub(crate) const HOLD: &str = "UPDATE goods SET free = free - ?, held = held + ? WHERE sku = ?";
pub(crate) const SELL: &str = "UPDATE goods SET held = held - ?, sold = sold + ? WHERE sku = ?";
pub(crate) const GIVE_BACK: &str =
    "UPDATE goods SET held = held - ?, free = free + ? WHERE sku = ?";

/// A database that can hold the table of goods.
pub(crate) trait Shelves: FenceDb {
    /// Runs one of the three statements.
    fn change(
        connection: &mut <Self as Database>::Connection,
        change: &'static str,
        pieces: i64,
        sku: u32,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

impl Shelves for MySql {
    async fn change(
        connection: &mut MySqlConnection,
        change: &'static str,
        pieces: i64,
        sku: u32,
    ) -> Result<(), Error> {
        let change = sqlx::query(change).bind(pieces).bind(pieces).bind(sku);
        change.execute(connection).await.map(drop)
    }
}

impl Shelves for Sqlite {
    async fn change(
        connection: &mut SqliteConnection,
        change: &'static str,
        pieces: i64,
        sku: u32,
    ) -> Result<(), Error> {
        let change = sqlx::query(change).bind(pieces).bind(pieces).bind(sku);
        change.execute(connection).await.map(drop)
    }
}

/// The table of goods of one participant.
#[derive(Debug)]
pub(crate) enum Goods {
    Sqlite(SqlitePool),
    MySql(MySqlPool),
}

impl Goods {
    /// Creates the table and fills it.
    pub(crate) async fn stock_up(&self, goods: u32) -> Result<(), Error> {
        match self {
            Self::Sqlite(pool) => sqlx::raw_sql(MAKE).execute(pool).await.map(drop)?,
            Self::MySql(pool) => sqlx::raw_sql(MAKE).execute(pool).await.map(drop)?,
        }
        for sku in 0..goods {
            match self {
                Self::Sqlite(pool) => {
                    sqlx::query(STOCK_UP).bind(sku).bind(PIECES).execute(pool).await.map(drop)?;
                }
                Self::MySql(pool) => {
                    sqlx::query(STOCK_UP).bind(sku).bind(PIECES).execute(pool).await.map(drop)?;
                }
            }
        }
        Ok(())
    }

    /// The number of pieces sold. Fails if pieces are still held or are missing.
    pub(crate) async fn sold(&self, goods: u32) -> anyhow::Result<i64> {
        let (free, held, sold): (i64, i64, i64) = match self {
            Self::Sqlite(pool) => sqlx::query_as(SUMS).fetch_one(pool).await?,
            Self::MySql(pool) => sqlx::query_as(SUMS).fetch_one(pool).await?,
        };
        let all = i64::from(goods) * PIECES;
        anyhow::ensure!(held == 0, "{held} pieces are held still");
        anyhow::ensure!(free + sold == all, "of {all} pieces {free} are free and {sold} sold");
        Ok(sold)
    }
}
