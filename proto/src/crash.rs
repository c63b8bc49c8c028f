//! Crash points: named places at which a process can be made to die, as if it had been killed there.
//!
//! With `CRASH_POINT=batch.after_commit:3` in its environment, the process sends itself SIGKILL when it reaches
//! `crash_point!("batch.after_commit")` for the third time. With `:stop` appended it sends SIGSTOP, and SIGCONT resumes it.
//! Fault injection uses this (`chaos`, and tests of processes). Without the feature `crash-points`, none of it is compiled.

/// Dies here if the environment says so; see the module [`crash`](crate::crash).
#[cfg(feature = "crash-points")]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::come_by($name)
    };
}

/// Does nothing: this was built without the feature `crash-points`.
#[cfg(not(feature = "crash-points"))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        ()
    };
}

/// Whether the environment names this crash point.
#[cfg(feature = "crash-points")]
#[macro_export]
macro_rules! crash_point_is_set {
    ($name:literal) => {
        $crate::crash::is_set($name)
    };
}

/// `false`: this was built without the feature `crash-points`.
#[cfg(not(feature = "crash-points"))]
#[macro_export]
macro_rules! crash_point_is_set {
    ($name:literal) => {
        false
    };
}

/// Whether the environment names this crash point.
#[cfg(feature = "crash-points")]
pub fn is_set(name: &str) -> bool {
    armed::POINT.as_ref().is_some_and(|(at, ..)| at == name)
}

/// The crash point that the environment names.
#[cfg(feature = "crash-points")]
mod armed {
    use std::sync::LazyLock;

    use rustix::process::Signal;

    /// Its name, the number of the visit, and the signal.
    type Point = (String, u64, Signal);

    pub(super) static POINT: LazyLock<Option<Point>> = LazyLock::new(|| {
        let text = std::env::var("CRASH_POINT").ok()?;
        Some(parse(&text).expect("CRASH_POINT is a name, a colon and a number, and perhaps :stop"))
    });

    fn parse(text: &str) -> Option<Point> {
        let (text, signal) = match text.strip_suffix(":stop") {
            Some(text) => (text, Signal::STOP),
            None => (text, Signal::KILL),
        };
        let (name, times) = text.split_once(':')?;
        Some((name.to_owned(), times.parse().ok()?, signal))
    }
}

/// Counts the visits, and dies or stops at the right one.
///
/// # Panics
///
/// When `CRASH_POINT` is malformed.
#[cfg(feature = "crash-points")]
pub fn come_by(name: &str) {
    use rustix::process::{getpid, kill_process};
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    static TIMES: AtomicU64 = AtomicU64::new(0);

    if let Some((at, nth, signal)) = &*armed::POINT
        && at == name
        && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == *nth
    {
        kill_process(getpid(), *signal).expect("everybody may do so to themselves");
        // Another thread may receive the signal. This one must not continue before all threads have stopped.
        std::thread::sleep(Duration::from_millis(100));
    }
}
