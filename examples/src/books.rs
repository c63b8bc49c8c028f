//! The contents of the three services' tables, read straight from their databases.

use std::{collections::BTreeMap, fmt};

use anyhow::Context as _;

use crate::{
    mysql, sqlite,
    store::{Service, Store, Stores},
};

/// All rows that the audit needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Books {
    /// Stock, by SKU.
    pub stock: BTreeMap<String, Stock>,
    /// Deductions, by order id.
    pub deductions: BTreeMap<i64, Deduction>,
    /// Points accounts, by customer.
    pub accounts: BTreeMap<String, Account>,
    /// Points bookings, by order id.
    pub bookings: BTreeMap<i64, Booking>,
    /// Orders, by id.
    pub orders: BTreeMap<i64, OrderRow>,
    /// By service: how many branches are recorded in its fence as tried, and neither confirmed nor cancelled.
    pub tried: BTreeMap<Service, i64>,
}

/// The stock of one SKU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// Pieces that can be sold.
    pub available: i64,
    /// Pieces that are reserved for open orders.
    pub frozen: i64,
    /// Pieces that were sold.
    pub sold: i64,
}

/// The pieces that one order took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deduction {
    /// The SKU.
    pub sku: String,
    /// The number of pieces.
    pub quantity: i64,
    /// `frozen` or `sold`.
    pub state: String,
}

/// A customer's points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Points that the customer can spend.
    pub balance: i64,
    /// Points of orders that are still open.
    pub pending: i64,
}

/// The points that one order earned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booking {
    /// The customer who earned them.
    pub customer: String,
    /// The number of points.
    pub points: i64,
    /// `pending` or `booked`.
    pub state: String,
}

/// A row of the order service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderRow {
    /// The customer.
    pub customer: String,
    /// The SKU that was ordered.
    pub sku: String,
    /// The number of pieces.
    pub quantity: i64,
    /// The total price in cents.
    pub amount_cents: i64,
    /// `pending`, `placed` or `cancelled`.
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
    /// Reads the current contents. Call it only when no order is in flight: the tables are not read in one snapshot.
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

/// Fills the stock (SKU and pieces) and creates the customers, before the first order. The tables must exist; each service
/// creates its own when it starts.
///
/// # Errors
///
/// When the rows exist already, or a database cannot be written.
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
