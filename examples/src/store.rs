//! The location of a service's tables: an SQLite file, or a database on a MySQL or MariaDB server.

use std::{fmt, path::PathBuf, str::FromStr};

use sqlx::mysql::MySqlConnectOptions;

/// The location of one database. `Display` and `Debug` leave out the password; [`Store::url`] includes it.
#[derive(Clone, PartialEq, Eq)]
pub enum Store {
    /// `sqlite:FILE`
    Sqlite(PathBuf),
    /// `mysql://user:password@host:3306/database`
    MySql(String),
}

/// One of the three services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// Stores and places orders.
    Order,
    /// Keeps the stock.
    Inventory,
    /// Keeps the customers' points.
    Points,
}

/// The location of each service's database.
#[derive(Debug, Clone)]
pub struct Stores {
    /// The order service.
    pub order: Store,
    /// The inventory service.
    pub inventory: Store,
    /// The points service.
    pub points: Store,
}

impl Store {
    /// The location as it is written on the command line, with its password.
    #[must_use]
    pub fn url(&self) -> String {
        match self {
            Self::Sqlite(file) => format!("sqlite:{}", file.display()),
            Self::MySql(url) => url.clone(),
        }
    }
}

impl Stores {
    pub(crate) fn each(&self) -> [(Service, &Store); 3] {
        [
            (Service::Order, &self.order),
            (Service::Inventory, &self.inventory),
            (Service::Points, &self.points),
        ]
    }
}

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("sqlite", file)) if !file.is_empty() => Ok(Self::Sqlite(PathBuf::from(file))),
            Some(("mysql" | "mariadb", rest)) if rest.starts_with("//") => {
                // Errors do not quote the text, because it may contain a password.
                let options: MySqlConnectOptions =
                    text.parse().map_err(|error| format!("it is no URL: {error}"))?;
                match options.get_database() {
                    Some(name) if !name.is_empty() => Ok(Self::MySql(text.to_owned())),
                    _ => Err("it names no database: mysql://user@host:3306/database".to_owned()),
                }
            }
            _ => {
                Err("a store is sqlite:FILE or mysql://user:password@host:3306/database".to_owned())
            }
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(file) => write!(f, "{}", file.display()),
            Self::MySql(url) => f.write_str(&without_password(url)),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The URL without its password.
#[must_use]
pub fn without_password(url: &str) -> String {
    let Ok(options) = url.parse::<MySqlConnectOptions>() else { return "mysql://…".to_owned() };
    let database = options.get_database().map(|name| format!("/{name}")).unwrap_or_default();
    let (user, host, port) = (options.get_username(), options.get_host(), options.get_port());
    format!("mysql://{user}@{host}:{port}{database}")
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Order => "order",
            Self::Inventory => "inventory",
            Self::Points => "points",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        let url = "mysql://shop:s3cret@127.0.0.1:3306/inventory";
        let store: Store = url.parse().unwrap();
        assert_eq!(store.url(), url);
        assert_eq!(store.to_string(), "mysql://shop@127.0.0.1:3306/inventory");
        assert!(!format!("{store:?}").contains("s3cret"));
        for wrong in ["mysql://shop:s3cret@127.0.0.1:3306", "mysql:s3cret", "mysql://s3cret@:x/y"] {
            let error = wrong.parse::<Store>().unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_file_is_a_file() {
        let store: Store = "sqlite:/tmp/a b.db".parse().unwrap();
        assert_eq!(store, Store::Sqlite(PathBuf::from("/tmp/a b.db")));
        assert_eq!(store.url(), "sqlite:/tmp/a b.db");
        assert!("/tmp/a.db".parse::<Store>().is_err());
    }
}
