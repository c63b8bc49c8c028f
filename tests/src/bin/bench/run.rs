//! One run of one column: start everything, warm up, measure, stop. Then check that every branch of every transaction was confirmed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::{
    initiator::Hold,
    load::{self, Tally},
    meter::{self, Processors},
    options::{Column, Load, Options},
    world::World,
};

/// Sampling interval of the coordinator's memory.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Deadline for the coordinator to receive the last answers and to finish the branches that were in backoff.
const END_PATIENCE: Duration = Duration::from_secs(120);
/// Transactions begun at once, and later decided at once, when many are held open.
const HELD_AT_A_TIME: usize = 256;
/// How long the coordinator is idle before its memory is read.
const REST: Duration = Duration::from_millis(500);

/// The figures of one run, under the names in `report.rs`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    pub(crate) figures: BTreeMap<String, f64>,
    /// Broken guarantees, as sentences.
    pub(crate) violations: Vec<String>,
    /// Version of the store's database server.
    pub(crate) server: Option<String>,
}

pub(crate) async fn run(options: &Options, column: &Column) -> anyhow::Result<Sample> {
    let mut world = World::start(options, column).await?;
    let tally = Tally::new();
    let mut figures = BTreeMap::new();
    tokio::time::sleep(REST).await;
    if let Some(pid) = world.pid {
        figures.insert("rest_mb".to_owned(), resident_mb(pid)?);
    }
    match column.load {
        Load::Held(held) => hold(&world, &tally, held, &mut figures).await?,
        Load::Closed(_) | Load::Open(_) | Load::Beside { .. } => {
            put_under_load(options, column.load, &mut world, &tally, &mut figures).await?;
        }
    }

    let mut violations = Vec::new();
    if let Some(coordinator) = &world.coordinator
        && let Err(error) = coordinator.until_none_is_open(END_PATIENCE).await
    {
        violations.push(error.to_string());
    }
    let (begun, completed) = (tally.begun(), world.ledger.completed());
    if let (failed @ 1.., first) = tally.failed() {
        let first = first.unwrap_or_default();
        violations
            .push(format!("{failed} of {begun} transactions failed, the first of them: {first}"));
    }
    if begun != completed {
        violations.push(format!("{begun} were begun, {completed} confirmed by all participants"));
    }
    match world.sold(options.goods).await {
        Ok(Some(sold)) if sold != i64::from(column.branches) * i64::try_from(completed)? => {
            violations.push(format!("{completed} were confirmed, and {sold} pieces sold"));
        }
        Ok(_) => {}
        Err(error) => violations.push(error.to_string()),
    }
    let server = world.server.as_ref().map(|server| server.version.clone());
    let Some(recorded) = world.stop(options.keep).await? else {
        return Ok(Sample { figures, violations, server });
    };
    let all = completed.max(1) as f64;
    for (name, count) in [
        ("commits", recorded.batches),
        ("commits_awaited", recorded.awaited),
        ("statements", recorded.statements),
        ("rows", recorded.rows),
    ] {
        figures.insert(name.to_owned(), count as f64 / all);
    }
    Ok(Sample { figures, violations, server })
}

async fn put_under_load(
    options: &Options,
    load: Load,
    world: &mut World,
    tally: &Arc<Tally>,
    figures: &mut BTreeMap<String, f64>,
) -> anyhow::Result<()> {
    let others = Tally::new();
    let mut tasks: Vec<TaskTracker> = Vec::new();
    match load {
        Load::Closed(concurrency) => {
            tasks.push(load::closed(tally, &world.initiators, concurrency));
        }
        Load::Open(rate) => {
            tasks.push(load::open(tally, &world.initiators, rate));
        }
        Load::Beside { concurrency, hangs } => {
            world.hangs.send_replace(hangs);
            let hindered = world.hindered.as_ref().expect("ours is measured");
            tasks.push(load::hindered(&others, hindered));
            tasks.push(load::closed(tally, &world.initiators, concurrency));
        }
        Load::Held(_) => unreachable!("that is no load"),
    }
    tokio::time::sleep(options.warm_up()).await;

    let processors = Processors::read()?;
    let (completed, before, began) = (tally.completed(), used(world).await?, Instant::now());
    tally.measure(true);
    let mut largest_mb = 0.0_f64;
    while began.elapsed() < options.measured() {
        let left = options.measured().saturating_sub(began.elapsed());
        tokio::time::sleep(LOOK_EVERY.min(left)).await;
        largest_mb = largest_mb.max(world.pid.map_or(Ok(0.0), resident_mb)?);
    }
    tally.measure(false);
    let (completed, after) = (tally.completed() - completed, used(world).await?);
    let took = began.elapsed();
    let (idle, stolen) = Processors::read()?.since(&processors);
    figures.insert("idle".to_owned(), idle);
    figures.insert("stolen".to_owned(), stolen);
    if world.pid.is_some() {
        figures.insert("load_mb".to_owned(), largest_mb);
    }
    figures.insert("completed_per_second".to_owned(), completed as f64 / took.as_secs_f64());
    for (name, after) in after {
        figures.insert(name.to_owned(), (after - before[name]) / completed.max(1) as f64);
    }

    tally.stop();
    others.stop();
    world.hangs.send_replace(false);
    for tasks in tasks {
        tasks.wait().await;
    }
    if let Load::Beside { .. } = load {
        // Branches that could not be confirmed while the participant hung are in backoff. Retry them now.
        world.coordinator.as_ref().expect("ours is measured").retry_all().await?;
        tally.take_in(&others);
    }
    figures.append(&mut tally.latencies.figures());
    Ok(())
}

/// Begins `held` transactions, reads the coordinator's memory while it is idle, and then decides them all.
async fn hold(
    world: &World,
    tally: &Arc<Tally>,
    held: u32,
    figures: &mut BTreeMap<String, f64>,
) -> anyhow::Result<()> {
    let hold = Arc::new(Hold { held: AtomicU64::new(0), let_go: Semaphore::new(0) });
    let began = Instant::now();
    let tasks = load::held(tally, &world.initiators, held, HELD_AT_A_TIME, &hold);
    while hold.held.load(Ordering::Relaxed) + tally.failed().0 < u64::from(held) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let begun_per_second = f64::from(held) / began.elapsed().as_secs_f64();
    tokio::time::sleep(REST).await;
    let open_mb = resident_mb(world.pid.expect("ours is measured"))?;
    let each_kb = (open_mb - figures["rest_mb"]) * 1e3 / f64::from(held);

    let began = Instant::now();
    hold.let_go.add_permits(HELD_AT_A_TIME);
    tasks.wait().await;
    let per_second = f64::from(held) / began.elapsed().as_secs_f64();
    for (name, figure) in [
        ("begun_per_second", begun_per_second),
        ("open_mb", open_mb),
        ("open_each_kb", each_kb),
        ("decided_per_second", per_second),
    ] {
        figures.insert(name.to_owned(), figure);
    }
    Ok(())
}

/// Resources used so far: processor time in microseconds, and the counters of the store's server.
async fn used(world: &mut World) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let mut used = match &mut world.server {
        Some(server) => server.counters().await?,
        None => BTreeMap::new(),
    };
    used.insert("program_cpu", meter::micros(meter::processor_time(std::process::id())?));
    if let Some(pid) = world.pid {
        used.insert("coordinator_cpu", meter::micros(meter::processor_time(pid)?));
        used.insert("disk_bytes", meter::written_bytes(pid)? as f64);
    }
    Ok(used)
}

fn resident_mb(pid: u32) -> anyhow::Result<f64> {
    Ok(meter::resident_bytes(pid)? as f64 / 1e6)
}
