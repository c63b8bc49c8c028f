//! The program `handfast`: the coordinator itself, and the commands to look at it and to help it along.

mod cli;

use std::{io, process::ExitCode};

use clap::Parser as _;
use handfast_coordinator::{server, telemetry};

/// A transaction takes some hundred small pieces of memory and gives them back on another thread: the system's allocator spends a
/// sixth of the coordinator's processor time on that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> io::Result<ExitCode> {
    let cli = cli::Cli::parse();
    let runtime = server::runtime()?;
    let code = runtime.block_on(cli.run());
    telemetry::flush();
    // Nothing waits for a name that is still being looked up, say.
    runtime.shutdown_background();
    Ok(code)
}
