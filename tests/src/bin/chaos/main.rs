//! Runs the shop's services and a coordinator as processes, on SQLite, MySQL or MariaDB, or on a group of such servers. Breaks everything
//! that can break while customers place orders. Then checks that no promise was broken.
//!
//! `coordinators.rs`, `services.rs` and `networks.rs` say what is broken, `load.rs` what customers do, and `verdict.rs` what must hold at
//! the end.

mod coordinators;
mod load;
mod networks;
mod services;
mod verdict;

mod report;
mod tally;

mod databases;
mod life;
mod proxy;
mod world;

use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clap::Parser;
use handfast_shop::books::{Books, fill};
use handfast_tests::{database::Kind, process};
use tempfile::TempDir;
use tokio::time::{Instant, interval};

use self::{
    coordinators::Coordinators,
    load::{CUSTOMERS, Progress, STOCK},
    report::Report,
    services::Troubled,
    tally::DATABASE_SWITCHED,
    world::{SERVICES, World},
};

/// A run is extended up to this many times its length until every kind of fault that is asked for has occurred, and enough customers
/// were told that their order is placed.
const LONGER_MAX: u32 = 6;
/// With fewer orders a run shows little: nothing that could have been lost.
const PLACED_MIN: u64 = 10;

const HELP: &str = "\
Exit codes:
  0    nothing was lost, and no promise was broken
  1    something was, or the run could not be run; all logs and stores are in the folder that is named
  2    wrong usage";

/// Kills, pauses and cuts off what takes part in the shop's transactions, and audits what is left.
#[derive(Debug, Parser)]
#[command(name = "chaos", after_help = HELP, max_term_width = 100)]
struct Flags {
    /// sqlite; mysql or mariadb: a server that is started for the run, and killed too; replication, galera or group-replication: a group
    /// of such servers, which are switched; or mysql://user:password@host:port of a running server
    #[arg(long, value_name = "STORE", default_value = "sqlite")]
    store: String,
    /// How long faults are injected
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    seconds: u64,
    /// In a group: seconds between two switches. New connections go to another server, and old ones live on
    #[arg(long, value_name = "S", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    move_every: u64,
    /// In a group: extend the run only until there was a switch, and not until every kind of fault has occurred
    #[arg(long)]
    only_switches: bool,
    /// Customers in parallel. With many of them, every process that dies loses many calls in flight
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=2_000))]
    customers: u16,
    /// Seed for the faults and their order [default: random]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Print one JSON object at the end on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let seed = flags.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let folder = match tempfile::Builder::new().prefix("handfast-chaos-").tempdir() {
        Ok(folder) => folder,
        Err(error) => return failed(&format!("cannot make a temporary folder: {error}")),
    };
    let run = async {
        let report = run(&flags, seed, &folder).await?;
        report.print(flags.json);
        anyhow::ensure!(report.is_fine(), "a promise was broken");
        Ok(())
    };
    let ended: anyhow::Result<()> = tokio::select! {
        ended = run => ended,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("stopped by Ctrl-C")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let kept = folder.keep();
            let release = if cfg!(debug_assertions) { "" } else { " --release" };
            let Flags { store, seconds, move_every, customers, .. } = flags;
            failed(&format!(
                "{error:#}\nall logs and stores are in {}\nonce more: cargo run{release} -p handfast-tests --bin chaos -- --store {store} --seconds {seconds} --move-every {move_every} --customers {customers} --seed {seed}",
                kept.display()
            ))
        }
    }
}

fn failed(why: &str) -> ExitCode {
    report::tell(&format!("error: {why}"));
    ExitCode::FAILURE
}

/// From the first process to the verdict.
async fn run(flags: &Flags, seed: u64, folder: &TempDir) -> anyhow::Result<Report> {
    process::build_with_crash_points();
    let switch_every = Kind::named(&flags.store).map(|_| Duration::from_secs(flags.move_every));
    let world = World::make(&flags.store, switch_every, folder.path()).await?;
    let mut coordinators = Coordinators::start(&world, seed).await?;
    let [order, inventory, points] = SERVICES
        .map(|service| Troubled::start(&world, service, seed.wrapping_add(10 + service as u64)));
    let (mut order, mut inventory, mut points) = tokio::try_join!(order, inventory, points)?;
    fill(&world.databases.services(), &STOCK, &CUSTOMERS).await?;
    let before = Books::read(&world.databases.services()).await?;

    let length = Duration::from_secs(flags.seconds);
    let progress = Arc::new(Progress::default());
    let trouble = async {
        tokio::try_join!(
            load::order(&world, progress.clone(), seed.wrapping_add(1000), flags.customers.into()),
            coordinators.trouble(),
            order.trouble(),
            inventory.trouble(),
            points.trouble(),
            networks::trouble_services(&world, seed.wrapping_add(2)),
            networks::trouble_databases(&world, seed.wrapping_add(3)),
            networks::kill_databases(&world, length, seed.wrapping_add(4)),
            networks::switch_databases(&world, seed.wrapping_add(5)),
        )
    };
    let mut told = tokio::select! {
        ended = trouble => ended?.0,
        () = keep_time(&world, &progress, flags) => unreachable!("it goes on for ever"),
    };
    report::tell("healing");
    networks::heal(&world);
    tokio::try_join!(order.heal(), inventory.heal(), points.heal(), coordinators.heal())?;
    let longest = verdict::settle(&world).await?;

    let placed = verdict::placed(&told);
    let resolved = load::resolve(&world, &mut told).await?;
    let verdict = verdict::judge(&world, &before, &told, &placed).await?;
    let report = Report::new(flags, seed, &progress, &world, resolved, longest, verdict);
    if report.is_fine() {
        world.databases.drop().await?;
    }
    Ok(report)
}

/// Prints the counts each second, and ends the run after its length, or later if not enough has happened yet.
async fn keep_time(world: &World, progress: &Progress, flags: &Flags) {
    let length = Duration::from_secs(flags.seconds);
    let is_asked_for = |kind: &&str| !flags.only_switches || *kind == DATABASE_SWITCHED;
    let began = Instant::now();
    let mut seconds = interval(Duration::from_secs(1));
    loop {
        seconds.tick().await;
        let is_missing = world.tally.missing(&world.databases).iter().any(is_asked_for)
            || progress.placed.load(Ordering::Relaxed) < PLACED_MIN;
        if began.elapsed() >= length * if is_missing { LONGER_MAX } else { 1 } {
            world.tally.end();
        }
        let [placed, refused, cancelled, unknown] =
            [&progress.placed, &progress.refused, &progress.cancelled, &progress.unknown]
                .map(|count| count.load(Ordering::Relaxed));
        let counts = world.tally.counts().clone();
        report::tell(&format!(
            "{:>4} s  {placed} confirmed, {refused} refused, {cancelled} cancelled, {unknown} unknown  \
             killed: {} processes, {} databases  faults: {}  violations: {}",
            began.elapsed().as_secs(),
            counts.process_kills,
            counts.database_kills,
            counts.faults.values().sum::<u64>(),
            counts.violations.len(),
        ));
    }
}
