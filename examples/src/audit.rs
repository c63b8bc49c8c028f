//! Checks for every order that it happened in all three services or in none. Takes the tables and the answers, and returns the
//! violations.

use std::collections::BTreeMap;

use crate::books::{Account, Books, Deduction, OrderRow, Stock};

/// What the customer was told about an order. It must stay true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The order is placed.
    Placed,
    /// A service refused.
    Refused,
    /// A call failed, and the order had no effect.
    Cancelled,
}

/// Returns the violations, one sentence each; empty if there are none. `before` holds the tables before the first order. `after`
/// holds them at the end, when no transaction is open.
#[must_use]
pub fn audit(before: &Books, after: &Books, answers: &BTreeMap<i64, Answer>) -> Vec<String> {
    let mut violations = Vec::new();
    stock(before, after, &mut violations);
    points(before, after, &mut violations);
    for (service, tried) in &after.tried {
        if *tried != 0 {
            violations.push(format!("{service}: {tried} branches are tried and wait for ever"));
        }
    }
    let orders = after.orders.keys().chain(after.deductions.keys()).chain(after.bookings.keys());
    let orders: std::collections::BTreeSet<_> = orders.chain(answers.keys()).copied().collect();
    for id in orders {
        if let Err(violation) = order(id, after, answers.get(&id)) {
            violations.push(format!("order {id}: {violation}"));
        }
    }
    violations
}

fn stock(before: &Books, after: &Books, violations: &mut Vec<String>) {
    if !before.stock.keys().eq(after.stock.keys()) {
        violations.push("inventory: there are other SKUs than before".to_owned());
    }
    for (sku, Stock { available, frozen, sold }) in &after.stock {
        let all = |stock: &Stock| stock.available + stock.frozen + stock.sold;
        let were = before.stock.get(sku).map_or(0, all);
        if available + frozen + sold != were {
            violations.push(format!(
                "{sku}: {available} available + {frozen} frozen + {sold} sold, but there were {were}"
            ));
        }
        if *frozen != 0 {
            violations.push(format!("{sku}: {frozen} are left frozen"));
        }
        let sold_before = before.stock.get(sku).map_or(0, |stock| stock.sold);
        let ordered = |books: &Books| -> i64 {
            let rows =
                books.deductions.values().filter(|row| row.sku == *sku && row.state == "sold");
            rows.map(|row| row.quantity).sum()
        };
        let ordered = ordered(after) - ordered(before);
        if sold - sold_before != ordered {
            let sold = sold - sold_before;
            violations.push(format!("{sku}: {sold} were sold, but orders took {ordered}"));
        }
    }
}

fn points(before: &Books, after: &Books, violations: &mut Vec<String>) {
    for (customer, Account { balance, pending }) in &after.accounts {
        if *pending != 0 {
            violations.push(format!("{customer}: {pending} points are left pending"));
        }
        let had = before.accounts.get(customer).map_or(0, |account| account.balance);
        let earned = |books: &Books| -> i64 {
            let rows = books.bookings.values();
            let rows = rows.filter(|row| row.customer == *customer && row.state == "booked");
            rows.map(|row| row.points).sum()
        };
        let earned = earned(after) - earned(before);
        if balance - had != earned {
            let got = balance - had;
            violations.push(format!("{customer}: got {got} points, but orders earned {earned}"));
        }
    }
}

/// Checks that the three services and the answer agree about one order.
fn order(id: i64, books: &Books, answer: Option<&Answer>) -> Result<(), String> {
    let (deduction, booking) = (books.deductions.get(&id), books.bookings.get(&id));
    let order = books.orders.get(&id);
    let status = order.map_or("not there", |order| order.status.as_str());
    let placed = match (order, status) {
        (Some(order), "placed") => {
            let OrderRow { customer, sku, quantity, amount_cents, .. } = order;
            let (sku, quantity) = (sku.clone(), *quantity);
            let wanted = Deduction { sku, quantity, state: "sold".to_owned() };
            if deduction != Some(&wanted) {
                return Err(format!("is placed, but in inventory there is {}", found(deduction)));
            }
            let points = amount_cents / 100;
            let booked = |row: &crate::books::Booking| {
                (&row.customer, row.points, row.state.as_str()) == (customer, points, "booked")
            };
            if !booking.is_some_and(booked) {
                return Err(format!("is placed, but in points there is {}", found(booking)));
            }
            true
        }
        (_, "cancelled" | "not there") => {
            if let Some(deduction) = deduction {
                return Err(format!("is {status}, but in inventory there is {deduction}"));
            }
            if let Some(booking) = booking {
                return Err(format!("is {status}, but in points there is {booking}"));
            }
            false
        }
        (_, status) => return Err(format!("is left {status}")),
    };
    match (placed, answer) {
        (false, Some(Answer::Placed)) => {
            Err(format!("its placement was acknowledged, but it is {status}"))
        }
        (true, Some(Answer::Refused | Answer::Cancelled)) => {
            Err("is placed, but the customer was told that it is not".to_owned())
        }
        (true, None) => Err("is placed, but nobody has ordered it".to_owned()),
        (true, Some(Answer::Placed)) | (false, _) => Ok(()),
    }
}

fn found<T: ToString>(row: Option<&T>) -> String {
    row.map_or_else(|| "nothing".to_owned(), T::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{books::Booking, store::Service};

    /// Two orders: one of two mice, which was placed, and one that was cancelled.
    fn before() -> Books {
        let mut books = Books::default();
        books.stock.insert("mouse".to_owned(), Stock { available: 10, frozen: 0, sold: 0 });
        books.accounts.insert("ada".to_owned(), Account { balance: 5, pending: 0 });
        books
    }

    fn after() -> Books {
        let mut books = before();
        books.stock.insert("mouse".to_owned(), Stock { available: 8, frozen: 0, sold: 2 });
        books.accounts.insert("ada".to_owned(), Account { balance: 63, pending: 0 });
        let sold = Deduction { sku: "mouse".to_owned(), quantity: 2, state: "sold".to_owned() };
        books.deductions.insert(1, sold);
        let booked = Booking { customer: "ada".to_owned(), points: 58, state: "booked".to_owned() };
        books.bookings.insert(1, booked);
        for (id, status) in [(1, "placed"), (2, "cancelled")] {
            let order = OrderRow {
                customer: "ada".to_owned(),
                sku: "mouse".to_owned(),
                quantity: 2,
                amount_cents: 5800,
                status: status.to_owned(),
            };
            books.orders.insert(id, order);
        }
        books.tried.insert(Service::Inventory, 0);
        books
    }

    fn answers() -> BTreeMap<i64, Answer> {
        BTreeMap::from([(1, Answer::Placed), (2, Answer::Refused), (3, Answer::Cancelled)])
    }

    /// Applies `change` and checks which violations the audit reports.
    fn check(change: impl Fn(&mut Books, &mut BTreeMap<i64, Answer>), expected: &[&str]) {
        let (mut after, mut answers) = (after(), answers());
        change(&mut after, &mut answers);
        assert_eq!(audit(&before(), &after, &answers), expected);
    }

    #[test]
    fn books_that_agree_pass() {
        check(|_, _| {}, &[]);
    }

    #[test]
    fn stock_that_vanishes_is_found() {
        check(
            |after, _| after.stock.get_mut("mouse").unwrap().available -= 1,
            &["mouse: 7 available + 0 frozen + 2 sold, but there were 10"],
        );
    }

    #[test]
    fn what_is_left_frozen_or_pending_is_found() {
        check(
            |after, _| {
                let stock = Stock { available: 7, frozen: 1, sold: 2 };
                after.stock.insert("mouse".to_owned(), stock);
                after.accounts.get_mut("ada").unwrap().pending = 9;
                after.tried.insert(Service::Inventory, 1);
            },
            &[
                "mouse: 1 are left frozen",
                "ada: 9 points are left pending",
                "inventory: 1 branches are tried and wait for ever",
            ],
        );
        check(
            |after, _| after.orders.get_mut(&2).unwrap().status = "pending".to_owned(),
            &["order 2: is left pending"],
        );
    }

    #[test]
    fn sums_that_fit_do_not_hide_orders_that_do_not() {
        // The stock was sold for a cancelled order.
        check(
            |after, _| {
                let sold = after.deductions.remove(&1).unwrap();
                after.deductions.insert(2, sold);
            },
            &[
                "order 1: is placed, but in inventory there is nothing",
                "order 2: is cancelled, but in inventory there is 2 × mouse, sold",
            ],
        );
    }

    #[test]
    fn an_answer_that_is_not_true_is_found() {
        check(
            |_, answers| {
                answers.insert(2, Answer::Placed);
                answers.insert(3, Answer::Placed);
                answers.insert(1, Answer::Refused);
            },
            &[
                "order 1: is placed, but the customer was told that it is not",
                "order 2: its placement was acknowledged, but it is cancelled",
                "order 3: its placement was acknowledged, but it is not there",
            ],
        );
        check(
            |_, answers| assert!(answers.remove(&1).is_some()),
            &["order 1: is placed, but nobody has ordered it"],
        );
    }

    #[test]
    fn points_for_nothing_are_found() {
        check(
            |after, _| after.accounts.get_mut("ada").unwrap().balance += 1,
            &["ada: got 59 points, but orders earned 58"],
        );
        check(
            |after, _| after.bookings.get_mut(&1).unwrap().points = 57,
            &[
                "ada: got 58 points, but orders earned 57",
                "order 1: is placed, but in points there is 57 points for ada, booked",
            ],
        );
    }
}
