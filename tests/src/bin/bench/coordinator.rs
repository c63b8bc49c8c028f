//! The coordinator as its users run it: in a process of its own. Its log goes to a file, which this program reads only at the end.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use handfast_proto::v1::{
    ListTransactionsRequest, RetryTransactionRequest, Transaction,
    admin_service_client::AdminServiceClient, list_transactions_request::Show,
};
use handfast_tests::{PATIENCE, process};
use serde_json::Value;
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint};

/// Polling interval for files and lists while the benchmark waits for something.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Page size when listing transactions.
const PAGE: u32 = 1000;

/// A running coordinator process. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Coordinator {
    child: Child,
    pub(crate) pid: u32,
    pub(crate) url: String,
    log: PathBuf,
}

/// The totals that the coordinator logs when it stops.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recorded {
    /// Durable commits. `awaited` counts the ones that a caller waited for.
    pub(crate) batches: u64,
    pub(crate) awaited: u64,
    pub(crate) statements: u64,
    pub(crate) rows: u64,
}

impl Coordinator {
    /// Starts a coordinator on `store` with these configuration keys. Returns once it serves.
    pub(crate) async fn start(
        store: &str,
        settings: &[(String, String)],
        log_level: &str,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let log = folder.join("coordinator.log");
        let mut command = Command::new(process::binary("handfast"));
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json", "--store", store])
            .args(["--log", &format!("{log_level},handfast_coordinator::server=info,handfast_coordinator::coordinator=info")])
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .kill_on_drop(true);
        for (key, value) in settings {
            command.env(format!("HANDFAST_{}", key.replace('.', "_").to_uppercase()), value);
        }
        let mut child = command.spawn().context("the coordinator cannot be started")?;
        let pid = child.id().context("it has ended at once")?;
        let serving = async {
            loop {
                if let Some(line) = last_line(&log, "serving")? {
                    return line["address"].as_str().map(str::to_owned).context("no address");
                }
                if let Some(status) = child.try_wait()? {
                    bail!("the coordinator has ended: {status}, see {}", log.display());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let address =
            tokio::time::timeout(PATIENCE, serving).await.context("it does not serve")??;
        Ok(Self { child, pid, url: format!("http://{address}"), log })
    }

    /// Waits until the coordinator has no open transaction.
    pub(crate) async fn until_none_is_open(&self, patience: Duration) -> anyhow::Result<()> {
        let waiting = async {
            while !self.open().await?.is_empty() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            anyhow::Ok(())
        };
        let in_time = tokio::time::timeout(patience, waiting).await;
        in_time.context("the coordinator still has open transactions")?
    }

    /// Retries all branches that are in backoff now.
    pub(crate) async fn retry_all(&self) -> anyhow::Result<()> {
        let mut client = AdminServiceClient::new(self.channel()?);
        for Transaction { xid, .. } in self.open().await? {
            client.retry_transaction(RetryTransactionRequest { xid }).await?;
        }
        Ok(())
    }

    /// The newest page of open transactions.
    async fn open(&self) -> anyhow::Result<Vec<Transaction>> {
        let request =
            ListTransactionsRequest { show: Show::Open.into(), limit: PAGE, ..Default::default() };
        let mut client =
            AdminServiceClient::new(self.channel()?).max_decoding_message_size(usize::MAX);
        Ok(client.list_transactions(request).await?.into_inner().transactions)
    }

    fn channel(&self) -> anyhow::Result<Channel> {
        Ok(Endpoint::from_shared(self.url.clone())?.connect_lazy())
    }

    /// Shuts the coordinator down gracefully and returns the totals from its log.
    pub(crate) async fn stop(mut self) -> anyhow::Result<Recorded> {
        let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", self.pid)]).status();
        anyhow::ensure!(kill.await?.success(), "the coordinator has ended before");
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let status = ended.context("the coordinator does not end")??;
        anyhow::ensure!(status.success(), "the coordinator: {status}, see {}", self.log.display());
        let line = last_line(&self.log, "recorded")?.context("it does not say what it recorded")?;
        let number = |key: &str| line[key].as_u64().with_context(|| format!("no {key} in {line}"));
        Ok(Recorded {
            batches: number("batches")?,
            awaited: number("awaited")?,
            statements: number("statements")?,
            rows: number("rows")?,
        })
    }
}

/// The last line of the log with this message. Reads only the end of the file, because the line is near the end.
fn last_line(log: &Path, message: &str) -> anyhow::Result<Option<Value>> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    const END: u64 = 64 * 1024;
    let mut file = File::open(log)?;
    let start = file.metadata()?.len().saturating_sub(END);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let lines = String::from_utf8_lossy(&end);
    let lines = lines.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.into_iter().find(|line| line["message"] == message))
}
