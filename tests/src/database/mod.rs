//! Servers of MySQL and MariaDB for tests, and databases on them.

mod group;

use std::{
    io::{Read as _, Seek as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};
use tempfile::TempDir;

use crate::process;

pub use group::{Group, Kind, USER};

/// All servers to test with: what `TEST_MYSQL_SERVERS` names, URLs without a database, separated by commas. `scripts/test` starts
/// some, and sets it; without it there is nothing to see.
#[must_use]
pub fn servers() -> Vec<String> {
    let servers = std::env::var("TEST_MYSQL_SERVERS").unwrap_or_default();
    servers.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

/// What kinds of servers a test can start: what `TEST_DATABASES` names, separated by spaces. `scripts/test` sets it.
#[must_use]
pub fn kinds() -> Vec<String> {
    let kinds = std::env::var("TEST_DATABASES").unwrap_or_default();
    kinds.split_whitespace().map(str::to_owned).collect()
}

/// The kinds of groups of servers that a test can start, as [`Kind::named`] knows them: what `TEST_GROUPS` names, separated by spaces.
/// `scripts/test` sets it.
#[must_use]
pub fn groups() -> Vec<String> {
    let kinds = std::env::var("TEST_GROUPS").unwrap_or_default();
    kinds.split_whitespace().map(str::to_owned).collect()
}

/// A server of our own, which we may kill. Gone when it is dropped.
#[derive(Debug)]
pub struct Server {
    kind: String,
    folder: PathBuf,
    port: u16,
    /// Of a folder that nobody else needs.
    temporary: Option<TempDir>,
}

impl Server {
    /// Starts one: `mariadb` or `mysql`.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub async fn start(kind: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut server = Self::start_in(kind, folder.path().to_owned()).await;
        server.temporary = Some(folder);
        server
    }

    /// The same with its files in this folder, where they stay.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub async fn start_in(kind: &str, folder: PathBuf) -> Self {
        let server = Self { kind: kind.to_owned(), folder, port: free_port(), temporary: None };
        server.start_again().await;
        server
    }

    /// Where it is, without a database.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mysql://root@127.0.0.1:{}", self.port)
    }

    /// Kills it: SIGKILL, whatever it is doing. Once this returns it is gone.
    pub fn kill(&self) {
        kill(&self.folder);
    }

    /// Sends it a signal. It may be gone.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ended_by_itself = kill_process(pid, signal);
        }
    }

    fn pid(&self) -> Option<Pid> {
        pid_in(&self.folder)
    }

    /// Starts it again, on the same files.
    ///
    /// # Panics
    ///
    /// When it does not come up.
    pub async fn start_again(&self) {
        drop(std::fs::remove_file(self.folder.join("pid"))); // of the one that was killed
        let started = script(&["start", &self.kind], &self.folder, self.port).await;
        started.expect("the server comes up");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs `scripts/database` with these arguments, on this folder and port. What it has to say about an error is the error.
async fn script(arguments: &[&str], folder: &Path, port: u16) -> anyhow::Result<()> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/database");
    // To a file: the servers inherit stderr, and would keep a pipe open.
    let mut said = tempfile::tempfile()?;
    let status = tokio::process::Command::new(script)
        .args(arguments)
        .arg(folder)
        .arg(port.to_string())
        .stdout(Stdio::null())
        .stderr(said.try_clone()?)
        .status()
        .await
        .context("scripts/database cannot be run")?;
    let mut text = String::new();
    said.rewind()?;
    said.read_to_string(&mut text)?;
    ensure!(status.success(), "scripts/database: {status}: {}", text.trim());
    Ok(())
}

/// Kills the server in this folder, and waits until it has ended.
fn kill(folder: &Path) {
    let Some(pid) = pid_in(folder) else { return };
    let _ended_by_itself = kill_process(pid, Signal::KILL);
    while test_kill_process(pid).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The process whose number is in this folder.
fn pid_in(folder: &Path) -> Option<Pid> {
    let pid = std::fs::read_to_string(folder.join("pid")).ok()?;
    pid.trim().parse().ok().and_then(Pid::from_raw)
}

/// A port of this machine that nobody listens on. (From below those that the system gives away, so that nobody gets it meanwhile.)
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let ports = (0..100).map(|_| rand::random_range(20_000..30_000));
    ports.into_iter().find(free).expect("one of a hundred is free")
}

/// A database of its own, for a coordinator's store.
#[derive(Debug)]
pub struct Database {
    server: String,
    name: String,
}

impl Database {
    /// Makes one without tables.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn empty(server: &str) -> Self {
        let name = format!("handfast_test_{:016x}", rand::random::<u64>());
        let database = Self { server: server.to_owned(), name };
        database.on_server(&format!("CREATE DATABASE {}", database.name)).await;
        database
    }

    /// Makes one with the tables.
    ///
    /// # Panics
    ///
    /// When the server, or `handfast migrate`, does not let us.
    pub async fn migrated(server: &str) -> Self {
        let database = Self::empty(server).await;
        let output = process::handfast(&["migrate", "--store", &database.url()]).await;
        assert!(output.status.success(), "{output:?}");
        database
    }

    /// As `--store` takes it.
    #[must_use]
    pub fn url(&self) -> String {
        let (server, parameters) = self.server.split_once('?').unwrap_or((&self.server, ""));
        let question = if parameters.is_empty() { "" } else { "?" };
        format!("{}/{}{question}{parameters}", server.trim_end_matches('/'), self.name)
    }

    /// Runs SQL in it.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn execute(&self, sql: &str) {
        let mut connection = self.connect().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("it is SQL");
    }

    /// Runs SQL in it that gives one number.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn number(&self, sql: &str) -> u64 {
        let mut connection = self.connect().await;
        let number: i64 = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&mut connection)
            .await
            .expect("it is SQL");
        number.unsigned_abs()
    }

    /// A connection to it.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn connect(&self) -> MySqlConnection {
        MySqlConnection::connect(&self.url()).await.expect("it is there")
    }

    /// Deletes it.
    ///
    /// # Panics
    ///
    /// When the server does not let us.
    pub async fn drop(self) {
        self.on_server(&format!("DROP DATABASE {}", self.name)).await;
    }

    async fn on_server(&self, sql: &str) {
        let mut connection = MySqlConnection::connect(&self.server).await.expect("it is there");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("it lets us");
    }
}
