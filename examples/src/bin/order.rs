//! The order service as a program. Its code is in `src/order.rs`.

use anyhow::Context as _;
use clap::Parser;
use handfast_shop::{Setup, log_to_stdout, mysql, sqlite, store::Store};

/// Keeps the orders, and places them.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    setup: Setup,
    /// Where the inventory service is
    #[arg(long, value_name = "URL")]
    inventory: String,
    /// Where the points service is
    #[arg(long, value_name = "URL")]
    points: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Flags { setup, inventory, points } = Flags::parse();
    log_to_stdout();
    let cannot = || format!("cannot open {}", setup.store);
    match &setup.store {
        Store::Sqlite(file) => {
            let pool = sqlite::open(file).await.with_context(cannot)?;
            sqlite::order::serve(&setup, pool, &inventory, &points).await
        }
        Store::MySql(url) => {
            let pool = mysql::open(url).await.with_context(cannot)?;
            mysql::order::serve(&setup, pool, &inventory, &points).await
        }
    }
}
