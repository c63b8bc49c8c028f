//! The coordinator as its users run it: a process of its own.

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

/// Sends a signal to a process of ours. It may be gone.
///
/// # Panics
///
/// When that is the number of no process.
pub fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.expect("a process has a number from 1");
    let _it_is_gone = rustix::process::kill_process(pid, signal);
}

/// Whether a process is stopped: SIGSTOP, until SIGCONT.
#[must_use]
pub fn is_stopped(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tT"))
}

/// Where cargo puts binaries, and whether the program that is running is a test. A test is target/debug/deps/it-…, a binary of ours
/// target/release/bench.
fn target_folder() -> (PathBuf, bool) {
    let program = std::env::current_exe().expect("this program is somewhere");
    let folder = program.parent().expect("a folder");
    let is_test = folder.ends_with("deps");
    let folder = if is_test { folder.parent().expect("target/debug") } else { folder };
    (folder.to_owned(), is_test)
}

/// Whether the binaries are built.
static BUILT: OnceLock<()> = OnceLock::new();

/// With what `cargo test --workspace --all-features` builds.
const AS_TESTS: [&str; 3] = ["--workspace", "--all-features", "--all-targets"];
/// With what `cargo run` builds a binary of this package.
const AS_THIS_PACKAGE: [&str; 6] =
    ["--package", "handfast-tests", "--package", "handfast-coordinator", "--bin", "handfast"];
/// With every feature, `crash-points` among them.
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

/// Sees to it that the coordinator and the services of the shop can be told where to die. Call it before anything else here.
///
/// # Panics
///
/// When they cannot be built.
pub fn build_with_crash_points() {
    BUILT.get_or_init(|| build(&WITH_CRASH_POINTS));
}

/// The binary of this name, built if need be.
///
/// # Panics
///
/// When it cannot be built.
pub fn binary(name: &str) -> PathBuf {
    let is_test = target_folder().1;
    BUILT.get_or_init(|| build(if is_test { &AS_TESTS } else { &AS_THIS_PACKAGE }));
    let binary = target_folder().0.join(name);
    assert!(binary.exists(), "{} is not there", binary.display());
    binary
}

/// Cargo builds no binaries of other packages for tests, nor for `cargo run`. This does, with what the program that is running was
/// built with, so that little is left to do. One that was not started by cargo finds what there is.
fn build(what: &[&str]) {
    let (folder, is_test) = target_folder();
    let profile = folder.file_name().and_then(|name| name.to_str()).expect("target/debug");
    let cargo = match std::env::var("CARGO") {
        Ok(cargo) => cargo,
        Err(_) if is_test => "cargo".to_owned(),
        Err(_) => return,
    };
    let mut command = std::process::Command::new(cargo);
    command
        .args(["build", "--quiet"])
        .args(what)
        .args(["--profile", if profile == "debug" { "dev" } else { profile }])
        .args(["--target-dir".as_ref(), folder.parent().expect("target").as_os_str()])
        .env_remove("OUT_DIR");
    // Of this package. Build scripts that look at them would run, and what stands on them be built, again.
    for (variable, _) in std::env::vars() {
        if variable.starts_with("CARGO_PKG_") || variable.starts_with("CARGO_MANIFEST_") {
            command.env_remove(variable);
        }
    }
    assert!(command.status().expect("cargo runs").success(), "the binaries cannot be built");
}

/// Runs `handfast` with these arguments to its end.
///
/// # Panics
///
/// When it cannot be run, or does not end.
pub async fn handfast(arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("handfast"));
    let output = command.args(arguments).kill_on_drop(true).stdin(Stdio::null()).output();
    tokio::time::timeout(PATIENCE, output).await.expect("it ends").expect("it runs")
}

/// What a coordinator says once it serves.
pub const SERVING: &str = "serving";

/// A coordinator that is running. Killed when it is dropped.
#[derive(Debug)]
pub struct Coordinator {
    child: Child,
    /// Where it listens.
    pub address: String,
    log: Log,
}

/// What a process has logged so far.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Value>>>);

impl Log {
    /// All lines.
    ///
    /// # Panics
    ///
    /// Never, unless a test has panicked here before.
    #[must_use]
    pub fn lines(&self) -> Vec<Value> {
        self.0.lock().expect("nothing panics while it is locked").clone()
    }

    /// The lines with this message.
    #[must_use]
    pub fn with_message(&self, message: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["message"] == message).collect()
    }
}

impl Coordinator {
    /// Starts one on this file, with these flags too, and waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn start(store: &Path, flags: &[&str]) -> Self {
        Self::start_on(&format!("sqlite:{}", store.display()), flags).await
    }

    /// The same on the store of this URL.
    ///
    /// # Panics
    ///
    /// When it does not serve.
    pub async fn start_on(store: &str, flags: &[&str]) -> Self {
        Self::spawn(Self::command(store, flags)).await
    }

    /// What starts one.
    #[must_use]
    pub fn command(store: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(binary("handfast"));
        command.args(["serve", "--log-format", "json", "--store", store]).args(flags);
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command
    }

    /// Waits until what `command` starts is serving.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn spawn(command: Command) -> Self {
        Self::launch(command).serves().await
    }

    /// Starts `command`, and waits for nothing.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
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

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An initiator's connection to it.
    ///
    /// # Panics
    ///
    /// Never: the address is one.
    #[must_use]
    pub fn handfast(&self) -> Handfast {
        Handfast::connect(&self.url()).expect("an address")
    }

    /// A plain connection to it.
    ///
    /// # Panics
    ///
    /// Never: the address is one.
    #[must_use]
    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url()).expect("an address").connect_lazy()
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// Its process id.
    ///
    /// # Panics
    ///
    /// When it has ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it is running")
    }

    /// Kills it: SIGKILL, at once.
    ///
    /// # Panics
    ///
    /// When it has ended before.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("it was running");
    }

    /// Sends it a signal.
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Waits until it has ended by itself.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn ended(&mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it ends")
            .expect("it was started")
    }
}

/// A coordinator that was started and may not serve yet. Killed when it is dropped.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    log: Log,
}

impl Launched {
    /// Waits until it says one of these, and tells which.
    ///
    /// # Panics
    ///
    /// When it does not, or ends.
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

    /// Waits until it serves.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn serves(mut self) -> Coordinator {
        self.says(&[SERVING]).await;
        let Self { child, log } = self;
        let line = log.with_message(SERVING).pop().expect("it has just said so");
        let address = line["address"].as_str().expect("an address").to_owned();
        Coordinator { child, address, log }
    }

    /// Ends it with this signal, and says how it ended.
    ///
    /// # Panics
    ///
    /// When it has ended before, or does not now.
    pub async fn end(mut self, signal: Signal) -> ExitStatus {
        send(self.child.id().expect("it is running"), signal);
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it ends")
            .expect("it was started")
    }
}
