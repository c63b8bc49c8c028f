//! Everything that reads a store in an SQL database. Each function sees one moment of it, and ends its local transaction before it
//! returns: while a snapshot is open the database cannot clean up what is older.

use std::collections::BTreeMap;

use handfast_proto::Xid;
use tracing::error;

use super::{
    Connection, Dialect, Query,
    record::{self, BranchRow, TransactionRow},
};
use crate::{
    store::{DuePage, Error, ListFilter, Lookup, PARTITIONS, Show, Summary, xids_of},
    transaction::{GlobalTransaction, StuckAfter, Timestamp},
};

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

/// Ends a local transaction that has changed nothing.
const END_READING: &str = "ROLLBACK";

pub(in crate::store) async fn load<D: Dialect>(
    connection: &mut Connection<D>,
    xid: Xid,
) -> Result<Lookup, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut query = Query::new(TRANSACTION[0]);
    query.push("WHERE g.xid = ").push_bind(xid).push(TRANSACTION[1]);
    let head: Option<TransactionRow> = D::fetch(connection, query).await?.pop();
    let lookup = match head {
        Some(head) => {
            let mut query = Query::new(BRANCH);
            query.push("WHERE b.xid = ").push_bind(xid).push(" ORDER BY b.position");
            let branches = D::fetch(connection, query).await?;
            Lookup::Found(Box::new(head.into_transaction(branches)?))
        }
        None => absent::<D>(connection, xid).await?,
    };
    D::run(connection, END_READING).await?;
    Ok(lookup)
}

/// What is known of the place where an xid would be.
async fn absent<D: Dialect>(connection: &mut Connection<D>, xid: Xid) -> Result<Lookup, Error> {
    let through = Query::new("SELECT through FROM purged WHERE `partition` = ?");
    let through: Option<(Vec<u8>,)> =
        D::fetch(connection, through.bind(xid.partition)).await?.pop();
    let epoch = Query::new("SELECT nonce, lost FROM epoch WHERE `partition` = ? AND epoch = ?");
    let epoch: Option<(u32, Option<i64>)> =
        D::fetch(connection, epoch.bind(xid.partition).bind(xid.epoch)).await?.pop();
    Ok(Lookup::Absent {
        purged_through: through.map(|(through,)| record::xid(&through)).transpose()?,
        nonce: epoch.map(|(nonce, _)| nonce),
        lost: matches!(epoch, Some((_, Some(_)))),
    })
}

pub(in crate::store) async fn find_keys<D: Dialect>(
    connection: &mut Connection<D>,
    hashes: &[[u8; 32]],
) -> Result<Vec<Option<Xid>>, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut found = Vec::with_capacity(hashes.len());
    for hash in hashes {
        let query = Query::new("SELECT xid FROM idempotency WHERE key_hash = ?");
        let xid: Option<(Vec<u8>,)> = D::fetch(connection, query.bind(hash.to_vec())).await?.pop();
        found.push(xid.map(|(xid,)| record::xid(&xid)).transpose()?);
    }
    D::run(connection, END_READING).await?;
    Ok(found)
}

pub(in crate::store) async fn due<D: Dialect>(
    connection: &mut Connection<D>,
    partition: u16,
    until: Timestamp,
    after: Option<(Timestamp, Xid)>,
    limit: usize,
) -> Result<DuePage, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let (first, last) = xids_of(partition);
    let mut query = Query::new(TRANSACTION[0]);
    query.push("WHERE g.due_at <= ").push_bind(until);
    query.push(" AND g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
    if let Some((due_at, xid)) = after {
        // The first condition says where to begin in the index.
        query.push(" AND g.due_at >= ").push_bind(due_at);
        query.push(" AND (g.due_at > ").push_bind(due_at);
        query.push(" OR g.due_at = ").push_bind(due_at);
        query.push(" AND g.xid > ").push_bind(xid).push(")");
    }
    query.push(" ORDER BY g.due_at, g.xid LIMIT ").push_bind(sql_limit(limit + 1));
    query.push(TRANSACTION[1]).push("ORDER BY g.due_at, g.xid");
    let mut heads: Vec<TransactionRow> = D::fetch(connection, query).await?;
    let more = heads.len() > limit;
    heads.truncate(limit);
    let next = match heads.last() {
        Some(TransactionRow { due_at: Some(due_at), xid, .. }) if more => {
            Some((Timestamp(*due_at), record::xid(xid)?))
        }
        _ => None,
    };
    let transactions = undamaged::<D>(connection, heads).await?;
    let next_due_at: Option<(i64,)> = if more {
        None
    } else {
        let query = Query::new(
            "SELECT due_at FROM global_transaction WHERE due_at > ? AND xid BETWEEN ? AND ? ORDER BY due_at LIMIT 1",
        );
        D::fetch(connection, query.bind(until).bind(first).bind(last)).await?.pop()
    };
    D::run(connection, END_READING).await?;
    Ok(DuePage { transactions, next, next_due_at: next_due_at.map(|(at,)| Timestamp(at)) })
}

pub(in crate::store) async fn list<D: Dialect>(
    connection: &mut Connection<D>,
    filter: &ListFilter,
    limit: usize,
) -> Result<Vec<GlobalTransaction>, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut found = Vec::new();
    match filter.show {
        // What is open is few, and has an index.
        Show::Open | Show::Stuck(..) => {
            let mut query = Query::new(TRANSACTION[0]);
            query.push("WHERE g.due_at IS NOT NULL");
            if let Show::Stuck(now, after) = filter.show {
                push_stuck(query.push(" AND "), now, after);
            }
            push_name(&mut query, filter);
            query.push(" ORDER BY g.begun_at DESC, g.xid DESC LIMIT ");
            query.push_bind(sql_limit(limit));
            query.push(TRANSACTION[1]).push("ORDER BY g.begun_at DESC, g.xid DESC");
            found = transactions::<D>(connection, query).await?;
        }
        // All are many, but within a partition they are sorted by age.
        Show::All => {
            for partition in 0..PARTITIONS {
                let (first, last) = xids_of(partition);
                let mut query = Query::new(TRANSACTION[0]);
                query.push("WHERE g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
                push_name(&mut query, filter);
                query.push(" ORDER BY g.xid DESC LIMIT ").push_bind(sql_limit(limit));
                query.push(TRANSACTION[1]);
                found.append(&mut transactions::<D>(connection, query).await?);
            }
            found.sort_by_key(|global| std::cmp::Reverse((global.begun_at, global.xid)));
            found.truncate(limit);
        }
    }
    D::run(connection, END_READING).await?;
    Ok(found)
}

pub(in crate::store) async fn summary<D: Dialect>(
    connection: &mut Connection<D>,
    now: Timestamp,
    after: StuckAfter,
) -> Result<Summary, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let query = "SELECT count(*), min(begun_at) FROM global_transaction WHERE due_at IS NOT NULL";
    let counted = D::fetch(connection, Query::new(query)).await?.pop();
    let (open, oldest): (i64, Option<i64>) = counted.ok_or(sqlx::Error::RowNotFound)?;
    let mut query = Query::new("SELECT count(*) FROM global_transaction AS g WHERE ");
    push_stuck(&mut query, now, after);
    let (stuck,): (i64,) =
        D::fetch(connection, query).await?.pop().ok_or(sqlx::Error::RowNotFound)?;
    D::run(connection, END_READING).await?;
    Ok(Summary {
        open: open.cast_unsigned(),
        stuck: stuck.cast_unsigned(),
        oldest: oldest.map(Timestamp),
    })
}

/// Of the next `limit` transactions of a partition after `after`: those that finished before that moment; and the last one
/// looked at, if there may be more. (Xids of a partition are sorted by age: what follows one that began later did not finish
/// before.)
pub(in crate::store) async fn finished<D: Dialect>(
    connection: &mut Connection<D>,
    partition: u16,
    before: Timestamp,
    after: Option<Xid>,
    limit: usize,
) -> Result<(Vec<Xid>, Option<Xid>), Error> {
    let (first, last) = xids_of(partition);
    let query = Query::new(
        "SELECT xid, begun_at, finished_at FROM global_transaction WHERE xid > ? AND xid <= ? ORDER BY xid LIMIT ?",
    );
    let query = query.bind(after.unwrap_or(first)).bind(last).bind(sql_limit(limit));
    let found: Vec<(Vec<u8>, i64, Option<i64>)> = D::fetch(connection, query).await?;
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
async fn transactions<D: Dialect>(
    connection: &mut Connection<D>,
    query: Query,
) -> Result<Vec<GlobalTransaction>, Error> {
    let heads = D::fetch(connection, query).await?;
    undamaged::<D>(connection, heads).await
}

/// Puts transactions together. One that makes no sense must not stand in the way of the others: it is left out, loudly.
async fn undamaged<D: Dialect>(
    connection: &mut Connection<D>,
    heads: Vec<TransactionRow>,
) -> Result<Vec<GlobalTransaction>, Error> {
    let mut branches: BTreeMap<Vec<u8>, Vec<BranchRow>> = BTreeMap::new();
    for some in heads.chunks(XIDS_MAX) {
        let mut query = Query::new(BRANCH);
        query.push("WHERE b.xid IN (").push_list(some.iter().map(|head| head.xid.clone()));
        query.push(" ORDER BY b.xid, b.position");
        // Only full ones are worth remembering: the others come in all sizes.
        query.persistent = some.len() == XIDS_MAX;
        let found: Vec<BranchRow> = D::fetch(connection, query).await?;
        for row in found {
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

fn push_stuck(query: &mut Query, now: Timestamp, after: StuckAfter) {
    let mut parts = STUCK.split('?');
    let decided_before =
        now.0.saturating_sub(i64::try_from(after.time.as_millis()).unwrap_or(i64::MAX));
    query.push(parts.next().unwrap_or_default()).push_bind(decided_before);
    query.push(parts.next().unwrap_or_default()).push_bind(after.attempts);
    query.push(parts.next().unwrap_or_default());
}

fn push_name(query: &mut Query, filter: &ListFilter) {
    if let Some(name) = &filter.name {
        query.push(" AND g.name = ").push_bind(name.clone());
    }
}

fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
