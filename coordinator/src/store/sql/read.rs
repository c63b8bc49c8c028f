//! Everything that reads a store in an SQL database: compiled once in the module of each. Each function sees one moment of it, and
//! lets go of it before it returns: what is old cannot be cleaned up while somebody looks at it.

use std::collections::BTreeMap;

use handfast_proto::Xid;
use sqlx::{Connection as _, QueryBuilder};
use tracing::error;

use super::{
    super::{
        DuePage, Error, ListFilter, Lookup, PARTITIONS, Show, Summary,
        record::{self, BranchRow, TransactionRow},
        xids_of,
    },
    BEGIN_READING, Connection, Db,
};
use crate::transaction::{GlobalTransaction, StuckAfter, Timestamp};

/// Transactions whose branches are read by one query.
const XIDS_MAX: usize = 64;

/// Around a query for rows of `global_transaction AS g`. Those are found first, and then their digests: joined at once, MySQL
/// would rather sort a million rows than follow an index for 256 of them.
const TRANSACTION: [&str; 2] = [
    "SELECT g.*, i.key_digest FROM (SELECT g.* FROM global_transaction AS g ",
    ") AS g LEFT JOIN idempotency AS i ON i.key_hash = g.key_hash ",
];
const BRANCH: &str = "SELECT b.*, r.operator AS resolved_by, r.reason AS resolved_reason, r.at AS resolved_at FROM branch AS b \
                      LEFT JOIN resolution AS r ON r.xid = b.xid AND r.branch_id = b.branch_id ";
/// What [`GlobalTransaction::is_stuck`] says, in SQL. Bind: decided before, attempts.
const STUCK: &str = "g.due_at IS NOT NULL AND g.state IN (2, 3) AND (g.decided_at <= ? OR EXISTS (SELECT 1 FROM branch AS b \
                     WHERE b.xid = g.xid AND b.state = 1 AND b.error_at IS NOT NULL \
                     AND (b.needs_attention OR b.attempts >= ?)))";

pub(super) async fn load(connection: &mut Connection, xid: Xid) -> Result<Lookup, Error> {
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let mut query = QueryBuilder::new(TRANSACTION[0]);
    query.push("WHERE g.xid = ").push_bind(xid.to_bytes().to_vec()).push(TRANSACTION[1]);
    if let Some(head) = query.build_query_as().fetch_optional(&mut *tx).await? {
        let head: TransactionRow = head;
        let mut query = QueryBuilder::new(BRANCH);
        query.push("WHERE b.xid = ").push_bind(head.xid.clone()).push(" ORDER BY b.position");
        let branches = query.build_query_as().fetch_all(&mut *tx).await?;
        return Ok(Lookup::Found(Box::new(head.into_transaction(branches)?)));
    }
    let purged_through: Option<Vec<u8>> =
        sqlx::query_scalar("SELECT through FROM purged WHERE `partition` = ?")
            .bind(xid.partition)
            .fetch_optional(&mut *tx)
            .await?;
    let nonce: Option<u32> =
        sqlx::query_scalar("SELECT nonce FROM epoch WHERE `partition` = ? AND epoch = ?")
            .bind(xid.partition)
            .bind(xid.epoch)
            .fetch_optional(&mut *tx)
            .await?;
    Ok(Lookup::Absent {
        purged_through: purged_through.map(|through| record::xid(&through)).transpose()?,
        nonce,
    })
}

pub(super) async fn find_keys(
    connection: &mut Connection,
    hashes: &[[u8; 32]],
) -> Result<Vec<Option<Xid>>, Error> {
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let mut found = Vec::with_capacity(hashes.len());
    for hash in hashes {
        let xid: Option<Vec<u8>> =
            sqlx::query_scalar("SELECT xid FROM idempotency WHERE key_hash = ?")
                .bind(hash.to_vec())
                .fetch_optional(&mut *tx)
                .await?;
        found.push(xid.map(|xid| record::xid(&xid)).transpose()?);
    }
    Ok(found)
}

pub(super) async fn due(
    connection: &mut Connection,
    partition: u16,
    until: Timestamp,
    after: Option<(Timestamp, Xid)>,
    limit: usize,
) -> Result<DuePage, Error> {
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let (first, last) = xids_of(partition);
    let mut query = QueryBuilder::new(TRANSACTION[0]);
    query.push("WHERE g.due_at <= ").push_bind(until.0);
    query.push(" AND g.xid BETWEEN ").push_bind(first.to_bytes().to_vec());
    query.push(" AND ").push_bind(last.to_bytes().to_vec());
    if let Some((due_at, xid)) = after {
        query
            .push(" AND g.due_at >= ") // where to begin in the index
            .push_bind(due_at.0)
            .push(" AND (g.due_at > ")
            .push_bind(due_at.0)
            .push(" OR g.due_at = ")
            .push_bind(due_at.0);
        query.push(" AND g.xid > ").push_bind(xid.to_bytes().to_vec()).push(")");
    }
    query.push(" ORDER BY g.due_at, g.xid LIMIT ").push_bind(rows(limit + 1));
    query.push(TRANSACTION[1]).push("ORDER BY g.due_at, g.xid");
    let mut heads: Vec<TransactionRow> = query.build_query_as().fetch_all(&mut *tx).await?;
    let more = heads.len() > limit;
    heads.truncate(limit);
    let next = match heads.last() {
        Some(TransactionRow { due_at: Some(due_at), xid, .. }) if more => {
            Some((Timestamp(*due_at), record::xid(xid)?))
        }
        _ => None,
    };
    let transactions = undamaged(&mut tx, heads).await?;
    let next_due_at: Option<i64> = if more {
        None
    } else {
        sqlx::query_scalar(
            "SELECT due_at FROM global_transaction WHERE due_at > ? AND xid BETWEEN ? AND ? ORDER BY due_at LIMIT 1",
        )
        .bind(until.0)
        .bind(first.to_bytes().to_vec())
        .bind(last.to_bytes().to_vec())
        .fetch_optional(&mut *tx)
        .await?
    };
    Ok(DuePage { transactions, next, next_due_at: next_due_at.map(Timestamp) })
}

pub(super) async fn list(
    connection: &mut Connection,
    filter: &ListFilter,
    limit: usize,
) -> Result<Vec<GlobalTransaction>, Error> {
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let mut found = Vec::new();
    match filter.show {
        // What is open is few, and has an index.
        Show::Open | Show::Stuck(..) => {
            let mut query = QueryBuilder::new(TRANSACTION[0]);
            query.push("WHERE g.due_at IS NOT NULL");
            if let Show::Stuck(now, after) = filter.show {
                push_stuck(query.push(" AND "), now, after);
            }
            push_name(&mut query, filter);
            query.push(" ORDER BY g.begun_at DESC, g.xid DESC LIMIT ").push_bind(rows(limit));
            query.push(TRANSACTION[1]).push("ORDER BY g.begun_at DESC, g.xid DESC");
            found = transactions(&mut tx, query).await?;
        }
        // All are many, but within a partition they are sorted by age.
        Show::All => {
            for partition in 0..PARTITIONS {
                let (first, last) = xids_of(partition);
                let mut query = QueryBuilder::new(TRANSACTION[0]);
                query.push("WHERE g.xid BETWEEN ").push_bind(first.to_bytes().to_vec());
                query.push(" AND ").push_bind(last.to_bytes().to_vec());
                push_name(&mut query, filter);
                query.push(" ORDER BY g.xid DESC LIMIT ").push_bind(rows(limit));
                query.push(TRANSACTION[1]);
                found.append(&mut transactions(&mut tx, query).await?);
            }
            found.sort_by_key(|global| std::cmp::Reverse((global.begun_at, global.xid)));
            found.truncate(limit);
        }
    }
    Ok(found)
}

pub(super) async fn summary(
    connection: &mut Connection,
    now: Timestamp,
    after: StuckAfter,
) -> Result<Summary, Error> {
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let (open, oldest): (i64, Option<i64>) = sqlx::query_as(
        "SELECT count(*), min(begun_at) FROM global_transaction WHERE due_at IS NOT NULL",
    )
    .fetch_one(&mut *tx)
    .await?;
    let mut query = QueryBuilder::new("SELECT count(*) FROM global_transaction AS g WHERE ");
    push_stuck(&mut query, now, after);
    let stuck: i64 = query.build_query_scalar().fetch_one(&mut *tx).await?;
    Ok(Summary {
        open: open.cast_unsigned(),
        stuck: stuck.cast_unsigned(),
        oldest: oldest.map(Timestamp),
    })
}

/// Of the next `limit` transactions of a partition after `after`: those that finished before that moment; and the last one
/// looked at, if there may be more. (Xids of a partition are sorted by age: what follows one that began later did not finish
/// before.)
pub(super) async fn finished(
    connection: &mut Connection,
    partition: u16,
    before: Timestamp,
    after: Option<Xid>,
    limit: usize,
) -> Result<(Vec<Xid>, Option<Xid>), Error> {
    let (first, last) = xids_of(partition);
    let mut tx = connection.begin_with(BEGIN_READING).await?;
    let found: Vec<(Vec<u8>, i64, Option<i64>)> = sqlx::query_as(
        "SELECT xid, begun_at, finished_at FROM global_transaction WHERE xid > ? AND xid <= ? ORDER BY xid LIMIT ?",
    )
    .bind(after.unwrap_or(first).to_bytes().to_vec())
    .bind(last.to_bytes().to_vec())
    .bind(rows(limit))
    .fetch_all(&mut *tx)
    .await?;
    let (mut finished, mut next) = (Vec::new(), None);
    let full = found.len() == limit;
    for (xid, begun_at, finished_at) in found {
        let xid = record::xid(&xid)?;
        next = (full && begun_at < before.0).then_some(xid);
        if finished_at.is_some_and(|at| at < before.0) {
            finished.push(xid);
        }
    }
    Ok((finished, next))
}

/// Runs a query for transactions, and puts those together that can be.
async fn transactions(
    tx: &mut Connection,
    mut query: QueryBuilder<Db>,
) -> Result<Vec<GlobalTransaction>, Error> {
    let heads = query.build_query_as().fetch_all(&mut *tx).await?;
    undamaged(tx, heads).await
}

/// Puts transactions together. One that makes no sense must not stand in the way of the others: it is left out, loudly.
async fn undamaged(
    tx: &mut Connection,
    heads: Vec<TransactionRow>,
) -> Result<Vec<GlobalTransaction>, Error> {
    let mut branches: BTreeMap<Vec<u8>, Vec<BranchRow>> = BTreeMap::new();
    for some in heads.chunks(XIDS_MAX) {
        let mut query = QueryBuilder::new(BRANCH);
        let mut xids = query.push("WHERE b.xid IN (").separated(", ");
        for head in some {
            xids.push_bind(head.xid.clone());
        }
        query.push(") ORDER BY b.xid, b.position");
        // Only full ones are worth remembering: the others come in all sizes.
        let rows: Vec<BranchRow> =
            query.build_query_as().persistent(some.len() == XIDS_MAX).fetch_all(&mut *tx).await?;
        for row in rows {
            branches.entry(row.xid.clone()).or_default().push(row);
        }
    }
    let mut found = Vec::with_capacity(heads.len());
    for head in heads {
        let branches = branches.remove(&head.xid).unwrap_or_default();
        match head.into_transaction(branches) {
            Ok(global) => found.push(global),
            Err(Error::Corrupt(what)) => {
                error!(what, "a damaged record is left alone; a person must look");
            }
            Err(unavailable @ Error::Unavailable(_)) => return Err(unavailable),
        }
    }
    Ok(found)
}

fn push_stuck(query: &mut QueryBuilder<Db>, now: Timestamp, after: StuckAfter) {
    let mut parts = STUCK.split('?');
    let decided_before =
        now.0.saturating_sub(i64::try_from(after.time.as_millis()).unwrap_or(i64::MAX));
    query.push(parts.next().unwrap_or_default()).push_bind(decided_before);
    query.push(parts.next().unwrap_or_default()).push_bind(after.attempts);
    query.push(parts.next().unwrap_or_default());
}

fn push_name(query: &mut QueryBuilder<Db>, filter: &ListFilter) {
    if let Some(name) = &filter.name {
        query.push(" AND g.name = ").push_bind(name.clone());
    }
}

fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
