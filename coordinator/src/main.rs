//! The program `handfast`: the coordinator itself, and the commands to look at it and to help it along.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    cli::Cli::parse().run().await
}
