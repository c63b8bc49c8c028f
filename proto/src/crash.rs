//! Where a process can be made to die, as if somebody had killed it at that very place: `CRASH_POINT=batch.after_commit:3` in its
//! environment is SIGKILL when it comes by `crash_point!("batch.after_commit")` for the third time. This is for the machine that
//! breaks things on purpose (`chaos`); without the feature `crash-points` nothing of it is compiled, here or where it is used.

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

/// Counts, and dies when it is time.
///
/// # Panics
///
/// When `CRASH_POINT` is no name and number.
#[cfg(feature = "crash-points")]
pub fn come_by(name: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    static WHERE: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let text = std::env::var("CRASH_POINT").ok()?;
        let parsed =
            text.split_once(':').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?)));
        Some(parsed.expect("CRASH_POINT is a name, a colon and a number"))
    });
    static TIMES: AtomicU64 = AtomicU64::new(0);

    if let Some((at, nth)) = &*WHERE
        && at == name
        && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == *nth
    {
        use rustix::process::{Signal, getpid, kill_process};
        kill_process(getpid(), Signal::KILL).expect("everybody may kill themselves");
    }
}
