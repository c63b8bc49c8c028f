//! Everything that changes a store in an SQL database: compiled once in the module of each, which says what differs between them.
//! Each function is one local transaction.

use std::collections::BTreeMap;

use handfast_proto::crash_point;
use sqlx::{Arguments as _, Connection as _, Database, QueryBuilder};

use super::{
    super::{
        Appended, Batch, Counter, Error, Guard, Ownership, Seat, Write, judge,
        record::{self, Cell, Rows},
    },
    BEGIN_WRITING, Connection, Db, PADDED_UPDATES, UPSERT_PURGED, delete, push_update,
    read::Finished,
};
use crate::transaction::Timestamp;

/// Rows of one statement. A few fixed sizes, so that statements are prepared once and reused.
pub(super) const ROWS: [usize; 8] = [64, 32, 16, 8, 4, 3, 2, 1];
/// Statements that a connection keeps prepared: more than there are shapes of rows, each in all those sizes. One that is prepared
/// anew waits for TCP's delayed acknowledgement, 40 ms.
pub(super) const STATEMENTS_MAX: usize = 256;
/// What a cell takes in the text of a statement, and as its value, as a rule.
const CELL_BYTES: usize = 32;
/// Guards of one statement.
pub(super) const GUARDS: [usize; 3] = [1, 4, 16];

pub(super) async fn acquire(
    connection: &mut Connection,
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Ownership>, Error> {
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    // First the UPDATE: from here on the rows are ours, and what is read is what was written.
    sqlx::query("UPDATE `partition` SET epoch = epoch + 1, position = 0, owner = ?")
        .bind(owner)
        .execute(&mut *tx)
        .await?;
    let recorded = recorded(&mut tx).await?;
    let ownerships: Vec<_> = recorded
        .into_iter()
        .map(|(partition, (epoch, _))| Ownership { partition, epoch, nonce: rand::random() })
        .collect();
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
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    // First the UPDATE: it waits for an earlier attempt whose COMMIT is still under way.
    let moved = move_positions(&mut tx, &batch.guards).await?;
    counter.statement(0);
    if moved == batch.guards.len() as u64 {
        write_all(&mut tx, &batch.writes, counter).await?;
        crash_point!("batch.before_commit");
        tx.commit().await?;
        crash_point!("batch.after_commit");
        return Ok(Appended::Durable);
    }
    // Inside the same local transaction: what others have recorded there stays.
    let recorded = recorded(&mut tx).await?;
    tx.rollback().await?;
    match judge(batch, |partition| recorded.get(&partition).copied())? {
        Some(Appended::Durable) if moved > 0 => {
            Err(Error::Corrupt(format!("half of a batch is recorded: {:?}", batch.guards)))
        }
        Some(appended) => Ok(appended),
        None => Err(Error::Corrupt(format!("a batch fits, and is not taken: {:?}", batch.guards))),
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

/// Moves the partitions' positions by one, where epoch and position are as the guards say. Returns how many it has moved.
async fn move_positions(tx: &mut Connection, guards: &[Guard]) -> Result<u64, Error> {
    let last = guards.last().ok_or_else(|| Error::Corrupt("a batch without a guard".to_owned()))?;
    let size = GUARDS.into_iter().find(|size| *size >= guards.len()).unwrap_or(guards.len());
    let mut query = QueryBuilder::new("UPDATE `partition` SET position = position + 1 WHERE ");
    // Said twice it still counts once.
    for (n, guard) in guards.iter().chain(std::iter::repeat(last)).take(size).enumerate() {
        query.push(if n == 0 { "(`partition` = " } else { " OR (`partition` = " });
        query.push_bind(guard.partition).push(" AND epoch = ").push_bind(guard.epoch);
        query.push(" AND position = ").push_bind(guard.position.cast_signed() - 1).push(")");
    }
    Ok(query.build().execute(&mut *tx).await?.rows_affected())
}

/// Writes all of them, and checks that each row counted.
async fn write_all(tx: &mut Connection, writes: &[Write], counter: &Counter) -> Result<(), Error> {
    for rows in record::rows(writes) {
        let all: Vec<_> = rows.cells.chunks(rows.columns.len()).collect();
        let mut left = &all[..];
        while !left.is_empty() {
            let count = if rows.keys > 0 && PADDED_UPDATES {
                left.len().min(ROWS[0])
            } else {
                ROWS.into_iter().find(|size| *size <= left.len()).expect("the last is 1")
            };
            let chunk;
            (chunk, left) = left.split_at(count);
            // A row that is to be changed changes once, however often it is said.
            let size =
                ROWS.into_iter().rfind(|size| *size >= count).expect("the first is the largest");
            let padded: Vec<_> = chunk.iter().copied().cycle().take(size).collect();
            let mut query = room_for(size * rows.columns.len());
            if rows.keys == 0 {
                push_insert(&mut query, &rows, &padded);
            } else {
                push_update(&mut query, &rows, &padded);
            }
            let written = query.build().execute(&mut *tx).await?.rows_affected();
            counter.statement(count);
            if written != count as u64 {
                return Err(Error::Corrupt(format!(
                    "{written} of {count} rows of `{}` were there to be changed",
                    rows.table
                )));
            }
        }
    }
    Ok(())
}

/// A query with room for the text and the values of so many cells, so that neither is copied while it grows.
fn room_for(cells: usize) -> QueryBuilder<Db> {
    let mut arguments = <Db as Database>::Arguments::default();
    arguments.reserve(cells, cells * CELL_BYTES);
    QueryBuilder::with_arguments(String::with_capacity(cells * CELL_BYTES), arguments)
}

fn push_insert(query: &mut QueryBuilder<Db>, shape: &Rows, rows: &[&[Cell]]) {
    query.push("INSERT INTO ").push(shape.table).push(" (").push(shape.columns.join(", "));
    query.push(") VALUES ");
    push_values(query, rows);
}

/// `(…), (…)`
pub(super) fn push_values(query: &mut QueryBuilder<Db>, rows: &[&[Cell]]) {
    for (n, row) in rows.iter().enumerate() {
        query.push(if n == 0 { "(" } else { "), (" });
        for (n, cell) in row.iter().enumerate() {
            query.push(if n == 0 { "" } else { ", " });
            push_cell(query, cell);
        }
    }
    query.push(")");
}

pub(super) fn push_cell(query: &mut QueryBuilder<Db>, cell: &Cell) {
    match cell {
        Cell::Int(value) => query.push_bind(value),
        Cell::Text(value) => query.push_bind(value),
        Cell::Bytes(value) => query.push_bind(value),
    };
}

/// Deletes what [`super::read::finished`] has found, and remembers how far it went.
pub(super) async fn purge(
    connection: &mut Connection,
    partition: u16,
    finished: &[Finished],
) -> Result<(), Error> {
    let Some(through) = finished.iter().map(|finished| finished.xid).max() else { return Ok(()) };
    let xids: Vec<_> = finished.iter().map(|finished| finished.xid.to_bytes().to_vec()).collect();
    let keys: Vec<_> = finished.iter().filter_map(|finished| finished.key_hash.clone()).collect();
    let mut tx = connection.begin_with(BEGIN_WRITING).await?;
    delete(&mut tx, "idempotency", "key_hash", keys).await?;
    delete(&mut tx, "branch", "xid", xids.clone()).await?;
    delete(&mut tx, "global_transaction", "xid", xids).await?;
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
