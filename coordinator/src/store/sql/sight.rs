//! Reads that prove that they are new enough. A connection may lead to a server that is behind: a replica, a lagging cluster
//! node, the old primary after a switch-over. Its data looks sound, but would let a confirmed transaction be cancelled.
//!
//! So every query starts at the partition's row, and each result row contains epoch, nonce and position. A batch moves the
//! position in the local transaction that writes its rows. So a reader that sees position n sees all rows up to batch n. It
//! must be one statement, because a proxy may send two statements to two servers.

use std::time::Duration;

use sqlx::{ColumnIndex, FromRow, Row, ValueRef as _};
use tracing::debug;

use super::{Connection, Connections, Dialect, FromAnyRow, Query};
use crate::store::{Error, Known, PartitionRow};

/// Pauses before an outdated read is retried on a new reading connection. After the last retry, a writing connection is used.
const REPEAT_AFTER: [Duration; 3] =
    [Duration::from_millis(10), Duration::from_millis(50), Duration::from_millis(200)];

/// Ends a local transaction that has changed nothing.
pub(super) const END_READING: &str = "ROLLBACK";
/// Transactions whose branches one query reads.
pub(super) const XIDS_MAX: usize = 64;

/// The columns of [`Seen`], at the end of the list of columns.
pub(super) const SEEN: &str = ", p.epoch AS seen_epoch, p.nonce AS seen_nonce, p.latest_batch AS seen_position FROM `partition` AS p ";

/// The partition's row as a query has seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromRow)]
pub(super) struct Seen {
    seen_epoch: u32,
    seen_nonce: u32,
    seen_position: i64,
}

/// A row of a query that starts at the partition's row. If nothing is joined to it, there is still one row.
#[derive(Debug, FromRow)]
pub(super) struct Sighted<T> {
    #[sqlx(flatten)]
    seen: Seen,
    #[sqlx(flatten)]
    found: Beside<T>,
}

/// The result of an outer join, if it found a row. It has a column `xid` that is not NULL.
#[derive(Debug)]
pub(super) struct Beside<T>(pub(super) Option<T>);

impl<'r, R: Row, T: FromRow<'r, R>> FromRow<'r, R> for Beside<T>
where
    &'static str: ColumnIndex<R>,
{
    fn from_row(row: &'r R) -> Result<Self, sqlx::Error> {
        if row.try_get_raw("xid")?.is_null() {
            return Ok(Self(None));
        }
        T::from_row(row).map(Some).map(Self)
    }
}

/// Checks the queries of one read: each must be new enough, and all must show the same snapshot.
#[derive(Debug)]
pub(super) struct Sight {
    known: Option<Known>,
    seen: Option<Seen>,
}

impl Sight {
    pub(super) fn of(known: Known) -> Self {
        Self { known: Some(known), seen: None }
    }

    /// For lists that people read. These may be out of date.
    pub(super) fn of_people() -> Self {
        Self { known: None, seen: None }
    }

    /// Adds the end of the query: it is limited to the partition's row and what is joined to it.
    pub(super) fn push_partition(&self, query: &mut Query) {
        let partition = self.known.map_or(0, |known| known.ownership.partition);
        query.push(" WHERE p.`partition` = ").push_bind(partition);
    }

    /// The rows joined to the partition's row.
    pub(super) async fn fetch<D: Dialect, T>(
        &mut self,
        connection: &mut Connection<D>,
        query: Query,
    ) -> Result<Vec<T>, Error>
    where
        Sighted<T>: FromAnyRow,
    {
        let rows: Vec<Sighted<T>> = D::fetch(connection, query).await?;
        self.check(rows.first().map(|row| row.seen))?;
        Ok(rows.into_iter().filter_map(|row| row.found.0).collect())
    }

    /// Checks the partition's row that a query has seen.
    pub(super) fn check(&mut self, seen: Option<Seen>) -> Result<(), Error> {
        let Some(known) = self.known else { return Ok(()) };
        let Some(seen) = seen else {
            let partition = known.ownership.partition;
            return Err(Error::Old(format!("there is no row for partition {partition}")));
        };
        if self.seen.is_some_and(|earlier| earlier != seen) {
            return Err(Error::Old(format!(
                "two queries of one read show {seen:?} and {:?}",
                self.seen
            )));
        }
        self.seen = Some(seen);
        let Seen { seen_epoch: epoch, seen_nonce: nonce, seen_position: position } = seen;
        known.check(PartitionRow { epoch, nonce, position: position.cast_unsigned() })
    }
}

/// Runs a read on one of the `readers`. If it is out of date, retries on new connections, and at last on the writing
/// connection.
pub(in crate::store) async fn reading<D: Dialect, T>(
    readers: &Connections<D>,
    writer: &Connections<D>,
    read: impl AsyncFnOnce(&mut Connection<D>) -> Result<T, Error> + Copy,
) -> Result<T, Error> {
    for pause in REPEAT_AFTER {
        match readers.run(read).await {
            Err(Error::Old(what)) => {
                debug!(what, "a read was old; repeating it over a new connection");
                readers.close_idle();
                tokio::time::sleep(pause).await;
            }
            answer => return answer,
        }
    }
    writer.run(read).await
}
