//! Starts a coordinator on a store with a million open transactions, and measures its memory, how long new transactions take meanwhile,
//! and how fast the old ones end. Some of the old ones cannot end, because their participant is gone.

#![allow(clippy::print_stdout, reason = "what is printed is the result")]

mod fill;
mod participant;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use handfast::{Contract, Handfast, Json, Remote};
use handfast_tests::{database::Database, process::Coordinator};
use serde_json::json;
use sqlx::MySqlPool;

/// Limit for the coordinator's memory in MB, however many transactions its store has.
const MEMORY_MB_MAX: u64 = 500;
/// Limit for one new transaction with its decision: far above the usual time, and far below "not served".
const NEW_MAX: Duration = Duration::from_secs(5);
/// Time between two measurements.
const LOOK: Duration = Duration::from_millis(500);

/// Starts a coordinator on a store with many open transactions, and measures how it recovers.
#[derive(Debug, Parser)]
#[command(
    name = "recovery",
    after_help = "Example:
  cargo run --profile dist -p handfast-tests --bin recovery -- --server mysql://root@127.0.0.1:3306 --open 1000000"
)]
struct Options {
    /// A MySQL or MariaDB server. The program makes a database on it, and drops it at the end
    #[arg(long, value_name = "URL")]
    server: String,
    /// Decided transactions whose participants are available again
    #[arg(long, default_value_t = 1_000_000)]
    open: u64,
    /// Decided transactions whose participant is gone
    #[arg(long, default_value_t = 10_000)]
    stuck: u64,
    /// How long the open transactions may take to end
    #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
    within: u64,
    /// How long new transactions are measured when no old ones are left, and again beside those whose participant is gone
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    sample: u64,
    /// Print the figures as JSON, and no progress
    #[arg(long)]
    json: bool,
}

struct Anything;

impl Contract for Anything {
    const NAME: &'static str = "anything";
    type Args = Json<u64>;
    type Reply = ();
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let database = Database::migrated(&options.server).await;
    let result = run(&options, &database).await;
    database.drop().await;
    if result { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run(options: &Options, database: &Database) -> bool {
    let say = |text: String| {
        if !options.json {
            println!("{text}");
        }
    };
    let alive = participant::serve().await;
    let pool = MySqlPool::connect(&database.url()).await.expect("the server is there");
    say(format!("filling the store with {} transactions of three branches", options.open));
    fill::fill(&pool, &alive, 0..options.open).await;

    let began = Instant::now();
    let flags =
        ["--log", "warn,handfast_coordinator::server=info,handfast_coordinator::dispatch=error"];
    let coordinator = Coordinator::start_on(&database.url(), &flags).await;
    let started_ms = began.elapsed().as_millis();
    say(format!("serving after {started_ms} ms"));
    let remote = Remote::connect("alive", &alive).expect("an address");
    let initiator = New { handfast: coordinator.handfast(), remote };

    let mut memory_mb_max = 0;
    let mut waits = Vec::new();
    let mut left = options.open;
    let mut slowest_look = f64::MAX;
    let deadline = began + Duration::from_secs(options.within);
    while left > 0 && Instant::now() < deadline {
        let look_began = Instant::now();
        while look_began.elapsed() < LOOK * 4 {
            waits.push(initiator.run().await);
            memory_mb_max = memory_mb_max.max(memory_mb(coordinator.pid()));
        }
        let now_left = fill::open(&pool).await;
        let per_second = left.saturating_sub(now_left) as f64 / look_began.elapsed().as_secs_f64();
        slowest_look = slowest_look.min(per_second);
        left = now_left;
        say(format!("{left} left, {per_second:.0} a second, {memory_mb_max} MB at most"));
    }
    let drained_seconds = began.elapsed().as_secs_f64();
    let recovering = Waits::of(waits);
    say(format!("{left} left after {drained_seconds:.1} s; new ones meanwhile: {recovering}"));

    let alone = Waits::of(initiator.some(options.sample).await);
    say(format!("new ones with nothing else to do: {alone}"));
    fill::fill(&pool, "http://127.0.0.1:1", options.open..options.open + options.stuck).await;
    coordinator.kill().await;
    let coordinator = Coordinator::start_on(&database.url(), &flags).await;
    let initiator = New { handfast: coordinator.handfast(), ..initiator };
    let beside = Waits::of(initiator.some(options.sample).await);
    memory_mb_max = memory_mb_max.max(memory_mb(coordinator.pid()));
    say(format!("new ones beside {} stuck ones: {beside}", options.stuck));

    let good = left == 0
        && memory_mb_max <= MEMORY_MB_MAX
        && [&recovering, &alone, &beside].iter().all(|waits| waits.max <= NEW_MAX);
    if options.json {
        let figures = json!({
            "open": options.open, "stuck": options.stuck, "serving_after_ms": started_ms, "left": left,
            "drained_seconds": drained_seconds, "slowest_per_second": slowest_look, "memory_mb_max": memory_mb_max,
            "new_while_recovering": recovering.json(), "new_alone": alone.json(), "new_beside_stuck": beside.json(),
        });
        println!("{figures}");
    }
    coordinator.kill().await;
    good
}

/// Begins transactions, as users do.
struct New {
    handfast: Handfast,
    remote: Remote,
}

impl New {
    /// One transaction, up to its decision.
    async fn run(&self) -> Duration {
        let began = Instant::now();
        let order = self
            .handfast
            .transaction("new")
            .until_decided()
            .run(async |global| Ok(global.call::<Anything>(&self.remote, Json(1)).await?));
        order.await.expect("new work is served");
        began.elapsed()
    }

    async fn some(&self, seconds: u64) -> Vec<Duration> {
        let began = Instant::now();
        let mut waits = Vec::new();
        while began.elapsed() < Duration::from_secs(seconds) {
            waits.push(self.run().await);
        }
        waits
    }
}

/// How long new transactions took.
struct Waits {
    count: usize,
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Waits {
    fn of(mut waits: Vec<Duration>) -> Self {
        waits.sort();
        let at = |part: usize| waits.get(waits.len() * part / 100).copied().unwrap_or_default();
        let max = waits.last().copied().unwrap_or_default();
        Self { count: waits.len(), p50: at(50), p99: at(99), max }
    }

    fn json(&self) -> serde_json::Value {
        let ms = |wait: Duration| wait.as_secs_f64() * 1000.0;
        json!({ "count": self.count, "p50_ms": ms(self.p50), "p99_ms": ms(self.p99), "max_ms": ms(self.max) })
    }
}

impl std::fmt::Display for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, p50, p99, max } = self;
        write!(f, "{count}, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}")
    }
}

/// What a process has in memory.
fn memory_mb(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = resident.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) / 1024
}
