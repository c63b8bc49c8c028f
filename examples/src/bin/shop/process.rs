//! One child process. It is started here, its output is read, and it is killed when its handle is dropped.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write as _,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::{mpsc, watch},
};

use super::events::Events;

pub(crate) const COORDINATOR: &str = "coordinator";
pub(crate) const ORDER: &str = "order";
pub(crate) const INVENTORY: &str = "inventory";
pub(crate) const POINTS: &str = "points";
/// The names of all processes, in the order in which they are started.
pub(crate) const NAMES: [&str; 4] = [COORDINATOR, INVENTORY, POINTS, ORDER];

/// How many of the last log lines are shown if the process dies.
const TAIL: usize = 12;
/// How long a process may take to start serving.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A child process. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    /// Set before the process is stopped on purpose, so that its exit is not reported.
    ending: Arc<AtomicBool>,
    tail: Tail,
    serving: watch::Receiver<bool>,
}

type Tail = Arc<Mutex<VecDeque<String>>>;

/// Handles the output of a process.
struct Listener {
    name: &'static str,
    file: File,
    tail: Tail,
    events: Events,
    serving: watch::Sender<bool>,
    ending: Arc<AtomicBool>,
    deaths: mpsc::Sender<&'static str>,
}

impl Process {
    /// Starts a process, and returns when it serves. If it exits without having been killed by this program, its name is sent to
    /// `deaths`.
    pub(crate) async fn start(
        name: &'static str,
        mut command: Command,
        folder: &Path,
        events: &Events,
        deaths: &mpsc::Sender<&'static str>,
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0) // Ctrl-C is for the walk; it sees to its children
            .kill_on_drop(true)
            .spawn()
            .with_context(|| {
                format!("cannot start {}", command.as_std().get_program().display())
            })?;
        let (told, serving) = watch::channel(false);
        let (ending, tail) = (Arc::new(AtomicBool::new(false)), Tail::default());
        let stderr = child.stderr.take().context("a pipe was asked for")?;
        tokio::spawn(keep_tail(stderr, file.try_clone()?, tail.clone()));
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        let listener = Listener {
            name,
            file,
            tail: tail.clone(),
            events: events.clone(),
            serving: told,
            ending: ending.clone(),
            deaths: deaths.clone(),
        };
        tokio::spawn(listener.listen(stdout));
        let mut process = Self { name, child, ending, tail, serving };
        process.wait_until_it_serves().await?;
        Ok(process)
    }

    async fn wait_until_it_serves(&mut self) -> anyhow::Result<()> {
        let serves = self.serving.wait_for(|serves| *serves);
        let serves = tokio::time::timeout(START_TIMEOUT, serves).await.map(|told| told.is_ok());
        match serves {
            Ok(true) => Ok(()),
            Ok(false) => bail!(self.obituary().await),
            Err(_) => {
                let (name, last_words) = (self.name, self.last_words());
                bail!("{name} does not serve within {START_TIMEOUT:?}; {last_words}")
            }
        }
    }

    /// Sends SIGKILL, and returns once the process has exited.
    pub(crate) async fn kill(mut self) -> anyhow::Result<()> {
        self.ending.store(true, Ordering::Relaxed);
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }

    /// How the process exited, and the last lines of its log.
    pub(crate) async fn obituary(&mut self) -> String {
        let status = tokio::time::timeout(Duration::from_secs(1), self.child.wait()).await;
        let status = match status {
            Ok(Ok(status)) => ExitStatus::to_string(&status),
            Ok(Err(_)) | Err(_) => "nobody knows how".to_owned(),
        };
        format!("{} has died ({status}); {}", self.name, self.last_words())
    }

    fn last_words(&self) -> String {
        let tail = self.tail.lock().expect("nothing panics while it is locked");
        if tail.is_empty() {
            return "it said nothing".to_owned();
        }
        let lines: Vec<_> = tail.iter().map(|line| format!("\n  {line}")).collect();
        format!("it said last:{}", lines.concat())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let _dead_already = self.child.start_kill();
    }
}

impl Listener {
    async fn listen(mut self, stdout: impl AsyncRead + Unpin) {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            keep(&mut self.file, &self.tail, &line);
            if !*self.serving.borrow() && line.contains(r#""message":"serving""#) {
                self.serving.send_replace(true);
            }
            self.events.read(&line);
        }
        if !self.ending.load(Ordering::Relaxed) && *self.serving.borrow() {
            let _walk_has_ended = self.deaths.send(self.name).await;
        }
    }
}

/// Collects stderr, which is meant for people: a panic, or the reason why the process did not start.
async fn keep_tail(stderr: impl AsyncRead + Unpin, mut file: File, tail: Tail) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        keep(&mut file, &tail, &line);
    }
}

fn keep(file: &mut File, tail: &Tail, line: &str) {
    let _disk_is_full = file.write_all(format!("{line}\n").as_bytes());
    let mut tail = tail.lock().expect("nothing panics while it is locked");
    if tail.len() == TAIL {
        tail.pop_front();
    }
    tail.push_back(line.to_owned());
}
