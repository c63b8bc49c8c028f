//! The map in ARCHITECTURE.md names every room of the house, and no others.

use std::{collections::BTreeSet, fs, path::PathBuf};

use super::root;

/// What the map names, as paths from the repository's root. A folder ends with a slash.
fn named() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let map = text.split("\n## Map\n").nth(1).expect("ARCHITECTURE.md has a section Map");
    let map = map.split("```").nth(1).expect("the map stands between marks for code");
    let (mut package, mut before) = (String::new(), String::new());
    let mut named = BTreeSet::new();
    for line in map.lines().skip(1) {
        for word in line.split([' ', ',', ';', ':', '`', '(', ')']).filter(|word| is_path(word)) {
            if line.starts_with(word) {
                package = word.to_owned();
                before = word.to_owned();
                named.insert(word.to_owned());
                continue;
            }
            // `src/store/` stands below its package; `sqlite/` behind it is in that folder, `limits.rs` behind `src/id.rs` beside it.
            let beside =
                before.trim_end_matches('/').rsplit_once('/').map_or("", |(in_it, _)| in_it);
            let places =
                [format!("{before}{word}"), format!("{beside}/{word}"), format!("{package}{word}")];
            let found = places.iter().find(|path| root().join(path).exists());
            before = found.unwrap_or(&places[2]).clone();
            named.insert(before.clone());
        }
    }
    named
}

fn is_path(word: &str) -> bool {
    (word.ends_with('/') || word.ends_with(".rs"))
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
}

/// What is in a folder: folders, with a slash, and files of Rust.
fn rooms(folder: &str) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let room = move |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let is_hidden = name.starts_with('.') || name == "target";
        match path.is_dir() {
            true if !is_hidden => Some(name + "/"),
            false if name.ends_with(".rs") && name != "lib.rs" => Some(name),
            _ => None,
        }
    };
    let folder = folder.to_owned();
    entries.filter_map(room).map(move |name| format!("{folder}{name}"))
}

#[test]
fn the_map_is_the_house() {
    let named = named();
    assert!(named.len() > 20, "{named:?}");
    let gone: Vec<_> = named.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(gone.is_empty(), "ARCHITECTURE.md names what is not there: {gone:#?}");
    let all = ["", "proto/src/", "coordinator/src/", "participant-sdk/src/"];
    let missing = all.into_iter().flat_map(rooms).filter(|path| !named.contains(path));
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md does not name: {missing:#?}");
}

/// The steps of a transaction name files and functions that exist: `partition/mod.rs`, `record`.
#[test]
fn the_steps_of_a_transaction_can_be_followed() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let steps = text.split("\n## One transaction, front to back\n").nth(1).unwrap();
    let steps = steps.split("\n## ").next().unwrap();
    let sources = super::files("", ".rs");
    let parts: Vec<_> = steps.split('`').collect();
    let (mut functions, mut n) = (0, 1);
    while n < parts.len() {
        let path = parts[n];
        n += 2;
        if !path.ends_with(".rs") {
            continue;
        }
        let whole = format!("/{path}");
        let found: Vec<_> =
            sources.iter().filter(|(file, _)| file.to_string_lossy().ends_with(&whole)).collect();
        let [(_, source)] = found[..] else { panic!("{path}: {} files", found.len()) };
        // Functions follow their file: a comma, or "and", and the name.
        while n < parts.len() && matches!(parts[n - 1].trim(), "," | "and") {
            let name = parts[n];
            let is_there = [format!("fn {name}("), format!("fn {name}<")];
            let code = || source.lines().filter(|line| !line.trim_start().starts_with("//"));
            let has = |text: &String| code().any(|line| line.contains(text));
            assert!(is_there.iter().any(has), "{path} has no fn {name}");
            functions += 1;
            n += 2;
        }
    }
    assert!(functions > 20, "{functions} functions");
}

/// Operators search for log lines by the words on their page.
#[test]
fn the_log_lines_on_the_operators_page_exist() {
    let text = fs::read_to_string(root().join("docs/operators.md")).unwrap();
    let table = text.split("\n## What common log lines mean\n").nth(1).unwrap();
    let table = table.split("\n## ").next().unwrap();
    let sources = super::files("coordinator/src", ".rs");
    let lines: Vec<_> =
        table.lines().filter_map(|row| row.strip_prefix("| `")?.split('`').next()).collect();
    assert!(lines.len() > 5, "{lines:?}");
    for line in lines {
        let is_logged = sources.iter().any(|(_, source)| source.contains(&format!("{line}\"")));
        assert!(is_logged, "no log line {line:?}");
    }
}
