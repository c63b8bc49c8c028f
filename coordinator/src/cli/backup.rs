//! `handfast backup`

use std::path::PathBuf;

use clap::Args;
use handfast_coordinator::{
    clock::{Clock as _, SystemClock},
    config::StoreUrl,
    store::sqlite::{self, CopyError},
};

use super::{Failure, failure::Code, talk};

/// Copies a SQLite store into a new file, also while a coordinator runs on it.
///
/// The copy has everything that was recorded when it began. `handfast restore` makes a store of it; a coordinator refuses to
/// start on it as it is. A MySQL or MariaDB store is backed up with the tools of its server.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  HANDFAST_STORE=sqlite:handfast.db handfast backup /backups/handfast-monday.backup
  handfast backup --store sqlite:handfast.db handfast-monday.backup")]
pub(super) struct Backup {
    /// The new file. A file that exists is not overwritten
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The store
    #[arg(long, value_name = "sqlite:PATH", env = "HANDFAST_STORE", hide_env_values = true)]
    store: String,
}

impl Backup {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let wrong = |what: &str| Failure::new(Code::Usage, "cannot make a backup", what, "");
        let store = match self.store.parse().map_err(|what: String| wrong(&what))? {
            StoreUrl::Sqlite(path) => path,
            StoreUrl::MySql(_) => {
                return Err(wrong(
                    "a MySQL or MariaDB store is backed up with its server's tools, such as mariadb-dump --single-transaction",
                ));
            }
            StoreUrl::Memory => return Err(wrong("a store in memory cannot be copied")),
        };
        let now = SystemClock::default().now();
        let bytes = sqlite::backup(&store, &self.file, now, tell_progress).await.map_err(failed)?;
        talk(&format!(
            "{} has everything that {} had recorded at the start ({} MB)",
            self.file.display(),
            store.display(),
            megabytes(bytes)
        ));
        Ok(())
    }
}

pub(super) fn tell_progress(done: u64, total: u64) {
    talk(&format!("copied {} of about {} MB", megabytes(done), megabytes(total)));
}

pub(super) fn failed(error: CopyError) -> Failure {
    let hint = match error {
        CopyError::Exists { .. } => "choose another name, or move that file away",
        CopyError::Open(_) | CopyError::Failed { .. } => "",
    };
    Failure::new(Code::Failed, "nothing was copied", error.to_string(), hint)
}

fn megabytes(bytes: u64) -> String {
    let tenths = bytes.div_ceil(100_000);
    format!("{}.{}", tenths / 10, tenths % 10)
}
