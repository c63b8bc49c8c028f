//! Rules of this repository, kept by a machine. Adding one costs a few lines.

mod map;
mod modules;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use self::modules::Crate;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All files below `folder` with this ending, and what is in them.
fn files(folder: &str, ending: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, ending: &str, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
            if path.is_dir() && !hidden && !path.ends_with("target") {
                walk(&path, ending, found);
            } else if path.to_string_lossy().ends_with(ending) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), ending, &mut found);
    assert!(!found.is_empty(), "no {ending} in {folder}");
    found
}

/// The lines of a file that are code, without the items that are for its tests.
fn code(text: &str) -> Vec<(usize, &str)> {
    let mut lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.trim()));
    let mut found = Vec::new();
    while let Some((n, line)) = lines.next() {
        if line == "#[cfg(test)]" {
            skip_item(&mut lines);
        } else if !line.starts_with("//") {
            found.push((n, line));
        }
    }
    found
}

/// Passes over one item, which rustfmt has laid out: it ends with the first `;` or closing brace outside of all brackets.
fn skip_item<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>) {
    let mut depth = 0_i32;
    for (_, line) in lines {
        for letter in line.chars() {
            match letter {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => depth -= 1,
                _ => {}
            }
        }
        if depth == 0 && (line.ends_with(';') || line.ends_with('}')) {
            return;
        }
    }
}

#[test]
fn code_is_what_is_not_for_tests() {
    let text = "use a;\n#[cfg(test)]\nmod tests;\n// said\nfn f() {}\n#[cfg(test)]\nmod more {\n    fn g() {}\n}\nfn h() {}\n";
    let lines: Vec<_> = code(text).into_iter().map(|(_, line)| line).collect();
    assert_eq!(lines, ["use a;", "fn f() {}", "fn h() {}"]);
}

#[track_caller]
fn none_of(files: Vec<(PathBuf, String)>, words: &[&str], why: &str) {
    for (path, text) in files {
        for (n, line) in code(&text) {
            for word in words {
                assert!(
                    !line.contains(word),
                    "{}:{n}: `{word}`: {why}\n    {line}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn what_decides_touches_nothing() {
    let impure = [
        "async ",
        ".await",
        "tokio",
        "sqlx",
        "tonic",
        "rand::",
        "SystemTime",
        "Instant",
        "std::fs",
        "tracing",
    ];
    let mut pure = files("coordinator/src/transaction", ".rs");
    pure.retain(|(path, _)| !path.components().any(|part| part.as_os_str() == "tests"));
    pure.extend(files("participant-sdk/src/fence", "verdict.rs"));
    none_of(pure, &impure, "this decides; others read clocks, wait and write");
}

#[test]
fn dependencies_point_one_way() {
    let sources = files("coordinator/src", ".rs");
    none_of(sources.clone(), &["handfast::"], "the coordinator never depends on the SDK");
    let coordinator = Crate::read(&root().join("coordinator/src"), &sources);
    assert_eq!(forbidden_uses(&coordinator), Vec::<String>::new());
}

/// Which of the coordinator's modules use one that they must not know.
fn forbidden_uses(coordinator: &Crate) -> Vec<String> {
    let below_rpc = ["transaction", "partition", "journal", "store", "dispatch"];
    let door = ["rpc", "server", "config"].as_slice();
    let others: [(&[&str], &[&str]); 4] = [
        (&below_rpc, door),
        (&["transaction"], &["store", "partition", "journal", "dispatch", "coordinator"]),
        (&["store"], &["partition", "journal", "dispatch", "coordinator"]),
        (&["dispatch"], &["store", "partition", "journal", "coordinator"]),
    ];
    let is_forbidden = |from: &str, to: &str| {
        others.iter().any(|(users, used)| users.contains(&from) && used.contains(&to))
    };
    let uses = coordinator.uses_below(&[]);
    assert!(uses.len() > 20, "{uses:?}: where are the modules?");
    let found = uses.iter().filter(|((from, to), _)| is_forbidden(from, to));
    found.map(|((from, to), place)| format!("{from} → {to}: {place}")).collect()
}

#[test]
fn a_dependency_that_points_the_other_way_is_found() {
    let mut sources = files("coordinator/src", ".rs");
    let (_, text) =
        sources.iter_mut().find(|(path, _)| path.ends_with("dispatch/grpc.rs")).unwrap();
    text.insert_str(0, "use crate::{\n    clock::Clock,\n    store::{Batch, Store},\n};\n");
    let coordinator = Crate::read(&root().join("coordinator/src"), &sources);
    let found = forbidden_uses(&coordinator);
    assert_eq!(found, ["dispatch → store: dispatch::grpc names crate::store::Batch"]);
}

/// Every folder of code in which modules can use each other: the root of a library or of a program.
const ROOTS: [&str; 12] = [
    "coordinator/src",
    "examples/src",
    "examples/src/bin/shop",
    "participant-sdk/src",
    "proto/src",
    "tests/it",
    "tests/model/src",
    "tests/src",
    "tests/src/bin/bench",
    "tests/src/bin/chaos",
    "tests/src/bin/recovery",
    "tests/src/bin/simulate",
];

#[test]
fn no_two_modules_use_each_other() {
    let mut found = String::new();
    for name in ROOTS {
        let read = Crate::read(&root().join(name), &files(name, ".rs"));
        for parent in read.parents() {
            let uses = read.uses_below(&parent);
            for circle in modules::circles(&uses) {
                found += &format!("\n{name}, in crate::{}: {circle:?}", parent.join("::"));
                for ((from, to), place) in &uses {
                    if circle.contains(from) && circle.contains(to) {
                        found += &format!("\n    {from} → {to}: {place}");
                    }
                }
            }
        }
    }
    assert!(found.is_empty(), "modules that use each other:{found}");
}

/// A program with several modules is in the list above.
#[test]
fn every_crate_is_looked_at() {
    let mut roots: Vec<_> = files("", ".rs")
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.ends_with("lib.rs") || path.ends_with("main.rs"))
        .map(|path| path.parent().unwrap().strip_prefix(root()).unwrap().to_owned())
        .collect();
    roots.sort();
    roots.dedup();
    let looked_at = ROOTS.map(PathBuf::from).to_vec();
    assert_eq!(roots, looked_at);
}

/// A file longer than this wants to be two files.
const LINES_MAX: usize = 500;

#[test]
fn files_are_short() {
    let mut long = BTreeMap::new();
    for ending in [".rs", ".proto", ".sql"] {
        for (path, text) in files("", ending) {
            let path = path.strip_prefix(root()).unwrap().display().to_string();
            let lines = text.lines().count();
            if lines > LINES_MAX {
                long.insert(path, lines);
            }
        }
    }
    assert!(long.is_empty(), "longer than {LINES_MAX} lines: {long:#?}");
}

#[test]
fn messages_stay_at_the_edge() {
    for folder in ["transaction", "partition", "journal", "store"] {
        none_of(
            files(&format!("coordinator/src/{folder}"), ".rs"),
            &["v1::", "pb::", "tonic::"],
            "only rpc and dispatch name messages",
        );
    }
}

#[test]
fn nothing_is_left_to_do() {
    // In two parts, so that this file passes.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("X", "XX"),
        concat!("unim", "plemented!"),
    ];
    for ending in [".rs", ".proto", ".sql", ".md", ".toml"] {
        for (path, text) in files("", ending) {
            for mark in marks {
                assert!(!text.contains(mark), "{} has a {mark}", path.display());
            }
        }
    }
}

#[test]
fn every_column_says_what_it_means() {
    let mut columns = 0;
    for (path, text) in files("", ".sql") {
        let mut in_table = false;
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            in_table = line.starts_with("CREATE TABLE") || in_table && !line.starts_with(')');
            let name = line.split_whitespace().next().unwrap_or_default();
            if in_table
                && !name.is_empty()
                && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
            {
                columns += 1;
                let elsewhere = format!("COMMENT ON COLUMN handfast_fence.{name} ");
                let said =
                    line.contains("--") || line.contains("COMMENT") || text.contains(&elsewhere);
                assert!(said, "{}:{}: what does it mean?\n    {line}", path.display(), n + 1);
            }
        }
    }
    assert!(columns > 60, "{columns} columns: where are the tables?");
}

#[test]
fn every_call_says_what_it_guarantees() {
    let mut calls = 0;
    for (path, text) in files("proto/handfast", ".proto") {
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        for (n, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("rpc ")) {
            calls += 1;
            assert!(
                lines[n - 1].starts_with("//"),
                "{}:{}: what does it guarantee?\n    {line}",
                path.display(),
                n + 1
            );
        }
    }
    assert_eq!(calls, 8 + 6 + 4);
}

/// A process dies there only if it was built with a feature that no package turns on; and each place is one where `chaos` lets one
/// die.
#[test]
fn places_to_die_are_compiled_out_and_known() {
    let named = |text: &str| -> Vec<String> {
        let places = text.split("crash_point!(\"").skip(1);
        places.map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
    };
    let mut places: Vec<_> = ["coordinator/src", "participant-sdk/src"]
        .iter()
        .flat_map(|folder| files(folder, ".rs"))
        .flat_map(|(_, text)| named(&text))
        .collect();
    places.sort();
    places.dedup();
    assert!(places.len() > 20, "{places:?}");
    let chaos: String =
        files("tests/src/bin/chaos", ".rs").into_iter().map(|(_, text)| text).collect();
    for place in &places {
        assert!(chaos.contains(&format!("\"{place}\"")), "chaos does not know of {place}");
    }
    for (path, text) in files("", "Cargo.toml") {
        let defined_here = path.ends_with("proto/Cargo.toml");
        let times = text.matches("crash-points").count();
        assert_eq!(times, usize::from(defined_here), "{} turns it on", path.display());
    }
}

/// Section by section, the two READMEs have the same numbers, the same names in backticks, the same links and the same code.
/// Comments and texts within the code are translated.
#[test]
fn the_chinese_readme_says_what_the_english_one_says() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let (english, chinese) = (read("README.md"), read("README.zh-CN.md"));
    let sections = |text: &str| text.split("\n## ").map(facts).collect::<Vec<_>>();
    let (in_english, in_chinese) = (sections(&english), sections(&chinese));
    for (n, heading) in english.split("\n## ").map(|text| text.lines().next().unwrap()).enumerate()
    {
        let translated = in_chinese.get(n).unwrap_or_else(|| panic!("{heading}: not translated"));
        for (english, chinese) in in_english[n].iter().zip(translated) {
            assert_eq!(english, chinese, "README.md (left), section {heading:?}");
        }
    }
    assert_eq!(in_english.len(), in_chinese.len());
}

/// What must be the same in every language: numbers, names in backticks, links, and code.
fn facts(section: &str) -> [Vec<String>; 4] {
    let fenced: Vec<_> = section.split("```").collect();
    let (prose, blocks): (Vec<_>, Vec<_>) =
        fenced.iter().enumerate().partition(|(n, _)| n % 2 == 0);
    let prose: String = prose.into_iter().map(|(_, text)| *text).collect();
    let sorted = |mut facts: Vec<String>| {
        facts.sort();
        facts
    };
    let numbers = section.split(|c: char| !c.is_ascii_digit() && !".,-".contains(c));
    let numbers = numbers.map(|text| text.trim_matches([',', '.', '-'])).filter(|n| !n.is_empty());
    let names = prose.split('`').skip(1).step_by(2);
    let links = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let links = links.filter(|link| !link.starts_with("README"));
    let blocks = blocks.into_iter().map(|(_, block)| *block);
    let code = blocks.filter(|block| !block.starts_with("text")).map(|block| {
        let lines = block.lines().map(|line| {
            let code = line.split("// ").next().unwrap_or_default();
            let code = code.split(" # ").next().unwrap_or_default();
            code.split('"').step_by(2).collect::<Vec<_>>().join("\"\"").trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    });
    [
        sorted(numbers.map(str::to_owned).collect()),
        sorted(names.map(str::to_owned).collect()),
        sorted(links.map(str::to_owned).collect()),
        code.collect(),
    ]
}
