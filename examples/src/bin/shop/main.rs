//! The walk through the shop. It starts a coordinator and three services as processes, places orders, and breaks things on
//! purpose. Then it checks in the services' databases that every order happened completely or not at all.
//!
//! Read `steps.rs` for the steps, and `../order.rs`, `../inventory.rs`, `../points.rs` to see how a service is written.

mod steps;

mod burst;
mod walk;

mod ledger;
mod timeline;

mod databases;
mod events;
mod network;
mod world;

mod binaries;
mod process;
mod screen;

use std::{cell::Cell, collections::BTreeMap, io::Write as _, process::ExitCode, time::Instant};

use clap::Parser;
use handfast_shop::{audit::Answer, store::Store};
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use self::{
    binaries::Binaries,
    burst::Size,
    databases::Server,
    process::{COORDINATOR, INVENTORY, NAMES},
    screen::Screen,
    steps::STEPS,
    walk::Walk,
    world::World,
};

const HELP: &str = "\
Exit codes:
  0    every order is all or nothing
  1    one is not, or the walk could not be walked
  2    wrong usage

Examples:
  cargo shop
  cargo shop --only 1,5 --keep
  cargo shop --orders 2000 --concurrency 64 --json
  cargo shop --only 9 --orders 2000 --kill 20
  cargo shop --store mysql://root@127.0.0.1:3306

The object of --json: orders, and of those placed, refused (a service said no) and cancelled (something failed), as customers
were told; violations, in sentences; seconds.";

/// Handfast's demo: orders across three services, and what can go wrong between them.
///
/// Starts a coordinator and the services order, inventory and points, each a process with its own database (SQLite in a temporary
/// folder, or on a server of yours); walks through nine steps; and audits the databases.
#[derive(Debug, Parser)]
#[command(name = "cargo shop", bin_name = "cargo shop", after_help = HELP, max_term_width = 100)]
struct Flags {
    /// Orders in the burst, step 9
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    orders: u32,
    /// Orders at a time in the burst
    #[arg(long, value_name = "C", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    concurrency: u16,
    /// How often the coordinator is killed (SIGKILL) during the burst, at random moments
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    kill: u32,
    /// Walk only these steps, from 1 to 9
    #[arg(long, value_name = "STEPS", value_delimiter = ',', value_parser = step)]
    only: Vec<u8>,
    /// Keep everything on this server of MySQL or MariaDB, in four databases that are made for this run and dropped at the end
    #[arg(long, value_name = "mysql://…")]
    store: Option<Server>,
    /// Leave everything running at the end, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Print one JSON object at the end on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
}

fn step(text: &str) -> Result<u8, String> {
    let step = text.trim().parse().ok().filter(|step| (1..=STEPS).contains(step));
    step.ok_or_else(|| format!("the steps are 1 to {STEPS}, as in --only 1,5"))
}

impl Flags {
    /// What is wrong with the combination of flags. Clap checks each flag by itself.
    fn problem(&self) -> Option<&'static str> {
        let burst = self.only.is_empty() || self.only.contains(&9);
        (self.kill > 0 && !burst)
            .then_some("--kill is about the burst, step 9, which --only leaves out")
    }

    fn steps(&self) -> Vec<u8> {
        let mut steps =
            if self.only.is_empty() { (1..=STEPS).collect() } else { self.only.clone() };
        steps.sort_unstable();
        steps.dedup();
        steps
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(problem) = flags.problem() {
        use clap::CommandFactory as _;
        Flags::command().error(clap::error::ErrorKind::ArgumentConflict, problem).exit();
    }
    let screen = Screen::new(flags.json);
    // The world lives outside of `run`, so that it can be stopped in order however `run` ends.
    let (mut world, ended) = (None, Cell::new(None));
    let code = tokio::select! {
        walked = run(&flags, screen, &mut world, &ended) => match walked {
            Ok(holds) => ExitCode::from(u8::from(!holds)),
            Err(error) => {
                Screen::new(true).line(&format!("error: {error:#}"));
                ExitCode::FAILURE
            }
        },
        code = stopped() => ended.get().map_or(code, |holds: bool| ExitCode::from(u8::from(!holds))),
    };
    if let Some(world) = world
        && let Err(error) = world.stop().await
    {
        Screen::new(true).line(&format!("error: {error:#}"));
    }
    code
}

/// Builds and starts the programs, and walks the steps. Returns whether the audit passed. With `--keep` it stores that result in
/// `ended` and never returns.
async fn run(
    flags: &Flags,
    screen: Screen,
    slot: &mut Option<World>,
    ended: &Cell<Option<bool>>,
) -> anyhow::Result<bool> {
    let binaries = Binaries::build().await?;
    let began = Instant::now();
    let (world, mut died) = World::new(binaries, flags.store.clone())?;
    let world = slot.insert(world); // from here on it is taken down, whatever happens
    world.start().await?;
    introduce(world, screen);
    let walked = tokio::select! {
        walked = walk(flags, screen, world) => Ok(walked?),
        name = death(&mut died) => Err(name),
    };
    let (answers, violations) = match walked {
        Ok(walked) => walked,
        Err(name) => anyhow::bail!(world.obituary(name).await),
    };
    if flags.json {
        print_json(&answers, &violations, began)?;
    }
    if flags.keep {
        ended.set(Some(violations.is_empty()));
        keep(world, screen);
        let name = death(&mut died).await;
        anyhow::bail!(world.obituary(name).await);
    }
    screen.line(&screen.paint.dim(&format!("\ntook {:.1} s", began.elapsed().as_secs_f64())));
    Ok(violations.is_empty())
}

type Walked = (BTreeMap<i64, Answer>, Vec<String>);

async fn walk(flags: &Flags, screen: Screen, world: &mut World) -> anyhow::Result<Walked> {
    let size = Size { orders: flags.orders, concurrency: flags.concurrency, kills: flags.kill };
    let mut walk = Walk::begin(world, screen, flags.orders).await?;
    for step in flags.steps() {
        walk.step(step, size).await?;
    }
    let violations = walk.end().await?;
    Ok((walk.answers, violations))
}

fn introduce(world: &World, screen: Screen) {
    let paint = screen.paint;
    screen
        .title("Handfast's shop: an order touches three services, each with a database of its own");
    for name in NAMES {
        let url = world.url(name);
        let place = match world.store(name) {
            Store::Sqlite(_) => String::new(),
            Store::MySql(_) => format!("   {}", world.store(name)),
        };
        screen.inner(&format!("{name:<12} {}", paint.dim(&format!("{url}{place}"))));
    }
    screen.inner("Each picture is one transaction: who was asked for what, what came of it, when, and how long");
    screen.inner(
        "that took; on the right the same as a drawing. It is made from what the processes log.",
    );
}

fn keep(world: &World, screen: Screen) {
    let (server, handfast) = (world.url(COORDINATOR), world.program("handfast"));
    let handfast = handfast.display();
    screen.title("Everything is left running");
    for name in NAMES {
        screen.inner(&format!("{name:<12} {}   {}", world.url(name), world.store(name)));
    }
    screen.line("");
    for line in [
        format!("{handfast} list --server {server}"),
        format!("{handfast} show --server {server} XID"),
        match world.store(INVENTORY) {
            Store::Sqlite(file) => {
                format!("sqlite3 -readonly {} 'SELECT * FROM stock'", file.display())
            }
            Store::MySql(_) => "SELECT * FROM stock -- in the database of inventory".to_owned(),
        },
        format!("tail -f {}/*.log", world.folder().display()),
        String::new(),
        "Stop: Ctrl-C".to_owned(),
    ] {
        screen.inner(&line);
    }
}

/// The output of `--json`.
#[derive(Serialize)]
struct Report<'w> {
    orders: usize,
    placed: usize,
    cancelled: usize,
    refused: usize,
    violations: &'w [String],
    /// Rounded to one decimal.
    seconds: f64,
}

fn print_json(
    answers: &BTreeMap<i64, Answer>,
    violations: &[String],
    began: Instant,
) -> anyhow::Result<()> {
    let count = |wanted| answers.values().filter(|answer| **answer == wanted).count();
    let report = Report {
        orders: answers.len(),
        placed: count(Answer::Placed),
        cancelled: count(Answer::Cancelled),
        refused: count(Answer::Refused),
        violations,
        seconds: (began.elapsed().as_secs_f64() * 10.0).round() / 10.0,
    };
    let json = format!("{}\n", serde_json::to_string(&report)?);
    let _nobody_reads = std::io::stdout().lock().write_all(json.as_bytes());
    Ok(())
}

/// The name of the next process that exits unexpectedly.
async fn death(died: &mut mpsc::Receiver<&'static str>) -> &'static str {
    match died.recv().await {
        Some(name) => name,
        None => std::future::pending().await, // the world is gone
    }
}

/// Waits for Ctrl-C or SIGTERM, and returns the matching exit code.
async fn stopped() -> ExitCode {
    let (Ok(mut interrupted), Ok(mut terminated)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await; // then they end this process at once
    };
    tokio::select! {
        _ = interrupted.recv() => ExitCode::from(130),
        _ = terminated.recv() => ExitCode::from(143),
    }
}
