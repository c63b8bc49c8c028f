//! The command line. Output for programs goes to stdout, messages for people go to stderr. A failure says what failed, why, and what
//! to do, and each kind of failure has its own exit code for scripts.

mod backup;
mod client;
mod dev;
mod failure;
#[cfg(test)]
mod fixture;
mod json;
mod migrate;
mod restore;
mod serve;
mod text;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use handfast_proto::text::is_unprintable;

use self::failure::Failure;

/// Shown below `handfast --help`.
const CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage or configuration
  3  there is no such transaction or branch
  4  a conflict: the state of the transaction does not allow it
  5  the coordinator cannot be reached, or cannot answer now: retry
  6  no answer in time: the request may have taken effect
  8  serve, dev: another coordinator has taken over the store
  9  serve, dev: the store contains a record that must not exist; a person must look
 10  serve, dev: the coordinator has a fault of its own; start it again
 11  serve, dev: the store's file was deleted, moved or replaced while it ran

Examples:
  handfast dev                                      a coordinator to try things with; needs nothing
  handfast serve --store sqlite:handfast.db         a coordinator for production
  handfast list --stuck                             the transactions that an operator should look at";

/// Handfast: one business operation across several services, as a whole or not at all.
///
/// A coordinator of TCC (Try, Confirm, Cancel) transactions.
#[derive(Debug, Parser)]
#[command(name = "handfast", version, after_help = CODES, max_term_width = 120, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Dev(dev::Dev),
    /// Prints a commented configuration file with every setting and its default.
    #[command(
        after_help = "Example:\n  handfast config > handfast.toml && handfast serve --config handfast.toml --check"
    )]
    Config,
    Migrate(migrate::Migrate),
    Backup(backup::Backup),
    Restore(restore::Restore),
    List(client::List),
    Show(client::Show),
    Retry(client::Retry),
    Resolve(client::Resolve),
}

impl Cli {
    pub(crate) async fn run(self) -> ExitCode {
        let ended = match self.command {
            Command::Serve(serve) => serve.run().await,
            Command::Dev(dev) => dev.run().await,
            Command::Config => tell(&handfast_coordinator::config::Config::template()),
            Command::Migrate(migrate) => migrate.run().await,
            Command::Backup(backup) => backup.run().await,
            Command::Restore(restore) => restore.run().await,
            Command::List(list) => list.run().await,
            Command::Show(show) => show.run().await,
            Command::Retry(retry) => retry.run().await,
            Command::Resolve(resolve) => resolve.run().await,
        };
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                talk(&failure.to_string());
                failure.code.into()
            }
        }
    }
}

/// Writes to stdout. A reader that stops early, as in `handfast list | head -1`, is not a failure.
fn tell(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(printable(text).as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::cannot_write(&error))
        }
        _ => Ok(()),
    }
}

/// Writes lines to stderr. If that fails, there is no place left to report it.
fn talk(text: &str) {
    let _nowhere_left = writeln!(io::stderr().lock(), "{}", printable(text));
}

/// Replaces control characters, and those that change the direction of text. Names and errors come from other programs, and
/// must not control the terminal.
fn printable(text: &str) -> String {
    let safe = |char: char| if is_unprintable(char) && char != '\n' { '\u{fffd}' } else { char };
    text.chars().map(safe).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_ends_its_help_with_an_example() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli.get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = format!("  handfast {}", command.get_name());
            assert!(
                help.lines().last().unwrap_or_default().starts_with(&example),
                "{example}: {help}"
            );
            assert!(command.get_about().is_some(), "{example}");
        }
    }

    #[test]
    fn a_terminal_obeys_nobody_else() {
        assert_eq!(printable("a\u{1b}[31mb\nc\r"), "a\u{fffd}[31mb\nc\u{fffd}");
        // A name that would show the rest of its line from right to left.
        assert_eq!(printable("a\u{202e}b\u{2066}"), "a\u{fffd}b\u{fffd}");
    }
}
