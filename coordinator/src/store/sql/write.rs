//! Everything that changes a store in an SQL database. Each function is one local transaction. After an error that one is still open:
//! whoever lent the connection closes it.

use std::collections::BTreeMap;

use handfast_proto::{Xid, crash_point};

use super::{Connection, Counter, Dialect, Query};
use crate::{
    store::{Appended, Batch, Error, Ownership, Seat, judge},
    transaction::Timestamp,
};

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
    // First the UPDATE: from here on the rows are ours, and what is read is what was written.
    let mut query =
        Query::new("UPDATE `partition` SET epoch = epoch + 1, position = 0, owner = ?").bind(owner);
    query.push(" WHERE `partition` IN (").push_list(partitions.iter().copied());
    D::execute(connection, query).await?;
    let recorded = recorded::<D>(connection).await?;
    let ownership = |partition: &u16| match recorded.get(partition) {
        Some((epoch, _)) => {
            Ok(Ownership { partition: *partition, epoch: *epoch, nonce: rand::random() })
        }
        None => Err(Error::Corrupt(format!("the store has no row for partition {partition}"))),
    };
    let ownerships = partitions.iter().map(ownership).collect::<Result<Vec<_>, _>>()?;
    for Ownership { partition, epoch, nonce } in &ownerships {
        let query = Query::new(
            "INSERT INTO epoch (`partition`, epoch, nonce, owner, taken_at) VALUES (?, ?, ?, ?, ?)",
        );
        let query = query.bind(*partition).bind(*epoch).bind(*nonce).bind(owner).bind(now);
        D::execute(connection, query).await?;
    }
    crash_point!("takeover.before_commit");
    D::run(connection, "COMMIT").await?;
    crash_point!("takeover.after_commit");
    Ok(ownerships)
}

pub(in crate::store) async fn append<D: Dialect>(
    connection: &mut Connection<D>,
    batch: &Batch,
    counter: &Counter,
) -> Result<Appended, Error> {
    let guards = &batch.guards;
    if guards.is_empty() {
        return Err(Error::Corrupt("a batch without a guard".to_owned()));
    }
    // First the UPDATE: it waits for an earlier attempt whose COMMIT is still under way.
    let moved = D::write(connection, batch, counter).await?;
    counter.statement(0); // that UPDATE: the rows of partitions are not counted
    if moved == guards.len() as u64 {
        crash_point!("batch.before_commit");
        D::run(connection, "COMMIT").await?;
        crash_point!("batch.after_commit");
        return Ok(Appended::Durable);
    }
    // Inside the same local transaction: what others have recorded there stays.
    let recorded = recorded::<D>(connection).await?;
    D::run(connection, "ROLLBACK").await?;
    match judge(batch, |partition| recorded.get(&partition).copied())? {
        Some(Appended::Durable) if moved > 0 => {
            Err(Error::Corrupt(format!("half of a batch is recorded: {guards:?}")))
        }
        Some(appended) => Ok(appended),
        None => Err(Error::Corrupt(format!("a batch fits, and is not taken: {guards:?}"))),
    }
}

/// Who owns the partitions.
pub(in crate::store) async fn seats<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<Vec<Seat>, Error> {
    let query = Query::new("SELECT `partition`, epoch, position, owner FROM `partition`");
    let rows: Vec<(u16, u32, i64, Option<String>)> = D::fetch(connection, query).await?;
    let seat = |(partition, epoch, position, owner): (_, _, i64, _)| Seat {
        partition,
        epoch,
        position: position.cast_unsigned(),
        owner,
    };
    Ok(rows.into_iter().map(seat).collect())
}

/// Epoch and position of every partition.
async fn recorded<D: Dialect>(
    connection: &mut Connection<D>,
) -> Result<BTreeMap<u16, (u32, u64)>, Error> {
    let seats = seats::<D>(connection).await?.into_iter();
    Ok(seats.map(|seat| (seat.partition, (seat.epoch, seat.position))).collect())
}

/// Deletes what [`super::read::finished`] has found, and remembers how far it went.
pub(in crate::store) async fn purge<D: Dialect>(
    connection: &mut Connection<D>,
    partition: u16,
    finished: &[Xid],
) -> Result<(), Error> {
    let Some(through) = finished.iter().max().copied() else { return Ok(()) };
    D::run(connection, D::BEGIN_WRITING).await?;
    D::delete(connection, finished).await?;
    let mark = Query::new(D::UPSERT_PURGED).bind(partition).bind(through).bind(through);
    D::execute(connection, mark).await?;
    D::run(connection, "COMMIT").await?;
    Ok(())
}

pub(in crate::store) async fn release<D: Dialect>(
    connection: &mut Connection<D>,
    ownerships: &[Ownership],
) -> Result<(), Error> {
    D::run(connection, D::BEGIN_WRITING).await?;
    for Ownership { partition, epoch, .. } in ownerships {
        let query =
            Query::new("UPDATE `partition` SET owner = NULL WHERE `partition` = ? AND epoch = ?");
        D::execute(connection, query.bind(*partition).bind(*epoch)).await?;
    }
    crash_point!("hand_back.before_commit");
    D::run(connection, "COMMIT").await?;
    crash_point!("hand_back.after_commit");
    Ok(())
}
