//! The address of a server: `http://host:port`.
//!
//! [`Address::from_str`] is the only parser, and it is strict. Requests, configuration and stored branches all use it. The
//! coordinator's allow-list parses hosts with the same [`Host`]. An [`Address`] contains the URI that is dialled, so the checked
//! address and the dialled address cannot differ.

use std::{
    cmp::Ordering,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use tonic::transport::Uri;

/// Longest host name, in bytes (RFC 1035).
const NAME_BYTES_MAX: usize = 253;
/// Longest label of a host name, in bytes (RFC 1035).
const LABEL_BYTES_MAX: usize = 63;

/// A name, or an IP address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Host {
    /// Lower-case labels of letters, digits, `-` and `_`, separated by dots. The last label is not a number, because resolvers
    /// read `2130706433` and `127.1` as IP addresses.
    Name(String),
    /// `127.0.0.1`
    V4(Ipv4Addr),
    /// `[::1]`
    V6(Ipv6Addr),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::V4(ip) => ip.fmt(f),
            Self::V6(ip) => write!(f, "[{ip}]"),
        }
    }
}

impl FromStr for Host {
    /// Why the text is not a host.
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if let Some(text) = text.strip_prefix('[') {
            let ip = text.strip_suffix(']').and_then(|text| text.parse().ok());
            return ip.map(Self::V6).ok_or("what stands in brackets must be an IPv6 address");
        }
        if let Ok(ip) = text.parse() {
            return Ok(Self::V4(ip));
        }
        if text.is_empty() {
            return Err("it has no host");
        }
        if !text.is_ascii() {
            return Err("its host must be in ASCII: write an internationalised name as xn--...");
        }
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let mut labels = text.split('.');
        if text.len() > NAME_BYTES_MAX
            || !labels.all(|it| (1..=LABEL_BYTES_MAX).contains(&it.len()) && it.bytes().all(letter))
        {
            return Err(
                "its host must be labels of letters, digits, - and _ with dots between them",
            );
        }
        let last = text.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        let hexadecimal = last.strip_prefix("0x");
        if last.bytes().all(|byte| byte.is_ascii_digit())
            || hexadecimal.is_some_and(|digits| digits.bytes().all(|it| it.is_ascii_hexdigit()))
        {
            return Err("its host ends in a number and is no IPv4 address of four decimal numbers");
        }
        Ok(Self::Name(text.to_ascii_lowercase()))
    }
}

/// Parses a port from 1 to 65535. Only decimal digits are allowed.
///
/// # Errors
///
/// When the text is not a port. The error says why.
pub fn port(text: &str) -> Result<u16, &'static str> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|port| digits && *port != 0);
    port.ok_or("its port must be a number from 1 to 65535")
}

/// `http://host:port`, such as `http://inventory:7001` or `http://[::1]:7001`. Every value can be dialled.
#[derive(Debug, Clone)]
pub struct Address {
    host: Host,
    port: u16,
    uri: Uri,
}

impl Address {
    /// The URI to dial.
    #[must_use]
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The host of the server.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port of the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn key(&self) -> (&Host, u16) {
        (&self.host, self.port)
    }
}

impl PartialEq for Address {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Address {}

impl PartialOrd for Address {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Address {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

/// The text is not a server address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address ({why}): one looks like http://127.0.0.1:7001")]
pub struct InvalidAddress {
    text: String,
    why: &'static str,
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let read = || {
            const SCHEME: &str = "http://";
            let (scheme, rest) = text.split_at_checked(SCHEME.len()).unwrap_or_default();
            if !scheme.eq_ignore_ascii_case(SCHEME) {
                return Err("it does not start with http://");
            }
            let authority = rest.strip_suffix('/').unwrap_or(rest);
            if authority.contains(['/', '?', '#']) {
                return Err("it has a path");
            }
            if authority.contains('@') {
                return Err("it has a user");
            }
            // If an IPv6 address has no port, the text after its last colon ends with a bracket.
            let (host, digits) = match authority.rsplit_once(':') {
                Some((host, digits)) if !digits.ends_with(']') => (host, digits),
                Some(_) | None => return Err("it has no port"),
            };
            let (host, port): (Host, _) = (host.parse()?, port(digits)?);
            let uri = format!("{SCHEME}{host}:{port}").parse().map_err(|_| "it is no URL")?;
            Ok(Self { host, port, uri })
        };
        read().map_err(|why| InvalidAddress { text: text.chars().take(256).collect(), why })
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
            ("HTTP://[0:0::1]:07001", "http://[::1]:7001"),
            ("http://my_service-2.shop:7001", "http://my_service-2.shop:7001"),
            ("http://xn--bcher-kva.example:7001", "http://xn--bcher-kva.example:7001"),
        ] {
            let address = text.parse::<Address>().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(address.uri().to_string(), format!("{printed}/"), "what is dialled");
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
            "http://x[.shop.internal:]:7001",
            "http://[x.shop.internal]:7001",
            "http://[::1]",
            "http://[::1:7001",
            "http://::1:7001",
            "http://[::1%25eth0]:7001",
            "http://inventory:",
            "http://inventory:0",
            "http://inventory:+1",
            "http://:7001",
            "http://.shop:7001",
            "http://shop.:7001",
            "http://a..b:7001",
            "http://b%75cher:7001",
            "http://bücher.example:7001",
            "http://2130706433:7001",
            "http://127.1:7001",
            "http://0x7f000001:7001",
            "http://0177.0.0.1:7001",
            "http://inventory:7001#x",
            "http://inventory:7001 ",
            "http://a@b:7001@inventory:7001",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("http://127.0.0.1:7001"), "{error}");
        }
    }
}
