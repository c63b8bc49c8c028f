//! The checks at the end, when all faults have ended and no transaction is open. They compare what the services have recorded with what
//! customers were told, and with what the coordinator has recorded.
//!
//! By the names of the invariants: no transaction is both confirmed and cancelled (I1) or done in part (I2). Nothing counts twice (I3,
//! I10: the sums are right). What customers were told is true (I4) and still recorded (I11). Nothing stays reserved (I5). Each participant
//! has done what the coordinator has decided (I6).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use handfast_proto::Xid;
use handfast_shop::{
    audit::{Answer, audit},
    books::Books,
    store::Service,
};
use tokio::time::{Instant, sleep};

use crate::{
    load::Told,
    world::{SERVICES, World},
};

/// How long open transactions may take to end after all faults have ended.
const SETTLED_WITHIN: Duration = Duration::from_secs(180);
/// How often open transactions are counted.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How many violations of one kind are printed. The logs have the others.
const TOLD_MAX: usize = 20;

// The numbers of states are those of the tables' comments.
const CONFIRMED: i64 = 4;
const CANCELLED: i64 = 5;
const FENCE_CONFIRMED: i64 = 2;
const FENCE_CANCELLED: i64 = 3;
const FENCE_SUSPENDED: i64 = 4;

/// Waits until no transaction is open and nothing is reserved, up to [`SETTLED_WITHIN`]. Returns how long that took.
pub(crate) async fn settle(world: &World) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut since: Option<Instant> = None;
    loop {
        let sql = "SELECT COUNT(*) FROM global_transaction WHERE state < 4";
        let open: Vec<(i64,)> = world.databases.rows(None, sql).await?;
        let mut open = open[0].0;
        // What was lost before it was recorded is open only here.
        for service in SERVICES {
            let sql = "SELECT COUNT(*) FROM handfast_fence WHERE state = 1";
            let tried: Vec<(i64,)> = world.databases.rows(Some(service), sql).await?;
            open += tried[0].0;
        }
        match (open, since) {
            (0, Some(since)) if since.elapsed() > Duration::from_secs(1) => {
                return Ok(since - began);
            }
            (0, Some(_)) => {}
            (0, None) => since = Some(Instant::now()),
            (open, _) if began.elapsed() >= SETTLED_WITHIN => {
                world.tally.violation(format!(
                    "{open} transactions and reservations do not come to their end"
                ));
                return Ok(began.elapsed());
            }
            (_, _) => since = None,
        }
        sleep(LOOK_EVERY).await;
    }
}

/// How many transactions are recorded, which confirmed orders were lost, and what else is wrong.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) transactions: usize,
    pub(crate) lost: Vec<i64>,
    pub(crate) violations: Vec<String>,
}

/// Makes all checks. `before`: the books before the first order; `placed`: the orders that customers were told are placed.
pub(crate) async fn judge(
    world: &World,
    before: &Books,
    told: &Told,
    placed: &BTreeSet<i64>,
) -> anyhow::Result<Verdict> {
    let after = Books::read(&world.databases.services()).await?;
    let answers: BTreeMap<_, _> =
        told.iter().filter_map(|(id, answer)| Some((*id, (*answer)?))).collect();
    let mut violations = few(audit(before, &after, &answers));
    let is_placed = |id: &i64| {
        after.orders.get(id).is_some_and(|order| order.status == "placed")
            && after.deductions.get(id).is_some_and(|row| row.state == "sold")
            && after.bookings.get(id).is_some_and(|row| row.state == "booked")
    };
    let lost = placed.iter().filter(|id| !is_placed(id)).copied().collect();
    let records = Records::read(world).await?;
    violations.extend(few(records.contradictions()));
    violations.extend(few(alarms(world)?));
    Ok(Verdict { transactions: records.states.len(), lost, violations })
}

fn few(mut violations: Vec<String>) -> Vec<String> {
    let more = violations.len().saturating_sub(TOLD_MAX);
    violations.truncate(TOLD_MAX);
    violations.extend((more > 0).then(|| format!("… and {more} more of this sort")));
    violations
}

/// What the coordinator has recorded, and what the fences have.
struct Records {
    /// States of transactions, by xid.
    states: BTreeMap<Vec<u8>, i64>,
    /// Participants, by xid and branch id.
    branches: BTreeMap<(Vec<u8>, String), String>,
    /// States in the fences, by participant, then by xid and branch id.
    fences: BTreeMap<String, BTreeMap<(Vec<u8>, String), i64>>,
    /// Branches that asked and are cancelled. Their transaction may have been lost without a record.
    given_back: BTreeSet<(Vec<u8>, String)>,
}

impl Records {
    async fn read(world: &World) -> anyhow::Result<Self> {
        let databases = &world.databases;
        let states: Vec<(Vec<u8>, i64)> =
            databases.rows(None, "SELECT xid, state FROM global_transaction").await?;
        let branches = "SELECT xid, branch_id, participant FROM readable_branch";
        let branches: Vec<(String, String, String)> = databases.rows(None, branches).await?;
        let (mut fences, mut given_back) = (BTreeMap::new(), BTreeSet::new());
        for service in SERVICES {
            let sql = "SELECT xid, branch_id, state, COALESCE(asks, 0) FROM handfast_fence";
            let rows: Vec<(Vec<u8>, Vec<u8>, i64, i64)> =
                databases.rows(Some(service), sql).await?;
            let text = |id: Vec<u8>| String::from_utf8_lossy(&id).trim_end_matches('\0').to_owned();
            let rows =
                rows.into_iter().map(|(xid, id, state, asks)| ((xid, text(id)), (state, asks)));
            // The transaction of a branch that asks may be lost as a whole. Then the branch is cancelled.
            let of_service = rows.clone().filter(|(_, row)| *row == (FENCE_CANCELLED, 1));
            given_back.extend(of_service.map(|(key, _)| key));
            let rows = rows.map(|(key, (state, _))| (key, state));
            fences.insert(Service::to_string(&service), rows.collect());
        }
        let branch = |(xid, id, participant): (String, _, _)| {
            let xid: Xid = xid.parse()?;
            Ok(((xid.to_bytes().to_vec(), id), participant))
        };
        let branches = branches.into_iter().map(branch).collect::<anyhow::Result<_>>()?;
        Ok(Self { states: states.into_iter().collect(), branches, fences, given_back })
    }

    fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        for ((xid, id), participant) in &self.branches {
            let state = self.states.get(xid);
            let fence =
                self.fences.get(participant).and_then(|rows| rows.get(&(xid.clone(), id.clone())));
            let fits = match (state, fence) {
                (Some(&CONFIRMED), Some(&FENCE_CONFIRMED))
                | (Some(&CANCELLED), None | Some(&FENCE_CANCELLED | &FENCE_SUSPENDED)) => true,
                (Some(_) | None, Some(_) | None) => false,
            };
            if !fits {
                found.push(format!(
                    "{} branch {id} at {participant}: recorded with state {state:?}, fence has {fence:?}",
                    hex(xid)
                ));
            }
        }
        for (participant, rows) in &self.fences {
            let unknown = rows.keys().filter(|key| !self.branches.contains_key(*key));
            for (xid, id) in unknown.filter(|key| !self.given_back.contains(*key)) {
                found
                    .push(format!("{} branch {id} at {participant}: was never recorded", hex(xid)));
            }
        }
        found
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Errors and panics in the logs. Whatever happens there must be none.
fn alarms(world: &World) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(&world.folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let name = path.file_name().unwrap_or_default().display();
        let log = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let alarming =
            |line: &&str| line.contains(r#""level":"ERROR""#) || line.contains("panicked at");
        found.extend(log.lines().filter(alarming).map(|line| format!("{name}: {line}")));
    }
    found.sort();
    Ok(found)
}

/// The orders that customers were told are placed.
pub(crate) fn placed(told: &Told) -> BTreeSet<i64> {
    let placed = told.iter().filter(|(_, answer)| **answer == Some(Answer::Placed));
    placed.map(|(id, _)| *id).collect()
}
