//! Writes log lines on a separate thread. So a full disk, a closed pipe or a stuck reader neither blocks nor ends the
//! coordinator.
//!
//! A log line goes into a queue of [`QUEUE_BYTES_MAX`]. The thread takes all waiting lines and writes them at once, and then
//! pauses for [`COLLECT_FOR`]: under load it wakes up a hundred times a second, and not for each line. A line that does not fit
//! or cannot be written is dropped and counted. The next write begins with a line that reports the count.

use std::{
    cell::RefCell,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use handfast_proto::text::is_unprintable;
use tracing::warn;
use tracing_subscriber::fmt::writer::MakeWriter;

/// Size of the queue: room for some ten thousand lines.
const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;
pub(super) const THREAD: &str = "log";
/// Pause after a write, in which the next lines collect.
const COLLECT_FOR: Duration = Duration::from_millis(10);
/// What the two buffers keep of their memory.
const BUFFER_BYTES_KEPT: usize = 256 * 1024;
/// How often, and how many times, a write is retried when a non-blocking pipe is full.
const AGAIN_EVERY: Duration = Duration::from_millis(10);
const AGAIN_TIMES: u32 = 100;

thread_local! {
    /// On the writing thread: collects the line that the thread logs itself.
    static OWN_LINE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// The destination of log lines. Cheap to clone; all clones share the queue.
#[derive(Debug, Clone)]
pub(super) struct LogWriter(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// Signalled when there is something to write.
    more: Condvar,
    /// Signalled when every line is written or dropped.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    dropped: u64,
    /// Whether the thread is writing, or pauses after that. It will look at the queue by itself.
    is_writing: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogWriter {
    pub(super) fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let of_thread = queue.clone();
        thread::Builder::new().name(THREAD.to_owned()).spawn(move || write(&of_thread, sink))?;
        Ok(Self(queue))
    }

    /// Waits until every line is written or dropped, but not longer than `within`.
    pub(super) fn flush(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let mut waiting = self.0.lock();
        while waiting.is_writing || !waiting.lines.is_empty() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            let waited = self.0.idle.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn push(&self, line: &[u8]) {
        let is_own = OWN_LINE.with_borrow_mut(|own| match own {
            Some(own) => {
                own.extend_from_slice(line);
                true
            }
            None => false,
        });
        if is_own {
            return;
        }
        let mut waiting = self.0.lock();
        if waiting.lines.len() + line.len() > QUEUE_BYTES_MAX {
            waiting.dropped += 1;
            return;
        }
        waiting.lines.extend_from_slice(line);
        if !waiting.is_writing {
            self.0.more.notify_one();
        }
    }
}

/// One log event. tracing-subscriber writes each event with one call.
#[derive(Debug)]
pub(super) struct Line<'a>(&'a LogWriter);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// The same, for text. A line stays one line, and no terminal obeys what others wrote into it.
#[derive(Debug, Clone)]
pub(super) struct TextWriter {
    pub(super) writer: LogWriter,
    /// Whether tracing-subscriber colours the lines.
    pub(super) colours: bool,
}

/// One log event as text.
#[derive(Debug)]
pub(super) struct TextLine<'a>(&'a TextWriter);

impl Write for TextLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let TextWriter { writer, colours } = self.0;
        let text = String::from_utf8_lossy(line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        if text.contains(is_unprintable) {
            writer.push(escaped(text, *colours).as_bytes());
        } else {
            writer.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for TextWriter {
    type Writer = TextLine<'a>;

    fn make_writer(&'a self) -> TextLine<'a> {
        TextLine(self)
    }
}

/// What tracing-subscriber writes behind ESC for its colours and styles. In a text of others they do no more than that either.
const STYLES: [&str; 9] = ["[0m", "[1m", "[2m", "[3m", "[31m", "[32m", "[33m", "[34m", "[35m"];

/// The line with each unprintable character as Rust writes it (`\n`, `\u{202e}`), and with its end.
fn escaped(text: &str, colours: bool) -> String {
    let mut line = String::with_capacity(text.len() + 16);
    for (at, c) in text.char_indices() {
        let is_style = |style: &&str| text[at + 1..].starts_with(style);
        if !is_unprintable(c) || colours && c == '\u{1b}' && STYLES.iter().any(is_style) {
            line.push(c);
        } else {
            line.extend(c.escape_default());
        }
    }
    line.push('\n');
    line
}

/// The thread's loop. It never ends.
fn write(queue: &Queue, mut sink: impl Write) {
    // Whether the last write ended in the middle of a line.
    let mut is_torn = false;
    let mut lines = Vec::new();
    loop {
        lines.clear();
        lines.shrink_to(BUFFER_BYTES_KEPT);
        let dropped = {
            let mut waiting = queue.lock();
            while waiting.lines.is_empty() {
                waiting.is_writing = false;
                queue.idle.notify_all();
                waiting = queue.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            waiting.is_writing = true;
            std::mem::swap(&mut waiting.lines, &mut lines);
            waiting.dropped
        };
        if is_torn {
            write_lines(&mut sink, b"\n", &mut is_torn);
        }
        let notice = if dropped > 0 { own_line(dropped) } else { Vec::new() };
        // The notice is empty if WARN is filtered out.
        if !notice.is_empty() && write_lines(&mut sink, &notice, &mut is_torn) == 0 {
            queue.lock().dropped -= dropped;
        }
        let lost = write_lines(&mut sink, &lines, &mut is_torn);
        if lost > 0 {
            queue.lock().dropped += lost;
        }
        thread::sleep(COLLECT_FOR);
    }
}

/// The line that reports how many lines were dropped, in the configured format.
fn own_line(dropped: u64) -> Vec<u8> {
    OWN_LINE.set(Some(Vec::new()));
    warn!(dropped, "log lines could not be written and are lost");
    OWN_LINE.take().unwrap_or_default()
}

/// Writes whole lines. Returns how many lines were not fully written. `sink` must not buffer.
fn write_lines(sink: &mut impl Write, lines: &[u8], is_torn: &mut bool) -> u64 {
    let mut left = lines;
    let mut again = 0;
    while !left.is_empty() {
        match sink.write(left) {
            Ok(0) => break,
            Ok(written) => {
                *is_torn = left[written - 1] != b'\n';
                left = &left[written..];
                again = 0;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && again < AGAIN_TIMES => {
                again += 1;
                thread::sleep(AGAIN_EVERY);
            }
            Err(_) => break,
        }
    }
    left.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::telemetry::json;

    /// The result of one write: the number of bytes taken, or an error.
    type Step = io::Result<usize>;

    /// A sink whose writes return what the test sends. Until the test sends something, a write blocks.
    struct Scripted {
        steps: mpsc::Receiver<Step>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = self.steps.recv().unwrap_or(Ok(usize::MAX))?.min(bytes.len());
            self.written.lock().unwrap().extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn scripted() -> (LogWriter, mpsc::Sender<Step>, Arc<Mutex<Vec<u8>>>) {
        let (step, steps) = mpsc::channel();
        let written = Arc::default();
        let writer = LogWriter::start(Scripted { steps, written: Arc::clone(&written) }).unwrap();
        (writer, step, written)
    }

    const LONG: Duration = Duration::from_secs(60);

    fn full() -> Step {
        Err(io::Error::from(io::ErrorKind::StorageFull))
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_told_once_it_works_again() {
        let (writer, step, written) = scripted();
        // The thread has no subscriber in this test, so it logs nothing. The line that it would log is checked separately
        // below.
        writer.push(b"one\n");
        step.send(full()).unwrap();
        writer.flush(LONG);
        writer.push(b"two\n");
        step.send(full()).unwrap();
        writer.flush(LONG);
        assert_eq!((writer.0.lock().dropped, &**written.lock().unwrap()), (2, &b""[..]));
        // The disk is nearly full: half a line is written, and counts as lost.
        writer.push(b"three\nfour\n");
        step.send(Ok(8)).unwrap();
        step.send(full()).unwrap();
        writer.flush(LONG);
        drop(step); // from now on everything is taken
        writer.push(b"five\n");
        writer.flush(LONG);
        let written = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert_eq!(written, "three\nfo\nfive\n");
        assert_eq!(writer.0.lock().dropped, 3);
    }

    #[test]
    fn the_count_is_told_in_the_format_of_all_lines() {
        let (writer, _step, _) = scripted();
        let subscriber = json(&"info".parse().unwrap(), writer);
        let line = tracing::subscriber::with_default(subscriber, || own_line(17));
        let line: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!((&line["level"], &line["dropped"]), (&"WARN".into(), &17.into()));
        assert_eq!(line["message"], "log lines could not be written and are lost");
    }

    #[test]
    fn a_reader_that_has_stopped_holds_up_nobody() {
        let (writer, step, written) = scripted();
        writer.push(b"first\n");
        while !writer.0.lock().lines.is_empty() {
            thread::yield_now();
        }
        // The thread blocks in its first write.
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        let began = Instant::now();
        for _ in 0..5000 {
            writer.push(&line);
        }
        writer.flush(Duration::from_millis(20));
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        let dropped = writer.0.lock().dropped;
        assert_eq!(dropped, 5000 - QUEUE_BYTES_MAX as u64 / 1024);
        drop(step);
        writer.push(b"last\n"); // no room for it, or room again
        writer.flush(LONG);
        writer.push(b"afterwards\n");
        writer.flush(LONG);
        assert!(written.lock().unwrap().ends_with(b"afterwards\n"));
    }

    #[test]
    fn a_write_that_would_block_is_repeated() {
        let (writer, step, written) = scripted();
        writer.push(b"line\n");
        step.send(Err(io::Error::from(io::ErrorKind::WouldBlock))).unwrap();
        step.send(Err(io::Error::from(io::ErrorKind::Interrupted))).unwrap();
        drop(step);
        writer.flush(LONG);
        assert_eq!(&**written.lock().unwrap(), b"line\n");
    }
}
