//! Reads the configuration from flags, environment, file and defaults. Earlier ones override later ones. A wrong value is an
//! error even if another source overrides it. Otherwise it would surface only when the other one is removed.

use std::{net::IpAddr, ops::Range};

use confique::{
    Config as _, Layer as _,
    meta::{Expr, Field, FieldKind, LeafKind, Meta},
};
use toml::{Table, Value, de::DeTable};

use super::{Config, keys::Keys};

type Layer = <Keys as confique::Config>::Layer;

/// How similar an unknown name and a suggestion must be, from 0 to 1.
const GUESS_SIMILARITY_MIN: f64 = 0.7;
/// Environment variables that are not configuration keys: the path of the file, and the address that clients connect to.
const ENV_OTHERS: [&str; 2] = ["HANDFAST_CONFIG", "HANDFAST_SERVER"];
/// The prefix of all our variables.
const ENV_PREFIX: &str = "HANDFAST_";

/// The values from all sources.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Keys and the texts of their flags. The flag of `log_format` is `--log-format`.
    pub flags: Vec<(&'static str, String)>,
    /// Names and values of environment variables. Foreign and empty ones are ignored.
    pub env: Vec<(String, String)>,
    /// Name and content of the file.
    pub file: Option<(String, String)>,
}

/// An error in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Invalid {
    /// The location and the problem.
    pub what: String,
    /// What the user can do.
    pub hint: String,
}

/// Where a value came from.
#[derive(Debug, Clone)]
enum Origin {
    Flag,
    Env,
    /// `handfast.toml:3`
    File(String),
}

/// A key, such as `retry.initial`.
#[derive(Debug, Clone)]
struct Key {
    path: String,
    field: &'static Field,
}

struct Setting {
    key: Key,
    origin: Origin,
    value: Value,
}

impl Config {
    /// Merges the sources and checks the result.
    ///
    /// # Errors
    ///
    /// The first error found.
    pub fn load(sources: &Sources) -> Result<Self, Invalid> {
        let mut settings = from_flags(&sources.flags);
        settings.extend(from_env(&sources.env)?);
        if let Some((name, text)) = &sources.file {
            settings.extend(from_file(name, text)?);
        }
        let mut layer = Layer::empty();
        for Setting { key, origin, value } in &settings {
            layer = layer
                .with_fallback(key.layer(value.clone()).map_err(|why| key.wrong(origin, &why))?);
        }
        let keys = Keys::from_layer(layer.with_fallback(Layer::default_values())).map_err(|_| Invalid {
            what: "no store is named".to_owned(), // all other keys have defaults
            hint: "name one: --store sqlite:handfast.db, HANDFAST_STORE, or `store` in the file of --config; \
                   to try things out: handfast dev"
                .to_owned(),
        })?;
        keys.check().map_err(|problem| {
            let blamed = problem
                .keys
                .iter()
                .find_map(|path| settings.iter().find(|setting| setting.key.path == *path));
            let location =
                blamed.map_or_else(String::new, |setting| setting.key.location(&setting.origin));
            Invalid { what: format!("{location}{}", problem.what), hint: problem.hint.to_owned() }
        })
    }

    /// A commented file with every key and its default.
    #[must_use]
    pub fn template() -> String {
        fn section(meta: &'static Meta) -> String {
            let entries = meta.fields.iter().map(|field| {
                let name = field.name;
                let entry = match &field.kind {
                    FieldKind::Leaf { .. } => {
                        format!("#{name} = {}\n\n", Key { path: name.to_owned(), field }.example())
                    }
                    FieldKind::Nested { meta } => format!("[{name}]\n{}", section(meta)),
                };
                comment(field.doc) + &entry
            });
            entries.collect()
        }
        let comment_and_keys = format!("{}\n{}", comment(Keys::META.doc), section(&Keys::META));
        comment_and_keys.trim_end().to_owned() + "\n"
    }
}

fn comment(doc: &[&str]) -> String {
    doc.iter().map(|line| format!("#{line}\n")).collect()
}

fn from_flags(flags: &[(&'static str, String)]) -> Vec<Setting> {
    let keys = keys();
    let settings = flags.iter().filter_map(|(path, text)| {
        let key = keys.iter().find(|key| key.path == *path)?;
        Some(Setting { key: key.clone(), origin: Origin::Flag, value: key.value_of_text(text) })
    });
    settings.collect()
}

fn from_env(env: &[(String, String)]) -> Result<Vec<Setting>, Invalid> {
    let keys = keys();
    let mut settings = Vec::new();
    for (name, text) in env {
        if !name.starts_with(ENV_PREFIX)
            || ENV_OTHERS.contains(&name.as_str())
            || is_of_kubernetes(name, text, env)
            || text.is_empty()
        {
            continue;
        }
        let Some(key) = keys.iter().find(|key| key.env() == name) else {
            let known = keys.iter().map(Key::env).chain(ENV_OTHERS);
            let hint = other_name(name).or_else(|| guess(name, known));
            return Err(Invalid {
                what: format!("unknown environment variable `{name}`"),
                hint: hint.unwrap_or_else(|| {
                    "those that Handfast knows are in `handfast config`; unset this one".to_owned()
                }),
            });
        };
        let value = key.value_of_text(text);
        settings.push(Setting { key: key.clone(), origin: Origin::Env, value });
    }
    Ok(settings)
}

/// Kubernetes sets variables for every service in a container's environment. A service named `handfast` causes
/// HANDFAST_SERVICE_HOST, HANDFAST_PORT, HANDFAST_PORT_7420_TCP_ADDR and more. No person wrote these, so they
/// are not errors.
/// A HANDFAST_PORT with a plain number was written by a person who expects it to have an effect, so it is an error.
fn is_of_kubernetes(name: &str, text: &str, env: &[(String, String)]) -> bool {
    let is_set = |name: &str| env.iter().any(|(set, _)| set == name);
    if let Some((stem, _)) = name.split_once("_SERVICE_PORT") {
        return text.parse::<u16>().is_ok() && is_set(&format!("{stem}_SERVICE_HOST"));
    }
    if name.ends_with("_SERVICE_HOST") {
        return text.parse::<IpAddr>().is_ok();
    }
    if let Some((_, rest)) = name.split_once("_PORT_") {
        // For example 7420_TCP and 7420_TCP_ADDR.
        return rest.split_once('_').is_some_and(|(port, protocol)| {
            let protocol = protocol.split('_').next().unwrap_or_default();
            port.parse::<u16>().is_ok() && ["TCP", "UDP", "SCTP"].contains(&protocol)
        });
    }
    name.ends_with("_PORT") && text.contains("://")
}

/// Our key for a name that other programs use for the same thing.
fn other_name(unknown: &str) -> Option<String> {
    let key = match unknown.trim_start_matches(ENV_PREFIX) {
        "PORT" | "HOST" | "ADDR" | "ADDRESS" | "BIND" | "GRPC_PORT" => {
            "HANDFAST_LISTEN=127.0.0.1:7420"
        }
        "DATABASE" | "DATABASE_URL" | "DB" | "DB_URL" | "URL" => {
            "HANDFAST_STORE=sqlite:handfast.db"
        }
        "LOG_LEVEL" | "LEVEL" => "HANDFAST_LOG=info",
        _ => return None,
    };
    Some(format!("did you mean `{key}`?"))
}

fn from_file(name: &str, text: &str) -> Result<Vec<Setting>, Invalid> {
    let mut file = File { name, text, settings: Vec::new() };
    let syntax = |error: toml::de::Error| Invalid {
        what: format!("{}: {}", file.location(error.span().unwrap_or_default()), error.message()),
        hint: "the file is TOML; `handfast config` prints one with all keys".to_owned(),
    };
    let values: Table = toml::from_str(text).map_err(syntax)?;
    let spans = DeTable::parse(text).map_err(syntax)?;
    file.take(&Keys::META, "", spans.get_ref(), &values)?;
    Ok(file.settings)
}

struct File<'a> {
    name: &'a str,
    text: &'a str,
    settings: Vec<Setting>,
}

impl File<'_> {
    fn location(&self, span: Range<usize>) -> String {
        let before = self.text.bytes().take(span.start);
        format!("{}:{}", self.name, 1 + before.filter(|byte| *byte == b'\n').count())
    }

    /// Reads the settings of one section. `section` ends with a dot; for the whole file it is empty.
    fn take(
        &mut self,
        meta: &'static Meta,
        section: &str,
        spans: &DeTable<'_>,
        values: &Table,
    ) -> Result<(), Invalid> {
        let mut entries: Vec<_> = spans.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        for (name, span) in entries {
            let path = format!("{section}{}", name.get_ref());
            let Some(field) = meta.fields.iter().find(|field| field.name == name.get_ref()) else {
                return Err(self.unknown(&path, name.span()));
            };
            let value = &values[field.name];
            match &field.kind {
                FieldKind::Nested { meta } => {
                    let (Some(spans), Some(values)) = (span.get_ref().as_table(), value.as_table())
                    else {
                        let location = self.location(span.span());
                        return Err(Invalid {
                            what: format!("{location}: `{path}` is {value}, and it is a section"),
                            hint: format!("write [{path}] on a line, and its keys below"),
                        });
                    };
                    self.take(meta, &format!("{path}."), spans, values)?;
                }
                FieldKind::Leaf { .. } => {
                    let key = Key { path, field };
                    // In a table, point to the wrong entry.
                    for (name, span) in span.get_ref().as_table().into_iter().flatten() {
                        let name = name.get_ref().to_string();
                        let entry = Table::from_iter([(name.clone(), value[&name].clone())]);
                        let checked = key.layer(entry.into());
                        checked.map_err(|why| {
                            let entry = Key { path: format!("{}.{name}", key.path), field };
                            entry.wrong(&Origin::File(self.location(span.span())), &why)
                        })?;
                    }
                    let origin = Origin::File(self.location(span.span()));
                    self.settings.push(Setting { key, origin, value: value.clone() });
                }
            }
        }
        Ok(())
    }

    fn unknown(&self, path: &str, span: Range<usize>) -> Invalid {
        let keys = keys();
        let sections = keys.iter().filter_map(|key| Some(key.path.split_once('.')?.0));
        let sections = sections.filter(|_| !path.contains('.'));
        let known = keys.iter().map(|key| key.path.as_str()).chain(sections);
        Invalid {
            what: format!("{}: unknown key `{path}`", self.location(span)),
            hint: guess(path, known)
                .unwrap_or_else(|| "`handfast config` prints all keys".to_owned()),
        }
    }
}

impl Key {
    fn env(&self) -> &'static str {
        match self.field.kind {
            FieldKind::Leaf { env: Some(env), .. } => env,
            FieldKind::Leaf { env: None, .. } | FieldKind::Nested { .. } => "",
        }
    }

    fn flag(&self) -> String {
        format!("--{}", self.path.replace('_', "-"))
    }

    fn default(&self) -> Option<Expr> {
        match self.field.kind {
            FieldKind::Leaf { kind: LeafKind::Required { default }, .. } => default,
            FieldKind::Leaf { kind: LeafKind::Optional, .. } | FieldKind::Nested { .. } => None,
        }
    }

    /// The default; for the store, which has no default, a value that works.
    fn example(&self) -> Value {
        let default = self.default().and_then(|default| Value::try_from(default).ok());
        default.unwrap_or_else(|| Value::from("sqlite:handfast.db"))
    }

    /// Reads the text of a flag or a variable as the type of the default. A text that does not fit stays text, and is refused later.
    fn value_of_text(&self, text: &str) -> Value {
        let stays = || Value::String(text.to_owned());
        let parts = || text.split(',').map(str::trim).filter(|part| !part.is_empty());
        match self.default() {
            Some(Expr::Bool(_)) => text.parse().map_or_else(|_| stays(), Value::Boolean),
            Some(Expr::Integer(_)) => text.parse().map_or_else(|_| stays(), Value::Integer),
            Some(Expr::Array(_)) => Value::Array(parts().map(Value::from).collect()),
            Some(Expr::Map(_)) => {
                let entries = parts().map(|part| {
                    let (name, value) = part.split_once('=')?;
                    Some((name.to_owned(), Value::from(value)))
                });
                entries.collect::<Option<Table>>().map_or_else(stays, Value::Table)
            }
            _ => stays(),
        }
    }

    /// A layer with only this value.
    fn layer(&self, value: Value) -> Result<Layer, String> {
        let table = self
            .path
            .rsplit('.')
            .fold(value, |value, name| Value::Table(Table::from_iter([(name.to_owned(), value)])));
        table.try_into().map_err(|error: toml::de::Error| error.message().to_owned())
    }

    fn location(&self, origin: &Origin) -> String {
        match origin {
            Origin::Flag => format!("{}: ", self.flag()),
            Origin::Env => format!("{}: ", self.env()),
            Origin::File(location) => format!("{location}: "),
        }
    }

    fn wrong(&self, origin: &Origin, why: &str) -> Invalid {
        let mut example = self.example();
        if let Some(participants) = example.as_table_mut() {
            participants.insert("inventory".to_owned(), Value::from("http://127.0.0.1:7001"));
        }
        let (what, hint) = match origin {
            Origin::File(_) => {
                let example = match example.as_table() {
                    Some(entries) => entries.to_string().trim_end().to_owned(),
                    None => format!("{} = {example}", self.field.name),
                };
                (format!("`{}`: {why}", self.path), example)
            }
            Origin::Env => (why.to_owned(), format!("{}={}", self.env(), text_of(&example))),
            Origin::Flag => (why.to_owned(), format!("{} {}", self.flag(), text_of(&example))),
        };
        Invalid {
            what: format!("{}{what}", self.location(origin)),
            hint: format!("such as: {hint}"),
        }
    }
}

/// The opposite of [`Key::value_of_text`].
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(text_of).collect::<Vec<_>>().join(","),
        Value::Table(entries) => {
            let entries = entries.iter().map(|(name, value)| format!("{name}={}", text_of(value)));
            entries.collect::<Vec<_>>().join(",")
        }
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {
            value.to_string()
        }
    }
}

/// All keys, in the order of the template.
fn keys() -> Vec<Key> {
    fn collect(meta: &'static Meta, section: &str, keys: &mut Vec<Key>) {
        for field in meta.fields {
            let path = format!("{section}{}", field.name);
            match &field.kind {
                FieldKind::Leaf { .. } => keys.push(Key { path, field }),
                FieldKind::Nested { meta } => collect(meta, &format!("{path}."), keys),
            }
        }
    }
    let mut keys = Vec::new();
    collect(&Keys::META, "", &mut keys);
    keys
}

/// A suggestion for an unknown name.
fn guess<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let plain = |name: &str| name.trim_start_matches(ENV_PREFIX).to_lowercase();
    let unknown = plain(unknown);
    let last = unknown.rsplit('.').next().unwrap_or(&unknown);
    let (mut best_similarity, mut best) = (GUESS_SIMILARITY_MIN, None);
    for name in known {
        let plain = plain(name);
        // The right key in the wrong section, or in none.
        let is_misplaced = plain.strip_suffix(last).is_some_and(|rest| rest.ends_with(['.', '_']));
        let similarity = if is_misplaced {
            1.0
        } else {
            strsim::normalized_damerau_levenshtein(&unknown, &plain)
        };
        if similarity > best_similarity {
            best_similarity = similarity;
            best = Some(format!("did you mean `{name}`?"));
        }
    }
    best
}
