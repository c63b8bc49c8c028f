//! The coordinator as its users run it: in a process of its own.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, OnceLock},
};

use handfast::Handfast;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};
use tonic::transport::{Channel, Endpoint};

use crate::{PATIENCE, wait_for};

pub use rustix::process::Signal;

/// Sends a signal to one of our processes, which may have ended already.
///
/// # Panics
///
/// If `pid` cannot be a process id.
pub fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.expect("a process has a number from 1");
    let _it_is_gone = rustix::process::kill_process(pid, signal);
}

/// Whether a process is stopped by SIGSTOP and has not received SIGCONT.
#[must_use]
pub fn is_stopped(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tT"))
}

/// The folder where cargo puts binaries, and whether the running program is a test. A test is target/debug/deps/it-…;
/// a binary is, for example, target/release/bench.
fn target_folder() -> (PathBuf, bool) {
    let program = std::env::current_exe().expect("this program is somewhere");
    let folder = program.parent().expect("a folder");
    let is_test = folder.ends_with("deps");
    let folder = if is_test { folder.parent().expect("target/debug") } else { folder };
    (folder.to_owned(), is_test)
}

/// Set once the binaries are built.
static BUILT: OnceLock<()> = OnceLock::new();

/// Arguments that match a build by `cargo test --workspace --all-features`.
const AS_TESTS: [&str; 3] = ["--workspace", "--all-features", "--all-targets"];
/// Arguments that match a build of this package's binaries by `cargo run`.
const AS_THIS_PACKAGE: [&str; 6] =
    ["--package", "handfast-tests", "--package", "handfast-coordinator", "--bin", "handfast"];
/// Arguments that enable all features, including `crash-points`.
const WITH_CRASH_POINTS: [&str; 10] = [
    "--workspace",
    "--all-features",
    "--bin",
    "handfast",
    "--bin",
    "order",
    "--bin",
    "inventory",
    "--bin",
    "points",
];

/// Builds the coordinator and the services of the shop with crash points. Call this before anything else in this module.
///
/// # Panics
///
/// If the build fails.
pub fn build_with_crash_points() {
    BUILT.get_or_init(|| build(&WITH_CRASH_POINTS));
}

/// Path of the binary with this name. Builds it first if necessary.
///
/// # Panics
///
/// If the build fails.
pub fn binary(name: &str) -> PathBuf {
    let is_test = target_folder().1;
    BUILT.get_or_init(|| build(if is_test { &AS_TESTS } else { &AS_THIS_PACKAGE }));
    let binary = target_folder().0.join(name);
    assert!(binary.exists(), "{} is not there", binary.display());
    binary
}

/// Builds the binaries of other packages, which cargo does not build for tests or for `cargo run`. The arguments match those of the
/// running program, so that cargo can reuse most of its build. A program that cargo did not start uses the binaries that exist.
fn build(what: &[&str]) {
    let folder = target_folder().0;
    let profile = folder.file_name().and_then(|name| name.to_str()).expect("target/debug");
    let Ok(cargo) = std::env::var("CARGO") else { return };
    let mut command = std::process::Command::new(cargo);
    command
        .args(["build", "--quiet"])
        .args(what)
        .args(["--profile", if profile == "debug" { "dev" } else { profile }])
        .args(["--target-dir".as_ref(), folder.parent().expect("target").as_os_str()])
        .env_remove("OUT_DIR");
    // Cargo set these variables for this package. Build scripts that read them would run again, with everything that depends on them.
    for (variable, _) in std::env::vars() {
        if variable.starts_with("CARGO_PKG_") || variable.starts_with("CARGO_MANIFEST_") {
            command.env_remove(variable);
        }
    }
    assert!(command.status().expect("cargo runs").success(), "the binaries cannot be built");
}

/// Runs `handfast` with these arguments until it exits.
///
/// # Panics
///
/// If it cannot be started, or does not exit in time.
pub async fn handfast(arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("handfast"));
    let output = command.args(arguments).kill_on_drop(true).stdin(Stdio::null()).output();
    tokio::time::timeout(PATIENCE, output).await.expect("it ends").expect("it runs")
}

/// The message that a coordinator logs when it starts to serve.
pub const SERVING: &str = "serving";

/// A running coordinator process. Dropping it kills the process.
#[derive(Debug)]
pub struct Coordinator {
    child: Child,
    /// The address where the coordinator listens.
    pub address: String,
    log: Log,
}

/// The lines that a process has logged so far.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Value>>>);

impl Log {
    /// All log lines.
    ///
    /// # Panics
    ///
    /// Only if a test has panicked while it held the lock.
    #[must_use]
    pub fn lines(&self) -> Vec<Value> {
        self.0.lock().expect("nothing panics while it is locked").clone()
    }

    /// The log lines with this message.
    #[must_use]
    pub fn with_message(&self, message: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["message"] == message).collect()
    }
}

impl Coordinator {
    /// Starts a coordinator on this SQLite file, with additional flags. Returns once it serves.
    ///
    /// # Panics
    ///
    /// If it does not serve in time.
    pub async fn start(store: &Path, flags: &[&str]) -> Self {
        Self::start_on(&format!("sqlite:{}", store.display()), flags).await
    }

    /// Like [`start`](Self::start), on the store with this URL.
    ///
    /// # Panics
    ///
    /// If it does not serve in time.
    pub async fn start_on(store: &str, flags: &[&str]) -> Self {
        Self::spawn(Self::command(store, flags)).await
    }

    /// The command that starts a coordinator on this store.
    #[must_use]
    pub fn command(store: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(binary("handfast"));
        command.args(["serve", "--log-format", "json", "--store", store]).args(flags);
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command
    }

    /// Starts `command` and waits until the coordinator serves.
    ///
    /// # Panics
    ///
    /// If it does not serve in time.
    pub async fn spawn(command: Command) -> Self {
        Self::launch(command).serves().await
    }

    /// Starts `command` and returns at once.
    ///
    /// # Panics
    ///
    /// If the process cannot be started.
    #[must_use]
    pub fn launch(mut command: Command) -> Launched {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it can be started");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let log = Log::default();
        let taking = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                taking.0.lock().expect("nothing panics while it is locked").push(line);
            }
        });
        Launched { child, log }
    }

    /// The coordinator's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An SDK client that is connected to the coordinator.
    ///
    /// # Panics
    ///
    /// Never: the address is valid.
    #[must_use]
    pub fn handfast(&self) -> Handfast {
        Handfast::connect(&self.url()).expect("an address")
    }

    /// A gRPC channel to the coordinator.
    ///
    /// # Panics
    ///
    /// Never: the address is valid.
    #[must_use]
    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url()).expect("an address").connect_lazy()
    }

    /// The coordinator's log.
    #[must_use]
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// The coordinator's process id.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it is running")
    }

    /// Kills the process with SIGKILL.
    ///
    /// # Panics
    ///
    /// If the process has ended already.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("it was running");
    }

    /// Sends a signal to the process.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Waits until the process exits by itself.
    ///
    /// # Panics
    ///
    /// If it does not exit in time.
    pub async fn ended(&mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it ends")
            .expect("it was started")
    }
}

/// A coordinator process that may not serve yet. Dropping it kills the process.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    log: Log,
}

impl Launched {
    /// Waits until the process logs one of these messages, and returns that message.
    ///
    /// # Panics
    ///
    /// If it logs none of them in time, or exits first.
    pub async fn says<'m>(&mut self, messages: &[&'m str]) -> &'m str {
        let said = wait_for("it says something", async || {
            let found = messages.iter().find(|message| !self.log.with_message(message).is_empty());
            if found.is_none()
                && let Ok(Some(status)) = self.child.try_wait()
            {
                panic!("the coordinator has ended: {status}, {:?}", self.log.lines());
            }
            found.copied()
        });
        said.await
    }

    /// Waits until the coordinator serves.
    ///
    /// # Panics
    ///
    /// If it does not serve in time.
    pub async fn serves(mut self) -> Coordinator {
        self.says(&[SERVING]).await;
        let Self { child, log } = self;
        let line = log.with_message(SERVING).pop().expect("it has just said so");
        let address = line["address"].as_str().expect("an address").to_owned();
        Coordinator { child, address, log }
    }

    /// Sends this signal to the process and returns its exit status.
    ///
    /// # Panics
    ///
    /// If the process has ended already, or does not end in time.
    pub async fn end(mut self, signal: Signal) -> ExitStatus {
        send(self.child.id().expect("it is running"), signal);
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it ends")
            .expect("it was started")
    }
}
