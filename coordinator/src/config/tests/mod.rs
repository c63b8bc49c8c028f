//! Every key can come from every source, the strongest source wins, and every error names its place and an example.

mod keys;

use self::keys::KEYS;
use super::*;

fn told(config: &Config, path: &str) -> String {
    let Config { retry, stuck, calls, limits, targets, .. } = config;
    match path {
        "listen" => config.listen.to_string(),
        "insecure" => config.insecure.to_string(),
        "store" => config.store.to_string(),
        "store_unsafe" => config.store_unsafe.to_string(),
        "log" => format!("{:?}", config.log),
        "log_format" => format!("{:?}", config.log_format),
        "log_labels" => config.log_labels.join(" "),
        "shutdown_grace" => format!("{:?}", config.shutdown_grace),
        "retention" => format!("{:?}", config.retention),
        "participants" => {
            let participants =
                targets.participants.iter().map(|(name, address)| format!("{name}={address}"));
            participants.collect::<Vec<_>>().join(" ")
        }
        "transaction.timeout" => format!("{:?}", config.transaction_timeout),
        "transaction.record_after" => format!("{:?}", config.record_after),
        "retry.initial" => format!("{:?}", retry.initial),
        "retry.max" => format!("{:?}", retry.max),
        "stuck.after_attempts" => stuck.attempts.to_string(),
        "stuck.after" => format!("{:?}", stuck.time),
        "calls.timeout" => format!("{:?}", calls.timeout),
        "calls.timeout_max" => format!("{:?}", calls.timeout_max),
        "calls.per_participant" => targets.calls_max.to_string(),
        "calls.streams" => targets.streams.to_string(),
        "limits.open" => limits.open.to_string(),
        "limits.open_megabytes" => limits.open_megabytes.to_string(),
        "limits.connections" => limits.connections.to_string(),
        "targets.allow" => targets.allow.to_string(),
        other => panic!("nobody tells {other}"),
    }
}

fn toml(path: &str, value: &str) -> String {
    match path.split_once('.') {
        Some((section, name)) => format!("[{section}]\n{name} = {value}\n"),
        None => format!("{path} = {value}\n"),
    }
}

/// Sources with a default store, so that the configuration is complete.
fn sources(file: &str, env: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Sources {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let flags = flags.iter().map(|(path, value)| (*path, (*value).to_owned()));
    // Of two flags for the same key, the first one wins.
    let default_store = ("store", "sqlite:default.db".to_owned());
    let has_store =
        file.contains("store =") || env.clone().any(|(name, _)| name == "HANDFAST_STORE");
    Sources {
        flags: flags.chain((!has_store).then_some(default_store)).collect(),
        env: env.collect(),
        file: Some(("handfast.toml".to_owned(), file.to_owned())),
    }
}

fn config(file: &str, env: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Config {
    Config::load(&sources(file, env, flags)).unwrap()
}

/// Checks the error against the printed text.
fn refused(
    file: &str,
    env: &[(&str, &str)],
    flags: &[(&'static str, &str)],
    what: &str,
    hint: &str,
) {
    let invalid = Config::load(&sources(file, env, flags)).unwrap_err();
    assert_eq!((invalid.what.as_str(), invalid.hint.as_str()), (what, hint));
}

#[test]
fn every_key_has_a_default_a_place_in_the_file_and_a_variable() {
    for (path, env, in_toml, text, default, value) in KEYS {
        assert_eq!(told(&config("", &[], &[]), path), default, "{path}");
        assert_eq!(told(&config(&toml(path, in_toml), &[], &[]), path), value, "{path} in a file");
        assert_eq!(told(&config("", &[(env, text)], &[]), path), value, "{env}");
        assert_eq!(env, format!("HANDFAST_{}", path.replace('.', "_").to_uppercase()));
    }
}

#[test]
fn flags_win_over_the_environment_that_over_the_file_and_the_file_over_defaults() {
    let file = "listen = '127.0.0.1:1'\nretention = '1d'\n[retry]\ninitial = '1s'\n";
    let env = [("HANDFAST_LISTEN", "127.0.0.1:2"), ("HANDFAST_RETRY_INITIAL", "2s")];
    let flags = [("listen", "127.0.0.1:3")];
    let listen = |config: Config| config.listen.port();
    assert_eq!(listen(config("", &[], &[])), 7420);
    assert_eq!(listen(config(file, &[], &[])), 1);
    assert_eq!(listen(config(file, &env, &[])), 2);
    let all = config(file, &env, &flags);
    assert_eq!(told(&all, "retry.initial"), "2s");
    assert_eq!(told(&all, "retention"), "86400s", "what only the file says stands");
    assert_eq!(listen(all), 3);
}

#[test]
fn an_empty_variable_and_those_of_others_are_passed_over() {
    let others = [
        ("HANDFAST_LISTEN", ""),
        ("HANDFAST_NONSENSE", ""),
        ("HANDFAST_SERVER", "http://127.0.0.1:7420"),
        ("HANDFAST_CONFIG", "handfast.toml"),
        ("PATH", "/bin"),
        // Variables that Kubernetes sets for services named `handfast` and `handfast-two`.
        ("HANDFAST_SERVICE_HOST", "10.0.0.1"),
        ("HANDFAST_SERVICE_PORT_GRPC", "7420"),
        ("HANDFAST_PORT", "tcp://10.0.0.1:7420"),
        ("HANDFAST_PORT_7420_TCP_ADDR", "10.0.0.1"),
        ("HANDFAST_SERVICE_PORT", "7420"),
        ("HANDFAST_TWO_PORT_7420_TCP", "tcp://10.0.0.1:7420"),
    ];
    assert_eq!(config("", &others, &[]).listen.port(), 7420);
}

#[test]
fn variables_that_mean_nothing_are_told_with_what_was_meant() {
    for (name, text, hint) in [
        ("HANDFAST_PORT", "7420", "HANDFAST_LISTEN"),
        ("HANDFAST_HOST", "0.0.0.0", "HANDFAST_LISTEN"),
        ("HANDFAST_SERVICE_PORT", "7420", "unset"),
        ("HANDFAST_PORT_NUMBER", "7420", "unset"),
        ("HANDFAST_DATABASE_URL", "mysql://db/handfast", "HANDFAST_STORE"),
        ("HANDFAST_LOG_LEVEL", "debug", "HANDFAST_LOG"),
    ] {
        let env = vec![(name.to_owned(), text.to_owned())];
        let invalid = Config::load(&Sources { env, ..Sources::default() }).unwrap_err();
        assert!(invalid.what.contains(name) && invalid.hint.contains(hint), "{invalid:?}");
    }
}

#[test]
fn the_template_says_what_the_defaults_are() {
    let template = Config::template();
    let (mut uncommented, mut keys) = (String::new(), 0);
    for line in template.lines() {
        // `#key = value` is a default, `# words` is a comment.
        let setting =
            line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' '));
        keys += usize::from(setting.is_some());
        uncommented.push_str(match setting {
            Some(r#"store = "sqlite:handfast.db""#) => r#"store = "sqlite:default.db""#,
            Some(setting) => setting,
            None => line,
        });
        uncommented.push('\n');
    }
    assert_eq!(keys, KEYS.len(), "{uncommented}");
    assert_eq!(
        format!("{:?}", config(&uncommented, &[], &[])),
        format!("{:?}", config("", &[], &[]))
    );
    assert!(Config::load(&sources(&template, &[], &[("store", "sqlite:a.db")])).is_ok());
}

#[test]
fn an_unknown_key_is_told_with_its_line_and_a_guess() {
    let file = |file, what: &str, hint: &str| refused(file, &[], &[], what, hint);
    let guess = |name| format!("did you mean `{name}`?");
    let all = "`handfast config` prints all keys";
    file("# Hm\n\nlisen = 1\n", "handfast.toml:3: unknown key `lisen`", &guess("listen"));
    file("LISTEN = 1", "handfast.toml:1: unknown key `LISTEN`", &guess("listen"));
    file(
        "[retry]\ninitail = 1",
        "handfast.toml:2: unknown key `retry.initail`",
        &guess("retry.initial"),
    );
    file("[retrys]\nx = 1", "handfast.toml:1: unknown key `retrys`", &guess("retry"));
    file("allow = []", "handfast.toml:1: unknown key `allow`", &guess("targets.allow"));
    file("[calls]\nopen = 1", "handfast.toml:2: unknown key `calls.open`", &guess("limits.open"));
    file("calls.x = 1", "handfast.toml:1: unknown key `calls.x`", all);
    file("colour = 1", "handfast.toml:1: unknown key `colour`", all);
    file("\"\" = 1", "handfast.toml:1: unknown key ``", all);
    // The first wrong line is reported, not the alphabetically first key.
    file("zzz = 1\naaa = 1", "handfast.toml:1: unknown key `zzz`", all);
}

#[test]
fn an_unknown_variable_is_told_with_a_guess() {
    let env = |name: &str, hint: &str| {
        refused("", &[(name, "1")], &[], &format!("unknown environment variable `{name}`"), hint);
    };
    env("HANDFAST_LISEN", "did you mean `HANDFAST_LISTEN`?");
    env("HANDFAST_TIMEOUT_MAX", "did you mean `HANDFAST_CALLS_TIMEOUT_MAX`?");
    env("HANDFAST_SEVER", "did you mean `HANDFAST_SERVER`?");
    env("HANDFAST_COLOUR", "those that Handfast knows are in `handfast config`; unset this one");
}

#[test]
fn a_bad_value_is_told_with_its_place_and_an_example() {
    let length = "is no length of time: those are a number and its unit (ms, s, m, h, d)";
    let address = "one looks like http://127.0.0.1:7001";
    for (path, value, why, example) in [
        ("listen", "7420", "7420 is no text in quotes".to_owned(), r#"listen = "127.0.0.1:7420""#),
        (
            "listen",
            r#""localhost:7420""#,
            r#""localhost:7420" is no address to listen on: those are IP:PORT, or [IPv6]:PORT"#.to_owned(),
            r#"listen = "127.0.0.1:7420""#,
        ),
        ("insecure", r#""yes""#, r#""yes" is neither true nor false"#.to_owned(), "insecure = false"),
        ("store", r#""a.db""#, r#""a.db" is no store"#.to_owned(), r#"store = "sqlite:handfast.db""#),
        ("log_format", r#""xml""#, r#""xml" is no log format: those are auto, text, json"#.to_owned(), r#"log_format = "auto""#),
        ("shutdown_grace", "20", format!("20 {length}"), r#"shutdown_grace = "20s""#),
        ("retention", r#""7""#, format!(r#""7" {length}"#), r#"retention = "7d""#),
        ("retention", r#""101years""#, format!(r#""101years" {length}"#), r#"retention = "7d""#),
        ("retry.initial", r#""-1s""#, format!(r#""-1s" {length}"#), r#"initial = "200ms""#),
        ("stuck.after_attempts", "0", "0 is no number from 1 to 10000000".to_owned(), "after_attempts = 8"),
        ("limits.open", "-1", "-1 is no number from 1 to 10000000".to_owned(), "open = 100000"),
        ("limits.open", "10_000_001", "10000001 is no number from 1 to 10000000".to_owned(), "open = 100000"),
        ("limits.open", "1.5", "1.5 is no number from 1 to 10000000".to_owned(), "open = 100000"),
        ("targets.allow", r#""loopback""#, r#""loopback" is no list of texts in quotes"#.to_owned(), r#"allow = ["loopback"]"#),
        (
            "targets.allow",
            r#"["inventory"]"#,
            r#""inventory" is no rule for targets (it has no port): those are `loopback` or `host:port`, such as inventory:7001, *.shop.internal:7001, 10.0.0.5:*"#.to_owned(),
            r#"allow = ["loopback"]"#,
        ),
        ("participants", "1", "1 is no table of names and addresses".to_owned(), r#"inventory = "http://127.0.0.1:7001""#),
        (
            "participants",
            r#"{ "" = "http://a:1" }"#,
            r#""" is no name: those have 1 to 64 bytes"#.to_owned(),
            r#"inventory = "http://127.0.0.1:7001""#,
        ),
        (
            "participants",
            r#"{ points = "points:1" }"#,
            format!(r#""points:1" is no address (it does not start with http://): {address}"#),
            r#"inventory = "http://127.0.0.1:7001""#,
        ),
    ] {
        let invalid = Config::load(&sources(&toml(path, value), &[], &[])).unwrap_err();
        assert!(invalid.what.starts_with("handfast.toml:"), "{invalid:?}");
        assert!(invalid.what.contains(&format!("`{path}")), "{invalid:?}");
        assert!(invalid.what.ends_with(&format!("`: {why}")), "{invalid:?}, not {why}");
        assert_eq!(invalid.hint, format!("such as: {example}"));
    }
}

#[test]
fn the_place_of_a_bad_value_is_exact() {
    refused(
        "\n[retry]\n\nmax = 'soon'\n",
        &[],
        &[],
        "handfast.toml:4: `retry.max`: \"soon\" is no length of time: those are a number and its unit (ms, s, m, h, d)",
        "such as: max = \"60s\"",
    );
    refused(
        "[participants]\ninventory = 'http://a:1'\npoints = 7\n",
        &[],
        &[],
        "handfast.toml:3: `participants.points`: 7 is no text in quotes",
        "such as: inventory = \"http://127.0.0.1:7001\"",
    );
    refused(
        "",
        &[("HANDFAST_TARGETS_ALLOW", "loopback,a:b")],
        &[],
        "HANDFAST_TARGETS_ALLOW: \"a:b\" is no rule for targets (its port must be a number from 1 to 65535): those are `loopback` \
         or `host:port`, such as inventory:7001, *.shop.internal:7001, 10.0.0.5:*",
        "such as: HANDFAST_TARGETS_ALLOW=loopback",
    );
    refused(
        "",
        &[("HANDFAST_PARTICIPANTS", "inventory")],
        &[],
        "HANDFAST_PARTICIPANTS: \"inventory\" is no table of names and addresses",
        "such as: HANDFAST_PARTICIPANTS=inventory=http://127.0.0.1:7001",
    );
    refused(
        "",
        &[("HANDFAST_LIMITS_OPEN", "many")],
        &[],
        "HANDFAST_LIMITS_OPEN: \"many\" is no number from 1 to 10000000",
        "such as: HANDFAST_LIMITS_OPEN=100000",
    );
    refused(
        "",
        &[],
        &[("shutdown_grace", "20")],
        "--shutdown-grace: \"20\" is no length of time: those are a number and its unit (ms, s, m, h, d)",
        "such as: --shutdown-grace 20s",
    );
    refused(
        "retry = 5",
        &[],
        &[],
        "handfast.toml:1: `retry` is 5, and it is a section",
        "write [retry] on a line, and its keys below",
    );
    // A value that is overridden is checked too.
    refused(
        "listen = 1",
        &[],
        &[("listen", "127.0.0.1:1")],
        "handfast.toml:1: `listen`: 1 is no text in quotes",
        "such as: listen = \"127.0.0.1:7420\"",
    );
}

#[test]
fn what_is_no_toml_is_told_with_its_line() {
    for (file, line) in [
        ("\nlisten = ", 2),
        ("listen = 127.0.0.1:1", 1),
        ("a = 1\na = 1", 2),
        ("a = 'x\n", 1),
        ("limits.open = 99999999999999999999", 1),
        ("\u{feff}\n[", 2),
        ("x", 1),
    ] {
        let invalid = Config::load(&sources(file, &[], &[])).unwrap_err();
        assert!(invalid.what.starts_with(&format!("handfast.toml:{line}: ")), "{invalid:?}");
        assert!(!invalid.what.contains('\n'), "{invalid:?}");
    }
}

#[test]
fn log_filters_are_checked() {
    for filter in
        ["INFO", "warn,handfast_coordinator::dispatch=debug", "[request{xid=\"1\"}]=trace", "off"]
    {
        config("", &[], &[("log", filter)]);
    }
    for (filter, why) in [
        ("info,a=loud", "is no log filter: error parsing level filter"),
        ("warning", "is no level; levels are off, error, warn, info, debug, trace"),
        ("info,handfast", "is no level"),
        ("[", "is no log filter"),
    ] {
        let invalid = Config::load(&sources("", &[("HANDFAST_LOG", filter)], &[])).unwrap_err();
        assert!(invalid.what.contains(why), "{invalid:?}");
        assert_eq!(invalid.hint, "such as: HANDFAST_LOG=info");
    }
}

#[test]
fn a_store_is_named_and_of_a_kind_that_exists() {
    let without = Config::load(&Sources::default()).unwrap_err();
    assert_eq!(without.what, "no store is named");
    assert!(without.hint.contains("--store sqlite:handfast.db"));
    for (store, why) in [
        (
            "memory:",
            "forgets every decision when the coordinator stops; it is for tests and benchmarks only",
        ),
        ("mysql://root@127.0.0.1", "names no database"),
        ("mysql:handfast", "one looks like mysql://user:password@host:3306/database"),
        ("sqlite:", "names no file"),
        ("sqlite::memory:", "names no file"),
        ("sqlite://handfast.db", "two slashes too many"),
        ("postgres://a", "is no store"),
        ("memory:table", "is no store"),
    ] {
        let invalid = Config::load(&sources("", &[("HANDFAST_STORE", store)], &[])).unwrap_err();
        assert!(invalid.what.contains(why), "{invalid:?}");
        assert_eq!(invalid.hint, "such as: HANDFAST_STORE=sqlite:handfast.db");
    }
}

#[test]
fn what_forgets_everything_must_be_asked_for_twice() {
    let env = [("HANDFAST_STORE", "memory:"), ("HANDFAST_STORE_UNSAFE", "true")];
    let config = Config::load(&sources("", &env, &[])).unwrap();
    assert_eq!(config.store, StoreUrl::Memory);
    Config::load(&sources("", &env[..1], &[])).unwrap_err();
}

#[test]
fn a_password_is_shown_nowhere() {
    let url = "mysql://ann:s3cret@db.internal/handfast";
    let config = Config::load(&sources("", &[("HANDFAST_STORE", url)], &[])).unwrap();
    assert_eq!(config.store.to_string(), "mysql://ann@db.internal:3306/handfast");
    assert!(!format!("{config:?}").contains("s3cret"));
    for wrong in ["mysql://ann:s3cret@db.internal", "mysql://ann:s3cret@db.internal:port/handfast"]
    {
        let invalid = Config::load(&sources("", &[("HANDFAST_STORE", wrong)], &[])).unwrap_err();
        assert!(!format!("{invalid:?}").contains("s3cret"), "{invalid:?}");
    }
}

#[test]
fn values_must_fit_each_other() {
    let insecure = "listen on 127.0.0.1; or, where everybody who can connect may do everything, set `insecure = true` \
                    (--insecure, HANDFAST_INSECURE=true)";
    refused(
        "",
        &[],
        &[("listen", "0.0.0.0:7420")],
        "--listen: other machines can connect to 0.0.0.0:7420, and there is no authentication yet",
        insecure,
    );
    config("insecure = true", &[], &[("listen", "0.0.0.0:7420")]);
    config("", &[], &[("listen", "[::1]:7420")]);
    config("", &[], &[("listen", "127.1.2.3:0")]);
    refused(
        "\nretention = '999ms'",
        &[],
        &[],
        "handfast.toml:2: `retention` is 999ms; it must be at least 1s",
        "the default is 7d; repeated calls are answered from kept records, so keep them long enough",
    );
    for (timeout, bound) in [("0s", "at least 1ms"), ("1h 1ms", "at most 1h")] {
        refused(
            "",
            &[("HANDFAST_TRANSACTION_TIMEOUT", timeout)],
            &[],
            &format!(
                "HANDFAST_TRANSACTION_TIMEOUT: `transaction.timeout` is {timeout}; it must be {bound}"
            ),
            "the default is 30s and the maximum is 1h; do not hold reservations longer",
        );
    }
    refused(
        "[retry]\ninitial = '2m'",
        &[],
        &[],
        "handfast.toml:2: `retry.initial` is 2m; it must be at most `retry.max`, which is 1m",
        "the defaults are 200ms and 60s",
    );
    refused(
        "[retry]\nmax = '100ms'",
        &[],
        &[],
        "handfast.toml:2: `retry.initial` is 200ms; it must be at most `retry.max`, which is 100ms",
        "the defaults are 200ms and 60s",
    );
    refused(
        "[calls]\ntimeout = '5s'",
        &[("HANDFAST_CALLS_TIMEOUT_MAX", "1s")],
        &[],
        "handfast.toml:2: `calls.timeout` is 5s; it must be at most `calls.timeout_max`, which is 1s",
        "the defaults are 5s and 60s",
    );
    refused(
        "[calls]\ntimeout = '0s'",
        &[],
        &[],
        "handfast.toml:2: `calls.timeout` is 0s; it must be at least 1ms",
        "the defaults are 5s and 60s",
    );
}
