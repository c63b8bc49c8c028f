//! Fuzzes configuration: flags, environment and file. The file starts as the commented template and is then mutated.
//! Every error must say what is wrong and how to fix it.

use handfast_coordinator::config::{Config, Sources};

use super::{Round, random::Random};

const VALUES: [&str; 20] = [
    "sqlite:handfast.db",
    "mysql://root@127.0.0.1:3306/handfast",
    "mysql://",
    "127.0.0.1:7420",
    "0.0.0.0:7420",
    "[::1]:0",
    "true",
    "500ms",
    "20s",
    "7d",
    "99999999999999999999y",
    "0",
    "-1",
    "1e400",
    "info",
    "info,sqlx=off",
    "json",
    "auto",
    "[\"loopback\"]",
    "{}",
];
const VARIABLES: [&str; 10] = [
    "HANDFAST_LISTEN",
    "HANDFAST_STORE",
    "HANDFAST_INSECURE",
    "HANDFAST_LOG",
    "HANDFAST_LOG_FORMAT",
    "HANDFAST_TIMEOUT",
    "HANDFAST_RETENTION",
    "HANDFAST_CALLS_TIMEOUT",
    "HANDFAST_RETRY_INITIAL",
    "HANDFAST_NOTHING",
];
const FLAGS: [&str; 6] = ["listen", "store", "insecure", "log", "log_format", "retention"];

pub(super) fn play(round: &mut Round) {
    let template = Config::template();
    while round.next() {
        let sources = sources(&mut round.random, &template);
        match Config::load(&sources) {
            Ok(_) => round.accepted(true),
            Err(invalid) if invalid.what.is_empty() => {
                round.found(format!("nobody says what is wrong with {sources:?}"));
            }
            Err(_) => {}
        }
    }
}

fn sources(random: &mut Random, template: &str) -> Sources {
    let mut flags = Vec::new();
    // Usually name a store. Otherwise most inputs would only find that the store is missing.
    if !random.once_in(8) {
        flags.push(("store", "sqlite:handfast.db".to_owned()));
    }
    while random.once_in(4) {
        flags.push((random.of(&FLAGS), random.text_of(&VALUES)));
    }
    let mut env = Vec::new();
    while random.once_in(3) {
        env.push((random.text_of(&VARIABLES), random.text_of(&VALUES)));
    }
    let file = random.once_in(2).then(|| ("handfast.toml".to_owned(), file(random, template)));
    Sources { flags, env, file }
}

fn file(random: &mut Random, template: &str) -> String {
    let lines = template.lines().map(|line| {
        // In the template, `#key = value` shows a key with its default.
        let key = line.strip_prefix('#').and_then(|line| line.split_once(" = "));
        match key {
            Some((key, default)) if random.once_in(6) => {
                let value = match random.below(4) {
                    0 => random.number().to_string(),
                    1 => format!("\"{}\"", random.of(&VALUES)),
                    2 => random.text(),
                    _ => default.to_owned(),
                };
                format!("{key} = {value}")
            }
            _ => line.to_owned(),
        }
    });
    let mut text = lines.collect::<Vec<_>>().join("\n").into_bytes();
    if random.once_in(3) {
        random.bend(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
