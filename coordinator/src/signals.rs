//! Signals: which of them end the process, and how.

use std::io;

use rustix::process::Signal;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::telemetry;

/// What SIGHUP means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hangup {
    /// A request to reload the configuration. Nothing can be reloaded, so the process goes on.
    Reload,
    /// The terminal was closed.
    Stop,
}

/// A token that is cancelled by the first SIGTERM or SIGINT. The second signal ends the process.
pub(crate) fn stop_token(hangup: Hangup) -> io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hung_up = signal(SignalKind::hangup())?;
    let mut file_too_large = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = one(&mut terminate) => {}
                () = one(&mut interrupt) => {}
                () = one(&mut hung_up) => match hangup {
                    Hangup::Stop => {}
                    Hangup::Reload => {
                        info!("SIGHUP: there is nothing to reload; a restart reads the configuration again");
                        continue;
                    }
                },
                // Ignore it: the write that exceeds the file size limit returns an error.
                () = one(&mut file_too_large) => continue,
            }
            if stopping.is_cancelled() {
                warn!("a second signal: ending at once");
                telemetry::flush();
                std::process::exit(1);
            }
            stopping.cancel();
        }
    });
    Ok(stop)
}

async fn one(signals: &mut Signals) {
    if signals.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}
