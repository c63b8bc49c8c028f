//! The points service as a program. Its code is in `src/points.rs`.

use anyhow::Context as _;
use clap::Parser;
use handfast_shop::{Setup, log_to_stdout, mysql, sqlite, store::Store};

/// Keeps the customers' points.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    setup: Setup,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Flags { setup } = Flags::parse();
    log_to_stdout();
    let cannot = || format!("cannot open {}", setup.store);
    match &setup.store {
        Store::Sqlite(file) => {
            sqlite::points::serve(&setup, sqlite::open(file).await.with_context(cannot)?).await
        }
        Store::MySql(url) => {
            mysql::points::serve(&setup, mysql::open(url).await.with_context(cannot)?).await
        }
    }
}
