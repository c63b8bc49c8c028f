//! Everything that changes a store in an SQL database. Each function is one local transaction. After an error the transaction
//! is still open, so the caller closes the connection.

use std::{collections::BTreeMap, time::Duration};

use handfast_proto::crash_point;
use tracing::{error, warn};

use super::{
    Cell, Connection, Connections, Counter, Dialect, End, Query, Wrote, read::Finished, record,
};
use crate::{
    store::{
        Appended, Batch, Damage, Epoch, Error, Guard, Head, Ownership, PartitionRow, Row, Seat,
        Write, judge, loss,
    },
    transaction::Timestamp,
};

/// Transactions that one query checks when some rows do not match.
const MISFITS_AT_A_TIME: usize = 256;
/// Pause before mismatched rows are checked again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// The owner of an epoch that only ends the one before it.
const NOBODY: &str = "nobody: the owner before had taken over before a loss of batches was known";

pub(in crate::store) async fn acquire<D: Dialect>(
    connection: &mut Connection<D>,
    partitions: &[u16],
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Ownership>, Error> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    D::run(connection, D::BEGIN_WRITING).await?;
    let ownerships = take_over::<D>(connection, partitions, owner, now).await?;
    crash_point!("takeover.before_commit");
    D::run(connection, "COMMIT").await?;
    crash_point!("takeover.after_commit");
    Ok(ownerships)
}

/// Begins the next epoch of these partitions, inside a local transaction.
async fn take_over<D: Dialect>(
    connection: &mut Connection<D>,
    partitions: &[u16],
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Ownership>, Error> {
    let nonces: BTreeMap<u16, u32> =
        partitions.iter().map(|partition| (*partition, rand::random())).collect();
    // UPDATE first: it locks the rows, so the following read sees exactly what was written.
    let mut query = Query::new("UPDATE `partition` SET epoch = epoch + 1, owner = ?").bind(owner);
    query.push(", nonce = CASE `partition`");
    for (partition, nonce) in &nonces {
        query.push(" WHEN ").push_bind(*partition).push(" THEN ").push_bind(*nonce);
    }
    query.push(" END WHERE `partition` IN (").push_list(nonces.keys().copied());
    D::execute(connection, query).await?;
    let recorded = recorded::<D>(connection).await?;
    let lossy = super::read::lossy::<D>(connection).await?;
    let ownership = |partition: &u16| match recorded.get(partition) {
        Some(PartitionRow { epoch, nonce, .. }) => Ok(Ownership {
            partition: *partition,
            epoch: *epoch,
            nonce: *nonce,
            lost_from: lossy.get(partition).map(|(oldest, _)| *oldest),
            lost_through: lossy.get(partition).map(|(_, newest)| *newest),
        }),
        None => Err(Error::Corrupt(format!("the store has no row for partition {partition}"))),
    };
    let ownerships = partitions.iter().map(ownership).collect::<Result<Vec<_>, _>>()?;
    // Close the earlier epochs. A purge by their owner writes the same row, so one of the two waits for the other. If their
    // owner knows of more batches than are recorded, those are lost. It finds that out when it learns that it was replaced.
    let mut query =
        Query::new("UPDATE epoch SET ended_at = ?, batches = CASE `partition`").bind(now);
    for (partition, PartitionRow { position, .. }) in &recorded {
        let position = position.cast_signed();
        query.push(" WHEN ").push_bind(*partition).push(" THEN ").push_bind(position);
    }
    query.push(" END WHERE ended_at IS NULL AND `partition` IN (");
    query.push_list(nonces.keys().copied());
    D::execute(connection, query).await?;
    let mut query = Query::new("UPDATE `partition` SET latest_batch = 0 WHERE `partition` IN (");
    query.push_list(nonces.keys().copied());
    D::execute(connection, query).await?;
    let mut query =
        Query::new("INSERT INTO epoch (`partition`, epoch, nonce, owner, taken_at) VALUES ");
    for (n, Ownership { partition, epoch, nonce, .. }) in ownerships.iter().enumerate() {
        query.push(if n == 0 { "(" } else { ", (" });
        query.push_list([
            Cell::from(*partition),
            Cell::from(*epoch),
            Cell::from(*nonce),
            Cell::from(owner),
            Cell::from(now),
        ]);
    }
    match D::execute(connection, query).await {
        Ok(_) => Ok(ownerships),
        // A member of a cluster that is behind has just received another takeover.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
            Err(Error::unavailable(format!("somebody else begins the same epoch: {error}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Appends a batch. Damage is reported only if a second check, on a new connection, finds it too: the first connection may have
/// led to a server that is behind.
pub(in crate::store) async fn append<D: Dialect>(
    connections: &Connections<D>,
    batch: &Batch,
    counter: &Counter,
) -> Result<Appended, Error> {
    let mut looked_again = false;
    loop {
        let append = async |connection: &mut Connection<D>| {
            append_once::<D>(connection, batch, counter).await
        };
        match connections.run(append).await? {
            Appended::Fenced(fenced) => {
                // The new owner may have taken over on a server that lacked the last batches.
                let note = async |connection: &mut Connection<D>| {
                    note_losses::<D>(connection, batch, &fenced).await
                };
                for Lost { partition, epoch, batches } in connections.run(note).await? {
                    error!(
                        partition,
                        epoch, batches, "batches were lost before another coordinator took over"
                    );
                }
                return Ok(Appended::Fenced(fenced));
            }
            Appended::Damaged(damaged) if !looked_again => {
                for Damage { partition, what, .. } in &damaged {
                    warn!(partition, what, "a batch does not fit what is recorded; looking again");
                }
                connections.close_idle();
                tokio::time::sleep(LOOK_AGAIN_AFTER).await;
                looked_again = true;
            }
            Appended::Damaged(damaged) => {
                let partitions: Vec<_> = damaged.iter().map(|damage| damage.partition).collect();
                let note = async |connection: &mut Connection<D>| {
                    note_losses::<D>(connection, batch, &partitions).await
                };
                connections.run(note).await?;
                return Ok(Appended::Damaged(damaged));
            }
            Appended::Durable => return Ok(Appended::Durable),
        }
    }
}

async fn append_once<D: Dialect>(
    connection: &mut Connection<D>,
    batch: &Batch,
    counter: &Counter,
) -> Result<Appended, Error> {
    let guards = &batch.guards;
    if guards.is_empty() {
        return Err(Error::Corrupt("a batch without a guard".to_owned()));
    }
    // UPDATE first: it waits for an earlier attempt whose COMMIT is still in flight.
    counter.positions();
    let moved = match D::write(connection, batch, End::Commit, counter).await? {
        Wrote::All => {
            crash_point!("batch.after_commit");
            return Ok(Appended::Durable);
        }
        Wrote::Positions(moved) => moved,
        Wrote::NotAllRows(noticed) => {
            // Some of the batch's own rows are written by now. Roll back and move the positions again, so that nobody else can
            // write. Then a read shows the rows as they were before the batch.
            D::run(connection, "ROLLBACK").await?;
            let no_rows = Batch { guards: guards.clone(), writes: Vec::new() };
            match D::write(connection, &no_rows, End::StayOpen, counter).await? {
                Wrote::Positions(moved) => moved, // somebody has taken over meanwhile
                Wrote::All | Wrote::NotAllRows(_) => {
                    let mut misfits = misfits::<D>(connection, batch).await?;
                    D::run(connection, "ROLLBACK").await?;
                    if misfits.is_empty() {
                        misfits = refused_rows::<D>(connection, batch, counter).await?;
                    }
                    if misfits.is_empty() {
                        return Ok(Damage::of_batch(batch, &noticed));
                    }
                    return Ok(Appended::Damaged(Damage::of_rows(misfits)));
                }
            }
        }
    };
    // Read in the same local transaction, while the moved rows are still locked.
    let recorded = recorded::<D>(connection).await?;
    D::run(connection, "ROLLBACK").await?;
    // On a member of a cluster, another member's batch can come between the UPDATE and the read. The two then contradict each other.
    Ok(match judge(batch, |partition| recorded.get(&partition).copied()) {
        Some(Appended::Durable) if moved > 0 => {
            Damage::of_batch(batch, "half of the batch is recorded")
        }
        Some(appended) => appended,
        None => Damage::of_batch(batch, "the guards match, but the UPDATE changed no row"),
    })
}

/// The transactions of a batch whose records contradict it, in words, by partition.
async fn misfits<D: Dialect>(
    connection: &mut Connection<D>,
    batch: &Batch,
) -> Result<Vec<(u16, String)>, Error> {
    let mut misfits = Vec::new();
    for writes in batch.writes.chunks(MISFITS_AT_A_TIME) {
        let mut query =
            Query::new("SELECT xid, state, branch_count FROM global_transaction WHERE xid IN (");
        query.push_list(writes.iter().map(|write| write.global.xid));
        query.persistent = false;
        let rows: Vec<(Vec<u8>, i64, Option<i64>)> = D::fetch(connection, query).await?;
        let mut recorded = BTreeMap::new();
        for (xid, state, branches) in rows {
            let branches = branches.and_then(|count| usize::try_from(count).ok());
            let row = record::state(state).map(|state| Row { state, branches });
            recorded.insert(record::xid(&xid)?, row);
        }
        for write in writes {
            let xid = write.global.xid;
            let misfit = match recorded.get(&xid).copied() {
                Some(None) => Some(format!("transaction {xid} has an impossible `state`")),
                recorded => write.misfit(recorded.flatten()),
            };
            misfits.extend(misfit.map(|misfit| (xid.partition, misfit)));
        }
        let key =
            |write: &Write| (write.head == Head::Insert).then_some(write.global.key).flatten();
        for (write, key) in writes.iter().filter_map(|write| Some((write, key(write)?))) {
            let query = Query::new("SELECT xid FROM idempotency WHERE key_hash = ?");
            let query = query.bind(key.hash.to_vec());
            let taken: Option<(Vec<u8>,)> = D::fetch(connection, query).await?.pop();
            if let Some((other,)) = taken {
                let other = record::xid(&other).map_or_else(
                    |_| "a transaction with an impossible xid".to_owned(),
                    |other| other.to_string(),
                );
                let xid = write.global.xid;
                let misfit =
                    format!("the key of transaction {xid} belongs to {other} in the store");
                misfits.push((xid.partition, misfit));
            }
        }
    }
    Ok(misfits)
}

/// The partitions with a row that the database refuses for what is in it. One statement may hold rows of several partitions, so
/// the rows of each partition are tried alone. COMMIT is never sent here, so nothing stays.
async fn refused_rows<D: Dialect>(
    connection: &mut Connection<D>,
    batch: &Batch,
    counter: &Counter,
) -> Result<Vec<(u16, String)>, Error> {
    let mut refused = Vec::new();
    for guard in &batch.guards {
        let of_partition = |write: &&Write| write.global.xid.partition == guard.partition;
        let writes = batch.writes.iter().filter(of_partition).cloned().collect();
        let alone = Batch { guards: vec![*guard], writes };
        match D::write(connection, &alone, End::StayOpen, counter).await? {
            Wrote::NotAllRows(what) => {
                refused.push((guard.partition, format!("the database refuses its rows: {what}")));
            }
            Wrote::All | Wrote::Positions(_) => {}
        }
        D::run(connection, "ROLLBACK").await?;
    }
    Ok(refused)
}

/// If these partitions lack batches that the batch's owner knows to be durable: marks their epoch as lost, because callers may
/// have been told about the lost changes, and ends the present ownership. Whoever owns the partition has taken over without
/// knowing of the loss, and might decide otherwise what was decided. Returns what is lost.
async fn note_losses<D: Dialect>(
    connection: &mut Connection<D>,
    batch: &Batch,
    partitions: &[u16],
) -> Result<Vec<Lost>, Error> {
    let mut noted = Vec::new();
    D::run(connection, D::BEGIN_WRITING).await?;
    for guard in batch.guards.iter().filter(|guard| partitions.contains(&guard.partition)) {
        let partition = guard.partition;
        // Lock the row: neither a batch nor a takeover comes between the look and the mark.
        let lock = Query::new("UPDATE `partition` SET owner = owner WHERE `partition` = ?");
        D::execute(connection, lock.bind(partition)).await?;
        let Some((epoch, batches)) = lost::<D>(connection, *guard).await? else { continue };
        let mark = Query::new("UPDATE epoch SET lost = ? WHERE `partition` = ? AND epoch = ?");
        let mark = mark.bind(i64::try_from(batches).unwrap_or(i64::MAX));
        D::execute(connection, mark.bind(partition).bind(epoch)).await?;
        let now = super::read::clock::<D>(connection).await?;
        take_over::<D>(connection, &[partition], NOBODY, now).await?;
        let free = Query::new("UPDATE `partition` SET owner = NULL WHERE `partition` = ?");
        D::execute(connection, free.bind(partition)).await?;
        noted.push(Lost { partition, epoch, batches });
    }
    D::run(connection, "COMMIT").await?;
    Ok(noted)
}

/// What this server has lost of a batch's owner, as [`loss`] says.
pub(in crate::store) async fn lost<D: Dialect>(
    connection: &mut Connection<D>,
    guard: Guard,
) -> Result<Option<(u32, u64)>, Error> {
    let query = Query::new(
        "SELECT e.epoch, e.nonce, COALESCE(e.batches, p.latest_batch), e.lost FROM epoch AS e \
         JOIN `partition` AS p ON p.`partition` = e.`partition` \
         WHERE e.`partition` = ? AND e.epoch <= ? ORDER BY e.epoch DESC LIMIT 2",
    );
    let query = query.bind(guard.partition).bind(guard.epoch);
    let rows: Vec<(u32, u32, i64, Option<i64>)> = D::fetch(connection, query).await?;
    let epoch = |(epoch, nonce, batches, lost): (_, _, i64, Option<i64>)| Epoch {
        epoch,
        nonce,
        batches: batches.cast_unsigned(),
        lost: lost.is_some(),
    };
    Ok(loss(guard, &rows.into_iter().map(epoch).collect::<Vec<_>>()))
}

/// A loss, for the log.
struct Lost {
    partition: u16,
    epoch: u32,
    batches: u64,
}

/// Marks the epochs of a store that was restored from an older copy: callers may have been told about what it lacks. Nobody owns it
/// afterwards. Returns how many epochs were marked.
pub(in crate::store) async fn mark_restored<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<u64, Error> {
    D::run(connection, D::BEGIN_WRITING).await?;
    let free = "UPDATE `partition` SET owner = NULL";
    D::execute(connection, Query::new(free)).await?;
    // 0: nobody knows how many batches are missing.
    let mark = "UPDATE epoch SET lost = 0 WHERE lost IS NULL AND epoch <= \
                (SELECT p.epoch FROM `partition` AS p WHERE p.`partition` = epoch.`partition`)";
    let marked = D::execute(connection, Query::new(mark)).await?;
    D::run(connection, "COMMIT").await?;
    Ok(marked)
}

/// The recorded owner of each partition.
pub(in crate::store) async fn seats<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<Vec<Seat>, Error> {
    let query =
        Query::new("SELECT `partition`, epoch, nonce, latest_batch, owner FROM `partition`");
    let rows: Vec<(u16, u32, u32, i64, Option<String>)> = D::fetch(connection, query).await?;
    let seat = |(partition, epoch, nonce, position, owner): (_, _, _, i64, _)| Seat {
        partition,
        epoch,
        nonce,
        position: position.cast_unsigned(),
        owner,
    };
    Ok(rows.into_iter().map(seat).collect())
}

async fn recorded<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<BTreeMap<u16, PartitionRow>, Error> {
    let recorded = |seat: Seat| {
        let Seat { partition, epoch, nonce, position, owner: _ } = seat;
        (partition, PartitionRow { epoch, nonce, position })
    };
    Ok(seats::<D>(connection).await?.into_iter().map(recorded).collect())
}

/// Deletes the transactions that [`super::read::finished`] found, and records how far it went. Returns how many were deleted. `None`:
/// the partition has another owner.
pub(in crate::store) async fn purge<D: Dialect>(
    connection: &mut Connection<D>,
    Ownership { partition, epoch, nonce, .. }: Ownership,
    before: Timestamp,
    Finished { ranges, some_have_keys }: &Finished,
) -> Result<Option<u64>, Error> {
    let Some((_, through)) = ranges.last().copied() else { return Ok(Some(0)) };
    D::run(connection, D::BEGIN_WRITING).await?;
    // Do not lock the partition's own row: its batches would wait until the rows are deleted.
    let guard = Query::new(
        "UPDATE epoch SET purge_steps = purge_steps + 1 WHERE `partition` = ? AND epoch = ? AND nonce = ? AND ended_at IS NULL",
    );
    let guard = guard.bind(partition).bind(epoch).bind(nonce);
    if D::execute(connection, guard).await? == 0 {
        D::run(connection, "ROLLBACK").await?;
        return Ok(None);
    }
    let mark = Query::new(D::UPSERT_PURGED).bind(partition).bind(through).bind(through);
    D::execute(connection, mark).await?;
    let mut deleted = 0;
    for (first, last) in ranges {
        // The last one alone: a database also locks the row after a range, which may be one that others are changing.
        if first < last {
            let range = Query::new("g.xid >= ? AND g.xid < ?").bind(*first).bind(*last);
            deleted += delete::<D>(connection, &range, before, *some_have_keys).await?;
        }
        let last = Query::new("g.xid = ?").bind(*last);
        deleted += delete::<D>(connection, &last, before, *some_have_keys).await?;
    }
    D::run(connection, "COMMIT").await?;
    Ok(Some(deleted))
}

/// Deletes the transactions that fit the condition and finished before that moment, with their branches and keys. Returns how many.
async fn delete<D: Dialect>(
    connection: &mut Connection<D>,
    which: &Query,
    before: Timestamp,
    some_have_keys: bool,
) -> Result<u64, Error> {
    let query = |sql: &str| {
        let sql = sql.replace("{xids}", &which.sql);
        Query { sql, values: which.values.clone(), persistent: true }.bind(before)
    };
    if some_have_keys {
        D::execute(connection, query(D::DELETE_KEYS)).await?;
    }
    D::execute(connection, query(D::DELETE_BRANCHES)).await?;
    Ok(D::execute(connection, query(D::DELETE_TRANSACTIONS)).await?)
}

pub(in crate::store) async fn release<D: Dialect>(
    connection: &mut Connection<D>,
    ownerships: &[Ownership],
) -> Result<(), Error> {
    D::run(connection, D::BEGIN_WRITING).await?;
    for Ownership { partition, epoch, nonce, .. } in ownerships {
        let query = Query::new(
            "UPDATE `partition` SET owner = NULL WHERE `partition` = ? AND epoch = ? AND nonce = ?",
        );
        D::execute(connection, query.bind(*partition).bind(*epoch).bind(*nonce)).await?;
    }
    crash_point!("hand_back.before_commit");
    D::run(connection, "COMMIT").await?;
    crash_point!("hand_back.after_commit");
    Ok(())
}
