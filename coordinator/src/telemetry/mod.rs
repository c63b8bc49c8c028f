//! Log lines: text for people, on stderr; JSON for programs, on stdout, one flat object in each line:
//!
//! ```json
//! {"timestamp":"2026-11-21T09:14:03.123456Z","level":"INFO","message":"decided","xid":"3-7-1042-9f3c01d2","name":"checkout","decision":"CONFIRM","target":"handfast_coordinator::partition::log"}
//! ```

mod writer;

use std::{
    fs::File,
    io::{self, IsTerminal as _},
    os::fd::AsFd as _,
    panic,
    sync::OnceLock,
    thread,
    time::Duration,
};

use tracing::Subscriber;
use tracing_subscriber::{
    fmt::{Subscriber as Lines, writer::MakeWriter},
    util::SubscriberInitExt as _,
};

use self::writer::{LogWriter, TextWriter};
use crate::config::{LogFilter, LogFormat};

/// At the end of the process, how long to wait for unwritten log lines.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

static WRITER: OnceLock<LogWriter> = OnceLock::new();

/// Starts logging. A second call changes nothing. Call [`flush`] before the process ends.
///
/// # Errors
///
/// When the system cannot start a thread, or stdout or stderr is closed.
pub fn init(filter: &LogFilter, format: LogFormat) -> io::Result<()> {
    let is_json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stdout().is_terminal(),
    };
    let descriptor = if is_json {
        io::stdout().as_fd().try_clone_to_owned()
    } else {
        io::stderr().as_fd().try_clone_to_owned()
    };
    let writer = LogWriter::start(File::from(descriptor?))?;
    // Fails only if logging was started before, for example by a test.
    let done_before = if is_json {
        json(filter, writer.clone()).try_init()
    } else {
        let colours = io::stderr().is_terminal();
        text(filter, TextWriter { writer: writer.clone(), colours }).try_init()
    };
    if done_before.is_ok() && WRITER.set(writer).is_ok() {
        // A panic may end the process at once, so write the waiting lines first.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            flush();
            hook(panic);
        }));
    }
    Ok(())
}

/// Waits until all log lines are written, but not longer than a second.
pub fn flush() {
    if let Some(writer) = WRITER.get()
        && thread::current().name() != Some(writer::THREAD)
    {
        writer.flush(FLUSH_WITHIN);
    }
}

fn json<W>(filter: &LogFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = Lines::builder().with_env_filter(filter.to_env_filter()).with_writer(writer);
    let lines = lines.log_internal_errors(false);
    lines.json().flatten_event(true).with_target(true).with_span_list(false).finish()
}

fn text(filter: &LogFilter, writer: TextWriter) -> impl Subscriber + Send + Sync {
    let colours = writer.colours;
    let lines = Lines::builder().with_env_filter(filter.to_env_filter()).with_writer(writer);
    // Otherwise errors would be reported on stderr, with a panic if that cannot be written either.
    lines.log_internal_errors(false).with_ansi(colours).finish()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Whatever comes from outside: a name, a message as a value and as debug output, an error, a field of a span.
    #[test]
    fn a_line_of_text_stays_a_line_and_no_terminal_obeys_it() {
        let harm = "a\nERROR forged\r\u{1b}[8m\u{1b}]0;x\u{7}\u{9b}2J\u{202e}b\u{2028}c\u{1b}";
        for colours in [false, true] {
            let lines = Written::default();
            let writer = LogWriter::start(lines.clone()).unwrap();
            let text_writer = TextWriter { writer: writer.clone(), colours };
            let subscriber = text(&"info".parse().unwrap(), text_writer);
            tracing::subscriber::with_default(subscriber, || {
                let span = tracing::info_span!("span", xid = harm, name = %harm);
                let _in_it = span.enter();
                let error = io::Error::other(harm);
                tracing::info!(name = %harm, text = harm, debug = ?harm, %error, "{harm}");
                tracing::info!(error = &error as &dyn std::error::Error, "as it is");
            });
            writer.flush(Duration::from_secs(60));
            let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert_eq!(lines.matches('\n').count(), 2, "{lines:?}");
            for line in lines.lines() {
                let mut parts = line.split('\u{1b}');
                assert!(!parts.next().unwrap().contains(handfast_proto::text::is_unprintable));
                for part in parts {
                    assert!(colours, "{line:?}");
                    let style = part.split_once('m').unwrap().0;
                    assert!(["[0", "[2", "[3", "[32", "[1"].contains(&style), "{line:?}");
                    assert!(!part.contains(handfast_proto::text::is_unprintable), "{line:?}");
                }
                assert!(line.contains("a\\nERROR forged"), "{line:?}");
            }
        }
    }

    #[test]
    fn what_sqlx_says_is_shown_to_who_asks_for_it() {
        let filters =
            [("info", 0), ("debug", 0), ("info,sqlx_core::pool=info", 1), ("info,sqlx=info", 2)];
        for (filter, shown) in filters {
            let lines = Written::default();
            let writer = lines.clone();
            let subscriber = json(&filter.parse().unwrap(), move || writer.clone());
            tracing::subscriber::with_default(subscriber, || {
                tracing::error!(target: "sqlx_core::pool::inner", "error returned from after_connect");
                tracing::warn!(target: "sqlx::query", "slow statement");
            });
            let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert_eq!(lines.lines().count(), shown, "{filter}: {lines}");
        }
    }

    #[test]
    fn a_program_can_draw_a_timeline_from_json_lines() {
        let lines = Written::default();
        let writer = lines.clone();
        let subscriber = json(&"info".parse().unwrap(), move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("not asked for");
            tracing::info!(target: "handfast_coordinator::partition", xid = %"0-1-2-00000003", took_ms = 7, "finished");
        });
        let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let line: serde_json::Value = serde_json::from_str(&lines).unwrap(); // one line, one object
        let timestamp = line["timestamp"].as_str().unwrap();
        assert!(
            timestamp.parse::<jiff::Timestamp>().is_ok() && timestamp.ends_with('Z'),
            "{timestamp}"
        );
        assert_eq!(
            line,
            serde_json::json!({
                "timestamp": timestamp,
                "level": "INFO",
                "target": "handfast_coordinator::partition",
                "message": "finished",
                "xid": "0-1-2-00000003",
                "took_ms": 7
            })
        );
    }
}
