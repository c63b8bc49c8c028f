//! The program `handfast`: the coordinator itself, and the commands to look at it and to help it along.

mod cli;

use std::{env, io, process::ExitCode, thread};

use clap::Parser as _;
use tokio::runtime;

/// A transaction takes some hundred small pieces of memory and gives them back on another thread: the system's allocator spends a
/// sixth of the coordinator's processor time on that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> io::Result<ExitCode> {
    let cli = cli::Cli::parse();
    let mut builder = runtime::Builder::new_multi_thread();
    // tokio reads this variable itself.
    if env::var_os("TOKIO_WORKER_THREADS").is_none() {
        builder.worker_threads(workers());
    }
    Ok(builder.enable_all().build()?.block_on(cli.run()))
}

/// Threads for the coordinator's work: half of the processors. Its work is many small pieces that wake each other, across threads a
/// quarter dearer than within one; and the other half is for the store's server and whoever else is on this machine.
fn workers() -> usize {
    thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).max(1))
}
