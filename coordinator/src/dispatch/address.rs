//! Which addresses the coordinator may call. Callers name addresses, and the coordinator calls them from inside its own
//! network, with endless retries. So it calls only addresses that the operator allowed.

use std::{fmt, str::FromStr, sync::Arc};

pub use handfast_proto::address::{Address, InvalidAddress};
use handfast_proto::address::{Host, port};

/// The addresses of a participant: one, or several for the same service. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Addresses(Arc<[Address]>);

impl Addresses {
    /// The addresses in order. There is at least one.
    pub fn iter(&self) -> impl Iterator<Item = &Address> {
        self.0.iter()
    }
}

impl From<Address> for Addresses {
    fn from(address: Address) -> Self {
        Self(Arc::new([address]))
    }
}

impl FromStr for Addresses {
    type Err = InvalidAddress;

    /// Parses addresses that are separated by spaces.
    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let mut addresses: Vec<Address> =
            text.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        if addresses.is_empty() {
            addresses.push(text.parse()?); // which says what is wrong
        }
        Ok(Self(addresses.into()))
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<_> = self.iter().map(Address::to_string).collect();
        f.write_str(&addresses.join(" "))
    }
}

/// One rule of the allow-list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    /// `loopback`: this machine.
    Loopback,
    /// `host:port`; the port `*` matches every port.
    HostPort { host: Hosts, port: Option<u16> },
}

/// The hosts that a rule matches.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    /// `*`
    Any,
    /// `*.shop.internal`: every name below that domain. Stored with its leading dot.
    Below(String),
    One(Host),
}

/// Which addresses named by callers may be called. Addresses in the configuration are always allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList(Vec<Rule>);

/// A text is not a valid rule of an allow-list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no rule for targets ({why}): those are `loopback` or `host:port`, such as inventory:7001, *.shop.internal:7001, 10.0.0.5:*"
)]
pub struct InvalidRule {
    text: String,
    why: &'static str,
}

impl FromStr for Rule {
    /// Why the text is not a valid rule.
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if text == "loopback" {
            return Ok(Self::Loopback);
        }
        let (host, digits) = text.rsplit_once(':').ok_or("it has no port")?;
        let host = match (host, host.strip_prefix("*.")) {
            ("*", _) => Hosts::Any,
            (_, Some(below)) => match below.parse()? {
                Host::Name(name) => Hosts::Below(format!(".{name}")),
                Host::V4(_) | Host::V6(_) => return Err("nothing is below an IP address"),
            },
            (host, None) => Hosts::One(host.parse()?),
        };
        let port = if digits == "*" { None } else { Some(port(digits)?) };
        Ok(Self::HostPort { host, port })
    }
}

impl AllowList {
    /// Parses the rules.
    ///
    /// # Errors
    ///
    /// When a rule is not valid.
    pub fn parse<'a>(rules: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidRule> {
        let rule = |text: &str| {
            text.parse().map_err(|why| InvalidRule { text: text.chars().take(256).collect(), why })
        };
        Ok(Self(rules.into_iter().map(rule).collect::<Result<_, _>>()?))
    }

    /// Whether the coordinator may call this address.
    #[must_use]
    pub fn allows(&self, address: &Address) -> bool {
        self.0.iter().any(|rule| match rule {
            Rule::Loopback => match address.host() {
                Host::Name(name) => name == "localhost",
                Host::V4(ip) => ip.is_loopback(),
                Host::V6(ip) => ip.is_loopback(),
            },
            Rule::HostPort { host, port } => {
                let host_fits = match (host, address.host()) {
                    (Hosts::Any, _) => true,
                    (Hosts::Below(below), Host::Name(name)) => name.ends_with(below.as_str()),
                    (Hosts::Below(_), Host::V4(_) | Host::V6(_)) => false,
                    (Hosts::One(one), host) => one == host,
                };
                host_fits && port.is_none_or(|port| port == address.port())
            }
        })
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.0.iter().map(|rule| match rule {
            Rule::Loopback => "loopback".to_owned(),
            Rule::HostPort { host, port } => {
                let port = port.map_or_else(|| "*".to_owned(), |port| port.to_string());
                match host {
                    Hosts::Any => format!("*:{port}"),
                    Hosts::Below(below) => format!("*{below}:{port}"),
                    Hosts::One(host) => format!("{host}:{port}"),
                }
            }
        });
        f.write_str(&rules.collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_is_dialled() {
        // A text that is not an address is refused in the same way as one that is not allowed.
        let allows = |rules: &[&str], address: &str| {
            let rules = AllowList::parse(rules.iter().copied()).unwrap();
            address.parse().is_ok_and(|address| rules.allows(&address))
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
        assert!(!allows(&["*.shop.internal:7001"], "http://x[.shop.internal:]:7001"));
        assert!(allows(&["*:*"], "http://anything:7002"));
        assert!(allows(&["[0::1]:*", "10.0.0.5:1"], "http://[::1]:7002"));
        assert!(allows(&["INVENTORY:7001"], "http://inventory:7001"));
        assert!(!allows(&[], "http://127.0.0.1:1"));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for rule in [
            "",
            "inventory",
            "inventory:http",
            "in*:1",
            "http://inventory:1",
            ":1",
            "*.:1",
            "*.10.0.0.5:1",
            "*.1:1",
            "x[.shop:]:1",
            "u@inventory:1",
            "bücher:1",
            "inventory:0",
            "inventory:+1",
            "inventory:",
        ] {
            assert!(AllowList::parse([rule]).is_err(), "{rule}");
        }
    }
}
