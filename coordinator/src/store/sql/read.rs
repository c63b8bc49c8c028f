//! All reads of a store in an SQL database. Each function sees one snapshot, and ends its local transaction before it returns.
//! While a snapshot is open, the database cannot clean up older versions of rows.

use std::collections::BTreeMap;

use handfast_proto::Xid;
use sqlx::FromRow;
use tracing::error;

use super::{
    Connection, Dialect, Query,
    branches::{BranchRow, ResolutionOfBranch},
    record::{self, Found, TransactionRow},
    resolutions,
    sight::{Beside, END_READING, SEEN, Seen, Sight, XIDS_MAX},
};
use crate::{
    store::{
        DuePage, Error, Known, ListFilter, Listed, Listing, Lookup, PARTITIONS, Show, Summary,
        XidBytes, xids_of,
    },
    transaction::{GlobalTransaction, StuckAfter, Timestamp},
};

/// Keys that one query looks up. A few fixed sizes, so that queries are prepared once.
const KEYS: [usize; 4] = [1, 8, 64, 256];

/// The start of a query for transactions: after it, the conditions on `global_transaction AS g`. The rows are found first, then
/// joined with their digests. With a direct join, MySQL would sort a million rows instead of using an index for 256 of them.
const SELECT_TRANSACTIONS: &str =
    "SELECT g.*, i.key_digest FROM (SELECT g.* FROM global_transaction AS g ";
/// What follows the conditions of [`SELECT_TRANSACTIONS`].
const JOIN_DIGESTS: &str = ") AS g LEFT JOIN idempotency AS i ON i.key_hash = g.key_hash ";
const BRANCH: &str = "SELECT b.*";

/// The same for a list, which shows no payloads, only that there is one.
const BRANCH_IN_LIST: &str = "SELECT b.xid, b.position, b.branch_id, b.action, b.participant, b.target, b.state, b.attempts, b.needs_attention, \
     SUBSTR(b.payload, 1, 0) AS payload, b.payload_type, b.due_at, b.error_code, b.error_message, b.error_at";

/// [`GlobalTransaction::is_stuck`] in SQL. Bind: decided before, attempts.
const STUCK: &str = "g.due_at IS NOT NULL AND g.state IN (2, 3) AND (g.decided_at <= ? OR EXISTS (SELECT 1 FROM branch AS b \
                     WHERE b.xid = g.xid AND b.state = 1 AND b.error_at IS NOT NULL \
                     AND (b.needs_attention OR b.attempts >= ?)))";

/// One transaction, and what is known about the place where it would be.
#[derive(Debug, FromRow)]
struct LoadRow {
    #[sqlx(flatten)]
    seen: Seen,
    #[sqlx(flatten)]
    head: Beside<TransactionRow>,
    through: Option<Vec<u8>>,
    epoch_nonce: Option<u32>,
    epoch_lost: Option<i64>,
}

pub(in crate::store) async fn load<D: Dialect>(
    connection: &mut Connection<D>,
    xid: Xid,
    known: Known,
) -> Result<Lookup, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut sight = Sight::of(known);
    // One statement also reads why the transaction may be absent: it might be deleted between two statements.
    let mut query = Query::new(
        "SELECT g.*, i.key_digest, d.through, e.nonce AS epoch_nonce, e.lost AS epoch_lost",
    );
    query.push(SEEN).push("LEFT JOIN global_transaction AS g ON g.xid = ").push_bind(xid);
    query.push(
        " LEFT JOIN idempotency AS i ON i.key_hash = g.key_hash \
          LEFT JOIN purged AS d ON d.`partition` = p.`partition` \
          LEFT JOIN epoch AS e ON e.`partition` = p.`partition` AND e.epoch = ",
    );
    query.push_bind(xid.epoch);
    sight.push_partition(&mut query);
    let row: Option<LoadRow> = D::fetch(connection, query).await?.pop();
    sight.check(row.as_ref().map(|row| row.seen))?;
    let row = row.ok_or(sqlx::Error::RowNotFound)?;
    let lookup = match row.head.0 {
        Some(head) => {
            let xids = [xid.to_bytes().to_vec()];
            let branches = branches::<D>(connection, &mut sight, BRANCH, &xids).await?;
            let branches = rows(branches).map_err(Error::Corrupt)?;
            let resolutions = resolutions::of_branches::<D>(connection, &mut sight, &xids).await?;
            let resolutions = rows(resolutions).map_err(Error::Corrupt)?;
            Lookup::Found(Box::new(head.into_transaction(branches, resolutions)?))
        }
        None => Lookup::Absent {
            purged_through: row.through.map(|through| record::xid(&through)).transpose()?,
            nonce: row.epoch_nonce,
            lost: row.epoch_lost.is_some(),
        },
    };
    D::run(connection, END_READING).await?;
    Ok(lookup)
}

pub(in crate::store) async fn find_keys<D: Dialect>(
    connection: &mut Connection<D>,
    hashes: &[[u8; 32]],
    known: Known,
) -> Result<Vec<Option<Xid>>, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut sight = Sight::of(known);
    let mut found = BTreeMap::new();
    for some in hashes.chunks(KEYS[KEYS.len() - 1]) {
        let size = KEYS.into_iter().find(|size| *size >= some.len()).expect("the last is the most");
        let mut query = Query::new("SELECT i.xid, i.key_hash");
        query.push(SEEN).push("LEFT JOIN idempotency AS i ON i.key_hash IN (");
        // A repeated hash is found only once.
        query.push_list(some.iter().cycle().take(size).map(|hash| hash.to_vec()));
        sight.push_partition(&mut query);
        let rows: Vec<(Vec<u8>, Vec<u8>)> = sight.fetch::<D, _>(connection, query).await?;
        found.extend(rows.into_iter().map(|(xid, hash)| (hash, xid)));
    }
    D::run(connection, END_READING).await?;
    let xid_of = |hash: &[u8; 32]| found.get(&hash[..]).map(|xid| record::xid(xid)).transpose();
    hashes.iter().map(xid_of).collect()
}

pub(in crate::store) async fn due<D: Dialect>(
    connection: &mut Connection<D>,
    until: Timestamp,
    after: Option<&(Timestamp, XidBytes)>,
    limit: usize,
    known: Known,
) -> Result<DuePage, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut sight = Sight::of(known);
    let (first, last) = xids_of(known.ownership.partition);
    let mut query = Query::new("SELECT g.*, i.key_digest");
    query.push(SEEN).push("LEFT JOIN (SELECT g.* FROM global_transaction AS g WHERE g.due_at <= ");
    query.push_bind(until);
    query.push(" AND g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
    push_not_lost(&mut query, known);
    if let Some((due_at, xid)) = after {
        // This condition lets the database start at the right place in the index.
        query.push(" AND g.due_at >= ").push_bind(*due_at);
        query.push(" AND (g.due_at > ").push_bind(*due_at);
        query.push(" OR g.due_at = ").push_bind(*due_at);
        query.push(" AND g.xid > ").push_bind(xid.clone()).push(")");
    }
    query.push(" ORDER BY g.due_at, g.xid LIMIT ").push_bind(sql_limit(limit + 1));
    query.push(") AS g ON TRUE LEFT JOIN idempotency AS i ON i.key_hash = g.key_hash");
    sight.push_partition(&mut query);
    query.push(" ORDER BY g.due_at, g.xid");
    let mut heads: Vec<Found<TransactionRow>> = sight.fetch::<D, _>(connection, query).await?;
    let more = heads.len() > limit;
    heads.truncate(limit);
    let next = heads.last().filter(|_| more).and_then(Found::place);
    let transactions = undamaged::<D>(connection, &mut sight, BRANCH, heads).await?;
    let mut next_due: Option<Found<()>> = None;
    if !more {
        let mut query = Query::new("SELECT g.xid, g.due_at");
        query.push(SEEN).push(
            "LEFT JOIN (SELECT g.xid, g.due_at FROM global_transaction AS g WHERE g.due_at > ",
        );
        query.push_bind(until);
        query.push(" AND g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
        push_not_lost(&mut query, known);
        query.push(" ORDER BY g.due_at LIMIT 1) AS g ON TRUE");
        sight.push_partition(&mut query);
        next_due = sight.fetch::<D, _>(connection, query).await?.pop();
    }
    D::run(connection, END_READING).await?;
    let next_due_at = next_due.and_then(|found| found.place()).map(|(at, _)| at);
    Ok(DuePage { transactions, next, next_due_at })
}

pub(in crate::store) async fn list<D: Dialect>(
    connection: &mut Connection<D>,
    filter: &ListFilter,
    limit: usize,
) -> Result<Listing, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let (mut found, mut looked_to) = (Vec::new(), None);
    match filter.show {
        // There are few open transactions, and they have an index.
        Show::Open | Show::Stuck(..) => {
            let mut query = Query::new(SELECT_TRANSACTIONS);
            query.push("WHERE g.due_at IS NOT NULL");
            if let Show::Stuck(now, after) = filter.show {
                push_stuck(query.push(" AND "), now, after);
            }
            (found, looked_to) = selected::<D>(connection, query, filter, BY_AGE, limit).await?;
        }
        Show::Lost => {
            let lossy = lossy::<D>(connection).await?;
            for (partition, (_, epoch)) in lossy {
                let (first, last) = xids_of(partition);
                let mut query = Query::new(SELECT_TRANSACTIONS);
                query.push("WHERE g.due_at IS NOT NULL AND g.state = 1 AND g.xid BETWEEN ");
                query.push_bind(first).push(" AND ").push_bind(Xid { epoch, ..last });
                let (mut of_one, end) =
                    selected::<D>(connection, query, filter, BY_AGE, limit).await?;
                found.append(&mut of_one);
                looked_to = looked_to.max(end);
            }
        }
        // There are many transactions in all, but within a partition they are sorted by age.
        Show::All => {
            for partition in 0..PARTITIONS {
                let (mut first, last) = xids_of(partition);
                if filter.searches() {
                    let end = last_looked_at::<D>(connection, (first, last), filter).await?;
                    first = end.map_or(first, |end| end.xid);
                    looked_to = looked_to.max(end);
                }
                let mut query = Query::new(SELECT_TRANSACTIONS);
                query.push("WHERE g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
                let order = " ORDER BY g.xid DESC";
                let (mut of_one, end) =
                    selected::<D>(connection, query, filter, order, limit).await?;
                found.append(&mut of_one);
                looked_to = looked_to.max(end);
            }
        }
    }
    D::run(connection, END_READING).await?;
    // Where one partition was looked at further back than another one, the rest belongs to the next page.
    found.retain(|global| Some(Listed::of(global)) >= looked_to);
    found.sort_by_key(|global| std::cmp::Reverse(Listed::of(global)));
    found.truncate(limit);
    Ok(Listing { transactions: found, looked_to })
}

/// The order of a list.
const BY_AGE: &str = " ORDER BY g.begun_at DESC, g.xid DESC";

/// The first `limit` transactions of a query that fit the filter. If some that were found do not fit after all, there may be fewer,
/// and the second value is the last one looked at.
async fn selected<D: Dialect>(
    connection: &mut Connection<D>,
    mut query: Query,
    filter: &ListFilter,
    order: &str,
    limit: usize,
) -> Result<(Vec<GlobalTransaction>, Option<Listed>), Error> {
    push_after(&mut query, filter);
    push_names(&mut query, filter);
    query.push(order).push(" LIMIT ").push_bind(sql_limit(limit)).push(JOIN_DIGESTS);
    let mut found = transactions::<D>(connection, query).await?;
    let read = found.len();
    let last = found.iter().map(Listed::of).min();
    found.retain(|global| filter.matches_labels(global));
    let is_short = read == limit && found.len() < limit;
    Ok((found, last.filter(|_| is_short)))
}

/// The last transaction of a partition that a search looks at. `None`: it looks at all of them.
async fn last_looked_at<D: Dialect>(
    connection: &mut Connection<D>,
    (first, last): (Xid, Xid),
    filter: &ListFilter,
) -> Result<Option<Listed>, Error> {
    let mut query = Query::new("SELECT g.begun_at, g.xid FROM global_transaction AS g ");
    query.push("WHERE g.xid BETWEEN ").push_bind(first).push(" AND ").push_bind(last);
    push_after(&mut query, filter);
    query.push(" ORDER BY g.xid DESC LIMIT 1 OFFSET ");
    query.push_bind(sql_limit(filter.looked_max.saturating_sub(1)));
    let end: Option<(i64, Vec<u8>)> = D::fetch(connection, query).await?.pop();
    let listed = |(begun_at, xid): (i64, Vec<u8>)| {
        Ok(Listed { begun_at: Timestamp(begun_at), xid: record::xid(&xid)? })
    };
    end.map(listed).transpose()
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

/// The oldest and the newest epoch of each partition that has lost batches.
pub(in crate::store) async fn lossy<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<BTreeMap<u16, (u32, u32)>, Error> {
    let query = Query::new(
        "SELECT `partition`, MIN(epoch), MAX(epoch) FROM epoch WHERE lost IS NOT NULL GROUP BY `partition`",
    );
    let lossy: Vec<(u16, u32, u32)> = D::fetch(connection, query).await?;
    Ok(lossy.into_iter().map(|(partition, oldest, newest)| (partition, (oldest, newest))).collect())
}

/// The database's time.
pub(in crate::store) async fn clock<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<Timestamp, Error> {
    let row: Option<(i64,)> = D::fetch(connection, Query::new(D::CLOCK)).await?.pop();
    let (millis,) = row.ok_or(sqlx::Error::RowNotFound)?;
    Ok(Timestamp(millis))
}

/// What a look for finished transactions has found.
#[derive(Debug, Default)]
pub(in crate::store) struct Finished {
    /// The first and the last xid of each range. As of the look, everything in it had finished.
    pub(in crate::store) ranges: Vec<(Xid, Xid)>,
    pub(in crate::store) some_have_keys: bool,
}

/// Looks at the next `limit` transactions of a partition after `after`. Returns those that finished before that moment, and the
/// last one looked at if there may be more. (Xids of a partition are sorted by age, so transactions after one that began later
/// did not finish earlier. A transaction that began after `now` is no evidence of that.)
pub(in crate::store) async fn finished<D: Dialect>(
    connection: &mut Connection<D>,
    partition: u16,
    before: Timestamp,
    now: Timestamp,
    after: Option<&[u8]>,
    limit: usize,
) -> Result<(Finished, Option<XidBytes>), Error> {
    let (first, last) = xids_of(partition);
    let query = Query::new(
        "SELECT xid, begun_at, finished_at, key_hash FROM global_transaction WHERE xid > ? AND xid <= ? ORDER BY xid LIMIT ?",
    );
    let after = after.map_or_else(|| first.to_bytes().to_vec(), <[u8]>::to_vec);
    let query = query.bind(after).bind(last).bind(sql_limit(limit));
    type Row = (Vec<u8>, i64, Option<i64>, Option<Vec<u8>>);
    let found: Vec<Found<Row>> = D::fetch(connection, query).await?;
    let (mut finished, mut next) = (Finished::default(), None);
    let full = found.len() == limit;
    let mut goes_on = false; // the range
    for Found { xid: bytes, row, .. } in found {
        let continues = std::mem::take(&mut goes_on);
        let (Ok(xid), Ok((_, begun_at, finished_at, key))) = (record::xid(&bytes), row) else {
            next = full.then_some(bytes); // it is damaged, and kept
            continue;
        };
        next = (full && (begun_at < before.0 || begun_at > now.0)).then_some(bytes);
        if finished_at.is_some_and(|at| at < before.0) {
            match finished.ranges.last_mut() {
                Some((_, last)) if continues => *last = xid,
                _ => finished.ranges.push((xid, xid)),
            }
            finished.some_have_keys |= key.is_some();
            goes_on = true;
        }
    }
    Ok((finished, next))
}

/// Runs a query for transactions, and rebuilds those that are not damaged.
async fn transactions<D: Dialect>(
    connection: &mut Connection<D>,
    query: Query,
) -> Result<Vec<GlobalTransaction>, Error> {
    let heads = D::fetch(connection, query).await?;
    undamaged::<D>(connection, &mut Sight::of_people(), BRANCH_IN_LIST, heads).await
}

/// Rebuilds transactions from their rows. A damaged one is logged and left out, so that it does not block the others.
async fn undamaged<D: Dialect>(
    connection: &mut Connection<D>,
    sight: &mut Sight,
    select_branches: &str,
    heads: Vec<Found<TransactionRow>>,
) -> Result<Vec<GlobalTransaction>, Error> {
    let mut branches: BTreeMap<Vec<u8>, Vec<Found<BranchRow>>> = BTreeMap::new();
    let mut resolved: BTreeMap<Vec<u8>, Vec<Found<ResolutionOfBranch>>> = BTreeMap::new();
    for some in heads.chunks(XIDS_MAX) {
        let xids: Vec<_> = some.iter().map(|head| head.xid.clone()).collect();
        for row in self::branches::<D>(connection, sight, select_branches, &xids).await? {
            branches.entry(row.xid.clone()).or_default().push(row);
        }
        for row in resolutions::of_branches::<D>(connection, sight, &xids).await? {
            resolved.entry(row.xid.clone()).or_default().push(row);
        }
    }
    let mut found = Vec::with_capacity(heads.len());
    for head in heads {
        let branches = branches.remove(&head.xid).unwrap_or_default();
        let resolved = resolved.remove(&head.xid).unwrap_or_default();
        match rebuilt(head, branches, resolved) {
            Ok(global) => found.push(global),
            Err(what) => error!(what, "a damaged record is left alone; a person must look"),
        }
    }
    Ok(found)
}

/// A transaction from its rows, or what is wrong with them.
fn rebuilt(
    head: Found<TransactionRow>,
    branches: Vec<Found<BranchRow>>,
    resolved: Vec<Found<ResolutionOfBranch>>,
) -> Result<GlobalTransaction, String> {
    let xid = head.xid;
    let unreadable = |what: String| match record::xid(&xid) {
        Ok(xid) => format!("transaction {xid} cannot be read: {what}"),
        Err(_) => format!("the transaction of {xid:02x?} cannot be read: {what}"),
    };
    let head = head.row.map_err(unreadable)?;
    let branches = rows(branches).map_err(unreadable)?;
    let global = head.into_transaction(branches, rows(resolved).map_err(unreadable)?);
    global.map_err(|error| error.to_string())
}

/// The rows, or what is wrong with one of them.
fn rows<T>(found: Vec<Found<T>>) -> Result<Vec<T>, String> {
    found.into_iter().map(|found| found.row).collect()
}

/// The branches of these transactions, in order.
async fn branches<D: Dialect>(
    connection: &mut Connection<D>,
    sight: &mut Sight,
    select: &str,
    xids: &[Vec<u8>],
) -> Result<Vec<Found<BranchRow>>, Error> {
    let mut query = Query::new(select);
    query.push(SEEN).push("LEFT JOIN branch AS b ON b.xid IN (").push_list(xids.iter().cloned());
    sight.push_partition(&mut query);
    query.push(" ORDER BY b.xid, b.position");
    // Only frequent sizes are worth keeping prepared.
    query.persistent = [1, XIDS_MAX].contains(&xids.len());
    sight.fetch::<D, _>(connection, query).await
}

/// Leaves out undecided transactions of lost epochs. They stay due for ever, and must not be read at each look.
fn push_not_lost(query: &mut Query, known: Known) {
    if let Some(last) = known.ownership.last_lost() {
        query.push(" AND (g.state <> 1 OR g.xid > ").push_bind(last).push(")");
    }
}

fn push_stuck(query: &mut Query, now: Timestamp, after: StuckAfter) {
    let mut parts = STUCK.split('?');
    let decided_before =
        now.0.saturating_sub(i64::try_from(after.time.as_millis()).unwrap_or(i64::MAX));
    query.push(parts.next().unwrap_or_default()).push_bind(decided_before);
    query.push(parts.next().unwrap_or_default()).push_bind(after.attempts);
    query.push(parts.next().unwrap_or_default());
}

/// The conditions that have no index.
fn push_names(query: &mut Query, filter: &ListFilter) {
    if let Some(name) = &filter.name {
        query.push(" AND g.name = ").push_bind(name.clone());
    }
    for (key, value) in &filter.labels {
        query.push(" AND INSTR(g.labels, ").push_bind(record::label(key, value)).push(") > 0");
    }
}

fn push_after(query: &mut Query, filter: &ListFilter) {
    if let Some(Listed { begun_at, xid }) = filter.after {
        query.push(" AND (g.begun_at < ").push_bind(begun_at.0);
        query.push(" OR g.begun_at = ").push_bind(begun_at.0);
        query.push(" AND g.xid < ").push_bind(xid).push(")");
    }
}

fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
