//! What the three services have written down, read straight from their databases, which are opened for reading only.

use std::{collections::BTreeMap, fmt};

use anyhow::Context as _;
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

use super::world::{INVENTORY, ORDER, POINTS, World};

/// What is on the shelves at the beginning, beside what the burst needs.
pub(crate) const STOCK: [(&str, i64); 3] = [("keyboard", 100), ("mouse", 100), ("monitor", 2)];
/// What the burst is about: few, so that orders meet.
pub(crate) const BURST_SKUS: [&str; 3] = ["lamp", "mug", "pen"];
/// Who orders.
pub(crate) const CUSTOMERS: [&str; 4] = ["ada", "ben", "cleo", "dan"];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Books {
    /// By SKU.
    pub(crate) stock: BTreeMap<String, Stock>,
    /// By order.
    pub(crate) deductions: BTreeMap<i64, Deduction>,
    /// By customer.
    pub(crate) accounts: BTreeMap<String, Account>,
    /// By order.
    pub(crate) bookings: BTreeMap<i64, Booking>,
    /// By number.
    pub(crate) orders: BTreeMap<i64, OrderRow>,
    /// By service: branches whose fence says that they are tried, and neither confirmed nor cancelled.
    pub(crate) tried: BTreeMap<&'static str, i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stock {
    pub(crate) available: i64,
    pub(crate) frozen: i64,
    pub(crate) sold: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deduction {
    pub(crate) sku: String,
    pub(crate) quantity: i64,
    pub(crate) state: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) balance: i64,
    pub(crate) pending: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Booking {
    pub(crate) customer: String,
    pub(crate) points: i64,
    pub(crate) state: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrderRow {
    pub(crate) customer: String,
    pub(crate) sku: String,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
    pub(crate) status: String,
}

impl fmt::Display for Deduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sku, quantity, state } = self;
        write!(f, "{quantity} × {sku}, {state}")
    }
}

impl fmt::Display for Booking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { customer, points, state } = self;
        write!(f, "{points} points for {customer}, {state}")
    }
}

impl Books {
    /// Reads what is there now.
    pub(crate) async fn read(world: &World) -> anyhow::Result<Self> {
        let mut books = Self::default();

        let mut db = open(world, INVENTORY).await?;
        let rows: Vec<(String, i64, i64, i64)> =
            sqlx::query_as("SELECT sku, available, frozen, sold FROM stock")
                .fetch_all(&mut db)
                .await?;
        let rows = rows.into_iter();
        books.stock = rows
            .map(|(sku, available, frozen, sold)| (sku, Stock { available, frozen, sold }))
            .collect();
        let rows: Vec<(i64, String, i64, String)> =
            sqlx::query_as("SELECT order_id, sku, quantity, state FROM deduction")
                .fetch_all(&mut db)
                .await?;
        let rows = rows.into_iter();
        books.deductions = rows
            .map(|(order, sku, quantity, state)| (order, Deduction { sku, quantity, state }))
            .collect();
        books.tried.insert(INVENTORY, tried(&mut db).await?);

        let mut db = open(world, POINTS).await?;
        let rows: Vec<(String, i64, i64)> =
            sqlx::query_as("SELECT customer, balance, pending FROM account")
                .fetch_all(&mut db)
                .await?;
        let rows = rows.into_iter();
        books.accounts = rows
            .map(|(customer, balance, pending)| (customer, Account { balance, pending }))
            .collect();
        let rows: Vec<(i64, String, i64, String)> =
            sqlx::query_as("SELECT order_id, customer, points, state FROM booking")
                .fetch_all(&mut db)
                .await?;
        let rows = rows.into_iter();
        books.bookings = rows
            .map(|(order, customer, points, state)| (order, Booking { customer, points, state }))
            .collect();
        books.tried.insert(POINTS, tried(&mut db).await?);

        let mut db = open(world, ORDER).await?;
        let rows: Vec<(i64, String, String, i64, i64, String)> =
            sqlx::query_as("SELECT id, customer, sku, quantity, amount_cents, status FROM orders")
                .fetch_all(&mut db)
                .await?;
        let rows = rows.into_iter();
        books.orders = rows
            .map(|(id, customer, sku, quantity, amount_cents, status)| {
                (id, OrderRow { customer, sku, quantity, amount_cents, status })
            })
            .collect();
        books.tried.insert(ORDER, tried(&mut db).await?);
        Ok(books)
    }
}

/// Puts goods on the shelves and customers into the books, before anybody orders.
pub(crate) async fn fill(world: &World, burst_orders: u32) -> anyhow::Result<()> {
    let options = |name| SqliteConnectOptions::new().filename(world.database(name));
    let mut db = SqliteConnection::connect_with(&options(INVENTORY)).await?;
    // An order of the burst takes two pieces on average; so about one in five finds the shelf empty.
    let each = i64::from(burst_orders) * 2 * 4 / 5 / i64::try_from(BURST_SKUS.len())?;
    for (sku, pieces) in STOCK.into_iter().chain(BURST_SKUS.map(|sku| (sku, each.max(1)))) {
        let insert = sqlx::query("INSERT INTO stock (sku, available) VALUES (?, ?)");
        insert.bind(sku).bind(pieces).execute(&mut db).await?;
    }
    let mut db = SqliteConnection::connect_with(&options(POINTS)).await?;
    for customer in CUSTOMERS {
        let insert = sqlx::query("INSERT INTO account (customer) VALUES (?)");
        insert.bind(customer).execute(&mut db).await?;
    }
    Ok(())
}

async fn open(world: &World, name: &str) -> anyhow::Result<SqliteConnection> {
    let file = world.database(name);
    let options = SqliteConnectOptions::new().filename(&file).read_only(true);
    let db = SqliteConnection::connect_with(&options).await;
    db.with_context(|| format!("cannot read {}", file.display()))
}

async fn tried(db: &mut SqliteConnection) -> anyhow::Result<i64> {
    let tried = "SELECT count(*) FROM handfast_fence_readable WHERE state = 'tried'";
    Ok(sqlx::query_scalar(tried).fetch_one(db).await?)
}
