//! What the three services have written down, read straight from their databases.

use std::{collections::BTreeMap, fmt};

use anyhow::Context as _;

use crate::{
    mysql, sqlite,
    store::{Service, Store, Stores},
};

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Books {
    /// By SKU.
    pub stock: BTreeMap<String, Stock>,
    /// By order.
    pub deductions: BTreeMap<i64, Deduction>,
    /// By customer.
    pub accounts: BTreeMap<String, Account>,
    /// By order.
    pub bookings: BTreeMap<i64, Booking>,
    /// By number.
    pub orders: BTreeMap<i64, OrderRow>,
    /// By service: branches whose fence says that they are tried, and neither confirmed nor cancelled.
    pub tried: BTreeMap<Service, i64>,
}

/// Pieces of one SKU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// On the shelf.
    pub available: i64,
    /// Kept for orders that are being placed.
    pub frozen: i64,
    /// Gone.
    pub sold: i64,
}

/// What an order took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deduction {
    /// Of what.
    pub sku: String,
    /// How many.
    pub quantity: i64,
    /// frozen or sold.
    pub state: String,
}

/// A customer's points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// What can be spent.
    pub balance: i64,
    /// Of orders that are being placed.
    pub pending: i64,
}

/// What an order earned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booking {
    /// Whose.
    pub customer: String,
    /// How many.
    pub points: i64,
    /// pending or booked.
    pub state: String,
}

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderRow {
    /// Whose.
    pub customer: String,
    /// Of what.
    pub sku: String,
    /// How many.
    pub quantity: i64,
    /// What it costs.
    pub amount_cents: i64,
    /// pending, placed or cancelled.
    pub status: String,
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
    /// Reads what is there now. Read when nothing is under way: each table is read at a moment of its own.
    ///
    /// # Errors
    ///
    /// When one of the databases cannot be read.
    pub async fn read(stores: &Stores) -> anyhow::Result<Self> {
        let mut books = Self::default();
        for (service, store) in stores.each() {
            let read = match store {
                Store::Sqlite(file) => sqlite::tables::read(service, file, &mut books).await,
                Store::MySql(url) => mysql::tables::read(service, url, &mut books).await,
            };
            read.with_context(|| format!("cannot read {store}"))?;
        }
        Ok(books)
    }
}

/// Puts goods on the shelves (SKU and pieces) and customers into the books, before anybody orders. The services have made their
/// tables: they do when they start.
///
/// # Errors
///
/// When they are there already, or a database cannot be written.
pub async fn fill(
    stores: &Stores,
    stock: &[(&str, i64)],
    customers: &[&str],
) -> anyhow::Result<()> {
    match &stores.inventory {
        Store::Sqlite(file) => sqlite::tables::add_stock(file, stock).await?,
        Store::MySql(url) => mysql::tables::add_stock(url, stock).await?,
    }
    match &stores.points {
        Store::Sqlite(file) => sqlite::tables::add_customers(file, customers).await?,
        Store::MySql(url) => mysql::tables::add_customers(url, customers).await?,
    }
    Ok(())
}
