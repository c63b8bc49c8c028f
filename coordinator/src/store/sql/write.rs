//! Everything that changes a store in an SQL database: compiled once in the module of each, which says what differs between them.
//! Each function is one local transaction.

use std::collections::BTreeMap;

use handfast_proto::{Xid, crash_point};
use sqlx::{Connection as _, QueryBuilder};

use super::{
    super::{Appended, Batch, Counter, Error, Ownership, Seat, judge},
    BEGIN_WRITING, Connection, Db, UPSERT_PURGED, batch,
};
use crate::transaction::Timestamp;

pub(super) async fn acquire(
    connection: &mut Connection,
    partitions: &[u16],
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Ownership>, Error> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    // First the UPDATE: from here on the rows are ours, and what is read is what was written.
    let mut query =
        QueryBuilder::<Db>::new("UPDATE `partition` SET epoch = epoch + 1, position = 0, owner = ");
    query.push_bind(owner.to_owned()).push(" WHERE `partition` IN (");
    let mut named = query.separated(", ");
    for partition in partitions {
        named.push_bind(*partition);
    }
    query.push(")").build().persistent(false).execute(&mut *tx).await?;
    let recorded = recorded(&mut tx).await?;
    let ownership = |partition: &u16| match recorded.get(partition) {
        Some((epoch, _)) => {
            Ok(Ownership { partition: *partition, epoch: *epoch, nonce: rand::random() })
        }
        None => Err(Error::Corrupt(format!("the store has no row for partition {partition}"))),
    };
    let ownerships = partitions.iter().map(ownership).collect::<Result<Vec<_>, _>>()?;
    for Ownership { partition, epoch, nonce } in &ownerships {
        sqlx::query(
            "INSERT INTO epoch (`partition`, epoch, nonce, owner, taken_at) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(partition)
        .bind(epoch)
        .bind(nonce)
        .bind(owner)
        .bind(now.0)
        .execute(&mut *tx)
        .await?;
    }
    crash_point!("takeover.before_commit");
    tx.commit().await?;
    crash_point!("takeover.after_commit");
    Ok(ownerships)
}

pub(super) async fn append(
    connection: &mut Connection,
    batch: &Batch,
    counter: &Counter,
) -> Result<Appended, Error> {
    let guards = &batch.guards;
    if guards.is_empty() {
        return Err(Error::Corrupt("a batch without a guard".to_owned()));
    }
    // First the UPDATE: it waits for an earlier attempt whose COMMIT is still under way.
    let moved = batch::write(connection, batch, counter).await?;
    counter.statement(0);
    if moved == guards.len() as u64 {
        crash_point!("batch.before_commit");
        sqlx::raw_sql("COMMIT").execute(connection).await?;
        crash_point!("batch.after_commit");
        return Ok(Appended::Durable);
    }
    // Inside the same local transaction: what others have recorded there stays.
    let recorded = recorded(connection).await?;
    sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    match judge(batch, |partition| recorded.get(&partition).copied())? {
        Some(Appended::Durable) if moved > 0 => {
            Err(Error::Corrupt(format!("half of a batch is recorded: {guards:?}")))
        }
        Some(appended) => Ok(appended),
        None => Err(Error::Corrupt(format!("a batch fits, and is not taken: {guards:?}"))),
    }
}

/// Who owns the partitions.
pub(super) async fn seats(connection: &mut Connection) -> Result<Vec<Seat>, Error> {
    let rows: Vec<(u16, u32, i64, Option<String>)> =
        sqlx::query_as("SELECT `partition`, epoch, position, owner FROM `partition`")
            .fetch_all(connection)
            .await?;
    let seat = |(partition, epoch, position, owner): (_, _, i64, _)| Seat {
        partition,
        epoch,
        position: position.cast_unsigned(),
        owner,
    };
    Ok(rows.into_iter().map(seat).collect())
}

/// Epoch and position of every partition.
async fn recorded(tx: &mut Connection) -> Result<BTreeMap<u16, (u32, u64)>, Error> {
    let seats = seats(tx).await?.into_iter();
    Ok(seats.map(|seat| (seat.partition, (seat.epoch, seat.position))).collect())
}

/// Deletes what [`super::read::finished`] has found, and remembers how far it went.
pub(super) async fn purge(
    connection: &mut Connection,
    partition: u16,
    finished: &[Xid],
) -> Result<(), Error> {
    let Some(through) = finished.iter().max() else { return Ok(()) };
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    batch::delete(&mut tx, finished).await?;
    let through = through.to_bytes().to_vec();
    sqlx::query(UPSERT_PURGED)
        .bind(partition)
        .bind(through.clone())
        .bind(through)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

pub(super) async fn release(
    connection: &mut Connection,
    ownerships: &[Ownership],
) -> Result<(), Error> {
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    for ownership in ownerships {
        sqlx::query("UPDATE `partition` SET owner = NULL WHERE `partition` = ? AND epoch = ?")
            .bind(ownership.partition)
            .bind(ownership.epoch)
            .execute(&mut *tx)
            .await?;
    }
    crash_point!("hand_back.before_commit");
    tx.commit().await?;
    crash_point!("hand_back.after_commit");
    Ok(())
}
