//! Reads the services' tables for the audit, and fills them before the first order.

use sqlx::Connection as _;

use super::{Db, Location, connect};
use crate::{
    books::{Account, Booking, Books, Deduction, OrderRow, Stock},
    store::Service,
};

type Connection = <Db as sqlx::Database>::Connection;

/// Reads one service's tables into `books`.
pub(crate) async fn read(
    service: Service,
    place: &Location,
    books: &mut Books,
) -> sqlx::Result<()> {
    let mut db = connect(place).await?;
    match service {
        Service::Order => read_orders(&mut db, books).await?,
        Service::Inventory => read_stock(&mut db, books).await?,
        Service::Points => read_points(&mut db, books).await?,
    }
    let tried = "SELECT count(*) FROM handfast_fence_readable WHERE state = 'tried'";
    books.tried.insert(service, sqlx::query_scalar(tried).fetch_one(&mut db).await?);
    db.close().await
}

async fn read_orders(db: &mut Connection, books: &mut Books) -> sqlx::Result<()> {
    let orders = "SELECT id, customer, sku, quantity, amount_cents, status FROM orders";
    let rows: Vec<(i64, String, String, i64, i64, String)> =
        sqlx::query_as(orders).fetch_all(db).await?;
    for (id, customer, sku, quantity, amount_cents, status) in rows {
        books.orders.insert(id, OrderRow { customer, sku, quantity, amount_cents, status });
    }
    Ok(())
}

async fn read_stock(db: &mut Connection, books: &mut Books) -> sqlx::Result<()> {
    let stock = "SELECT sku, available, frozen, sold FROM stock";
    let rows: Vec<(String, i64, i64, i64)> = sqlx::query_as(stock).fetch_all(&mut *db).await?;
    for (sku, available, frozen, sold) in rows {
        books.stock.insert(sku, Stock { available, frozen, sold });
    }
    let deductions = "SELECT order_id, sku, quantity, state FROM deduction";
    let rows: Vec<(i64, String, i64, String)> = sqlx::query_as(deductions).fetch_all(db).await?;
    for (order, sku, quantity, state) in rows {
        books.deductions.insert(order, Deduction { sku, quantity, state });
    }
    Ok(())
}

async fn read_points(db: &mut Connection, books: &mut Books) -> sqlx::Result<()> {
    let accounts = "SELECT customer, balance, pending FROM account";
    let rows: Vec<(String, i64, i64)> = sqlx::query_as(accounts).fetch_all(&mut *db).await?;
    for (customer, balance, pending) in rows {
        books.accounts.insert(customer, Account { balance, pending });
    }
    let bookings = "SELECT order_id, customer, points, state FROM booking";
    let rows: Vec<(i64, String, i64, String)> = sqlx::query_as(bookings).fetch_all(db).await?;
    for (order, customer, points, state) in rows {
        books.bookings.insert(order, Booking { customer, points, state });
    }
    Ok(())
}

/// Adds stock to the inventory service.
pub(crate) async fn add_stock(place: &Location, stock: &[(&str, i64)]) -> sqlx::Result<()> {
    let mut db = connect(place).await?;
    for (sku, pieces) in stock {
        let insert = sqlx::query("INSERT INTO stock (sku, available) VALUES (?, ?)");
        insert.bind(*sku).bind(*pieces).execute(&mut db).await?;
    }
    db.close().await
}

/// Adds customers to the points service.
pub(crate) async fn add_customers(place: &Location, customers: &[&str]) -> sqlx::Result<()> {
    let mut db = connect(place).await?;
    for customer in customers {
        let insert = sqlx::query("INSERT INTO account (customer) VALUES (?)");
        insert.bind(*customer).execute(&mut db).await?;
    }
    db.close().await
}
