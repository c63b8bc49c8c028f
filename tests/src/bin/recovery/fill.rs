//! Puts open transactions into a store, as a coordinator leaves them that was killed after their decisions.

use std::ops::Range;

use sqlx::{AssertSqlSafe, MySqlPool};

/// Transactions of one statement.
const STEP: u64 = 20_000;
/// How long ago they began, in milliseconds.
const AGE_MILLIS: u64 = 600_000;

/// Confirming transactions with these sequence numbers, spread over the partitions, each with three branches at `target`.
pub(crate) async fn fill(pool: &MySqlPool, target: &str, sequences: Range<u64>) {
    let mut connection = pool.acquire().await.expect("the server is there");
    let mut run = async |sql: String| {
        let done = sqlx::query(AssertSqlSafe(sql)).execute(&mut *connection).await;
        done.expect("the server takes it");
    };
    // Xids of an epoch that was.
    run("INSERT IGNORE INTO epoch (`partition`, epoch, nonce, owner, taken_at) \
         SELECT `partition`, 1, 7, 'filled', 0 FROM `partition`"
        .to_owned())
    .await;
    run("UPDATE `partition` SET epoch = GREATEST(epoch, 1)".to_owned()).await;
    let digit = "(SELECT 0 AS d UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4 \
                 UNION ALL SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)";
    run("DROP TEMPORARY TABLE IF EXISTS numbers".to_owned()).await;
    run(format!(
        "CREATE TEMPORARY TABLE numbers AS SELECT a.d + 10 * b.d + 100 * c.d + 1000 * d.d + 10000 * e.d AS n \
         FROM {digit} AS a, {digit} AS b, {digit} AS c, {digit} AS d, (SELECT 0 AS d UNION ALL SELECT 1) AS e"
    ))
    .await;
    let mut first = sequences.start;
    while first < sequences.end {
        let numbers = format!("FROM numbers WHERE n < {}", (sequences.end - first).min(STEP));
        let xid = format!(
            "UNHEX(CONCAT(LPAD(HEX(({first} + n) MOD 16), 4, '0'), '00000001', LPAD(HEX({first} + n), 12, '0'), '00000007'))"
        );
        let at = format!("UNIX_TIMESTAMP() * 1000 - {AGE_MILLIS} + ({first} + n) DIV 100");
        let branches = [1, 2, 3].map(|id| {
            format!(
                r#"{{"id":"{id}","action":"anything","participant":"alive","target":"{target}"}}"#
            )
        });
        let branches = branches.join(",");
        run(format!(
            "INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, decided_at, due_at, branch_count, \
             branches) SELECT {xid}, 'old', 1, 2, '{{}}', {at}, {at} + 30000, {at} + 10, {at} + 10, 3, '[{branches}]' {numbers}"
        ))
        .await;
        first += STEP;
    }
}

/// How many are open.
pub(crate) async fn open(pool: &MySqlPool) -> u64 {
    let sql = "SELECT count(*) FROM global_transaction WHERE due_at IS NOT NULL AND name = 'old'";
    let open: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("the server is there");
    open.unsigned_abs()
}
