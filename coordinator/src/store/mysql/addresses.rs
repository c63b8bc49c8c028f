//! The addresses of a store: `mysql://user:password@db1,db2:3307,db3/database`. All of them have the same user, password, database
//! and parameters. They are the members of one group of servers, or a primary and its replicas.

use std::{fmt, str::FromStr as _};

use sqlx::{ConnectOptions as _, mysql::MySqlConnectOptions};

use super::server::OpenError;

/// Parameters of a URL. Others are refused: most likely one is misspelled, and the setting that was meant would be missing.
const PARAMETERS: [&str; 14] = [
    "charset",
    "collation",
    "socket",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "sslca",
    "sslcert",
    "sslkey",
    "sslmode",
    "statement-cache-capacity",
    "time-zone",
    "timezone",
];
/// The largest number of addresses. Each takeover asks all of them.
const ADDRESSES_MAX: usize = 9;

/// See the module's comment. Its text does not contain the password.
#[derive(Debug, Clone)]
pub struct Addresses {
    options: Vec<MySqlConnectOptions>,
}

impl Addresses {
    /// Parses a store's URL.
    ///
    /// # Errors
    ///
    /// [`OpenError::Url`]. It does not contain the text, which may include a password.
    pub fn parse(url: &str) -> Result<Self, OpenError> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(OpenError::Url("it has no host".to_owned()));
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (format!("{user}@"), hosts),
            None => (String::new(), authority),
        };
        check_parameters(path)?;
        let hosts: Vec<_> = hosts.split(',').map(str::trim).collect();
        if hosts.len() > ADDRESSES_MAX {
            return Err(OpenError::Url(format!("it has more than {ADDRESSES_MAX} addresses")));
        }
        if hosts.len() > 1 && hosts.contains(&"") {
            return Err(OpenError::Url("one of its addresses is empty".to_owned()));
        }
        let options =
            hosts.into_iter().map(|host| options(&format!("{scheme}://{user}{host}{path}")));
        Ok(Self { options: options.collect::<Result<_, _>>()? })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.options.len()
    }

    /// How to connect to one of them.
    pub(super) fn options(&self, address: usize) -> &MySqlConnectOptions {
        &self.options[address]
    }

    /// The host and port of one of them, for people.
    pub(super) fn name(&self, address: usize) -> String {
        let options = self.options(address);
        format!("{}:{}", options.get_host(), options.get_port())
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = (0..self.len()).map(|address| self.name(address)).collect();
        let first = self.options(0);
        let (user, database) = (first.get_username(), first.get_database().unwrap_or_default());
        write!(f, "mysql://{user}@{}/{database}", names.join(","))
    }
}

fn options(url: &str) -> Result<MySqlConnectOptions, OpenError> {
    let options =
        MySqlConnectOptions::from_str(url).map_err(|error| OpenError::Url(error.to_string()))?;
    if options.get_database().is_none_or(str::is_empty) {
        return Err(OpenError::Url("it names no database".to_owned()));
    }
    // `session` sets up each connection, whatever the URL says. What is slow or fails is logged by whoever waits for it.
    Ok(options
        .set_names(false)
        .timezone(None)
        .pipes_as_concat(false)
        .no_engine_substitution(false)
        .disable_statement_logging())
}

fn check_parameters(path: &str) -> Result<(), OpenError> {
    let Some((_, parameters)) = path.split_once('?') else { return Ok(()) };
    let parameters = parameters.split('#').next().unwrap_or_default();
    for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
        let name = parameter.split('=').next().unwrap_or_default();
        if PARAMETERS.contains(&name) {
            continue;
        }
        let similarity = |known: &str| strsim::normalized_damerau_levenshtein(name, known);
        let nearest = PARAMETERS.into_iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        // A text in the wrong place may be part of a password, so only a text that is nearly a parameter's name is repeated.
        let problem = match nearest.filter(|nearest| similarity(nearest) >= 0.7) {
            Some(nearest) => format!("it has no parameter `{name}`; did you mean `{nearest}`?"),
            None => format!("it has an unknown parameter; there are {}", PARAMETERS.join(", ")),
        };
        return Err(OpenError::Url(problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> Result<String, String> {
        Addresses::parse(url).map(|it| it.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn there_may_be_several_addresses() {
        for (url, expected) in [
            ("mysql://me:s3cret@db1/handfast", "mysql://me@db1:3306/handfast"),
            (
                "mysql://me:a,b%40c@db1,db2:3307,[::1]:3308/handfast?ssl-mode=REQUIRED",
                "mysql://me@db1:3306,db2:3307,[::1]:3308/handfast",
            ),
            ("mariadb://db1, db2/handfast", "mysql://root@db1:3306,db2:3306/handfast"),
        ] {
            assert_eq!(shown(url).as_deref(), Ok(expected));
        }
        let addresses = Addresses::parse("mysql://me:a,b@db1,db2/x").unwrap();
        assert_eq!(addresses.options(1).get_username(), "me");
    }

    #[test]
    fn a_url_that_says_something_else_is_refused() {
        for (url, problem) in [
            ("mysql:handfast", "has no host"),
            ("mysql://me@db1,/handfast", "one of its addresses is empty"),
            ("mysql://me@db1,db2", "names no database"),
            ("mysql://me@1,2,3,4,5,6,7,8,9,10/x", "more than 9 addresses"),
            (
                "mysql://me@db1/x?ssl-mod=REQUIRED",
                "no parameter `ssl-mod`; did you mean `ssl-mode`?",
            ),
            ("mysql://me@db1/x?charset=utf8mb4&colation=a", "did you mean `collation`?"),
            ("mysql://me@db1/x?s3cret", "an unknown parameter; there are charset,"),
        ] {
            let error = shown(url).unwrap_err();
            assert!(error.contains(problem), "{url}: {error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
