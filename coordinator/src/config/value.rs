//! Parses values: text or TOML in, checked types out. Each error says what was found and what was expected.

use std::{
    collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc,
    time::Duration,
};

use handfast_proto::limits::{LABEL_KEY_BYTES_MAX, LABELS_MAX, PARTICIPANT_BYTES_MAX};
use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Value;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::{
    dispatch::address::{Addresses, AllowList},
    store::mysql,
};

/// The largest count: more than one machine can hold, and less than semaphores and sums can represent.
const COUNT_MAX: u32 = 10_000_000;
/// The longest duration, so that times computed from it can be represented.
pub(super) const LENGTH_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Where transactions are recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// `sqlite:PATH`
    Sqlite(PathBuf),
    /// `mysql://user:password@host:3306/database`, with several hosts for a group of servers
    MySql(MySqlUrl),
    /// `memory:`. It needs `store_unsafe`, because nothing in it survives the process.
    Memory,
}

/// The URL of a MySQL store. Its password appears in no log and in no error.
#[derive(Clone, PartialEq, Eq)]
pub struct MySqlUrl {
    secret: String,
    shown: String,
}

impl MySqlUrl {
    /// The URL as it was given, with the password.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }
}

impl fmt::Display for MySqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for MySqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::MySql(url) => url.fmt(f),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

impl FromStr for StoreUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The part before an @ may contain a password, whatever the text was meant to be.
        let shown =
            text.rsplit_once('@').map_or_else(|| text.to_owned(), |(_, host)| format!("…@{host}"));
        let wrong = |why| Err(format!("{shown:?} {why}"));
        match text.split_once(':') {
            Some(("memory", "")) => Ok(Self::Memory),
            Some(("mysql" | "mariadb", _)) => {
                let addresses = mysql::Addresses::parse(text).map_err(|error| error.to_string())?;
                let shown = addresses.to_string();
                Ok(Self::MySql(MySqlUrl { secret: text.to_owned(), shown }))
            }
            Some(("sqlite", "" | ":memory:")) => wrong("names no file"),
            Some(("sqlite", path)) if path.starts_with("//") => wrong(
                "has two slashes too many: a file is sqlite:handfast.db or sqlite:/var/lib/handfast.db",
            ),
            Some(("sqlite", path)) => Ok(Self::Sqlite(PathBuf::from(path))),
            _ => wrong("is no store"),
        }
    }
}

/// The log filter: checked directives of `tracing_subscriber::EnvFilter`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(String);

impl LogFilter {
    /// For the subscriber. It suppresses what sqlx logs, unless the filter names it (`sqlx=warn`): slow statements with their whole
    /// text, slow connections, and broken ones with level ERROR, which here means that a person must act. The code that needed the
    /// connection logs the failure.
    #[must_use]
    pub fn to_env_filter(&self) -> EnvFilter {
        EnvFilter::new(format!("sqlx=off,{}", self.0))
    }
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let levels = "levels are off, error, warn, info, debug, trace";
        EnvFilter::try_new(text).map_err(|error| format!("{text:?} is no log filter: {error}"))?;
        // A word that is not a level is legal. It means "everything from that target, and nothing else", which nobody intends.
        for word in text.split(',') {
            if !word.contains(['=', '[', ']', '{', '}', '"'])
                && word.parse::<LevelFilter>().is_err()
            {
                return Err(format!("{text:?} is no log filter: {word:?} is no level; {levels}"));
            }
        }
        Ok(Self(text.to_owned()))
    }
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text if stdout is a terminal, otherwise JSON.
    Auto,
    /// For people, on stderr.
    Text,
    /// For programs, on stdout: one object in each line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is no log format: those are auto, text, json")),
        }
    }
}

/// Reads a type that implements `FromStr`.
pub(super) fn parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let value = Value::deserialize(deserializer)?;
    let text =
        value.as_str().ok_or_else(|| D::Error::custom(format!("{value} is no text in quotes")))?;
    text.parse().map_err(D::Error::custom)
}

pub(super) fn listen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text: String = parsed(deserializer)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is no address to listen on: those are IP:PORT, or [IPv6]:PORT"
        ))
    })
}

pub(super) fn yes_or_no<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let answer = value.as_bool();
    answer.ok_or_else(|| D::Error::custom(format!("{value} is neither true nor false")))
}

pub(super) fn length<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let length = value.as_str().and_then(|text| humantime::parse_duration(text).ok());
    length.filter(|length| *length <= LENGTH_MAX).ok_or_else(|| {
        D::Error::custom(format!(
            "{value} is no length of time: those are a number and its unit (ms, s, m, h, d)"
        ))
    })
}

pub(super) fn count<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u32>,
{
    let value = Value::deserialize(deserializer)?;
    let number = value.as_integer().and_then(|number| u32::try_from(number).ok());
    let number = number.filter(|number| (1..=COUNT_MAX).contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| D::Error::custom(format!("{value} is no number from 1 to {COUNT_MAX}")))
}

pub(super) fn allow_list<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<AllowList, D::Error> {
    let rules = texts(deserializer)?;
    AllowList::parse(rules.iter().map(String::as_str)).map_err(D::Error::custom)
}

pub(super) fn label_keys<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Arc<[String]>, D::Error> {
    let keys = texts(deserializer)?;
    match keys.iter().find(|key| !(1..=LABEL_KEY_BYTES_MAX).contains(&key.len())) {
        None if keys.len() <= LABELS_MAX => Ok(keys.into()),
        None => Err(D::Error::custom(format!("a transaction has at most {LABELS_MAX} labels"))),
        Some(key) => Err(D::Error::custom(format!(
            "{key:?} is no key of a label: those have 1 to {LABEL_KEY_BYTES_MAX} bytes"
        ))),
    }
}

fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let texts = value.as_array().and_then(|values| values.iter().map(text).collect());
    texts.ok_or_else(|| D::Error::custom(format!("{value} is no list of texts in quotes")))
}

pub(super) fn participants<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, Addresses>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let Value::Table(table) = value else {
        return Err(D::Error::custom(format!("{value} is no table of names and addresses")));
    };
    let participants = table.into_iter().map(|(name, value)| {
        if !(1..=PARTICIPANT_BYTES_MAX).contains(&name.len()) {
            return Err(format!(
                "{name:?} is no name: those have 1 to {PARTICIPANT_BYTES_MAX} bytes"
            ));
        }
        let text = value.as_str().ok_or_else(|| format!("{value} is no text in quotes"))?;
        Ok((name, text.parse::<Addresses>().map_err(|error| error.to_string())?))
    });
    participants.collect::<Result<_, _>>().map_err(D::Error::custom)
}
