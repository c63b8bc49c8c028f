//! `handfast restore`

use std::path::{Path, PathBuf};

use clap::Args;
use handfast_coordinator::{
    clock::{Clock as _, SystemClock},
    config::{MySqlUrl, StoreUrl},
    standby,
    store::{
        mysql::MySqlStore,
        sqlite::{self, Restored},
    },
};

use super::{
    Failure,
    backup::{failed, tell_progress},
    failure::Code,
    talk,
};

const HELP: &str = "\
Stop the coordinator first. The store that is there is kept under another name.

A restored store lacks what was recorded after the backup, and callers may have been told about that. It is marked, so \
that the coordinator answers LOST for a transaction that it lacks, and never decides one again that was undecided in the \
backup. The participants still hold their reservations and ask: each reports those that a person must settle.

A MySQL or MariaDB store is restored with the tools of its server. Then --mark does the rest, before a coordinator starts. \
--mark also makes a SQLite store usable whose -wal file is lost for good.

Examples:
  handfast restore --store sqlite:handfast.db handfast-monday.backup
  handfast restore --store mysql://handfast@127.0.0.1:3306/handfast --mark";

/// Makes a store of a backup, or marks a store that was restored by other means.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct Restore {
    /// The backup, or another whole copy of a SQLite store
    #[arg(value_name = "FILE", required_unless_present = "mark", conflicts_with = "mark")]
    file: Option<PathBuf>,
    /// The store
    #[arg(
        long,
        value_name = "sqlite:PATH|mysql://…",
        env = "HANDFAST_STORE",
        hide_env_values = true
    )]
    store: String,
    /// Only mark the store: it was restored by other means
    #[arg(long)]
    mark: bool,
}

impl Restore {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let wrong = |what: String| Failure::new(Code::Usage, "cannot restore", what, "");
        let store = self.store.parse().map_err(wrong)?;
        match (self.file, store) {
            (Some(file), StoreUrl::Sqlite(store)) => restore(&file, &store).await,
            (Some(_), StoreUrl::MySql(_)) => Err(wrong(
                "a MySQL or MariaDB store is restored with the tools of its server; then run this with --mark instead of a file"
                    .to_owned(),
            )),
            (None, StoreUrl::Sqlite(store)) => {
                let now = SystemClock::default().now();
                let marking = sqlite::mark_restored(&store, now, tell_progress);
                let restored = marking.await.map_err(failed)?;
                talk(&format!("{}{}", marked(restored.epochs), kept(restored.earlier.as_deref())));
                Ok(())
            }
            (None, StoreUrl::MySql(url)) => mark(&url).await,
            (_, StoreUrl::Memory) => Err(wrong("a store in memory is not restored".to_owned())),
        }
    }
}

async fn restore(file: &Path, store: &Path) -> Result<(), Failure> {
    let now = SystemClock::default().now();
    let restored = sqlite::restore(file, store, now, tell_progress).await.map_err(failed)?;
    let Restored { earlier, transactions, made_at, epochs: _ } = restored;
    let made = made_at.and_then(|at| jiff::Timestamp::from_millisecond(at.0).ok());
    let made = made.map_or_else(String::new, |at| format!(", made at {at:.0}"));
    let earlier = kept(earlier.as_deref());
    talk(&format!(
        "{} is {} now{made}, with {transactions} transactions. It is marked: what it lacks is answered LOST{earlier}",
        store.display(),
        file.display(),
    ));
    Ok(())
}

async fn mark(url: &MySqlUrl) -> Result<(), Failure> {
    let failed = |cause: String| Failure::new(Code::Failed, "nothing was marked", cause, "");
    // What the server does with future commits is none of this command's business.
    let opened = MySqlStore::open(url.secret(), true).await;
    let store = opened.map_err(|error| failed(error.to_string()))?;
    if !standby::is_free(&store).await {
        let hint = "stop it first, and every standby";
        let cause = "a coordinator uses this store, or it does not answer";
        return Err(Failure::new(Code::Failed, "nothing was marked", cause, hint));
    }
    let count = store.mark_restored().await.map_err(|error| failed(error.to_string()))?;
    talk(&marked(count));
    Ok(())
}

fn kept(earlier: Option<&Path>) -> String {
    earlier.map_or_else(String::new, |earlier| {
        format!("\nThe store that was there is kept as {}", earlier.display())
    })
}

fn marked(count: u64) -> String {
    format!("the store is marked ({count} epochs): what it lacks is answered LOST from now on")
}
