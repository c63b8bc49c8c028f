//! Concurrent calls, and calls that are dropped half-way.

use super::*;

/// Delivers two calls concurrently, from two processes, many times.
async fn race(
    server: &Server,
    level: Level,
    first: Phase,
    second: Phase,
) -> Vec<(Answer, Answer, Shop)> {
    let mut rounds = Vec::new();
    for n in 0..12 {
        let shop = server.open(8).await;
        if first == Phase::Confirm {
            done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
        }
        let other = shop.second_process().await;
        let call = |shop: Shop, phase| async move {
            shop.deliver(level, &branch(1, phase), &payload(2)).await
        };
        let mut calls = [(shop.clone(), first), (other, second)];
        if n % 2 == 1 {
            calls.reverse();
        }
        let [a, b] = calls.map(|(shop, phase)| tokio::spawn(call(shop, phase)));
        let (a, b) = (a.await.unwrap(), b.await.unwrap());
        rounds.push(if n % 2 == 1 { (b, a, shop) } else { (a, b, shop) });
    }
    rounds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_trys_at_once_one_has_the_effect() {
    for server in servers().await {
        for level in LEVELS {
            for (a, b, shop) in race(&server, level, Phase::Try, Phase::Try).await {
                assert_eq!((done(&a), done(&b)), (&b"\"8 left\""[..], &b"\"8 left\""[..]));
                assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0), "{level:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_confirms_at_once_one_has_the_effect() {
    for server in servers().await {
        for level in LEVELS {
            for (a, b, shop) in race(&server, level, Phase::Confirm, Phase::Confirm).await {
                assert_eq!((done(&a), done(&b)), (&b""[..], &b""[..]));
                assert_eq!(shop.shelf().await, (STOCK - 2, 0, 2), "{level:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_a_try_and_its_cancel_at_once_nothing_is_left() {
    for server in servers().await {
        for level in LEVELS {
            for (tried, cancelled, shop) in race(&server, level, Phase::Try, Phase::Cancel).await {
                done(&cancelled);
                let expected = match word(&tried) {
                    "Done" => "cancelled",
                    reason::CANCELLED_BEFORE => "suspended",
                    other => panic!("{other}"),
                };
                assert_eq!(shop.state(1).await.unwrap(), expected, "{level:?}");
                assert_eq!(shop.shelf().await, UNTOUCHED);
            }
        }
    }
}

/// Polls the future until it has been pending this many times, and drops it. After each poll it pauses, so that the database can
/// execute what it was sent.
async fn give_up_after<F: Future>(
    pendings: usize,
    pause: Duration,
    future: F,
) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..pendings {
        let polled = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        if let Poll::Ready(output) = polled.await {
            return Some(output);
        }
        tokio::time::sleep(pause).await;
    }
    None
}

/// Checks that shelf and fence row agree. Reads both in one statement.
async fn agree(shop: &Shop) -> String {
    let sql = "SELECT coalesce((SELECT state FROM handfast_fence_readable), 'nothing'), free, held, sold FROM shelf";
    let found: (String, i64, i64, i64) = sqlx::query_as(sql).fetch_one(&shop.pool).await.unwrap();
    let expected = match found.0.as_str() {
        "nothing" | "cancelled" | "suspended" => UNTOUCHED,
        "tried" => (STOCK - 2, 2, 0),
        "confirmed" => (STOCK - 2, 0, 2),
        other => panic!("{other}"),
    };
    assert_eq!((found.1, found.2, found.3), expected, "{}", found.0);
    found.0
}

#[tokio::test]
async fn a_call_given_up_at_any_point_leaves_no_half_work_and_the_pool_usable() {
    for server in servers().await {
        let mut points = 0;
        for (level, in_memory) in GIVEN_UP {
            for phase in [Phase::Try, Phase::Confirm, Phase::Cancel] {
                for pause in [Duration::ZERO, Duration::from_millis(2)] {
                    let mut pendings = 0;
                    while give_up_and_repeat(&server, level, in_memory, phase, pendings, pause)
                        .await
                    {
                        pendings += 1;
                        points += 1;
                    }
                }
            }
        }
        // The number of suspensions varies, because an answer may arrive before it is awaited.
        assert!(points >= 12 * GIVEN_UP.len(), "only {points} points");
    }
}

/// Returns false if the call completed before it could be dropped.
async fn give_up_and_repeat(
    server: &Server,
    level: Level,
    in_memory: bool,
    phase: Phase,
    pendings: usize,
    pause: Duration,
) -> bool {
    let shop = if in_memory { server.alone().await } else { server.open(1).await };
    if phase != Phase::Try {
        done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
    }
    let (branch, payload) = (branch(1, phase), payload(2));
    let call = shop.deliver(level, &branch, &payload);
    let given_up = give_up_after(pendings, pause, call).await.is_none();

    // The next user soon gets the only connection, and it works normally, even for a local transaction that is dropped.
    let next = tokio::time::timeout(Duration::from_secs(5), shop.pool.begin());
    let mut next = next.await.unwrap_or_else(|_| panic!("{level:?} {phase}, given up after {pendings} waits of {pause:?}: the connection is lost")).unwrap();
    sqlx::query("UPDATE shelf SET free = 0").execute(&mut *next).await.unwrap();
    drop(next);
    agree(&shop).await;

    // The retry does the work exactly once.
    done(&shop.deliver(level, &branch, &payload).await);
    let expected = match phase {
        Phase::Try => "tried",
        Phase::Confirm => "confirmed",
        Phase::Cancel => "cancelled",
    };
    assert_eq!(agree(&shop).await, expected);
    given_up
}

#[tokio::test]
async fn a_call_whose_deadline_passes_in_the_authors_code_is_rolled_back() {
    for server in servers().await {
        let shop = server.alone().await;
        let branch = branch(1, Phase::Try);
        let never = shop.fence.run(&branch, b"", async |tx| {
            sqlx::query("UPDATE shelf SET free = 0").execute(&mut **tx).await?;
            std::future::pending::<()>().await;
            Ok::<_, TryError>(())
        });
        tokio::time::timeout(Duration::from_millis(200), never).await.unwrap_err();
        assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));
    }
}

#[tokio::test]
async fn a_call_whose_code_panics_is_rolled_back() {
    for server in servers().await {
        let shop = server.alone().await;
        let fence = shop.fence.clone();
        let task = tokio::spawn(async move {
            let work = async |tx: &mut Tx<Db>| -> Result<(), TryError> {
                sqlx::query("UPDATE shelf SET free = 0").execute(&mut **tx).await?;
                panic!("as planned");
            };
            fence.run(&branch(1, Phase::Try), b"", work).await
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));
    }
}
