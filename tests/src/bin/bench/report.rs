//! Names the figures and prints them as a table, Markdown or JSON.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::{
    options::{Column, Load, Options, PhaseTwo, Record, Storage, Subject},
    run::Sample,
};

/// The figures of the table: name, meaning, and number of decimals. JSON has more figures and all decimals.
const FIGURES: [(&str, &str, usize); 37] = [
    ("completed_per_second", "transactions completed a second", 0),
    ("ratio", "  times the column before", 2),
    ("ours_ratio", "  ours in the same run: times as many", 2),
    ("begun_per_second", "transactions begun a second", 0),
    ("decided_per_second", "transactions decided and completed a second", 0),
    ("whole_p50", "initiator waits, in all: p50, ms", 2),
    ("whole_p99", "  p99", 2),
    ("begin_p50", "  for Begin with branches: p50", 2),
    ("begin_p99", "    p99", 2),
    ("trys_p50", "  for Trys: p50", 2),
    ("trys_p99", "    p99", 2),
    ("decide_p50", "  for Decide: p50", 2),
    ("decide_p99", "    p99", 2),
    ("completed_p50", "until the last Confirm: p50, ms", 2),
    ("completed_p99", "  p99", 2),
    ("coordinator_cpu", "processor time, a transaction: coordinator, µs", 0),
    ("server_cpu", "  the store's server, µs", 0),
    ("program_cpu", "  initiators and participants, µs", 0),
    ("idle", "all processors: idle, %", 0),
    ("stolen", "  with other machines of the same host, %", 0),
    ("commits", "coordinator, a transaction: commits", 3),
    ("commits_awaited", "  that somebody waited for", 3),
    ("statements", "  statements in them", 2),
    ("rows", "  rows in them", 2),
    ("disk_bytes", "  bytes written to disk", 0),
    ("server_commits", "store's server, a transaction: commits", 3),
    ("server_statements", "  statements", 2),
    ("server_rows_inserted", "  rows inserted", 2),
    ("server_rows_updated", "  rows updated", 2),
    ("server_rows_deleted", "  rows deleted", 2),
    ("server_bytes", "  bytes received", 0),
    ("rest_mb", "coordinator's memory, MB: at rest", 1),
    ("load_mb", "  under load", 1),
    ("open_mb", "  with all of them open", 1),
    ("open_each_kb", "  for each of them, kB", 2),
    ("runs", "runs (medians are told)", 0),
    ("violations", "violations", 0),
];

/// A column and the samples of all its runs.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) column: Column,
    pub(crate) samples: Vec<Sample>,
}

impl Outcome {
    pub(crate) fn new(column: Column) -> Self {
        Self { column, samples: Vec::new() }
    }

    pub(crate) fn violations(&self) -> impl Iterator<Item = &String> {
        self.samples.iter().flat_map(|sample| &sample.violations)
    }

    /// The median of each figure over all runs.
    pub(crate) fn medians(&self) -> BTreeMap<&str, f64> {
        let names: BTreeSet<_> =
            self.samples.iter().flat_map(|sample| sample.figures.keys()).collect();
        let mut medians: BTreeMap<_, _> =
            names.into_iter().map(|name| (name.as_str(), self.median(name))).collect();
        medians.insert("runs", self.samples.len() as f64);
        medians.insert("violations", self.violations().count() as f64);
        medians
    }

    fn median(&self, name: &str) -> f64 {
        let found = self.samples.iter().filter_map(|sample| sample.figures.get(name));
        let mut found: Vec<_> = found.copied().collect();
        found.sort_by(f64::total_cmp);
        let last = found.len() - 1;
        f64::midpoint(found[last / 2], found[last.div_ceil(2)])
    }

    pub(crate) fn title(&self) -> String {
        let load = match self.column.load {
            Load::Closed(number) | Load::Beside { concurrency: number, .. } => {
                format!("{number} at a time")
            }
            Load::Open(rate) => format!("{rate} a second"),
            Load::Held(held) => format!("{held} open"),
        };
        let (subject, branches) = (self.subject(), self.column.branches);
        let ways = [self.record(), self.phase_two(), self.hang()].concat();
        format!("{subject}\n{branches} branches\n{load}{ways}")
    }

    /// Name of this column's line in the plot. It leaves out the load and, without `branches`, also the number of branches.
    pub(crate) fn series(&self, branches: bool) -> String {
        let branches =
            if branches { format!(", {} branches", self.column.branches) } else { String::new() };
        let ways = [self.record(), self.phase_two(), self.hang()].concat();
        format!("{}{branches}{ways}", self.subject()).replace('\n', ", ")
    }

    /// Name of the measured server.
    fn subject(&self) -> String {
        let server = self.samples.first().and_then(|sample| sample.server.as_ref());
        let mysql = if server.is_some_and(|version| version.contains("MariaDB")) {
            "MariaDB"
        } else {
            "MySQL"
        };
        match &self.column.subject {
            Subject::Handfast(Storage::Memory) => "MEMORY, NOT DURABLE".to_owned(),
            Subject::Handfast(Storage::Sqlite(_)) => "SQLite".to_owned(),
            Subject::Handfast(Storage::MySql(_)) => mysql.to_owned(),
            Subject::Dtm { url, store, .. } => {
                let store =
                    if matches!(store, Storage::MySql(_)) { mysql } else { "its own store" };
                let host = url.trim_start_matches("http://").split('/').next().unwrap_or_default();
                format!("{host}\n{store}")
            }
        }
    }

    fn record(&self) -> &'static str {
        match self.column.record {
            Record::Begin => "",
            Record::Decision => "\nrecorded with the decision",
        }
    }

    fn phase_two(&self) -> &'static str {
        match self.column.phase_two {
            Some(PhaseTwo::Batches) => "\nin batches",
            Some(PhaseTwo::OneByOne) => "\none by one",
            None => "",
        }
    }

    fn hang(&self) -> &'static str {
        match self.column.load {
            Load::Beside { hangs: false, .. } => "\nall answer",
            Load::Beside { hangs: true, .. } => "\none hangs",
            Load::Closed(_) | Load::Open(_) | Load::Held(_) => "",
        }
    }
}

pub(crate) fn table(outcomes: &[Outcome], markdown: bool) -> String {
    let mut table = Table::new();
    table.load_style(if markdown { presets::ASCII_MARKDOWN } else { presets::NOTHING });
    let separator = if markdown { ", " } else { "\n" };
    let titles = outcomes.iter().map(|outcome| outcome.title().replace('\n', separator));
    table.set_header(std::iter::once(String::new()).chain(titles));
    let medians: Vec<_> = outcomes.iter().map(Outcome::medians).collect();
    for (name, meaning, digits) in FIGURES {
        if medians.iter().all(|medians| !medians.contains_key(name)) {
            continue;
        }
        let cell = |medians: &BTreeMap<_, f64>| match medians.get(name) {
            Some(figure) => format!("{figure:.digits$}"),
            None => String::new(),
        };
        table.add_row(std::iter::once(meaning.to_owned()).chain(medians.iter().map(cell)));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

pub(crate) fn json(options: &Options, outcomes: &[Outcome]) -> Value {
    let columns = outcomes.iter().map(|outcome| {
        let samples: Vec<_> = outcome.samples.iter().map(|sample| &sample.figures).collect();
        json!({
            "title": outcome.title().replace('\n', ", "),
            "branches": outcome.column.branches,
            "server": outcome.samples[0].server,
            "medians": outcome.medians(),
            "samples": samples,
            "violations": outcome.violations().collect::<Vec<_>>(),
        })
    });
    json!({
        "machine": machine(),
        "options": format!("{options:?}"),
        "columns": columns.collect::<Vec<_>>(),
    })
}

/// One line about the machine of this run.
pub(crate) fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (processors, memory, kernel) =
        (read("/proc/cpuinfo"), read("/proc/meminfo"), read("/proc/sys/kernel/osrelease"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let kilobytes = field(&memory, "MemTotal").trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
    format!(
        "{} × {}, {} GB, Linux {}; everything on it",
        processors.lines().filter(|line| line.starts_with("processor")).count(),
        field(&processors, "model name"),
        kilobytes / 1_000_000,
        kernel.trim()
    )
}
