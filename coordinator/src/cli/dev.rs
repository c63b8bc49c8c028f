//! `handfast dev`

use std::{io, net::TcpListener};

use clap::Args;
use handfast_coordinator::{
    config::{Config, Sources},
    server::{self, Started, TakeOver},
    signals::Hangup,
    telemetry,
};

use super::{
    Failure,
    client::SERVER_DEFAULT,
    failure::Code,
    serve::{self, Flags},
    talk,
};

const HELP: &str = "\
It reads neither a file nor HANDFAST_ variables. So it is the same everywhere, and touches no store that a variable names.

Examples:
  handfast dev
  handfast dev --listen 127.0.0.1:0 --store sqlite:try.db";

/// Runs a coordinator to try things with. It needs no set-up.
///
/// Its store is a file in a temporary folder, which is removed at the end, unless --store names one.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct Dev {
    #[command(flatten)]
    flags: Flags,
}

impl Dev {
    pub(super) async fn run(mut self) -> Result<(), Failure> {
        // Removed when it goes out of scope.
        let mut folder = None;
        if self.flags.store.is_none() {
            let made =
                tempfile::Builder::new().prefix("handfast-dev-").tempdir().map_err(no_folder)?;
            self.flags.store = Some(format!("sqlite:{}", made.path().join("store.db").display()));
            folder = Some(made);
        }
        let mut config =
            Config::load(&Sources { flags: self.flags.given(), ..Sources::default() })?;
        let taken = self.flags.listen.is_none() && is_taken(&config);
        if taken {
            config.listen.set_port(0);
        }
        telemetry::init(&config.log, config.log_format).map_err(Failure::cannot_log)?;
        serve::end_on_panic();
        let is_kept = folder.is_none();
        let announce = |started: &Started| talk(&welcome(started, is_kept, taken));
        let exit = server::run(config, TakeOver::WhenFree, Hangup::Stop, announce).await?;
        drop(folder);
        serve::ended(exit)
    }
}

fn is_taken(config: &Config) -> bool {
    TcpListener::bind(config.listen).is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
}

fn no_folder(error: io::Error) -> Failure {
    let hint = "--store sqlite:PATH needs none; TMPDIR says where they are made";
    Failure::new(Code::Failed, "cannot make a temporary folder", error.to_string(), hint)
}

fn welcome(Started { grpc, store }: &Started, is_kept: bool, taken: bool) -> String {
    let server = format!("http://{grpc}");
    let port = if taken { "   (not the usual port: 7420 is taken)" } else { "" };
    let kept = if is_kept { "" } else { "   (gone when this stops; --store sqlite:PATH keeps it)" };
    let elsewhere =
        if server == SERVER_DEFAULT { String::new() } else { format!(" --server {server}") };
    format!(
        "handfast {version}, to try things out with

  initiators connect to   {server}{port}
  recorded in             {store}{kept}

Next, in another terminal:
  handfast list{elsewhere}
  README.md                 has a service that takes part, and one that begins, to copy

Stop: Ctrl-C
",
        version = env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_welcome_says_what_to_do_next() {
        let started = Started {
            grpc: "127.0.0.1:7420".parse().unwrap(),
            store: "sqlite:/tmp/x/store.db".to_owned(),
        };
        let text = welcome(&started, false, false);
        for part in [
            "http://127.0.0.1:7420\n",
            "sqlite:/tmp/x/store.db   (gone",
            "  handfast list\n",
            "Ctrl-C",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn another_port_is_said_and_a_store_that_stays_is_not() {
        let started =
            Started { grpc: "127.0.0.1:39123".parse().unwrap(), store: "sqlite:try.db".to_owned() };
        let text = welcome(&started, true, true);
        assert!(
            text.contains("http://127.0.0.1:39123   (not the usual port: 7420 is taken)\n"),
            "{text}"
        );
        assert!(text.contains("handfast list --server http://127.0.0.1:39123\n"), "{text}");
        assert!(!text.contains("gone"), "{text}");
    }
}
