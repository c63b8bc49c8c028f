//! Resource use of processes and of the database server: processor time, memory, statements, rows and bytes.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::Context as _;
use sqlx::{Connection as _, MySqlConnection};

/// The unit in which Linux reports processor time. `USER_HZ` is 100 on all platforms.
const TICK: Duration = Duration::from_millis(10);

/// Status variables of MySQL or MariaDB, and our name for each. MariaDB counts rows only for all of its storage engines together.
/// There, reading the counters adds a little to them.
const STATUS: [(&[&str], &str); 6] = [
    (&["Com_commit"], "server_commits"),
    (&["Questions"], "server_statements"),
    (&["Innodb_rows_inserted", "Handler_write"], "server_rows_inserted"),
    (&["Innodb_rows_updated", "Handler_update"], "server_rows_updated"),
    (&["Innodb_rows_deleted", "Handler_delete"], "server_rows_deleted"),
    (&["Bytes_received"], "server_bytes"),
];

/// Processor time of all threads of a process, including threads that have ended.
pub(crate) fn processor_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process is gone")?;
    // The name is in brackets and may contain spaces. The next field is number 3; 14 and 15 are user and system time.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>);
    Ok(TICK * ticks.sum::<Result<u32, _>>()?)
}

/// Processor time of the whole machine since it started, in ticks.
#[derive(Debug)]
pub(crate) struct Processors {
    all: f64,
    idle: f64,
    /// Time that the hypervisor gave to other virtual machines.
    stolen: f64,
}

impl Processors {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("cannot look at the processors")?;
        // "cpu", then user, nice, system, idle, waiting for disks, interrupts, soft interrupts, stolen.
        let ticks = stat.split_whitespace().skip(1).take(8).map(str::parse);
        let ticks = ticks.collect::<Result<Vec<f64>, _>>()?;
        let [.., idle, waiting, _, _, stolen] = ticks[..] else {
            anyhow::bail!("/proc/stat has too few fields");
        };
        Ok(Self { all: ticks.iter().sum(), idle: idle + waiting, stolen })
    }

    /// Percentages of idle and of stolen time since `before`.
    pub(crate) fn since(&self, before: &Self) -> (f64, f64) {
        let percent = |part: f64| 100.0 * part / (self.all - before.all).max(1.0);
        (percent(self.idle - before.idle), percent(self.stolen - before.stolen))
    }
}

/// Resident memory of a process.
pub(crate) fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let kilobytes = field(pid, "status", "VmRSS:")?;
    Ok(kilobytes * 1024)
}

/// Bytes that a process has written to disks.
pub(crate) fn written_bytes(pid: u32) -> anyhow::Result<u64> {
    field(pid, "io", "write_bytes:")
}

fn field(pid: u32, file: &str, name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).context("the process is gone")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()).context("no such line")?;
    Ok(number.parse()?)
}

/// The MySQL or MariaDB server in which the measured coordinator stores its transactions.
#[derive(Debug)]
pub(crate) struct Server {
    connection: MySqlConnection,
    /// `None` if the server runs on another machine or its pid file cannot be read.
    pid: Option<u32>,
    pub(crate) version: String,
}

impl Server {
    pub(crate) async fn connect(url: &str) -> anyhow::Result<Self> {
        let mut connection = MySqlConnection::connect(url).await.context("the store's server")?;
        let (version, pid_file): (String, String) =
            sqlx::query_as("SELECT @@version, @@pid_file").fetch_one(&mut connection).await?;
        let pid = fs::read_to_string(pid_file).ok().and_then(|pid| pid.trim().parse().ok());
        Ok(Self { connection, pid, version })
    }

    /// All counters under our names, with processor time in microseconds.
    pub(crate) async fn counters(&mut self) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        let rows: Vec<(String, String)> =
            sqlx::query_as("SHOW GLOBAL STATUS").fetch_all(&mut self.connection).await?;
        let mut counters = BTreeMap::new();
        for (variables, name) in STATUS {
            let find = |variable: &&str| rows.iter().find(|(found, _)| found == variable);
            let row = variables.iter().find_map(find);
            let (_, value) = row.with_context(|| format!("the server has no {variables:?}"))?;
            counters.insert(name, value.parse()?);
        }
        if let Some(pid) = self.pid {
            counters.insert("server_cpu", micros(processor_time(pid)?));
        }
        Ok(counters)
    }
}

/// A time in microseconds, the unit of processor time in the figures.
pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
