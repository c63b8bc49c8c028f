//! Fuzzes participant addresses, and the rules that say which addresses the coordinator may dial. An accepted address must be
//! dialable and must print as the address that is dialled. The coordinator must dial no address that its rules do not name.

use std::net::IpAddr;

use handfast_coordinator::dispatch::address::{Address, AllowList};
use handfast_proto::connection;

use super::{Round, random::Random};

const SCHEMES: [&str; 8] =
    ["http://", "http://", "http://", "http://", "HTTP://", "https://", "http:", ""];
const PIECES: [&str; 30] = [
    "x",
    "shop",
    ".",
    "shop.internal",
    ".shop.internal",
    "inventory",
    "[",
    "]",
    ":",
    "::1",
    "[::1]",
    "127.0.0.1",
    "10.0.0.5",
    "localhost",
    "%31",
    "%",
    "é",
    "xn--9ca",
    "-",
    "_",
    "0x7f",
    "1",
    "017",
    "*",
    "@",
    "u:p@",
    "/",
    "?",
    "\\",
    " ",
];
const PORTS: [&str; 10] =
    [":7001", ":7001", ":7001", ":7001", ":", "", ":0", ":+1", ":70010", ":07001"];
const TAILS: [&str; 8] = ["", "", "", "", "/", "/x", "?q", "#f"];

pub(super) fn play(round: &mut Round) {
    while round.next() {
        let text = text(&mut round.random);
        // Use the same text as a rule.
        let rule = text.split_once("//").map_or(text.as_str(), |(_, rest)| rest);
        let rules = AllowList::parse([rule]).ok();
        let address = text.parse::<Address>().ok();
        round.accepted(address.is_some());
        let Some(address) = address else { continue };
        if let Some(wrong) = wrong(&address, rules.as_ref()) {
            round.found(format!("{text:?}: {wrong}"));
        }
    }
}

fn text(random: &mut Random) -> String {
    let mut text = random.of(&SCHEMES).to_owned();
    if random.once_in(2) {
        text += random.of(&["x.shop.internal", "inventory", "127.0.0.1", "[::1]"]);
    } else {
        (0..=random.below(4)).for_each(|_| text += random.of(&PIECES));
    }
    text += random.of(&PORTS);
    text += random.of(&TAILS);
    let mut bytes = text.into_bytes();
    if random.once_in(4) {
        random.bend(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Describes what is wrong with an accepted address, if anything.
fn wrong(address: &Address, rules: Option<&AllowList>) -> Option<String> {
    let printed = address.to_string();
    if printed.parse().as_ref() != Ok(address) {
        return Some(format!("{printed} is read as another address"));
    }
    let endpoint = connection::endpoint(address);
    let uri = endpoint.uri();
    let (Some(authority), Some(host), Some(port)) = (uri.authority(), uri.host(), uri.port_u16())
    else {
        return Some(format!("{uri} is what is dialled"));
    };
    if format!("http://{authority}") != printed || authority.as_str() != format!("{host}:{port}") {
        return Some(format!("{printed} is checked, and {uri} is dialled"));
    }
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let ip = bare.parse::<IpAddr>().ok();
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    let is_name = || host.split('.').all(|label| !label.is_empty() && label.chars().all(letter));
    if port == 0 || !ip.map_or_else(is_name, |ip| ip.is_ipv6() == (bare != host)) {
        return Some(format!("{uri} is neither a name nor an IP, with a port"));
    }
    let loopback = AllowList::parse(["loopback"]).expect("a rule");
    if loopback.allows(address) && host != "localhost" && !ip.is_some_and(|ip| ip.is_loopback()) {
        return Some(format!("{uri} is taken for this machine"));
    }
    let below = AllowList::parse(["*.shop.internal:7001"]).expect("a rule");
    if below.allows(address) != (host.ends_with(".shop.internal") && port == 7001) {
        return Some(format!("{uri} and *.shop.internal:7001 do not fit as they should"));
    }
    // A rule with the same text as the address, and without a `*`, must allow the address.
    let rules = rules.filter(|rules| !rules.to_string().contains('*'))?;
    if rules.to_string() != "loopback" && !rules.allows(address) {
        return Some(format!("the rule {rules} is for something else"));
    }
    None
}
