//! The tables of earlier versions, with what their coordinators have left in them.

use super::*;
use crate::transaction::{BranchState, Event, Resolution};

/// Rows of `branch` as versions 1 and 2 wrote them. The first transaction is undecided, the second one is stuck, and of the third one,
/// a branch was resolved. The fourth one has finished, and its key is known.
const ROWS: &str = "
INSERT INTO epoch (`partition`, epoch, nonce, owner, taken_at) VALUES (3, 1, 77, 'one', 0);
INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, decided_at, finished_at, due_at, key_hash) VALUES
    (x'0003000000010000000000010000004D', 'trying', 1, 1, '{}', 1, 2, NULL, NULL, 2, NULL),
    (x'0003000000010000000000020000004D', 'stuck', 1, 2, '{}', 1, 2, 2, NULL, 2, NULL),
    (x'0003000000010000000000030000004D', 'resolved', 1, 2, '{}', 1, 2, 2, NULL, 2, NULL),
    (x'0003000000010000000000040000004D', 'keyed', 1, 4, '{}', 1, 2, 2, 3, NULL, x'0707070707070707070707070707070707070707070707070707070707070707');
INSERT INTO idempotency (key_hash, xid, key_digest) VALUES
    (x'0707070707070707070707070707070707070707070707070707070707070707', x'0003000000010000000000040000004D',
     x'0808080808080808080808080808080808080808080808080808080808080808');
INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
    SELECT xid, 0, '1', 'inventory.deduct', 'inventory', '', 1, 0, 0 FROM global_transaction;
INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
    SELECT xid, 1, '2', 'points.add', 'points', '', 1, 0, 0 FROM global_transaction;
UPDATE branch SET attempts = 9, needs_attention = 1, error_code = 'INTERNAL', error_message = 'no', error_at = 2, due_at = 2
    WHERE xid = x'0003000000010000000000020000004D' AND position = 1;
UPDATE branch SET state = 3 WHERE xid = x'0003000000010000000000030000004D' AND position = 0;
INSERT INTO resolution (xid, branch_id, decision, name, action, operator, reason, at)
    VALUES (x'0003000000010000000000030000004D', '1', 1, 'resolved', 'inventory.deduct', 'ann', 'by hand', 5);";

fn xid(sequence: u64) -> Xid {
    Xid { partition: 3, epoch: 1, sequence, nonce: 77 }
}

/// A step may be killed half-way while an older coordinator is still running.
#[tokio::test]
async fn a_store_of_an_earlier_version_becomes_one_of_this_version() {
    for server in servers() {
        for from in [1, 2] {
            let database = Database::of_version(&server, from).await;
            let mut connection = database.connect().await;
            sqlx::raw_sql(ROWS).execute(&mut connection).await.unwrap();
            let position = ["", "position", "batches"][from];
            let seat = format!(
                "UPDATE `partition` SET epoch = 1, {position} = 5, owner = 'one' WHERE `partition` = 3"
            );
            sqlx::raw_sql(AssertSqlSafe(seat)).execute(&mut connection).await.unwrap();
            if from == 2 {
                let since = "UPDATE `partition` SET nonce = 77 WHERE `partition` = 3;
                             UPDATE global_transaction SET branches = 2";
                sqlx::raw_sql(since).execute(&mut connection).await.unwrap();
            }
            let refused = MySqlStore::open(&database.url(), true).await.unwrap_err().to_string();
            assert!(refused.contains(&format!("version {from}")), "{refused}");
            let url = database.url();
            assert_eq!(migrate(&url).await.unwrap(), (from, 3));
            // As if it had been killed before it was recorded, or in the middle.
            for undone in [
                "DELETE FROM handfast_schema WHERE version = 3",
                "DELETE FROM handfast_schema WHERE version = 3; ALTER TABLE global_transaction DROP COLUMN branches",
                "DELETE FROM handfast_schema WHERE version = 3; ALTER TABLE global_transaction DROP COLUMN branches;
                 ALTER TABLE global_transaction RENAME COLUMN branch_count TO branches",
            ] {
                sqlx::raw_sql(undone).execute(&mut connection).await.unwrap();
                assert_eq!(migrate(&url).await.unwrap(), (2, 3), "{undone}");
            }
            assert_eq!(migrate(&url).await.unwrap(), (3, 3));
            let store = database.store().await;
            let seats = store.seats().await.unwrap();
            let seat = seats.iter().find(|seat| seat.partition == 3).unwrap();
            assert_eq!((seat.epoch, seat.nonce, seat.position), (1, 77, 5));
            nobody_of_an_earlier_version_writes(&mut connection).await;
            what_was_recorded_goes_on(&store).await;
            what_people_see(&mut connection).await;
            database.drop().await;
        }
    }
}

/// A standby or an owner that was not stopped.
async fn nobody_of_an_earlier_version_writes(connection: &mut Connection) {
    for (statement, column) in [
        ("SELECT `partition`, epoch, position, owner FROM `partition`", "position"),
        ("UPDATE `partition` SET epoch = epoch + 1, position = 0, owner = 'one'", "position"),
        (
            "UPDATE `partition` SET position = position + 1 WHERE `partition` = 3 AND epoch = 1 AND position = 5",
            "position",
        ),
        ("SELECT `partition`, epoch, nonce, batches, owner FROM `partition`", "batches"),
        ("UPDATE `partition` SET batches = 0 WHERE `partition` IN (3)", "batches"),
        (
            "UPDATE `partition` SET batches = batches + 1 WHERE `partition` = 3 AND epoch = 1 AND nonce = 77 AND batches = 5",
            "batches",
        ),
        (
            "UPDATE epoch SET purges = purges + 1 WHERE `partition` = 3 AND epoch = 1 AND nonce = 77 AND ended_at IS NULL",
            "purges",
        ),
    ] {
        let error = sqlx::raw_sql(statement).execute(&mut *connection).await.unwrap_err();
        let unknown = format!("Unknown column '{column}'");
        assert!(error.to_string().contains(&unknown), "{error}");
    }
}

/// The next owner reads what was recorded, and carries it on.
async fn what_was_recorded_goes_on(store: &MySqlStore) {
    let mut owner = Owner::of(store).await;
    assert_eq!(owner.ownership(3).epoch, 2);
    let due = store.due(NOW, None, 10, owner.known(3)).await.unwrap();
    let due: Vec<_> = due.transactions.iter().map(|global| global.name.as_str()).collect();
    assert_eq!(due, ["trying", "stuck", "resolved"]);
    let mut trying = owner.found(xid(1)).await;
    assert_eq!(trying.branches.len(), 2);
    // A branch joins, and with it all are in the transaction's row.
    let mut third = (*trying.branches[0].spec).clone();
    third.branch_id = "3".parse().unwrap();
    trying.apply(Event::Registered(vec![third]), NOW).unwrap();
    let joined = Write { head: Head::Keep, new_branches: 2, ..updated(&trying, BranchSet::EMPTY) };
    owner.append(vec![joined]).await;
    assert_eq!(owner.found(xid(1)).await, trying.recorded());
    confirm(&mut trying);
    call(&mut trying, 2, failed(false));
    owner.append(vec![updated(&trying, BranchSet::only(2))]).await;
    assert_eq!(owner.found(xid(1)).await, trying.recorded());

    let mut stuck = owner.found(xid(2)).await;
    assert!(stuck.branches[1].needs_attention && stuck.branches[1].attempts == 9);
    call(&mut stuck, 1, failed(true));
    let failed_again = updated(&stuck, BranchSet::only(1));
    owner.append(vec![Write { before: Some(State::Confirming), ..failed_again }]).await;
    assert_eq!(owner.found(xid(2)).await, stuck.recorded());

    let resolved = owner.found(xid(3)).await;
    let by =
        Resolution { operator: "ann".to_owned(), reason: "by hand".to_owned(), at: Timestamp(5) };
    assert_eq!(resolved.branches[0].state, BranchState::Resolved(Box::new(by)));

    let keyed = owner.found(xid(4)).await;
    assert_eq!(
        (keyed.state, keyed.branches[0].state.clone()),
        (State::Confirmed, BranchState::Acknowledged)
    );
    let key = [7; 32];
    assert_eq!(store.find_keys(&[key], owner.known(3)).await.unwrap(), [Some(xid(4))]);
    assert_eq!(store.purge(owner.ownership(3), NOW, NOW, None, 10).await.unwrap(), (1, None));
    assert_eq!(store.find_keys(&[key], owner.known(3)).await.unwrap(), [None]);
}

async fn what_people_see(connection: &mut Connection) {
    let transactions = "SELECT name, state, waiting_for FROM readable_transaction ORDER BY xid";
    let rows: Vec<(String, String, Option<String>)> =
        sqlx::query_as(transactions).fetch_all(&mut *connection).await.unwrap();
    let waiting = |name: &str| {
        let (_, _, waiting) = rows.iter().find(|(found, ..)| found == name).unwrap();
        waiting.clone().unwrap_or_default()
    };
    assert_eq!(waiting("trying"), "inventory, points, inventory");
    assert_eq!(waiting("stuck"), "inventory, points");
    assert_eq!(waiting("resolved"), "points");
    let branches = "SELECT b.branch_id, b.participant, b.state, CAST(b.attempts AS SIGNED) FROM readable_branch AS b \
                    JOIN readable_transaction AS g ON g.xid = b.xid WHERE g.name = ? ORDER BY b.branch_id";
    let mut shown = async |name: &str| {
        let rows = sqlx::query_as(branches).bind(name.to_owned()).fetch_all(&mut *connection);
        let rows: Vec<(String, String, String, i64)> = rows.await.unwrap();
        let row =
            |(id, participant, state, attempts)| format!("{id} {participant} {state} {attempts}");
        rows.into_iter().map(row).collect::<Vec<_>>()
    };
    assert_eq!(
        shown("trying").await,
        ["1 inventory registered 0", "2 points registered 0", "3 inventory registered 1"]
    );
    assert_eq!(shown("stuck").await, ["1 inventory registered 0", "2 points registered 10"]);
    assert_eq!(shown("resolved").await, ["1 inventory resolved 0", "2 points registered 0"]);
}

/// One damaged row does not keep people from reading the others.
#[tokio::test]
async fn the_views_show_branches_that_have_no_row_of_their_own() {
    for server in servers() {
        let database = Database::new(&server).await;
        let store = database.store().await;
        let mut owner = Owner::of(&store).await;
        let mut global = begun(owner.xid(3), &["1", "2", "3"]);
        let damaged = begun(owner.xid(3), &["1"]);
        owner.append(vec![inserted(&global), inserted(&damaged)]).await;
        let mut connection = database.connect().await;
        let rows = "SELECT COUNT(*) FROM branch";
        let rows: i64 = sqlx::query_scalar(rows).fetch_one(&mut connection).await.unwrap();
        assert_eq!(rows, 0);
        confirm(&mut global);
        call(&mut global, 1, Outcome::Done { reply: None });
        owner.append(vec![updated(&global, BranchSet::only(1))]).await;
        let damage = "UPDATE global_transaction SET branches = '{' WHERE xid = ?";
        let damage = sqlx::query(damage).bind(damaged.xid.to_bytes().to_vec());
        damage.execute(&mut connection).await.unwrap();
        let shown = "SELECT branch_id, action, participant, target, state FROM readable_branch WHERE xid = ? ORDER BY branch_id";
        let shown = sqlx::query_as(shown).bind(global.xid.to_string());
        let shown: Vec<(String, String, String, String, String)> =
            shown.fetch_all(&mut connection).await.unwrap();
        let shown: Vec<_> = shown.iter().map(|row| (row.0.as_str(), row.4.as_str())).collect();
        assert_eq!(shown, [("1", "registered"), ("2", "confirmed"), ("3", "registered")]);
        let all = "SELECT COUNT(*) FROM readable_transaction";
        let all: i64 = sqlx::query_scalar(all).fetch_one(&mut connection).await.unwrap();
        assert_eq!(all, 2);
        database.drop().await;
    }
}
