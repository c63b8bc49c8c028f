//! Where a process can be made to die, as if somebody had killed it at that very place: `CRASH_POINT=batch.after_commit:3` in its
//! environment is SIGKILL when it comes by `crash_point!("batch.after_commit")` for the third time; with `:stop` at the end it is
//! SIGSTOP, and SIGCONT lets it go on from there. This is for what breaks things on purpose (`chaos`, and tests of processes);
//! without the feature `crash-points` nothing of it is compiled, here or where it is used.

/// Dies here, if the process was told to; see the module [`crash`](crate::crash).
#[cfg(feature = "crash-points")]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::come_by($name)
    };
}

/// Nothing: this was built without the feature `crash-points`.
#[cfg(not(feature = "crash-points"))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        ()
    };
}

/// Counts, and dies or stops when it is time.
///
/// # Panics
///
/// When `CRASH_POINT` is no name and number.
#[cfg(feature = "crash-points")]
pub fn come_by(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};
    use std::{
        sync::{
            LazyLock,
            atomic::{AtomicU64, Ordering},
        },
        time::Duration,
    };

    /// Where, at which time, and with what.
    fn parse(text: &str) -> Option<(String, u64, Signal)> {
        let (text, signal) = match text.strip_suffix(":stop") {
            Some(text) => (text, Signal::STOP),
            None => (text, Signal::KILL),
        };
        let (name, times) = text.split_once(':')?;
        Some((name.to_owned(), times.parse().ok()?, signal))
    }

    static WHERE: LazyLock<Option<(String, u64, Signal)>> = LazyLock::new(|| {
        let text = std::env::var("CRASH_POINT").ok()?;
        Some(parse(&text).expect("CRASH_POINT is a name, a colon and a number, and perhaps :stop"))
    });
    static TIMES: AtomicU64 = AtomicU64::new(0);

    if let Some((at, nth, signal)) = &*WHERE
        && at == name
        && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == *nth
    {
        kill_process(getpid(), *signal).expect("everybody may do so to themselves");
        // Another thread may be the one that receives it; this one must not go on before all have stopped.
        std::thread::sleep(Duration::from_millis(100));
    }
}
