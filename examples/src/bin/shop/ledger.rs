//! Draws the services' tables as text, before and after.

use handfast_shop::books::{Account, Books, Stock};

use super::screen::Paint;

/// Each line shows the current value, and the value before where it differs.
pub(crate) fn draw(before: &Books, after: &Books, paint: Paint) -> Vec<String> {
    let mut lines = Vec::new();
    let nothing = Stock { available: 0, frozen: 0, sold: 0 };
    lines.push(paint.dim(&line("stock", ["available", "frozen", "sold"])));
    for (sku, is) in &after.stock {
        let was = before.stock.get(sku).unwrap_or(&nothing);
        let columns = [(was.available, is.available), (was.frozen, is.frozen), (was.sold, is.sold)];
        lines.push(line(sku, columns.map(change)));
    }
    let nothing = Account { balance: 0, pending: 0 };
    lines.push(paint.dim(&line("points", ["balance", "pending"])));
    for (customer, is) in &after.accounts {
        let was = before.accounts.get(customer).unwrap_or(&nothing);
        lines.push(line(
            customer,
            [(was.balance, is.balance), (was.pending, is.pending)].map(change),
        ));
    }
    let orders = ["placed", "cancelled", "pending"];
    let count = |books: &Books, status: &str| {
        let orders = books.orders.values().filter(|order| order.status == status).count();
        i64::try_from(orders).unwrap_or(i64::MAX)
    };
    lines.push(
        paint.dim(&format!(
            "{}   (no row: cancelled before it was written)",
            line("orders", orders)
        )),
    );
    lines
        .push(line("", orders.map(|status| change((count(before, status), count(after, status))))));
    lines
}

fn line<const N: usize>(title: &str, columns: [impl AsRef<str>; N]) -> String {
    let columns: String = columns.iter().map(|column| format!("{:>16}", column.as_ref())).collect();
    format!("{title:<10}{columns}")
}

fn change((before, after): (i64, i64)) -> String {
    if before == after { after.to_string() } else { format!("{before} → {after}") }
}

#[cfg(test)]
mod tests {
    use handfast_shop::books::OrderRow;

    use super::*;

    #[test]
    fn what_has_changed_is_shown_with_what_it_was() {
        let mut before = Books::default();
        before.stock.insert("mouse".to_owned(), Stock { available: 10, frozen: 0, sold: 0 });
        before.accounts.insert("ada".to_owned(), Account { balance: 5, pending: 0 });
        let mut after = before.clone();
        after.stock.insert("mouse".to_owned(), Stock { available: 8, frozen: 0, sold: 2 });
        let order = OrderRow {
            customer: "ada".to_owned(),
            sku: "mouse".to_owned(),
            quantity: 2,
            amount_cents: 5800,
            status: "placed".to_owned(),
        };
        after.orders.insert(1, order);
        let expected = "
stock            available          frozen            sold
mouse               10 → 8               0           0 → 2
points             balance         pending
ada                      5               0
orders              placed       cancelled         pending   (no row: cancelled before it was written)
                     0 → 1               0               0";
        let drawn = draw(&before, &after, Paint { colour: false });
        assert_eq!(format!("\n{}", drawn.join("\n")), expected);
    }
}
