//! One run of a process, from its start until it is killed or ends by itself. It logs into its own file.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use handfast_tests::process::{Signal, send};
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    time::Instant,
};

/// The end of a wait for a process.
pub(crate) enum Awaited<T> {
    /// It logged the line that was waited for.
    Seen(T),
    /// It ended before.
    Ended(ExitStatus),
}

/// How often a log is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// See the module's comment. Killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Life {
    child: Child,
    log: PathBuf,
    /// How many bytes of the log were read.
    read: u64,
    /// An incomplete line at the end of what was read.
    rest: String,
}

impl Life {
    /// Starts the process.
    pub(crate) fn begin(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0) // Ctrl-C is for whoever started all of it
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.as_std().get_program()))?;
        Ok(Self { child, log: log.to_owned(), read: 0, rest: String::new() })
    }

    /// Waits until the process logs a line with this message, or ends.
    pub(crate) async fn says(
        &mut self,
        message: &str,
        within: Duration,
    ) -> anyhow::Result<Awaited<Value>> {
        let limit = Instant::now() + within;
        loop {
            let ended = self.child.try_wait()?;
            if let Some(line) =
                self.new_lines()?.into_iter().find(|line| line["message"] == message)
            {
                return Ok(Awaited::Seen(line));
            }
            if let Some(status) = ended {
                return Ok(Awaited::Ended(status));
            }
            anyhow::ensure!(
                Instant::now() < limit,
                "within {within:?} it does not log {message:?}: {}",
                self.log.display()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until the process serves, and returns its address.
    pub(crate) async fn serves(&mut self, within: Duration) -> anyhow::Result<Awaited<SocketAddr>> {
        let line = match self.says("serving", within).await? {
            Awaited::Seen(line) => line,
            Awaited::Ended(status) => return Ok(Awaited::Ended(status)),
        };
        let address = line["address"].as_str().and_then(|address| address.parse().ok());
        let address = address.with_context(|| format!("it serves nowhere: {line}"))?;
        Ok(Awaited::Seen(address))
    }

    /// The JSON lines that were logged since the last call.
    fn new_lines(&mut self) -> anyhow::Result<Vec<Value>> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        self.read += file.read_to_end(&mut bytes)? as u64;
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        let Some(end) = self.rest.rfind('\n') else { return Ok(Vec::new()) };
        let rest = self.rest.split_off(end + 1);
        let lines = std::mem::replace(&mut self.rest, rest);
        Ok(lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// The log file.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Sends SIGKILL. When this returns, the process has ended.
    pub(crate) async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id() {
            send(pid, signal);
        }
    }

    /// Waits for the end of the process. `None`: it is still running after this time.
    pub(crate) async fn ended(&mut self, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        match tokio::time::timeout(within, self.child.wait()).await {
            Ok(status) => Ok(Some(status?)),
            Err(_) => Ok(None),
        }
    }
}
