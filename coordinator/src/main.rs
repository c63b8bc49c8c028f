//! The program `handfast`: the coordinator itself, and the commands to look at it and to help it along.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

/// A transaction takes some hundred small pieces of memory and gives them back on another thread: the system's allocator spends a
/// sixth of the coordinator's processor time on that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    cli::Cli::parse().run().await
}
