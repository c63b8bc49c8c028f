//! `handfast serve`

use std::{env, fs, path::PathBuf};

use clap::Args;
use handfast_coordinator::{
    config::{Config, Sources},
    server::{self, Exit, TakeOver},
    signals::Hangup,
    telemetry,
};
use tracing::{error, warn};

use super::{Failure, failure::Code, tell};

const HELP: &str = "\
Every setting is also an environment variable: HANDFAST_ and its name, such as HANDFAST_LISTEN or HANDFAST_CALLS_TIMEOUT. \
A flag overrides a variable, and a variable overrides the file. `handfast config` prints all settings.

Logs go to stdout as JSON, one object in each line; or as text to stderr, if stdout is a terminal. --log-format says \
which. What cannot be written (a full disk, a closed pipe) is dropped, counted, and the count logged later.

SIGTERM or Ctrl-C stops in order: at once when nothing is under way, else within --shutdown-grace; a second one at once. \
SIGHUP changes nothing: a restart reads the configuration again.

On MySQL and MariaDB, `handfast migrate` creates the tables. A second coordinator on the same store is a standby: it \
waits until the first one stops or shows no life for ten seconds. With --take-over it does not wait, and the first one \
stops with exit code 8. A supervisor may restart both with --take-over: after six takeovers within ten minutes, \
--take-over waits like a standby, so that they do not take the store from each other without end. --take-over=always \
ignores that limit. Use it if you know that the other coordinator is dead.

Examples:
  handfast serve --store sqlite:handfast.db
  handfast serve --store mysql://handfast@127.0.0.1:3306/handfast
  handfast serve --config /etc/handfast.toml --check";

/// Runs the coordinator until it is told to stop.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct Serve {
    /// Read this file; a variable overrides it, and a flag overrides both
    #[arg(long, value_name = "FILE", env = "HANDFAST_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Only check the configuration, and exit
    #[arg(long)]
    check: bool,
    /// Take over a MySQL or MariaDB store at once; the coordinator that owns it stops
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "seldom")]
    take_over: Option<AtOnce>,
    #[command(flatten)]
    flags: Flags,
}

/// Whether to limit how often a store is taken over at once.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AtOnce {
    /// Unless it was taken over six times within the last ten minutes [without =WHEN]
    Seldom,
    /// However often
    Always,
}

/// Settings that are also flags. Their values are checked with the rest of the configuration.
#[derive(Debug, Default, Args)]
pub(super) struct Flags {
    /// Address to listen on [default: 127.0.0.1:7420]
    #[arg(long, value_name = "IP:PORT")]
    pub(super) listen: Option<String>,
    /// Listen beyond this machine although there is no authentication yet
    #[arg(long)]
    insecure: bool,
    /// Where to record transactions
    #[arg(long, value_name = "sqlite:PATH|mysql://…")]
    pub(super) store: Option<String>,
    /// Log level, and other levels for parts of the program [default: info]
    #[arg(long, value_name = "LEVEL,PART=LEVEL")]
    log: Option<String>,
    /// Log format [default: auto: text if stdout is a terminal, else json]
    #[arg(long, value_name = "auto|text|json")]
    log_format: Option<String>,
    /// Longest time for an orderly shutdown [default: 20s]
    #[arg(long, value_name = "TIME")]
    shutdown_grace: Option<String>,
}

impl Flags {
    pub(super) fn given(&self) -> Vec<(&'static str, String)> {
        let insecure = self.insecure.then(|| "true".to_owned());
        let flags = [
            ("listen", &self.listen),
            ("insecure", &insecure),
            ("store", &self.store),
            ("log", &self.log),
            ("log_format", &self.log_format),
            ("shutdown_grace", &self.shutdown_grace),
        ];
        flags.into_iter().filter_map(|(key, text)| Some((key, text.clone()?))).collect()
    }
}

impl Serve {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let config = Config::load(&self.sources()?)?;
        if self.check {
            return tell(&format!(
                "the configuration is fine: the coordinator would listen on {} and record in {}\n",
                config.listen, config.store
            ));
        }
        telemetry::init(&config.log, config.log_format).map_err(Failure::cannot_log)?;
        end_on_panic();
        if !config.listen.ip().is_loopback() {
            warn!(address = %config.listen, "other machines can connect, and there is no authentication yet (insecure)");
        }
        let take_over = match self.take_over {
            None => TakeOver::WhenFree,
            Some(AtOnce::Seldom) => TakeOver::AtOnce,
            Some(AtOnce::Always) => TakeOver::Always,
        };
        ended(server::run(config, take_over, Hangup::Reload, |_| {}).await?)
    }

    fn sources(&self) -> Result<Sources, Failure> {
        let file = self.config.as_ref().map(|path| {
            let name = path.display().to_string();
            match fs::read_to_string(path) {
                Ok(text) => Ok((name, text)),
                Err(error) => Err(Failure::new(
                    Code::Usage,
                    format!("cannot read {name}"),
                    error.to_string(),
                    "it is what --config or HANDFAST_CONFIG names; `handfast config` prints one to start with",
                )),
            }
        });
        let mut env = Vec::new();
        for (name, value) in env::vars_os() {
            let Ok(name) = name.into_string() else { continue }; // ours are plain
            if name.starts_with("HANDFAST_") {
                let value = value.into_string().map_err(|_| {
                    Failure::new(Code::Usage, format!("{name} is no text in UTF-8"), "", "")
                })?;
                env.push((name, value));
            }
        }
        Ok(Sources { flags: self.flags.given(), env, file: file.transpose()? })
    }
}

/// From now on a panic of any task or thread ends the process at once. A process that lost a task would keep its callers waiting. The next
/// one carries on with what is durable.
pub(super) fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        error!(%panic, "a task panicked; ending at once");
        telemetry::flush();
        std::process::exit(Code::Broken as i32);
    }));
}

/// What the end of a run means for the command that started it.
pub(super) fn ended(exit: Exit) -> Result<(), Failure> {
    match exit {
        Exit::Stopped => Ok(()),
        Exit::Fenced => Err(Failure::new(
            Code::Fenced,
            "another coordinator has taken over this store",
            "it owns the partitions now, so this one has stopped",
            "if that was not meant to be, find out who else uses the store; nothing is lost",
        )),
        Exit::Corrupt => Err(Failure::new(
            Code::Corrupt,
            "the store's records are inconsistent",
            "see the log; committed decisions remain valid, and this coordinator has stopped",
            "keep a copy of the store as it is before anything else is tried",
        )),
        Exit::Broken(task) => Err(Failure::new(
            Code::Broken,
            "the coordinator has a fault of its own, and has stopped",
            format!("its {task} task ended; see the log. Committed decisions remain valid"),
            "start it again: it carries on what is open. Please report the log",
        )),
        Exit::StoreGone => Err(Failure::new(
            Code::StoreGone,
            "the store's file was deleted, moved or replaced while the coordinator ran",
            "the log says which; nothing more was acknowledged, and this coordinator has stopped",
            "put the file and its -wal back, or restore a backup: `handfast restore --help`. If both are gone, a start begins a new store",
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        serve: Serve,
    }

    #[test]
    fn every_flag_is_a_key() {
        let flags = [
            ("listen", "127.0.0.1:1"),
            ("store", "sqlite:a.db"),
            ("log", "debug"),
            ("log-format", "json"),
            ("shutdown-grace", "1s"),
        ];
        let given = flags.map(|(flag, text)| format!("--{flag}={text}"));
        let line = Line::parse_from(
            ["serve".to_owned(), "--insecure".to_owned()].into_iter().chain(given),
        );
        let flags = line.serve.flags.given();
        assert_eq!(flags.len(), 6);
        let config = Config::load(&Sources { flags, ..Sources::default() }).unwrap();
        assert!(config.insecure);
        assert_eq!(config.listen.to_string(), "127.0.0.1:1");
        assert_eq!(config.store.to_string(), "sqlite:a.db");
        assert_eq!(
            format!("{:?} {:?}", config.log, config.log_format),
            r#"LogFilter("debug") Json"#
        );
        assert_eq!(config.shutdown_grace.as_secs(), 1);
    }

    #[test]
    fn without_flags_nothing_is_given() {
        assert_eq!(Line::parse_from(["serve"]).serve.flags.given(), []);
    }

    #[test]
    fn the_end_has_a_code() {
        assert!(ended(Exit::Stopped).is_ok());
        assert_eq!(ended(Exit::Fenced).unwrap_err().code, Code::Fenced);
        assert_eq!(ended(Exit::Corrupt).unwrap_err().code, Code::Corrupt);
        assert_eq!(ended(Exit::Broken("journal")).unwrap_err().code, Code::Broken);
        assert_eq!(ended(Exit::StoreGone).unwrap_err().code, Code::StoreGone);
    }

    #[test]
    fn a_panic_of_any_task_ends_the_process_with_its_own_code() {
        const INSIDE: &str = "HANDFAST_TEST_PANICS";
        if env::var_os(INSIDE).is_some() {
            let flags =
                vec![("store", "sqlite:a.db".to_owned()), ("log_format", "json".to_owned())];
            let config = Config::load(&Sources { flags, ..Sources::default() }).unwrap();
            telemetry::init(&config.log, config.log_format).unwrap();
            end_on_panic();
            // Without the hook the panic would stay in its thread.
            drop(std::thread::spawn(|| panic!("a fault of our own")).join());
            return;
        }
        let test = std::thread::current().name().unwrap().to_owned();
        let inside = std::process::Command::new(env::current_exe().unwrap())
            .args(["--exact", &test, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        assert_eq!(inside.status.code(), Some(Code::Broken as i32));
        let log = String::from_utf8(inside.stdout).unwrap();
        assert!(log.contains("a task panicked") && log.contains("a fault of our own"), "{log}");
    }
}
