//! Writes the table in the README's section "How it is tested" from what the programs that test printed with `--json`.

#![allow(clippy::print_stdout, reason = "what is printed is the table")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::Value;

/// The lines before and after the table in a README.
const MARKS: [&str; 2] = ["<!-- figures -->", "<!-- end of figures -->"];

/// Prints the table of figures, or writes it into files.
#[derive(Debug, Parser)]
struct Options {
    /// The folder that `scripts/prove` has written, with one file for each program.
    #[arg(default_value = "target/figures")]
    folder: PathBuf,
    /// Replace the table in this file
    #[arg(long, value_name = "FILE")]
    write: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if options.write.is_empty() {
        println!("{}", table(&options.folder, ""));
    }
    for path in &options.write {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let [begin, end] = MARKS.map(|mark| text.find(mark));
        let (Some(begin), Some(end)) = (begin, end) else {
            anyhow::bail!("{} has no lines {MARKS:?}", path.display());
        };
        let table = table(&options.folder, &text[begin..end]);
        let new = format!("{}{}\n\n{table}\n\n{}", &text[..begin], MARKS[0], &text[end..]);
        fs::write(path, new).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Makes the cells of a row: what a program did, and what it found.
type Row = fn(&Value) -> String;

/// The programs: the file with the result, the first cell of the row, and the function for the other cells.
const PROGRAMS: [(&str, &str, Row); 11] = [
    ("model", "model", model),
    ("simulate", "simulation", simulation),
    ("bugs", "planted bugs", bugs),
    ("chaos-sqlite", "chaos, sqlite", chaos),
    ("chaos-mysql", "chaos, mysql", chaos),
    ("chaos-mariadb", "chaos, mariadb", chaos),
    ("chaos-replication", "chaos, mariadb with a replica", chaos),
    ("chaos-galera", "chaos, galera", chaos),
    ("chaos-group-replication", "chaos, mysql group replication", chaos),
    ("recovery", "recovery", recovery),
    ("fuzz", "fuzzing", fuzz),
];

/// Makes the table. A program without a result in `folder` keeps its row of the table `before`, if it has one there.
fn table(folder: &Path, before: &str) -> String {
    let rows = PROGRAMS.iter().filter_map(|(file, program, row)| {
        let begins = format!("| {program} | ");
        match read(folder, file) {
            Some(answer) => Some(format!("{begins}{} |", row(&answer))),
            None => before.lines().find(|line| line.starts_with(&begins)).map(str::to_owned),
        }
    });
    let rows: Vec<_> = rows.collect();
    format!("| program | what it did | what it found |\n|---|---|---|\n{}", rows.join("\n"))
}

/// Reads the result of a program, if there is one.
fn read(folder: &Path, name: &str) -> Option<Value> {
    let text = fs::read_to_string(folder.join(name).with_extension("json")).ok()?;
    serde_json::from_str(&text).ok()
}

fn model(it: &Value) -> String {
    format!(
        "{} states in {} variants; {} guards taken away, in {} rules | {} of {} clean with all rules; {} of {} broken without one",
        number(&it["states"]),
        it["clean_of"],
        it["broken_of"],
        it["rules"].as_array().map_or(0, Vec::len),
        it["clean"],
        it["clean_of"],
        it["broken"],
        it["broken_of"],
    )
}

fn simulation(it: &Value) -> String {
    // Beside faults it counts what came of them.
    let is_fault = |what: &str| {
        let outcomes = ["told ", "orders ", "overdue ", "inquiries ", "coordinator started"];
        !outcomes.iter().any(|outcome| what.starts_with(outcome))
    };
    let counts = it["counts"].as_object().into_iter().flatten();
    let faults: u64 =
        counts.filter(|(what, _)| is_fault(what)).filter_map(|(_, count)| count.as_u64()).sum();
    format!(
        "{} seeds, {:.0} simulated hours, {} orders, {} faults | promises broken: {}; all resolved within {} s once all was well",
        number(&it["seeds"]),
        it["simulated_seconds"].as_f64().unwrap_or_default() / 3600.0,
        number(&it["orders"]),
        grouped(faults),
        it["violations"],
        it["longest_to_resolve_seconds"],
    )
}

fn bugs(it: &Value) -> String {
    let found = it.as_object().into_iter().flatten().map(|(name, seeds)| match seeds.as_u64() {
        Some(seeds) => format!("{} {seeds}", name.replace('-', " ")),
        None => format!("{} NOT FOUND", name.replace('-', " ")),
    });
    let found: Vec<_> = found.collect();
    let count = found.len();
    format!("{count}, one at a time | seeds until found: {}", found.join(", "))
}

fn chaos(it: &Value) -> String {
    let switches = &it["faults"]["database: new connections led to another server"];
    let switches = match switches.as_u64() {
        Some(count) => format!(" and {} switches", grouped(count)),
        None => String::new(),
    };
    let unknown = |how: &str| it["unknown_resolved"][how].as_u64().unwrap_or_default();
    format!(
        "{} s: {} kills of processes, {} of the database{switches}, {} orders, {} told confirmed, {} unknown and resolved later | lost {}, promises broken {}; all resolved within {} s once all was well",
        it["seconds"],
        number(&it["process_kills"]),
        number(&it["database_kills"]),
        number(&it["orders"]),
        number(&it["acknowledged"]["confirmed"]),
        grouped(unknown("confirmed") + unknown("cancelled")),
        it["lost"],
        it["violations"].as_array().map_or(0, Vec::len),
        it["resolved_after_heal_seconds"],
    )
}

fn recovery(it: &Value) -> String {
    let meanwhile = |what: &str| it["new_while_recovering"][what].as_f64().unwrap_or_default();
    format!(
        "{} open transactions at the start; {} whose participant is gone | serving after {} ms; {} left after {:.0} s; {} MB at most; new ones meanwhile: p50 {:.0} ms, p99 {:.0} ms",
        number(&it["open"]),
        number(&it["stuck"]),
        it["serving_after_ms"],
        it["left"],
        it["drained_seconds"].as_f64().unwrap_or_default(),
        it["memory_mb_max"],
        meanwhile("p50_ms"),
        meanwhile("p99_ms"),
    )
}

fn fuzz(it: &Value) -> String {
    let targets = it["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    let inputs: u64 = targets.iter().filter_map(|target| target["inputs"].as_u64()).sum();
    let findings: usize =
        targets.iter().filter_map(|target| Some(target["findings"].as_array()?.len())).sum();
    format!(
        "{} s: {} inputs for {} readers of what comes from outside | {findings} findings",
        it["seconds"],
        grouped(inputs),
        targets.len(),
    )
}

fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| "?".to_owned(), grouped)
}

/// 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
