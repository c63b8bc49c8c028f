//! Step 8: many concurrent orders for few SKUs. Meanwhile the coordinator may be killed repeatedly.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use handfast_shop::{audit::Answer, v1::PlaceOrderRequest};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    process::COORDINATOR,
    screen::Screen,
    walk::{BURST_SKUS, CUSTOMERS, Walk, answer, request},
    world::World,
};

/// The size of the burst.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) orders: u32,
    /// Orders in flight at a time.
    pub(crate) concurrency: u16,
    /// How often the coordinator is killed during the burst.
    pub(crate) kills: u32,
}

/// How often progress is shown: first on a terminal, then elsewhere.
const PROGRESS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
/// A kill follows the order that triggers it after a random delay of up to this many milliseconds. So other orders are hit at
/// any point.
const KILL_WITHIN_MS: u64 = 40;
/// Width of the progress bar.
const BAR: usize = 24;

/// The order id, its answer, and how long it took. The answer is `None` if it is unknown.
type Told = (i64, Option<Answer>, Duration);

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    answered: usize,
    placed: usize,
    refused: usize,
    cancelled: usize,
    unknown: usize,
}

/// Runs the burst, and records all answers.
pub(crate) async fn run(walk: &mut Walk<'_>, size: Size) -> anyhow::Result<()> {
    walk.world.call_directly().await?;
    walk.world.events.ignore(true); // nobody draws thousands of timelines
    let requests: Vec<_> = (0..size.orders as usize).map(|n| nth(walk, n)).collect();
    let all = requests.len();

    let began = Instant::now();
    let (told, mut answers) = mpsc::channel(all.max(1));
    let mut workers = place_all(walk.world, requests, size.concurrency, &told)?;
    drop(told);
    let (answered, progress) = watch::channel(Counts::default());
    let (screen, world) = (walk.screen, &mut *walk.world);
    let collect = async {
        let (mut counts, mut noted) = (Counts::default(), Vec::with_capacity(all));
        while let Some(told) = answers.recv().await {
            counts.add(told.1);
            noted.push(told);
            answered.send_replace(counts);
        }
        drop(answered);
        noted
    };
    let kills = kill_now_and_then(world, size, progress.clone());
    let (noted, killed, ()) =
        tokio::join!(collect, kills, show_progress(screen, all, began, progress));
    killed?;
    while let Some(ended) = workers.join_next().await {
        ended?;
    }
    walk.world.events.ignore(false);

    let took = began.elapsed();
    let mut counts = Counts::default();
    let mut times: Vec<_> = noted.iter().map(|(.., took)| *took).collect();
    for (id, answer, _) in noted {
        counts.add(answer);
        let known = match answer {
            Some(answer) => answer,
            None => walk.ask(id).await?,
        };
        walk.answers.insert(id, known);
    }
    times.sort();
    for line in summary(counts, &times, took, size.kills) {
        walk.conclude(&line);
    }
    Ok(())
}

/// The nth order. Deterministic: only the order of execution is random in a burst.
fn nth(walk: &mut Walk<'_>, n: usize) -> PlaceOrderRequest {
    let sku = BURST_SKUS[n % BURST_SKUS.len()];
    let quantity = [1, 2, 3][n / BURST_SKUS.len() % 3];
    request(walk.new_order(CUSTOMERS[n % CUSTOMERS.len()], sku, quantity))
}

/// Runs this many customers concurrently. Each orders again as soon as it has an answer.
fn place_all(
    world: &World,
    requests: Vec<PlaceOrderRequest>,
    concurrency: u16,
    told: &mpsc::Sender<Told>,
) -> anyhow::Result<JoinSet<()>> {
    let (orders, requests) = (world.orders()?, Arc::new(requests));
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..concurrency {
        let (mut orders, requests) = (orders.clone(), requests.clone());
        let (next, told) = (next.clone(), told.clone());
        workers.spawn(async move {
            while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (id, began) = (request.order_id, Instant::now());
                // Without an answer the outcome is unknown.
                let answer = match orders.place_order(request.clone()).await {
                    Ok(response) => answer(response.get_ref()),
                    Err(_) => None,
                };
                if told.send((id, answer, began.elapsed())).await.is_err() {
                    return; // the walk has ended
                }
            }
        });
    }
    Ok(workers)
}

/// Kills the coordinator at random moments spread over the burst, and restarts it each time.
async fn kill_now_and_then(
    world: &mut World,
    size: Size,
    mut progress: watch::Receiver<Counts>,
) -> anyhow::Result<()> {
    let mut moments: Vec<_> =
        (0..size.kills).map(|_| rand::random_range(0..size.orders as usize)).collect();
    moments.sort_unstable();
    for moment in moments {
        // An error means that all orders have been answered.
        let _all_answered = progress.wait_for(|counts| counts.answered >= moment).await.is_err();
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..KILL_WITHIN_MS))).await;
        world.kill(COORDINATOR).await?;
        world.start_again(COORDINATOR).await?;
    }
    Ok(())
}

async fn show_progress(
    screen: Screen,
    all: usize,
    began: Instant,
    mut progress: watch::Receiver<Counts>,
) {
    let pause = if screen.repaints() { PROGRESS[0] } else { PROGRESS[1] };
    while tokio::time::timeout(pause, over(&mut progress)).await.is_err() {
        let counts = *progress.borrow();
        let line = counts.line(all, began.elapsed());
        if screen.repaints() {
            screen.repaint(&line);
        } else {
            screen.inner(&line);
        }
    }
    if screen.repaints() {
        screen.repaint("");
    }
}

/// Returns when no further answer will come.
async fn over(progress: &mut watch::Receiver<Counts>) {
    while progress.changed().await.is_ok() {}
}

impl Counts {
    fn add(&mut self, answer: Option<Answer>) {
        self.answered += 1;
        *match answer {
            Some(Answer::Placed) => &mut self.placed,
            Some(Answer::Refused) => &mut self.refused,
            Some(Answer::Cancelled) => &mut self.cancelled,
            None => &mut self.unknown,
        } += 1;
    }

    fn line(&self, all: usize, took: Duration) -> String {
        let Self { answered, placed, refused, cancelled, unknown } = self;
        let full = answered * BAR / all.max(1);
        let bar = format!("{}{}", "█".repeat(full), "░".repeat(BAR - full));
        let mut line = format!(
            "{bar} {answered}/{all}  {} a second  placed {placed}  refused {refused}",
            per_second(*answered, took)
        );
        for (count, word) in [(cancelled, "cancelled"), (unknown, "unknown")] {
            if *count > 0 {
                line.push_str(&format!("  {word} {count}"));
            }
        }
        line
    }
}

fn per_second(count: usize, took: Duration) -> u128 {
    count as u128 * 1000 / took.as_millis().max(1)
}

/// The result of the burst, in a few lines.
fn summary(counts: Counts, times: &[Duration], took: Duration, kills: u32) -> Vec<String> {
    let Counts { answered, placed, refused, cancelled, unknown } = counts;
    let mut outcomes = format!("{placed} placed, {refused} refused");
    if cancelled > 0 {
        outcomes.push_str(&format!(", {cancelled} cancelled"));
    }
    if unknown > 0 {
        outcomes.push_str(&format!(", {unknown} not known at first: asked for by their keys"));
    }
    let within = |percent: usize| {
        let place = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(place).map_or(0, Duration::as_millis)
    };
    let speed = format!(
        "{:.1} s, {} orders a second; half of them within {} ms, 99 of 100 within {} ms",
        took.as_secs_f64(),
        per_second(answered, took),
        within(50),
        within(99)
    );
    let killed =
        (kills > 0).then(|| format!("the coordinator was killed and started again {kills} times"));
    let debug = cfg!(debug_assertions).then(|| {
        "this is a debug build: examples/README.md says how to see what a release build does"
            .to_owned()
    });
    [outcomes, speed].into_iter().chain(killed).chain(debug).collect()
}
