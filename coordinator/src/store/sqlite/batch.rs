//! The statements of a batch, prepared once. SQLite runs in this process, so larger messages would save nothing.

use handfast_proto::crash_point;
use sqlx::{Arguments as _, Database, QueryBuilder};

use super::{Connection, Db, Dialect as _, InSqlite};
use crate::store::{
    Batch, Error, Guard,
    sql::{
        Cell, Counter, End, Wrote,
        changes::{self, TableChange},
    },
};

/// Rows of one statement. A few fixed sizes, so that statements are prepared once and reused.
const STATEMENT_ROWS: [usize; 8] = [64, 32, 16, 8, 4, 3, 2, 1];
/// Guards of one statement. A few fixed sizes, for the same reason.
const STATEMENT_GUARDS: [usize; 3] = [1, 4, 16];
/// Statements that the connection keeps prepared. There are fewer shapes of rows, each in all these sizes.
pub(super) const STATEMENTS_MAX: usize = 256;
/// The usual space that one cell takes in the text of a statement and as a value.
const CELL_BYTES: usize = 32;

/// See [`Dialect::write`](crate::store::sql::Dialect::write).
pub(super) async fn write(
    connection: &mut Connection,
    Batch { guards, writes }: &Batch,
    end: End,
    counter: &Counter,
) -> Result<Wrote, Error> {
    sqlx::query(InSqlite::BEGIN_WRITING).execute(&mut *connection).await?;
    let moved = move_positions(connection, guards).await?;
    if moved != guards.len() as u64 {
        return Ok(Wrote::Positions(moved));
    }
    for change in changes::by_table(writes) {
        let all: Vec<_> = change.cells.chunks(change.columns.len()).collect();
        let mut left = &all[..];
        while !left.is_empty() {
            let count =
                STATEMENT_ROWS.into_iter().find(|size| *size <= left.len()).expect("the last is 1");
            let chunk;
            (chunk, left) = left.split_at(count);
            let mut query = room_for(count * change.columns.len());
            if change.keys == 0 {
                push_insert(&mut query, &change, chunk);
            } else {
                push_update(&mut query, &change, chunk);
            }
            let wrote = match query.build().execute(&mut *connection).await {
                Ok(done) => Wrote::counted(change.table, count, done.rows_affected()),
                Err(error) => Wrote::failed(error)?,
            };
            counter.rows(count);
            if wrote != Wrote::All {
                return Ok(wrote);
            }
        }
    }
    if end == End::Commit {
        crash_point!("batch.before_commit");
        sqlx::query("COMMIT").execute(connection).await?;
    }
    Ok(Wrote::All)
}

async fn move_positions(connection: &mut Connection, guards: &[Guard]) -> Result<u64, Error> {
    let size =
        STATEMENT_GUARDS.into_iter().find(|size| *size >= guards.len()).unwrap_or(guards.len());
    let mut query =
        QueryBuilder::<Db>::new("UPDATE partition SET latest_batch = latest_batch + 1 WHERE ");
    // A guard that occurs twice still counts once.
    for (n, guard) in guards.iter().cycle().take(size).enumerate() {
        query.push(if n == 0 { "(partition = " } else { " OR (partition = " });
        query.push_bind(guard.partition).push(" AND epoch = ").push_bind(guard.epoch);
        query.push(" AND nonce = ").push_bind(guard.nonce);
        query.push(" AND latest_batch = ").push_bind(guard.position.cast_signed() - 1).push(")");
    }
    Ok(query.build().execute(connection).await?.rows_affected())
}

/// A query with space for the text and values of this many cells, so that they are not copied as it grows.
fn room_for(cells: usize) -> QueryBuilder<Db> {
    let mut arguments = <Db as Database>::Arguments::default();
    arguments.reserve(cells, cells * CELL_BYTES);
    QueryBuilder::with_arguments(String::with_capacity(cells * CELL_BYTES), arguments)
}

fn push_insert(query: &mut QueryBuilder<Db>, change: &TableChange, rows: &[&[Cell]]) {
    query.push("INSERT INTO ").push(change.table).push(" (").push(change.columns.join(", "));
    query.push(") VALUES ");
    push_values(query, rows);
    if change.overwrites > 0 {
        let overwritten = change.columns[change.columns.len() - change.overwrites..].iter();
        let all: Vec<_> =
            overwritten.map(|column| format!("{column} = excluded.{column}")).collect();
        query.push(" ON CONFLICT DO UPDATE SET ").push(all.join(", "));
    }
}

/// `UPDATE … SET … FROM (VALUES (…), (…)) AS v WHERE …`, with the keys and the expected values as conditions.
fn push_update(query: &mut QueryBuilder<Db>, change: &TableChange, rows: &[&[Cell]]) {
    let equal = |(n, column): (usize, &&str)| format!("{column} = v.column{}", n + 1);
    let as_expected =
        |(n, column): (usize, &&str)| format!("({column} IS NULL OR {column} = v.column{})", n + 1);
    let changed = change.keys + change.expected;
    let columns = || change.columns.iter().enumerate();
    let values: Vec<_> = columns().skip(changed).map(equal).collect();
    let expected = columns().take(changed).skip(change.keys).map(as_expected);
    let keys: Vec<_> = columns().take(change.keys).map(equal).chain(expected).collect();
    query
        .push("UPDATE ")
        .push(change.table)
        .push(" SET ")
        .push(values.join(", "))
        .push(" FROM (VALUES ");
    push_values(query, rows);
    query.push(") AS v WHERE ").push(keys.join(" AND "));
}

/// `(…), (…)`
fn push_values(query: &mut QueryBuilder<Db>, rows: &[&[Cell]]) {
    for (n, row) in rows.iter().enumerate() {
        query.push(if n == 0 { "(" } else { "), (" });
        for (n, cell) in row.iter().enumerate() {
            query.push(if n == 0 { "" } else { ", " });
            match cell {
                Cell::Int(value) => query.push_bind(value),
                Cell::Text(value) => query.push_bind(value),
                Cell::Bytes(value) => query.push_bind(value),
            };
        }
    }
    query.push(")");
}
