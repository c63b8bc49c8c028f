//! Where participants are, and which addresses may be dialled at all. The coordinator calls addresses that callers name, with
//! its own reach into the network, and repeats for ever; so only what the operator allowed is dialled.

use std::{fmt, net::IpAddr, str::FromStr};

use http::{Uri, uri::Scheme};

/// `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    host: String,
    port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

/// A text is no address of a participant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address of a participant ({why}): one looks like http://127.0.0.1:7001")]
pub struct InvalidAddress {
    text: String,
    why: &'static str,
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = |why| InvalidAddress { text: text.chars().take(256).collect(), why };
        let uri: Uri = text.parse().map_err(|_| invalid("it is no URL"))?;
        if uri.scheme() != Some(&Scheme::HTTP) {
            return Err(invalid("it does not start with http://"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(invalid("it has a path"));
        }
        let authority = uri.authority().ok_or_else(|| invalid("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(invalid("it has a user"));
        }
        let port = authority.port_u16().ok_or_else(|| invalid("it has no port"))?;
        Ok(Self { host: authority.host().to_ascii_lowercase(), port })
    }
}

/// One rule of the allow-list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    /// `loopback`: this machine.
    Loopback,
    /// `host:port`; a host that starts with `*.` stands for all names below it, `*` for any; a port of `*` for any.
    HostPort { host: String, port: Option<u16> },
}

/// Which addresses that callers name may be dialled. What the configuration says of a participant is always allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList(Vec<Rule>);

/// A text is no rule of an allow-list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no rule for targets: those are `loopback` or `host:port`, such as inventory:7001, *.shop.internal:7001, 10.0.0.5:*"
)]
pub struct InvalidRule(String);

impl AllowList {
    /// Reads the rules.
    ///
    /// # Errors
    ///
    /// When one of them is none.
    pub fn parse<'a>(rules: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidRule> {
        let rule = |text: &str| {
            if text == "loopback" {
                return Ok(Rule::Loopback);
            }
            let invalid = || InvalidRule(text.to_owned());
            let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
            let port = match port {
                "*" => None,
                port => Some(port.parse().map_err(|_| invalid())?),
            };
            let plain = host.strip_prefix("*.").unwrap_or(host);
            if plain.is_empty() || (plain.contains('*') && host != "*") || plain.contains('/') {
                return Err(invalid());
            }
            Ok(Rule::HostPort { host: host.to_ascii_lowercase(), port })
        };
        Ok(Self(rules.into_iter().map(rule).collect::<Result<_, _>>()?))
    }

    /// Whether this address may be dialled.
    #[must_use]
    pub fn allows(&self, address: &Address) -> bool {
        self.0.iter().any(|rule| match rule {
            Rule::Loopback => {
                let ip =
                    address.host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
                address.host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
            }
            Rule::HostPort { host, port } => {
                let host_fits = host == "*"
                    || *host == address.host
                    || host.strip_prefix('*').is_some_and(|below| address.host.ends_with(below));
                host_fits && port.is_none_or(|port| port == address.port)
            }
        })
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.0.iter().map(|rule| match rule {
            Rule::Loopback => "loopback".to_owned(),
            Rule::HostPort { host, port: Some(port) } => format!("{host}:{port}"),
            Rule::HostPort { host, port: None } => format!("{host}:*"),
        });
        f.write_str(&rules.collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_plain() {
        for (text, printed) in [
            ("http://127.0.0.1:7001", "http://127.0.0.1:7001"),
            ("http://Inventory.Shop:80/", "http://inventory.shop:80"),
            ("http://[::1]:7001", "http://[::1]:7001"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), printed);
        }
        for text in [
            "",
            "inventory",
            "inventory:7001",
            "https://inventory:7001",
            "http://inventory",
            "http://inventory:7001/path",
            "http://inventory:7001?a=b",
            "http://user@inventory:7001",
            "http://inventory:70010",
            "file:///etc/passwd",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("http://127.0.0.1:7001"), "{error}");
        }
    }

    #[test]
    fn only_what_is_allowed_is_dialled() {
        let allows = |rules: &[&str], address: &str| {
            AllowList::parse(rules.iter().copied()).unwrap().allows(&address.parse().unwrap())
        };
        for address in
            ["http://127.0.0.1:1", "http://127.9.9.9:1", "http://[::1]:1", "http://localhost:1"]
        {
            assert!(allows(&["loopback"], address), "{address}");
        }
        for address in [
            "http://10.0.0.1:1",
            "http://169.254.169.254:80",
            "http://localhost.evil.example:1",
            "http://127.0.0.1.evil.example:1",
            "http://2130706433:1",
            "http://0x7f000001:1",
            "http://[::ffff:127.0.0.1]:1",
        ] {
            assert!(!allows(&["loopback"], address), "{address}");
        }
        assert!(allows(&["inventory:7001"], "http://inventory:7001"));
        assert!(!allows(&["inventory:7001"], "http://inventory:7002"));
        assert!(allows(&["inventory:*"], "http://inventory:7002"));
        assert!(allows(&["loopback", "*.shop.internal:*"], "http://a.b.shop.internal:7002"));
        assert!(!allows(&["*.shop.internal:*"], "http://shop.internal.evil:7002"));
        assert!(!allows(&["*.shop.internal:*"], "http://evilshop.internal:7002"));
        assert!(allows(&["*:*"], "http://anything:7002"));
        assert!(!allows(&[], "http://127.0.0.1:1"));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for rule in ["", "inventory", "inventory:http", "in*:1", "http://inventory:1", ":1", "*.:1"]
        {
            assert!(AllowList::parse([rule]).is_err(), "{rule}");
        }
    }
}
