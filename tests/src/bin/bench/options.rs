//! Command-line options, and the columns of the table that follow from them.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use sqlx::mysql::MySqlConnectOptions;

const HELP: &str = "\
Lists make a table with a column for each combination: --branches 1,3,10 --concurrency 1,16,64,256,1024

Stores:
  sqlite             a file in a temporary folder
  sqlite:PATH        a new file at PATH, on the disk that you want to measure
  mysql://…          a server, without a database name; each run makes its own database and drops it
  memory             NOT DURABLE: nothing is written anywhere; shows what the coordinator costs without a store

Exit codes:
  0    every transaction was confirmed, and every Confirm acknowledged
  1    a transaction was not, or a program could not be run
  2    wrong usage

Examples:
  bench
  bench --store mysql://root@127.0.0.1:3306 --concurrency 64,256 --retention 5s --runs 5
  bench --rate 500 --seconds 30
  bench --open 100000
  bench --hang
  bench --store mysql://root@127.0.0.1:3306 --fence mysql://root@127.0.0.1:3306 --goods 10 --phase-two one-by-one,batches \
      --concurrency 256 --runs 5
  bench --store mysql://root@127.0.0.1:3306 --versus http://127.0.0.1:36789/api/dtmsvr --target-pid 4711 --runs 5 \
      --bars processors.svg";

/// Default length of the warm-up before the measurement.
const WARM_UP: Duration = Duration::from_secs(3);
/// Below this retention, the warm-up lasts until the purge has begun, so that the purge is measured too.
const SHORT_RETENTION: Duration = Duration::from_secs(300);
/// The purge begins within this time after the first retention ends: it checks every five seconds.
const PURGE_BEGINS: Duration = Duration::from_secs(7);

/// Measures what a coordinator does and what it costs: a real coordinator process with a real store; initiators and participants
/// are this program.
#[derive(Debug, Clone, Parser)]
#[command(name = "bench", after_help = HELP, max_term_width = 120)]
pub(crate) struct Options {
    /// Where the coordinator records: sqlite, sqlite:PATH, mysql://…, memory
    #[arg(long, value_name = "STORES", default_value = "sqlite", value_delimiter = ',', value_parser = store)]
    pub(crate) store: Vec<Storage>,
    /// Branches per transaction, each at its own participant
    #[arg(long, value_name = "LIST", default_value = "3", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) branches: Vec<u16>,
    /// Transactions in flight, from Begin to the last Confirm
    #[arg(long, value_name = "LIST", default_value = "64", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) concurrency: Vec<u32>,
    /// Transactions begun per second, at a fixed rate; latencies count from the scheduled beginning
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "concurrency", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rate: Vec<u32>,
    /// Length of the measurement
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// Length of the warm-up [default: 3; with a short retention, until the purge has begun]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=3_600))]
    pub(crate) warm_up: Option<u64>,
    /// Number of runs; medians are printed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) runs: u16,
    /// Who calls the Trys
    #[arg(long, value_enum, default_value_t = Drive::Initiator)]
    pub(crate) drive: Drive,
    /// When transactions are recorded. With both, measures both and prints the ratio
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "begin")]
    pub(crate) record: Vec<Record>,
    /// Whether calls share streams
    #[arg(long, value_enum, default_value_t = Transport::Stream)]
    pub(crate) transport: Transport,
    /// How Trys reach participants: over the network, or within this program, which leaves out their cost
    #[arg(long, value_enum, default_value_t = Trys::Network)]
    pub(crate) trys: Trys,
    /// Where participants keep their fences: memory, sqlite, mysql://…
    #[arg(long, value_name = "PLACE", default_value = "memory", value_parser = store)]
    pub(crate) fence: Storage,
    /// Participants with a database also sell one of this many goods: an UPDATE in Try and one in Confirm. Few goods make hot rows
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub(crate) goods: u32,
    /// How participants with a database confirm: in batches (the default) or one by one. With both, measures both and prints the ratio
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    pub(crate) phase_two: Vec<PhaseTwo>,
    /// Connections of initiators to the coordinator
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) connections: u16,
    /// How long the coordinator keeps finished transactions; with a short time the purge is measured too
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub(crate) retention: humantime::Duration,
    /// The coordinator's log level; it logs into a file
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(crate) log: String,
    /// One more key of the coordinator's configuration, such as calls.per_participant=256; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    pub(crate) setting: Vec<(String, String)>,
    /// Instead of a load: begin this many transactions, measure the coordinator's memory, then decide them all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) open: Option<u32>,
    /// Measure twice, the second time with a participant that does not answer Confirms. Measures the transactions without it
    #[arg(long, conflicts_with_all = ["open", "rate"])]
    pub(crate) hang: bool,
    /// Measure this server of DTM's protocol instead: http://host:port/api/dtmsvr
    #[arg(long, value_name = "URL", conflicts_with_all = ["open", "hang", "versus"])]
    pub(crate) target: Option<String>,
    /// Measure ours and then each of these servers, in each run, and print how many times as many ours completes. If all use the same
    /// MySQL server, name it with --store
    #[arg(long, value_name = "URLS", value_delimiter = ',', conflicts_with_all = ["open", "hang"])]
    pub(crate) versus: Vec<String>,
    /// The process ids of these servers, in their order, to measure their processor time and memory
    #[arg(long, value_name = "PIDS", value_delimiter = ',')]
    pub(crate) target_pid: Vec<u32>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Print the table in Markdown
    #[arg(long, conflicts_with = "json")]
    pub(crate) markdown: bool,
    /// Also draw the table into this file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Also draw the processor time of a transaction into this file: a bar for each column, a part of it for each process
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) bars: Option<PathBuf>,
    /// Keep the coordinator's folder: its log, and SQLite's file
    #[arg(long)]
    pub(crate) keep: bool,
}

/// Where a coordinator stores transactions, or a participant its fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Storage {
    Memory,
    /// Path of the file. `None`: a file in the run's temporary folder.
    Sqlite(Option<String>),
    MySql(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Drive {
    /// The initiator: Begin with branches, Trys, Decide
    Initiator,
    /// The coordinator: Execute
    Coordinator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Record {
    /// Begin waits until the transaction is recorded
    Begin,
    /// The transaction is recorded together with its decision
    Decision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    /// Calls share streams
    Stream,
    /// Each call by itself
    Unary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Trys {
    Network,
    Local,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PhaseTwo {
    Batches,
    OneByOne,
}

fn store(text: &str) -> Result<Storage, String> {
    match text.split_once(':') {
        None if text == "memory" => Ok(Storage::Memory),
        None if text == "sqlite" => Ok(Storage::Sqlite(None)),
        Some(("sqlite", path)) if !path.is_empty() => Ok(Storage::Sqlite(Some(path.to_owned()))),
        Some(("mysql", rest)) => match text.parse::<MySqlConnectOptions>() {
            Ok(options)
                if rest.starts_with("//") && options.get_database().is_none_or(str::is_empty) =>
            {
                Ok(Storage::MySql(text.to_owned()))
            }
            _ => Err("a server, without a database: mysql://root@127.0.0.1:3306".to_owned()),
        },
        _ => Err("memory, sqlite, sqlite:PATH, or mysql://user@host:port".to_owned()),
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a key, =, and a value")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// One configuration to measure: a column of the table.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) subject: Subject,
    pub(crate) branches: u16,
    pub(crate) load: Load,
    /// `None` if `--phase-two` was not given.
    pub(crate) phase_two: Option<PhaseTwo>,
    pub(crate) record: Record,
}

/// The server that is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Our coordinator, with this store.
    Handfast(Storage),
    /// A running server that speaks DTM's protocol.
    Dtm {
        url: String,
        /// Its process, if it is known.
        pid: Option<u32>,
        /// Its store, if `--store` names one.
        store: Storage,
    },
}

impl Subject {
    /// The store of the measured server.
    pub(crate) fn store(&self) -> &Storage {
        match self {
            Self::Handfast(store) | Self::Dtm { store, .. } => store,
        }
    }
}

/// The load on the measured server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// This many transactions in flight.
    Closed(u32),
    /// This many transactions begun per second.
    Open(u32),
    /// This many transactions begun and held open; all are decided at the end.
    Held(u32),
    /// `concurrency` transactions in flight, beside others that need the participant that may hang. `hangs`: whether it does.
    Beside { concurrency: u32, hangs: bool },
}

impl Options {
    pub(crate) fn columns(&self) -> Vec<Column> {
        let loads: Vec<_> = match (self.open, self.hang) {
            (Some(open), _) => vec![Load::Held(open)],
            (None, true) => {
                let pair = |concurrency: &u32| {
                    [false, true].map(|hangs| Load::Beside { concurrency: *concurrency, hangs })
                };
                self.concurrency.iter().flat_map(pair).collect()
            }
            (None, false) if self.rate.is_empty() => {
                self.concurrency.iter().copied().map(Load::Closed).collect()
            }
            (None, false) => self.rate.iter().copied().map(Load::Open).collect(),
        };
        let mut columns = Vec::new();
        for store in &self.store {
            let mut pids = self.target_pid.iter().copied();
            let ours = self.target.is_none().then(|| Subject::Handfast(store.clone()));
            let theirs = self.target.iter().chain(&self.versus).map(|url| Subject::Dtm {
                url: url.clone(),
                pid: pids.next(),
                store: store.clone(),
            });
            let subjects: Vec<_> = ours.into_iter().chain(theirs).collect();
            for branches in &self.branches {
                for load in &loads {
                    let ways: Vec<_> = match &self.phase_two[..] {
                        [] => vec![None],
                        ways => ways.iter().copied().map(Some).collect(),
                    };
                    for subject in &subjects {
                        let records = match subject {
                            Subject::Handfast(_) => &self.record[..],
                            Subject::Dtm { .. } => &[Record::Begin],
                        };
                        for (phase_two, record) in
                            ways.iter().flat_map(|way| records.iter().map(move |it| (*way, *it)))
                        {
                            columns.push(Column {
                                subject: subject.clone(),
                                branches: *branches,
                                load: *load,
                                phase_two,
                                record,
                            });
                        }
                    }
                }
            }
        }
        columns
    }

    pub(crate) fn warm_up(&self) -> Duration {
        match self.warm_up {
            Some(seconds) => Duration::from_secs(seconds),
            None if *self.retention < SHORT_RETENTION => *self.retention + PURGE_BEGINS,
            None => WARM_UP,
        }
    }

    pub(crate) fn measured(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_measured_before_each_server_that_it_is_compared_with() {
        let options = ["bench", "--versus", "http://a/api,http://b/api", "--target-pid", "7"];
        let subjects = Options::parse_from(options).columns().into_iter();
        let store = || Storage::Sqlite(None);
        let theirs = |url: &str, pid| Subject::Dtm { url: url.to_owned(), pid, store: store() };
        assert_eq!(
            subjects.map(|column| column.subject).collect::<Vec<_>>(),
            [
                Subject::Handfast(store()),
                theirs("http://a/api", Some(7)),
                theirs("http://b/api", None)
            ]
        );
    }

    #[test]
    fn a_server_is_named_without_a_database() {
        for right in ["mysql://root@127.0.0.1:3306", "mysql://root@db/?ssl-mode=disabled"] {
            assert!(matches!(store(right), Ok(Storage::MySql(url)) if url == right), "{right}");
        }
        for wrong in ["mysql:", "mysql:db", "mysql://root@db/orders", "mysql://db/orders?a=b", "my"]
        {
            assert!(store(wrong).is_err(), "{wrong}");
        }
    }
}
