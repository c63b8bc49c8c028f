//! One damaged record hurts nobody else, and is carried out as far as it can be.

use super::*;
use crate::{
    store::{
        Head,
        conformance::{NOW, cancel, confirm, inserted, updated},
    },
    transaction::{BranchSpec, BranchState, CancelCause, Decision, Event, Key, Resolution, State},
};

/// What the coordinator reads of a store in which `damage` was done to the second of three transactions. Their decision is
/// `decision`.
struct Read {
    due: Vec<GlobalTransaction>,
    listed: Vec<GlobalTransaction>,
    loaded: Result<Lookup, Error>,
    xid: Xid,
}

impl Read {
    async fn after(decision: Decision, damage: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path).await.unwrap();
        let mut owner = Owner::of(&store).await;
        let mut xids = Vec::new();
        for _ in 0..3 {
            let mut global = begun(owner.xid(3), &["a", "b"]);
            xids.push(global.xid);
            owner.insert(&global).await;
            match decision {
                Decision::Confirm => confirm(&mut global),
                Decision::Cancel => cancel(&mut global, CancelCause::TimedOut),
            }
            owner.append(vec![updated(&global, BranchSet::EMPTY)]).await;
        }
        let xid = xids[1];
        let mut db = Connection::connect(&path.display().to_string()).await.unwrap();
        let hex: String = xid.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let damage = damage.replace("THIS", &format!("x'{hex}'"));
        sqlx::raw_sql(sqlx::AssertSqlSafe(damage)).execute(&mut db).await.unwrap();
        let until = NOW + Duration::from_secs(3600);
        // Two to a page, so that the place where the next page starts is needed too.
        let (mut due, mut after) = (Vec::new(), None);
        loop {
            let page = store.due(until, after, 2, owner.known(3)).await.unwrap();
            due.extend(page.transactions);
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        let filter = ListFilter::of(crate::store::Show::Open);
        let listed = store.list(&filter, 10).await.unwrap().transactions;
        let loaded = store.load(xid, owner.known(3)).await;
        Self { due, listed, loaded, xid }
    }

    /// It was read, and so were the others.
    fn carried_out(self, damage: &str) -> GlobalTransaction {
        assert_eq!((self.due.len(), self.listed.len()), (3, 3), "{damage}");
        let found = self.due.into_iter().find(|global| global.xid == self.xid).unwrap();
        assert!(matches!(self.loaded, Ok(Lookup::Found(_))), "{damage}: {:?}", self.loaded);
        found
    }

    /// It was told, and the others were read.
    fn left_out(self, damage: &str) {
        for read in [&self.due, &self.listed] {
            assert_eq!(read.len(), 2, "{damage}");
            assert!(read.iter().all(|global| global.xid != self.xid), "{damage}");
        }
        assert!(matches!(self.loaded, Err(Error::Corrupt(_))), "{damage}: {:?}", self.loaded);
    }
}

/// Gives the branches rows of their own, as if there were more to tell of them.
const WITH_ROWS: &str = "INSERT INTO branch (xid, position, branch_id, action, participant, target, state, attempts, needs_attention)
    SELECT xid, j.key, j.value ->> 'id', j.value ->> 'action', j.value ->> 'participant', j.value ->> 'target', 1, 0, 0
    FROM global_transaction, json_each(branches) AS j; ";

fn damage_of(global: &GlobalTransaction, branch: usize) -> Option<String> {
    global.branches[branch].spec.damage.as_ref().map(ToString::to_string)
}

#[tokio::test]
async fn what_is_not_needed_is_left_out() {
    for damage in [
        "UPDATE global_transaction SET labels = '{' WHERE xid = THIS",
        "UPDATE global_transaction SET drive = 9 WHERE xid = THIS",
        "UPDATE global_transaction SET key_hash = x'01' WHERE xid = THIS",
        "UPDATE global_transaction SET cancel_cause = 9 WHERE xid = THIS",
        "UPDATE global_transaction SET cancel_branch_id = ' ' WHERE xid = THIS",
        "UPDATE global_transaction SET cancel_cause = 2, refusal = '{' WHERE xid = THIS",
        "UPDATE branch SET attempts = -1 WHERE xid = THIS",
        "UPDATE branch SET error_code = 'UNAVAILABLE' WHERE xid = THIS",
    ] {
        let damage = &format!("{WITH_ROWS}{damage}");
        let global = Read::after(Decision::Cancel, damage).await.carried_out(damage);
        assert_eq!(global.state, State::Cancelling, "{damage}");
        assert!(global.cancel.is_some(), "{damage}");
        assert!(global.branches.iter().all(|branch| branch.spec.damage.is_none()), "{damage}");
    }
}

#[tokio::test]
async fn a_branch_in_an_unknown_state_is_called_again_unless_somebody_resolved_it() {
    let unknown =
        &format!("{WITH_ROWS}UPDATE branch SET state = 9 WHERE xid = THIS AND position = 0");
    let global = Read::after(Decision::Confirm, unknown).await.carried_out(unknown);
    assert_eq!(global.branches[0].state, BranchState::Registered);
    let resolved = "UPDATE branch SET state = 9 WHERE xid = THIS; INSERT INTO resolution \
                    SELECT xid, branch_id, 1, 'checkout', action, 'ann', 'by hand', 7 FROM branch \
                    WHERE xid = THIS AND position = 0";
    let resolved = &format!("{WITH_ROWS}{resolved}");
    let global = Read::after(Decision::Confirm, resolved).await.carried_out(resolved);
    let resolution =
        Resolution { operator: "ann".to_owned(), reason: "by hand".to_owned(), at: Timestamp(7) };
    assert_eq!(global.branches[0].state, BranchState::Resolved(Box::new(resolution)));
    assert_eq!(global.branches[1].state, BranchState::Registered);
}

#[tokio::test]
async fn a_branch_without_a_part_of_its_payload_is_not_called() {
    for (damage, what) in [
        ("payload = x'01'", "the type of its payload is missing"),
        ("payload_type = 'a/b'", "its payload is missing"),
    ] {
        let damage =
            format!("{WITH_ROWS}UPDATE branch SET {damage} WHERE xid = THIS AND position = 1");
        let global = Read::after(Decision::Confirm, &damage).await.carried_out(&damage);
        assert_eq!([damage_of(&global, 0), damage_of(&global, 1)], [None, Some(what.to_owned())]);
    }
}

/// Members of a branch in the column `branches`, and what they say of it.
const UNKNOWN: [(&str, &str); 2] = [
    ("'$[1].kind', 'message'", "this version does not know its kind"),
    ("'$[1].payload', json('true')", "its payload is missing"),
];

fn set_in_json(member: &str) -> String {
    format!(
        "UPDATE global_transaction SET branches = json_set(branches, {member}) WHERE xid = THIS"
    )
}

/// A later version may have recorded it, or its row was deleted. The row may also have been written since then, without the payload.
#[tokio::test]
async fn a_branch_of_an_unknown_kind_or_without_the_row_of_its_payload_is_not_called() {
    for (rows, (member, what)) in
        ["", WITH_ROWS].into_iter().flat_map(|rows| UNKNOWN.map(|unknown| (rows, unknown)))
    {
        let damage = format!("{rows}{}", set_in_json(member));
        let global = Read::after(Decision::Confirm, &damage).await.carried_out(&damage);
        assert_eq!([damage_of(&global, 0), damage_of(&global, 1)], [None, Some(what.to_owned())]);
    }
}

/// The new branch is written with all others.
#[tokio::test]
async fn a_new_branch_does_not_hide_what_is_wrong_with_the_others() {
    for (member, what) in UNKNOWN {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path).await.unwrap();
        let mut owner = Owner::of(&store).await;
        let xid = owner.xid(3);
        owner.insert(&begun(xid, &["a", "b"])).await;
        let mut db = Connection::connect(&path.display().to_string()).await.unwrap();
        let damage = set_in_json(member).replace("THIS", "xid");
        sqlx::raw_sql(sqlx::AssertSqlSafe(damage)).execute(&mut db).await.unwrap();

        let mut global = owner.found(xid).await;
        let third =
            BranchSpec { branch_id: "c".parse().unwrap(), ..(*global.branches[0].spec).clone() };
        global.apply(Event::Registered(vec![third]), NOW).unwrap();
        let write =
            Write { head: Head::Keep, new_branches: 2, ..updated(&global, BranchSet::EMPTY) };
        owner.append(vec![write]).await;
        let read = owner.found(xid).await;
        let damage = [0, 1, 2].map(|branch| damage_of(&read, branch));
        assert_eq!(damage, [None, Some(what.to_owned()), None]);
        assert_eq!(read, global.recorded());
    }
}

/// Somebody has done its work already.
#[tokio::test]
async fn a_resolved_branch_without_a_row_is_not_called_again() {
    let resolved = "INSERT INTO resolution SELECT xid, 'b', 1, 'checkout', '', 'ann', 'by hand', 7 \
                    FROM global_transaction WHERE xid = THIS";
    let mut global = Read::after(Decision::Confirm, resolved).await.carried_out(resolved);
    let by =
        Resolution { operator: "ann".to_owned(), reason: "by hand".to_owned(), at: Timestamp(7) };
    assert_eq!(global.branches[0].state, BranchState::Registered);
    assert_eq!(global.branches[1].state, BranchState::Resolved(Box::new(by.clone())));
    // So there is nothing to record when it is resolved again.
    let again = Event::Resolved { branch_id: "b".parse().unwrap(), resolution: by };
    assert_eq!(global.apply(again, NOW).unwrap().branches, BranchSet::EMPTY);
}

#[tokio::test]
async fn the_purge_leaves_the_key_of_another_transaction() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let mut owner = Owner::of(&store).await;
    let mut finished = begun(owner.xid(3), &[]);
    finished.key = Some(Key { hash: [1; 32], digest: [1; 32] });
    cancel(&mut finished, CancelCause::TimedOut);
    let mut open = begun(owner.xid(3), &["a"]);
    open.key = Some(Key { hash: [2; 32], digest: [2; 32] });
    owner.append(vec![inserted(&finished), inserted(&open)]).await;
    let mut db = Connection::connect(&path.display().to_string()).await.unwrap();
    let damage = "UPDATE global_transaction SET key_hash = (SELECT max(key_hash) FROM idempotency) WHERE state = 5";
    sqlx::raw_sql(damage).execute(&mut db).await.unwrap();
    let later = NOW + Duration::from_secs(3600);
    assert_eq!(store.purge(owner.ownership(3), later, later, None, 10).await.unwrap(), (1, None));
    let found = store.find_keys(&[[2; 32]], owner.known(3)).await.unwrap();
    assert_eq!(found, [Some(open.xid)]);
}

#[tokio::test]
async fn what_cannot_be_carried_out_is_left_alone_and_the_others_go_on() {
    for damage in [
        "UPDATE global_transaction SET state = 9 WHERE xid = THIS",
        "UPDATE global_transaction SET state = 1 WHERE xid = THIS", // and yet it has a decided_at
        "UPDATE global_transaction SET branch_count = 7 WHERE xid = THIS",
        "UPDATE global_transaction SET branches = '[' WHERE xid = THIS",
        "UPDATE global_transaction SET branches = '[]' WHERE xid = THIS",
        "UPDATE global_transaction SET branches = x'ff' WHERE xid = THIS",
        "UPDATE global_transaction SET branches = json_remove(branches, '$[0].action') WHERE xid = THIS",
        "UPDATE global_transaction SET branches = json_set(branches, '$[0].id', 'c') WHERE xid = THIS",
        "UPDATE branch SET position = 2 WHERE xid = THIS AND position = 1",
        // As an earlier version has recorded it.
        "UPDATE global_transaction SET branches = NULL WHERE xid = THIS; DELETE FROM branch WHERE xid = THIS AND position = 0",
        "UPDATE branch SET branch_id = 'no id!' WHERE xid = THIS AND position = 0",
        // SQLite takes values of any type.
        "UPDATE global_transaction SET begun_at = 'noon' WHERE xid = THIS",
        "UPDATE global_transaction SET name = x'ff' WHERE xid = THIS",
        "UPDATE branch SET attempts = 'many' WHERE xid = THIS AND position = 1",
        "UPDATE global_transaction SET due_at = 'noon' WHERE xid = THIS",
        "UPDATE global_transaction SET due_at = 0.5 WHERE xid = THIS",
    ] {
        let damage = &format!("{WITH_ROWS}{damage}");
        Read::after(Decision::Confirm, damage).await.left_out(damage);
    }
}

#[tokio::test]
async fn a_row_whose_xid_is_none_does_not_stop_the_others() {
    // Between the second and the third, in every order.
    let damage = "INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, due_at) \
                  SELECT substr(xid, 1, 15), name, drive, state, labels, begun_at, expires_at, due_at \
                  FROM global_transaction WHERE xid = THIS";
    let read = Read::after(Decision::Confirm, damage).await;
    assert_eq!((read.due.len(), read.listed.len()), (3, 3));
    assert!(matches!(read.loaded, Ok(Lookup::Found(_))));
}

#[tokio::test]
async fn a_page_of_damaged_rows_does_not_stop_the_others() {
    for damaged in ["substr(xid, 1, length), due_at", "substr(xid, 1, length), due_at - 0.5"] {
        let damage = format!(
            "INSERT INTO global_transaction (xid, due_at, name, drive, state, labels, begun_at, expires_at) \
             SELECT {damaged}, name, drive, state, labels, begun_at, expires_at FROM global_transaction, \
             (SELECT 11 AS length UNION SELECT 12 UNION SELECT 13 UNION SELECT 14 UNION SELECT 15) WHERE xid = THIS"
        );
        let read = Read::after(Decision::Confirm, &damage).await;
        assert_eq!((read.due.len(), read.listed.len()), (3, 3), "{damage}");
        assert!(matches!(read.loaded, Ok(Lookup::Found(_))), "{damage}");
    }
}

#[tokio::test]
async fn a_damaged_record_does_not_stop_the_purge() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let mut owner = Owner::of(&store).await;
    for _ in 0..4 {
        let mut global = begun(owner.xid(3), &[]);
        cancel(&mut global, CancelCause::TimedOut); // and finished, since it has no branches
        owner.insert(&global).await;
    }
    let mut db = Connection::connect(&path.display().to_string()).await.unwrap();
    for damage in [
        "UPDATE global_transaction SET finished_at = 'noon' WHERE xid = (SELECT max(xid) FROM global_transaction)",
        "UPDATE global_transaction SET xid = substr(xid, 1, 15) WHERE xid = (SELECT min(xid) FROM global_transaction)",
        "INSERT INTO global_transaction (xid, name, drive, state, labels, begun_at, expires_at, finished_at) \
         SELECT substr(xid, 1, length), name, drive, state, labels, begun_at, expires_at, finished_at FROM global_transaction, \
         (SELECT 12 AS length UNION SELECT 13 UNION SELECT 14) WHERE xid = (SELECT min(xid) FROM global_transaction)",
    ] {
        sqlx::raw_sql(damage).execute(&mut db).await.unwrap();
    }
    let later = NOW + Duration::from_secs(3600);
    let (mut deleted, mut after) = (0, None);
    loop {
        let ownership = owner.ownership(3);
        let (more, next) = store.purge(ownership, later, later, after, 2).await.unwrap();
        deleted += more;
        after = next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(deleted, 2);
}
