//! `handfast migrate`

use clap::Args;
use handfast_coordinator::{
    config::StoreUrl,
    store::mysql::{self, OpenError},
};

use super::{Failure, failure::Code, talk, tell};

/// Creates the tables of a MySQL or MariaDB store, or upgrades them to this version.
///
/// It never downgrades, and a repeat changes nothing. A SQLite store does not need it.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  handfast migrate --store mysql://handfast@127.0.0.1:3306/handfast --dry-run")]
pub(super) struct Migrate {
    /// The URL of the store
    #[arg(long, value_name = "mysql://…", env = "HANDFAST_STORE", hide_env_values = true)]
    store: String,
    /// Only print the SQL
    #[arg(long)]
    dry_run: bool,
}

impl Migrate {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let wrong = |what: String| Failure::new(Code::Usage, "cannot migrate", what, "");
        let url = match self.store.parse().map_err(wrong)? {
            StoreUrl::MySql(url) => url,
            StoreUrl::Sqlite(_) => {
                return Err(wrong("a store of SQLite makes its tables itself".to_owned()));
            }
            StoreUrl::Memory => return Err(wrong("a store in memory has no tables".to_owned())),
        };
        if self.dry_run {
            let steps = mysql::pending(url.secret()).await.map_err(failed)?;
            return tell(&steps.concat());
        }
        match mysql::migrate(url.secret()).await.map_err(failed)? {
            (from, to) if from == to => talk(&format!("{url} has version {to} already")),
            (0, to) => talk(&format!("{url} has its tables now, of version {to}")),
            (from, to) => talk(&format!("{url} has been brought from version {from} to {to}")),
        }
        Ok(())
    }
}

fn failed(error: OpenError) -> Failure {
    Failure::new(Code::Failed, "cannot migrate", error.to_string(), "")
}
