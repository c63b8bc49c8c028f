//! Everything that changes the embedded store. Each function is one local transaction.

use std::collections::BTreeMap;

use handfast_proto::Xid;
use sqlx::{Connection as _, QueryBuilder, Sqlite, SqliteConnection, query_builder::Separated};

use super::super::{
    Appended, Batch, Error, Head, Ownership, PARTITIONS, Write, judge,
    record::{BranchRow, TransactionRow},
};
use crate::transaction::{BranchState, Decision, Timestamp};

/// Rows of one statement. A few fixed sizes, so that statements are prepared once and reused.
const ROWS: [usize; 4] = [64, 16, 4, 1];

const BEGIN: &str = "BEGIN IMMEDIATE";

pub(super) async fn acquire(
    connection: &mut SqliteConnection,
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Ownership>, Error> {
    let mut tx = connection.begin_with(BEGIN).await?;
    let mut ownerships = Vec::new();
    for partition in 0..PARTITIONS {
        let nonce: u32 = rand::random();
        let epoch: Option<u32> = sqlx::query_scalar(
            "UPDATE partition SET epoch = epoch + 1, position = 0, owner = ? WHERE partition = ? RETURNING epoch",
        )
        .bind(owner)
        .bind(partition)
        .fetch_optional(&mut *tx)
        .await?;
        let epoch =
            epoch.ok_or_else(|| Error::Corrupt(format!("partition {partition} has no row")))?;
        sqlx::query(
            "INSERT INTO epoch (partition, epoch, nonce, owner, taken_at) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(partition)
        .bind(epoch)
        .bind(nonce)
        .bind(owner)
        .bind(now.0)
        .execute(&mut *tx)
        .await?;
        ownerships.push(Ownership { partition, epoch, nonce });
    }
    tx.commit().await?;
    Ok(ownerships)
}

pub(super) async fn append(
    connection: &mut SqliteConnection,
    batch: &Batch,
) -> Result<Appended, Error> {
    // IMMEDIATE: from here on nobody else writes, so what is read now still holds at COMMIT.
    let mut tx = connection.begin_with(BEGIN).await?;
    let rows: Vec<(u16, u32, i64)> =
        sqlx::query_as("SELECT partition, epoch, position FROM partition")
            .fetch_all(&mut *tx)
            .await?;
    let recorded: BTreeMap<_, _> = rows
        .into_iter()
        .map(|(partition, epoch, position)| (partition, (epoch, position.cast_unsigned())))
        .collect();
    if let Some(appended) = judge(batch, |partition| recorded.get(&partition).copied())? {
        tx.rollback().await?;
        return Ok(appended);
    }
    for guard in &batch.guards {
        let moved = sqlx::query(
            "UPDATE partition SET position = ?3 WHERE partition = ?1 AND epoch = ?2 AND position = ?3 - 1",
        )
        .bind(guard.partition)
        .bind(guard.epoch)
        .bind(guard.position.cast_signed())
        .execute(&mut *tx)
        .await?;
        expect_rows(moved.rows_affected(), 1, "partition")?;
    }
    write_all(&mut tx, &batch.writes).await?;
    tx.commit().await?;
    Ok(Appended::Durable)
}

async fn write_all(tx: &mut SqliteConnection, writes: &[Write]) -> Result<(), Error> {
    let heads = |head: Head| {
        (writes.iter()).filter(move |write| write.head == head).map(|write| &*write.global)
    };
    insert_transactions(tx, heads(Head::Insert).map(TransactionRow::of).collect()).await?;
    insert_keys(
        tx,
        heads(Head::Insert).map(TransactionRow::of).filter(|row| row.key_hash.is_some()).collect(),
    )
    .await?;
    update_transactions(tx, heads(Head::Update).map(TransactionRow::of).collect()).await?;
    let new = writes.iter().flat_map(|write| {
        (write.new_branches..write.global.branches.len())
            .map(|position| BranchRow::of(&write.global, position))
    });
    insert_branches(tx, new.collect()).await?;
    let changed = writes.iter().flat_map(|write| {
        let known = write.changed_branches.iter().filter(|position| *position < write.new_branches);
        known.map(|position| BranchRow::of(&write.global, position))
    });
    update_branches(tx, changed.collect()).await?;
    insert_resolutions(tx, writes).await
}

async fn insert_transactions(
    tx: &mut SqliteConnection,
    rows: Vec<TransactionRow>,
) -> Result<(), Error> {
    let sql = "INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, decided_at, \
               finished_at, due_at, cancel_cause, cancel_branch_id, cancel_reason, refusal, key_hash) ";
    in_chunks(tx, "global_transaction", rows, sql, "", |mut values, row| {
        values
            .push_bind(row.xid)
            .push_bind(row.name)
            .push_bind(row.drive)
            .push_bind(row.state)
            .push_bind(row.labels)
            .push_bind(row.begun_at)
            .push_bind(row.expires_at)
            .push_bind(row.decided_at)
            .push_bind(row.finished_at)
            .push_bind(row.due_at)
            .push_bind(row.cancel_cause)
            .push_bind(row.cancel_branch_id)
            .push_bind(row.cancel_reason)
            .push_bind(row.refusal)
            .push_bind(row.key_hash);
    })
    .await
}

async fn insert_keys(tx: &mut SqliteConnection, rows: Vec<TransactionRow>) -> Result<(), Error> {
    let sql = "INSERT INTO idempotency (key_hash, xid, digest) ";
    in_chunks(tx, "idempotency", rows, sql, "", |mut values, row| {
        values.push_bind(row.key_hash).push_bind(row.xid).push_bind(row.key_digest);
    })
    .await
}

async fn update_transactions(
    tx: &mut SqliteConnection,
    rows: Vec<TransactionRow>,
) -> Result<(), Error> {
    let sql = "UPDATE global_transaction SET state = v.column2, decided_at = v.column3, finished_at = v.column4, \
               due_at = v.column5, cancel_cause = v.column6, cancel_branch_id = v.column7, cancel_reason = v.column8, \
               refusal = v.column9 FROM (";
    in_chunks(
        tx,
        "global_transaction",
        rows,
        sql,
        ") AS v WHERE xid = v.column1",
        |mut values, row| {
            values
                .push_bind(row.xid)
                .push_bind(row.state)
                .push_bind(row.decided_at)
                .push_bind(row.finished_at)
                .push_bind(row.due_at)
                .push_bind(row.cancel_cause)
                .push_bind(row.cancel_branch_id)
                .push_bind(row.cancel_reason)
                .push_bind(row.refusal);
        },
    )
    .await
}

async fn insert_branches(tx: &mut SqliteConnection, rows: Vec<BranchRow>) -> Result<(), Error> {
    let sql = "INSERT INTO branch (xid, position, branch_id, action, participant, target, payload, payload_type, state, \
               attempts, needs_attention, due_at, error_code, error_message, error_at) ";
    in_chunks(tx, "branch", rows, sql, "", |mut values, row| {
        values
            .push_bind(row.xid)
            .push_bind(row.position)
            .push_bind(row.branch_id)
            .push_bind(row.action)
            .push_bind(row.participant)
            .push_bind(row.target)
            .push_bind(row.payload)
            .push_bind(row.payload_type)
            .push_bind(row.state)
            .push_bind(row.attempts)
            .push_bind(row.needs_attention)
            .push_bind(row.due_at)
            .push_bind(row.error_code)
            .push_bind(row.error_message)
            .push_bind(row.error_at);
    })
    .await
}

async fn update_branches(tx: &mut SqliteConnection, rows: Vec<BranchRow>) -> Result<(), Error> {
    let sql = "UPDATE branch SET state = v.column3, attempts = v.column4, needs_attention = v.column5, due_at = v.column6, \
               error_code = v.column7, error_message = v.column8, error_at = v.column9 FROM (";
    in_chunks(
        tx,
        "branch",
        rows,
        sql,
        ") AS v WHERE xid = v.column1 AND position = v.column2",
        |mut values, row| {
            values
                .push_bind(row.xid)
                .push_bind(row.position)
                .push_bind(row.state)
                .push_bind(row.attempts)
                .push_bind(row.needs_attention)
                .push_bind(row.due_at)
                .push_bind(row.error_code)
                .push_bind(row.error_message)
                .push_bind(row.error_at);
        },
    )
    .await
}

/// Runs `sql VALUES (…), (…), … end` for all rows, in chunks of a few fixed sizes, and checks that each row counted.
async fn in_chunks<T>(
    tx: &mut SqliteConnection,
    table: &str,
    rows: Vec<T>,
    sql: &str,
    end: &str,
    mut push: impl FnMut(Separated<'_, Sqlite, &'static str>, T),
) -> Result<(), Error> {
    let mut left = rows.len();
    let mut rows = rows.into_iter();
    while left > 0 {
        let size = ROWS.into_iter().find(|size| *size <= left).expect("one is 1");
        left -= size;
        let mut query = QueryBuilder::new(sql);
        query.push_values(rows.by_ref().take(size), &mut push).push(end);
        let done = query.build().execute(&mut *tx).await?;
        expect_rows(done.rows_affected(), size, table)?;
    }
    Ok(())
}

async fn insert_resolutions(tx: &mut SqliteConnection, writes: &[Write]) -> Result<(), Error> {
    for write in writes {
        for position in write.changed_branches.iter() {
            let branch = &write.global.branches[position];
            let BranchState::Resolved(resolution) = &branch.state else { continue };
            let decision = write.global.state.decision().expect("only what is decided is resolved");
            sqlx::query(
                "INSERT INTO resolution (xid, branch_id, decision, name, action, operator, reason, at) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(write.global.xid.to_bytes().to_vec())
            .bind(branch.spec.branch_id.as_str())
            .bind(match decision {
                Decision::Confirm => 1,
                Decision::Cancel => 2,
            })
            .bind(&write.global.name)
            .bind(&branch.spec.action)
            .bind(&resolution.operator)
            .bind(&resolution.reason)
            .bind(resolution.at.0)
            .execute(&mut *tx)
            .await?;
        }
    }
    Ok(())
}

fn expect_rows(affected: u64, expected: usize, table: &str) -> Result<(), Error> {
    if affected == expected as u64 {
        Ok(())
    } else {
        Err(Error::Corrupt(format!(
            "{affected} of {expected} rows of `{table}` were there to be changed"
        )))
    }
}

pub(super) async fn purge(
    connection: &mut SqliteConnection,
    partition: u16,
    finished: &[Xid],
) -> Result<(), Error> {
    let mut tx = connection.begin_with(BEGIN).await?;
    for sql in [
        "DELETE FROM idempotency WHERE key_hash IN (SELECT key_hash FROM global_transaction WHERE xid IN (",
        "DELETE FROM branch WHERE xid IN (",
        "DELETE FROM global_transaction WHERE xid IN (",
    ] {
        let mut query = QueryBuilder::new(sql);
        let mut xids = query.separated(", ");
        for xid in finished {
            xids.push_bind(xid.to_bytes().to_vec());
        }
        query.push(if sql.contains("SELECT") { "))" } else { ")" });
        query.build().execute(&mut *tx).await?;
    }
    let through = finished.iter().max().expect("at least one").to_bytes().to_vec();
    sqlx::query(
        "INSERT INTO purged (partition, through) VALUES (?, ?) \
         ON CONFLICT (partition) DO UPDATE SET through = max(through, excluded.through)",
    )
    .bind(partition)
    .bind(through)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}

pub(super) async fn release(
    connection: &mut SqliteConnection,
    ownerships: &[Ownership],
) -> Result<(), Error> {
    let mut tx = connection.begin_with(BEGIN).await?;
    for ownership in ownerships {
        sqlx::query("UPDATE partition SET owner = NULL WHERE partition = ? AND epoch = ?")
            .bind(ownership.partition)
            .bind(ownership.epoch)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}
