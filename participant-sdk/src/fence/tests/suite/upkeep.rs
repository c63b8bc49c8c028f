//! The clean-up, the creation of the table, and log lines.

use super::*;

/// Delivers these calls for the `n`th transaction. Then makes its row this many milliseconds old, and sets when it expired.
async fn aged(shop: &Shop, n: u64, calls: &[Phase], age: i64, expired: Option<i64>) {
    for phase in calls {
        done(&shop.deliver(Level::Run, &branch(n, *phase), &payload(0)).await);
    }
    sqlx::query(sql("UPDATE handfast_fence SET changed_at = ?, expires_at = ? WHERE xid = ?"))
        .bind(now() - age)
        .bind(expired.map(|expired| now() - expired))
        .bind(&branch(n, Phase::Try).xid.to_bytes()[..])
        .execute(&shop.pool)
        .await
        .unwrap();
}

#[tokio::test]
async fn clean_up_deletes_what_is_old_and_keeps_what_somebody_may_ask_for() {
    for server in servers().await {
        use Phase::{Cancel, Confirm, Try};
        let shop = server.open(8).await;
        let week = millis(RETENTION);
        let hour = millis(EXPIRY_MARGIN);
        aged(&shop, 1, &[Try, Confirm], week, Some(week)).await;
        aged(&shop, 2, &[Try, Cancel], week, Some(hour)).await;
        aged(&shop, 3, &[Cancel], week, None).await;
        aged(&shop, 4, &[Try], week, Some(week)).await;
        aged(&shop, 5, &[Try, Confirm], week - 60_000, Some(week)).await;
        aged(&shop, 6, &[Cancel], week, Some(hour - 60_000)).await;
        aged(&shop, 7, &[Cancel], week, Some(-hour)).await;
        assert_eq!(shop.fence.clean_up().await.unwrap(), 3);
        for (n, state) in [
            (1, None),
            (2, None),
            (3, None),
            (4, Some("tried")),
            (5, Some("confirmed")),
            (6, Some("suspended")),
            (7, Some("suspended")),
        ] {
            assert_eq!(shop.state(n).await.as_deref(), state, "{n}");
        }
        assert_eq!(shop.fence.clean_up().await.unwrap(), 0);
    }
}

async fn overdue(shop: &Shop, branch: &Branch) -> usize {
    let from_the_first = Default::default();
    let page = shop.fence.overdue(&branch.action, &from_the_first).await.unwrap();
    page.branches.len()
}

/// Many rows, few of them tried, fewer overdue: an inquiry reads these few by an index, in order and in pages.
#[tokio::test]
async fn an_inquiry_finds_what_is_overdue_by_an_index() {
    for server in servers().await {
        let shop = server.open(8).await;
        fill(&shop, 100_000).await;
        let overdue_at = now() - millis(EXPIRY_MARGIN) - 1000;
        let some =
            "UPDATE handfast_fence SET state = 1, expires_at = ? WHERE seen >= ? AND seen < ?";
        // Rows of the same age, rows of other ages, and rows that are tried and not overdue.
        for (expires_at, from, to) in [
            (overdue_at, 10_000_i64, 10_600_i64),
            (overdue_at - 1, 20_000, 20_010),
            (overdue_at - 2, 30_000, 30_600),
            (now(), 40_000, 41_000),
        ] {
            let some = sqlx::query(sql(some)).bind(expires_at).bind(from).bind(to);
            some.execute(&shop.pool).await.unwrap();
        }
        sqlx::raw_sql(ANALYZE).execute(&shop.pool).await.unwrap();
        let plan = plan(&shop.pool).await;
        assert!(plan.contains("handfast_fence_tried"), "{plan}");
        assert!(!TOO_MUCH.iter().any(|step| plan.contains(step)), "{plan}");

        let (mut found, mut pages, mut after) = (Vec::new(), 0, Some(OverdueKey::default()));
        while let Some(key) = after {
            let page = shop.fence.overdue("inventory.deduct", &key).await.unwrap();
            assert!(page.branches.len() <= 500);
            found.extend(page.branches);
            (after, pages) = (page.next, pages + 1);
        }
        found.sort();
        found.dedup();
        assert_eq!((found.len(), pages), (1210, 3));
        let of_another = shop.fence.overdue("points.debit", &OverdueKey::default()).await.unwrap();
        assert!(of_another.branches.is_empty() && of_another.next.is_some());
    }
}

/// Copies one final row many times. The copies are numbered by `seen`.
async fn fill(shop: &Shop, rows: i64) {
    done(&shop.deliver(Level::Run, &branch(1, Phase::Try), &payload(0)).await);
    done(&shop.deliver(Level::Run, &branch(1, Phase::Confirm), &[]).await);
    let set = "UPDATE handfast_fence SET seen = 0";
    sqlx::raw_sql(set).execute(&shop.pool).await.unwrap();
    let mut connection = shop.pool.acquire().await.unwrap();
    sqlx::raw_sql("BEGIN").execute(&mut *connection).await.unwrap();
    let mut copies = 1;
    while copies < rows {
        let copy = format!(
            "INSERT INTO handfast_fence (xid, branch_id, state, action, expires_at, created_at, changed_at, seen) \
             SELECT {NUMBERED}, branch_id, state, action, expires_at, created_at, changed_at, seen + {copies} \
             FROM handfast_fence WHERE seen + {copies} < {rows}"
        )
        .replace("{n}", &format!("(seen + {copies})"));
        sqlx::raw_sql(sqlx::AssertSqlSafe(copy)).execute(&mut *connection).await.unwrap();
        copies *= 2;
    }
    sqlx::raw_sql("COMMIT").execute(&mut *connection).await.unwrap();
}

/// As this many services do that start together.
async fn create_table_at_once(shop: &Shop, services: usize) {
    let tasks: Vec<_> = (0..services)
        .map(|_| {
            let fence = shop.fence.clone();
            tokio::spawn(async move { fence.create_table_if_missing().await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
}

/// Services that upgrade have a table without the index. It is added while they run, and they work without it as well.
#[tokio::test]
async fn a_table_of_an_earlier_version_gets_the_index() {
    for server in servers().await {
        let shop = server.open(8).await;
        sqlx::raw_sql(DROP_INDEX).execute(&shop.pool).await.unwrap();
        let hour = millis(EXPIRY_MARGIN);
        aged(&shop, 1, &[Phase::Try], hour, Some(hour)).await;
        shop.fence.verify().await.unwrap();
        assert_eq!(overdue(&shop, &branch(1, Phase::Cancel)).await, 1);
        create_table_at_once(&shop, 4).await;
        let mut connection = shop.pool.acquire().await.unwrap();
        assert!(Db::has_tried_index(&mut connection).await.unwrap());
        assert_eq!(overdue(&shop, &branch(1, Phase::Cancel)).await, 1);
    }
}

#[tokio::test]
async fn a_branch_that_was_settled_by_hand_is_closed_without_running_its_code() {
    for server in servers().await {
        let shop = server.open(8).await;
        let hour = millis(EXPIRY_MARGIN);
        for (n, phase, state) in [(1, Phase::Confirm, "confirmed"), (2, Phase::Cancel, "cancelled")]
        {
            aged(&shop, n, &[Phase::Try], hour, Some(hour)).await;
            let (runs, shelf) = (shop.runs(), shop.shelf().await);
            assert_eq!(overdue(&shop, &branch(n, phase)).await, 1);
            for _ in 0..2 {
                done(&shop.fence.close(&branch(n, phase)).await);
            }
            assert_eq!(shop.state(n).await.as_deref(), Some(state));
            assert_eq!(overdue(&shop, &branch(n, phase)).await, 0);
            // A late call is answered from the row.
            done(&shop.deliver(Level::Action, &branch(n, phase), &[]).await);
            assert_eq!((shop.runs(), shop.shelf().await), (runs, shelf));
        }
        let answer = shop.fence.close(&branch(1, Phase::Try)).await;
        assert!(matches!(answer, Answer::Invalid { field: "phase", .. }), "{answer:?}");
    }
}

#[tokio::test]
async fn clean_up_takes_many_rows_in_several_batches() {
    for server in servers().await {
        let shop = server.open(8).await;
        aged(&shop, 1, &[Phase::Cancel], millis(RETENTION), None).await;
        let mut transaction = shop.pool.begin().await.unwrap();
        for n in 0..1200_u16 {
            let copy = "INSERT INTO handfast_fence (xid, branch_id, state, action, expires_at, created_at, changed_at, seen)
            SELECT ?, branch_id, state, action, expires_at, created_at, changed_at, seen FROM handfast_fence WHERE xid = ?";
            let xid = [n.to_be_bytes(); 8].concat();
            let of = branch(1, Phase::Cancel).xid.to_bytes();
            let copy = sqlx::query(sql(copy)).bind(xid).bind(&of[..]);
            assert_eq!(copy.execute(&mut *transaction).await.unwrap().rows_affected(), 1);
        }
        transaction.commit().await.unwrap();
        assert_eq!(shop.fence.clean_up().await.unwrap(), 1201);
    }
}

#[tokio::test]
async fn clean_up_goes_on_in_the_background_until_its_guard_is_dropped() {
    for server in servers().await {
        let shop = server.open(8).await;
        let fence = shop.fence.clone().retention(Duration::ZERO);
        let guard = fence.clean_up_every(Duration::from_millis(10));
        for n in 1..=2 {
            done(&shop.deliver(Level::Run, &branch(n, Phase::Cancel), &[]).await);
            until(async || shop.state(n).await.is_none()).await;
        }
        drop(guard);
        tokio::time::sleep(Duration::from_millis(50)).await;
        done(&shop.deliver(Level::Run, &branch(3, Phase::Cancel), &[]).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(shop.state(3).await.unwrap(), "suspended");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_processes_may_make_the_table_at_once() {
    for server in servers().await {
        let shop = server.open(8).await;
        sqlx::raw_sql("DROP VIEW handfast_fence_readable; DROP TABLE handfast_fence")
            .execute(&shop.pool)
            .await
            .unwrap();
        create_table_at_once(&shop, 8).await;
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_call_writes_one_line_and_no_line_shows_a_payload() {
    for server in servers().await {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .finish();
        // With a single subscriber, tracing would disable log lines that were first reached in a test without a subscriber.
        let _second = tracing::Dispatch::new(tracing_subscriber::registry());
        let _guard = tracing::subscriber::set_default(subscriber);

        let shop = server.alone().await;
        let shop = Shop { fence: shop.fence.clone().log_labels(["order", "shop"]), ..shop };
        let secret = payload_that(2, "hunter2");
        let refuse = payload_that(2, "refuse");
        for (n, phase, payload) in [
            (1, Phase::Try, &secret),
            (1, Phase::Try, &secret),
            (1, Phase::Confirm, &secret),
            (1, Phase::Cancel, &secret),
            (2, Phase::Try, &refuse),
            (2, Phase::Cancel, &refuse),
            (2, Phase::Try, &refuse),
            (3, Phase::Try, &secret),
            (3, Phase::Cancel, &secret),
        ] {
            let mut call = branch(n, phase);
            call.labels.insert("order".to_owned(), "1042".to_owned());
            call.labels.insert("card".to_owned(), "4111111111111111".to_owned());
            shop.deliver(Level::Action, &call, payload).await;
        }

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(!text.contains("hunter2") && !text.contains("4111111111111111"));
        let ours: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|line: &serde_json::Value| line["target"] == "handfast::fence::log")
            .collect();
        let messages: Vec<_> = ours
            .iter()
            .map(|line| {
                let fields = &line["fields"];
                assert!(fields["took_ms"].is_u64() && fields["attempt"] == 1, "{line}");
                assert_eq!(fields["labels"], "order=1042", "{line}");
                assert!(fields["xid"].as_str().unwrap().starts_with("3-7-"), "{line}");
                format!("{} {}: {}", line["level"], fields["verdict"], fields["message"])
            })
            .map(|line| line.replace('"', ""))
            .collect();
        assert_eq!(
            messages,
            [
                "INFO run: branch tried",
                "INFO repeat: repeat",
                "INFO run: branch confirmed",
                "ERROR opposite_done: opposite done",
                "INFO run: refused",
                "INFO empty_rollback: empty rollback",
                "INFO suspension: suspension",
                "INFO run: branch tried",
                "INFO run: branch cancelled",
            ]
        );
    }
}

/// Only branches whose transaction may be lost ask, and they do so as soon as phase one is over.
#[tokio::test]
async fn branches_that_ask_are_found() {
    for server in servers().await {
        let shop = server.open(8).await;
        for n in 1..=4 {
            let mut tried = branch(n, Phase::Try);
            tried.at_decision = n != 1;
            tried.expires_at = Some(now() + 60_000);
            done(&shop.deliver(Level::Run, &tried, &payload(1)).await);
        }
        done(&shop.deliver(Level::Run, &branch(4, Phase::Cancel), &[]).await);
        let expired = async || {
            let page = shop.fence.expired(&OverdueKey::default()).await.unwrap();
            page.branches.into_iter().map(|(xid, ..)| xid).collect::<Vec<_>>()
        };
        assert_eq!(expired().await, []);
        let two = branch(2, Phase::Try);
        let asking = shop.fence.asking(two.xid).await.unwrap();
        assert_eq!(asking, [(two.branch_id.clone(), two.action.clone())]);
        for n in [1, 4] {
            assert_eq!(shop.fence.asking(branch(n, Phase::Try).xid).await.unwrap(), []);
        }
        let over = sqlx::query(sql("UPDATE handfast_fence SET expires_at = ?")).bind(now() - 1000);
        over.execute(&shop.pool).await.unwrap();
        let mut found = expired().await;
        found.sort();
        assert_eq!(found, [2, 3].map(|n| branch(n, Phase::Try).xid));
    }
}

/// Programs with the earlier version of this crate go on with the table: they name the columns that they write.
#[tokio::test]
async fn a_table_of_the_earlier_version_gets_the_new_column() {
    for server in servers().await {
        let shop = server.open(8).await;
        done(&shop.deliver(Level::Run, &branch(1, Phase::Try), &payload(1)).await);
        let drop = "ALTER TABLE handfast_fence DROP COLUMN asks";
        sqlx::raw_sql(drop).execute(&shop.pool).await.unwrap();
        let differs = shop.fence.verify().await.unwrap_err().to_string();
        assert!(differs.contains("column asks is missing"), "{differs}");
        let both = tokio::join!(
            shop.fence.create_table_if_missing(),
            shop.fence.create_table_if_missing()
        );
        both.0.unwrap();
        both.1.unwrap();
        done(&shop.deliver(Level::Run, &branch(1, Phase::Confirm), &[]).await);
        let mut asks = branch(2, Phase::Try);
        asks.at_decision = true;
        done(&shop.deliver(Level::Run, &asks, &payload(1)).await);
        assert_eq!(shop.fence.asking(asks.xid).await.unwrap().len(), 1);
    }
}
