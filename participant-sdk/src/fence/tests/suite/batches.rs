//! Confirms and Cancels in batches have the same answers and effects as alone.

use super::*;

/// A shop in which these transactions have received these calls, one piece each.
async fn shop_after(server: &Server, before: &[(u64, &[Phase])]) -> Shop {
    let shop = server.open(8).await;
    for (n, phases) in before {
        for phase in *phases {
            done(&shop.deliver(Level::Action, &branch(*n, *phase), &payload(1)).await);
        }
    }
    shop
}

fn calls(of: impl IntoIterator<Item = u64>, phase: Phase) -> Vec<Branch> {
    of.into_iter().map(|n| branch(n, phase)).collect()
}

#[tokio::test]
async fn those_who_come_together_get_the_answers_that_they_would_get_alone() {
    use Phase::{Cancel, Confirm, Try};
    for server in servers().await {
        let before: &[(u64, &[Phase])] =
            &[(1, &[Try]), (2, &[Try, Confirm]), (4, &[Try, Cancel]), (5, &[Try]), (6, &[Cancel])];
        let opposite = reason::OPPOSITE_DONE;
        for (phase, expected, shelf, runs) in [
            (
                Confirm,
                ["Done", "Done", reason::NEVER_TRIED, opposite, "Done", opposite],
                (STOCK - 3, 0, 3),
                2,
            ),
            (Cancel, ["Done", opposite, "Done", "Done", "Done", "Done"], (STOCK - 1, 0, 1), 2),
        ] {
            let shop = shop_after(&server, before).await;
            let first = shop.runs();
            // Twice: a repeat gets the same answers and has no further effect.
            for _ in 0..2 {
                let answers = shop.together(&calls(1..=6, phase)).await;
                assert_eq!(answers.iter().map(word).collect::<Vec<_>>(), expected, "{phase}");
                assert_eq!((shop.shelf().await, shop.runs() - first), (shelf, runs), "{phase}");
            }
            let state = if phase == Confirm { "confirmed" } else { "cancelled" };
            for n in [1, 5] {
                assert_eq!(shop.state(n).await.as_deref(), Some(state));
            }
            assert_eq!(
                shop.batches(),
                usize::from(phase == Confirm),
                "what must run runs together"
            );
        }
    }
}

#[tokio::test]
async fn one_that_fails_among_others_fails_alone() {
    for server in servers().await {
        for (how, answer) in
            [("fail", "Retry"), ("attention", reason::NEEDS_ATTENTION), ("end", "Retry")]
        {
            for (phase, shelf, state) in [
                (Phase::Confirm, (STOCK - 5, 1, 4), "confirmed"),
                (Phase::Cancel, (STOCK - 1, 1, 0), "cancelled"),
            ] {
                let before: Vec<_> = (1..=5).map(|n| (n, &[Phase::Try][..])).collect();
                let shop = shop_after(&server, &before).await;
                shop.change_payload(3, payload_that(1, how)).await;
                let answers = shop.together(&calls(1..=5, phase)).await;
                assert_eq!(
                    answers.iter().map(word).collect::<Vec<_>>(),
                    ["Done", "Done", answer, "Done", "Done"],
                    "{how}, {phase}: {answers:?}"
                );
                assert_eq!(shop.shelf().await, shelf, "{how}, {phase}");
                assert_eq!(shop.state(2).await.as_deref(), Some(state));
                assert_eq!(shop.state(3).await.as_deref(), Some("tried"));
                assert_eq!(shop.fence.failed_batches(), 1);
            }
        }
    }
}

#[tokio::test]
async fn a_batch_whose_local_transaction_has_ended_is_not_called_done() {
    for server in servers().await {
        let shop = shop_after(&server, &[(1, &[Phase::Try]), (2, &[Phase::Try])]).await;
        let calls = calls(1..=2, Phase::Confirm);
        let answers = shop.fence.run_many(Phase::Confirm, &calls, async |(tx, _)| {
            sqlx::raw_sql("ROLLBACK").execute(&mut **tx).await?;
            Ok(())
        });
        assert_eq!(answers.await, [None, None]);
        assert_eq!(shop.state(1).await.as_deref(), Some("tried"));
        assert_eq!(shop.fence.failed_batches(), 1);
    }
}

#[tokio::test]
async fn a_batch_has_room_for_all_sizes() {
    for server in servers().await {
        for size in [2, 4, 5, 16, 17, 64] {
            let shop = server.open(8).await;
            for n in 1..=size {
                done(&shop.deliver(Level::Action, &branch(n, Phase::Try), &payload(0)).await);
            }
            let answers = shop.together(&calls(1..=size, Phase::Confirm)).await;
            assert!(answers.iter().all(|answer| word(answer) == "Done"), "{size}: {answers:?}");
            assert_eq!(shop.batches(), 1);
            let confirmed = "SELECT COUNT(*) FROM handfast_fence_readable WHERE state = 'confirmed' AND seen = 2";
            let confirmed: i64 = sqlx::query_scalar(confirmed).fetch_one(&shop.pool).await.unwrap();
            assert_eq!(u64::try_from(confirmed), Ok(size));
        }
    }
}

/// Queues calls, in this order, while this function holds all connections. When it returns, the calls can proceed.
async fn queue_up(
    shop: &Shop,
    participant: &Participant,
    calls: Vec<Branch>,
) -> Vec<JoinHandle<Answer>> {
    let mut all = Vec::new();
    for _ in 0..8 {
        all.push(shop.pool.acquire().await.unwrap());
    }
    let mut tasks = Vec::new();
    for call in calls {
        let participant = participant.clone();
        tasks.push(tokio::spawn(async move { participant.handle(&call, &[]).await }));
        // The test has one thread, so the call runs until it waits.
        tokio::task::yield_now().await;
    }
    tasks
}

#[tokio::test]
async fn who_waits_with_others_is_served_whatever_becomes_of_them() {
    for server in servers().await {
        let batches = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        let before: Vec<_> = (1..=batches + 5).map(|n| (n, &[Phase::Try][..])).collect();
        let shop = shop_after(&server, &before).await;
        let participant = shop.participant_in_batches();

        // The first calls run at once and the others wait. One waiting caller is dropped; the other waiting calls run as one
        // batch.
        let calls_of = |of| calls(of, Phase::Confirm);
        let mut tasks = queue_up(&shop, &participant, calls_of(1..=batches + 3)).await;
        let gone = tasks.remove(tasks.len() - 2);
        gone.abort();
        drop(gone.await);
        for task in tasks {
            assert_eq!(word(&task.await.unwrap()), "Done");
        }
        assert_eq!(shop.batches(), 1);
        assert_eq!(shop.state(batches + 2).await.as_deref(), Some("tried"));

        // If the author's code panics for one branch, only that branch's call fails.
        shop.change_payload(batches + 4, payload_that(1, "panic")).await;
        let mut calls = calls_of(1..=batches);
        calls.extend(calls_of(batches + 4..=batches + 5));
        let mut tasks = queue_up(&shop, &participant, calls).await;
        assert_eq!(word(&tasks.pop().unwrap().await.unwrap()), "Done");
        assert!(tasks.pop().unwrap().await.unwrap_err().is_panic());
        assert_eq!(shop.batches(), 2);
        assert_eq!(shop.state(batches + 4).await.as_deref(), Some("tried"));

        // Afterwards no worker is running, so a late call runs at once.
        let late = participant.handle(&branch(batches + 2, Phase::Confirm), &[]).await;
        assert_eq!((word(&late), shop.batches()), ("Done", 2));
    }
}

#[tokio::test]
async fn who_has_come_often_goes_alone() {
    for server in servers().await {
        let batches = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        let before: Vec<_> = (1..=batches + 2).map(|n| (n, &[Phase::Try][..])).collect();
        let shop = shop_after(&server, &before).await;
        let mut calls = calls(1..=batches + 2, Phase::Confirm);
        for call in &mut calls {
            call.attempt = 4;
        }
        for task in queue_up(&shop, &shop.participant_in_batches(), calls).await {
            assert_eq!(word(&task.await.unwrap()), "Done");
        }
        assert_eq!(shop.batches(), 0);
    }
}
