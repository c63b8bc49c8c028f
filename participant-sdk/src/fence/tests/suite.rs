//! The fence on a real database, the same for each: whatever arrives, in whatever order, twice, at once, or given up half-way, the shelf ends
//! as if each call had come once and in order.

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use handfast_proto::reason;
use sqlx::{Connection as _, Database as _};
use tokio::task::JoinHandle;

use super::{Db, GIVEN_UP, Place, places, shop::Shop, sql};
use crate::{
    Answer, Branch, Participant, Phase, TryError, Tx,
    fence::{
        EXPIRY_MARGIN, Entered, RETENTION,
        db::Statements as _,
        fixture::{CELLS, LEVELS, Level, STOCK, UNTOUCHED, branch, payload, payload_that, word},
        millis,
    },
};

fn done(answer: &Answer) -> &[u8] {
    match answer {
        Answer::Done(reply) => reply,
        Answer::Refused(_)
        | Answer::TooLate(_)
        | Answer::Unknown(_)
        | Answer::Retry(_)
        | Answer::Invalid { .. }
        | Answer::NotServed(_) => panic!("{answer:?}"),
    }
}

fn now() -> i64 {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap();
    millis(now)
}

fn expiring(mut branch: Branch, expires_at: i64) -> Branch {
    branch.expires_at = Some(expires_at);
    branch
}

/// Waits until the condition holds, at most ten seconds.
async fn until<F: Future<Output = bool>>(condition: impl Fn() -> F) {
    for _ in 0..1000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came true");
}

// ---------------------------------------------------------------------------------------------------------------- the table

#[tokio::test]
async fn every_cell_of_the_table_at_every_level() {
    for place in places().await {
        for level in LEVELS {
            for (before, asked, answer, shelf, state) in CELLS {
                let shop = place.alone().await;
                for phase in before {
                    done(&shop.deliver(level, &branch(1, *phase), &payload(2)).await);
                }
                // Twice: a repeat has the same answer and no further effect.
                for _ in 0..2 {
                    let found = shop.deliver(level, &branch(1, asked), &payload(2)).await;
                    let cell = format!("{level:?}: {before:?}, then {asked}: {found:?}");
                    assert_eq!(word(&found), answer, "{cell}");
                    assert_eq!(shop.shelf().await, shelf, "{cell}");
                    assert_eq!(shop.state(1).await.as_deref(), state, "{cell}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_repeated_try_gives_the_first_reply_and_runs_nothing() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let first = shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await;
            assert_eq!(done(&first), b"\"8 left\"");
            done(&shop.deliver(level, &branch(2, Phase::Try), &payload(1)).await);
            for _ in 0..3 {
                assert_eq!(shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await, first);
            }
            done(&shop.deliver(level, &branch(1, Phase::Confirm), &[]).await);
            let late = shop.second_process().await;
            assert_eq!(late.deliver(level, &branch(1, Phase::Try), &payload(2)).await, first);
            assert_eq!(shop.runs(), 3, "{level:?}: two Trys and a Confirm");
        }
    }
}

#[tokio::test]
async fn another_payload_or_action_under_the_same_branch_id_is_refused() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
            let other = shop.deliver(level, &branch(1, Phase::Try), &payload(3)).await;
            assert_eq!(word(&other), reason::PAYLOAD_DIFFERS, "{level:?}");
            assert_eq!(shop.runs(), 1);
        }
        let shop = place.open(8).await;
        done(&shop.deliver(Level::Run, &branch(1, Phase::Try), &payload(2)).await);
        for phase in [Phase::Try, Phase::Confirm, Phase::Cancel] {
            let mut other = branch(1, phase);
            other.action = "inventory.count".to_owned();
            let answer = shop.deliver(Level::Run, &other, &payload(2)).await;
            assert_eq!(word(&answer), reason::PAYLOAD_DIFFERS, "{phase}");
            assert!(format!("{answer:?}").contains("another action"), "{answer:?}");
        }
        assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));
    }
}

#[tokio::test]
async fn branches_of_one_transaction_do_not_meet() {
    for place in places().await {
        let shop = place.open(8).await;
        for id in ["1", "2", "2.1", "22222222222222222222222222222222"] {
            let mut other = branch(1, Phase::Try);
            other.branch_id = id.parse().unwrap();
            done(&shop.deliver(Level::Run, &other, &payload(2)).await);
        }
        assert_eq!(shop.shelf().await, (STOCK - 8, 8, 0));
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT xid, branch_id FROM handfast_fence_readable ORDER BY branch_id")
                .fetch_all(&shop.pool)
                .await
                .unwrap();
        assert!(rows.iter().all(|(xid, _)| xid == "3-7-1-9f3c01d2"), "{rows:?}");
        let ids: Vec<_> = rows.iter().map(|(_, id)| id.as_str()).collect();
        assert_eq!(ids, ["1", "2", "2.1", "22222222222222222222222222222222"]);
    }
}

// -------------------------------------------------------------------------------------------------- what is not done at all

#[tokio::test]
async fn a_refusal_leaves_no_row_and_its_cancel_is_an_empty_rollback() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let refuse = payload_that(2, "refuse");
            for _ in 0..2 {
                let answer = shop.deliver(level, &branch(1, Phase::Try), &refuse).await;
                assert!(
                    matches!(&answer, Answer::Refused(refusal) if refusal.metadata["left"] == "8")
                );
                assert_eq!(shop.shelf().await, UNTOUCHED);
                assert_eq!(shop.state(1).await, None, "{level:?}");
            }
            done(&shop.deliver(level, &branch(1, Phase::Cancel), &[]).await);
            assert_eq!(shop.state(1).await.unwrap(), "suspended");
            let late = shop.deliver(level, &branch(1, Phase::Try), &refuse).await;
            assert_eq!(word(&late), reason::CANCELLED_BEFORE);
            assert_eq!(shop.runs(), 2, "{level:?}");
        }
    }
}

#[tokio::test]
async fn an_error_undoes_everything_in_every_phase() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let answer =
                shop.deliver(level, &branch(1, Phase::Try), &payload_that(2, "fail")).await;
            assert!(
                matches!(&answer, Answer::Unknown(text) if text.contains("on fire")),
                "{answer:?}"
            );
            assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));

            // Of the row that stays, phase two finds a payload that makes it fail, until somebody mends it.
            done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
            let break_it = || sql("UPDATE handfast_fence SET payload = ?");
            sqlx::query(break_it())
                .bind(payload_that(2, "fail"))
                .execute(&shop.pool)
                .await
                .unwrap();
            for phase in [Phase::Confirm, Phase::Cancel] {
                let answer = shop.deliver(level, &branch(1, phase), &[]).await;
                assert!(matches!(answer, Answer::Retry(_) | Answer::Unknown(_)), "{answer:?}");
                assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0), "{level:?}");
                assert_eq!(shop.state(1).await.unwrap(), "tried");
            }
            sqlx::query(break_it()).bind(payload(2)).execute(&shop.pool).await.unwrap();
            done(&shop.deliver(level, &branch(1, Phase::Cancel), &[]).await);
            assert_eq!(shop.shelf().await, UNTOUCHED);
        }
    }
}

#[tokio::test]
async fn work_whose_local_transaction_has_ended_is_not_called_done() {
    for place in places().await {
        for level in [Level::Run, Level::Action, Level::Batch] {
            // A connection whose transaction count is wrong must not stay in the pool, so a file, and not memory.
            let shop = place.open(1).await;
            let end = payload_that(2, "end");
            let answer = shop.deliver(level, &branch(1, Phase::Try), &end).await;
            assert!(format!("{answer:?}").contains("ended before its work was done"), "{answer:?}");
            assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));

            done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
            let break_it = || sql("UPDATE handfast_fence SET payload = ?");
            sqlx::query(break_it()).bind(&end).execute(&shop.pool).await.unwrap();
            for phase in [Phase::Confirm, Phase::Cancel] {
                let answer = shop.deliver(level, &branch(1, phase), &[]).await;
                assert!(matches!(answer, Answer::Retry(_) | Answer::Unknown(_)), "{answer:?}");
                assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));
                assert_eq!(shop.state(1).await.unwrap(), "tried");
            }
        }
    }
}

#[tokio::test]
async fn run_borrows_what_it_likes_and_fits_into_tasks_and_handlers() {
    for place in places().await {
        /// As tonic wants its handlers.
        #[tonic::async_trait]
        trait Handler {
            async fn deduct(&self, quantity: &str) -> Answer;
        }

        #[tonic::async_trait]
        impl Handler for Shop {
            async fn deduct(&self, quantity: &str) -> Answer {
                let call = branch(1, Phase::Try);
                let work = self.fence.run(&call, quantity.as_bytes(), async |tx| {
                    let quantity: i64 = quantity.parse()?;
                    let take = sql("UPDATE shelf SET free = free - ?, held = held + ?");
                    sqlx::query(take).bind(quantity).bind(quantity).execute(&mut **tx).await?;
                    tx.reply(call.action.clone());
                    Ok::<_, TryError>(())
                });
                work.await
            }
        }

        let shop = place.alone().await;
        let handler = shop.clone();
        let answer = tokio::spawn(async move { handler.deduct("2").await }).await.unwrap();
        assert_eq!(done(&answer), b"inventory.deduct");
        assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));
    }
}

#[tokio::test]
async fn savepoints_are_the_authors_own() {
    for place in places().await {
        let shop = place.alone().await;
        let take = "UPDATE shelf SET free = free - 1, held = held + 1";
        let answer = shop
            .fence
            .run(&branch(1, Phase::Try), b"", async |tx| {
                sqlx::query(take).execute(&mut **tx).await?;
                let mut inner = tx.begin().await?;
                sqlx::query(take).execute(&mut *inner).await?;
                inner.rollback().await?;
                let mut inner = tx.begin().await?;
                sqlx::query(take).execute(&mut *inner).await?;
                inner.commit().await?;
                drop(tx.begin().await?);
                Ok::<_, TryError>(())
            })
            .await;
        done(&answer);
        assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));

        let answer = shop
            .fence
            .run(&branch(2, Phase::Try), b"", async |tx| {
                std::mem::forget(tx.begin().await?);
                sqlx::query(take).execute(&mut **tx).await?;
                Ok::<_, TryError>(())
            })
            .await;
        assert_eq!(word(&answer), "Unknown", "COMMIT would have ended the savepoint only");
        assert_eq!((shop.shelf().await, shop.state(2).await), ((STOCK - 2, 2, 0), None));
    }
}

#[tokio::test]
async fn an_error_cannot_say_done() {
    for place in places().await {
        struct AllIsWell;
        impl From<AllIsWell> for Answer {
            fn from(_: AllIsWell) -> Self {
                Self::Done("fine".into())
            }
        }
        let shop = place.alone().await;
        let work = async |_: &mut Tx<Db>| Err(AllIsWell);
        let answer = shop.fence.run(&branch(1, Phase::Try), b"", work).await;
        assert_eq!((word(&answer), shop.state(1).await), ("Unknown", None));
    }
}

#[tokio::test]
async fn what_is_too_long_is_not_kept() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let long = vec![b' '; 64 * 1024 + 1];
            let answer = shop.deliver(level, &branch(1, Phase::Try), &long).await;
            let expected = if let Level::Enter = level { "Unknown" } else { "payload.data" };
            assert_eq!(word(&answer), expected, "{answer:?}");
            let answer =
                shop.deliver(level, &branch(1, Phase::Try), &payload_that(2, "long")).await;
            assert!(format!("{answer:?}").contains("the reply has 65538 bytes"), "{answer:?}");
            assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------- payload

#[tokio::test]
async fn confirm_and_cancel_get_what_try_got() {
    for place in places().await {
        for level in LEVELS {
            for phase in [Phase::Confirm, Phase::Cancel] {
                for asked in [payload(5), Vec::new(), b"not JSON".to_vec()] {
                    let shop = place.alone().await;
                    done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
                    done(&shop.deliver(level, &branch(1, phase), &asked).await);
                    let expected =
                        if phase == Phase::Confirm { (STOCK - 2, 0, 2) } else { UNTOUCHED };
                    assert_eq!(shop.shelf().await, expected, "{level:?} {phase}");
                }
            }
        }
    }
}

#[tokio::test]
async fn nothing_that_is_printed_shows_a_payload() {
    for place in places().await {
        let shop = place.alone().await;
        let secret = b"hunter2";
        let answer = shop
            .fence
            .run(&branch(1, Phase::Try), secret, async |tx| {
                tx.reply(&secret[..]);
                assert_eq!(
                    format!("{tx:?}"),
                    format!("Tx({}, payload 7 bytes, reply 7 bytes)", Db::NAME)
                );
                Ok::<_, TryError>(())
            })
            .await;
        assert_eq!(format!("{answer:?}"), "Done(7 bytes)");
        let mut transaction = shop.pool.begin().await.unwrap();
        let confirm = branch(1, Phase::Confirm);
        let entered = shop.fence.enter(&mut transaction, &confirm, &[]).await.unwrap();
        assert_eq!(entered, Entered::Run { payload: secret[..].into() });
        assert_eq!(format!("{entered:?}"), "Run(7 bytes)");
        transaction.rollback().await.unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------- time

#[tokio::test]
async fn a_new_try_after_its_deadline_is_rejected_and_a_recorded_one_is_answered() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let late = expiring(branch(1, Phase::Try), now() - 90_000);
            for _ in 0..2 {
                let answer = shop.deliver(level, &late, &payload(2)).await;
                let Answer::TooLate(refusal) = answer else { panic!("{level:?}: {answer:?}") };
                if shop.state(1).await.is_none() {
                    assert_eq!(refusal.reason, reason::EXPIRED);
                    assert!(refusal.message.contains(" came 90"), "says how late: {refusal}");
                    assert!(refusal.message.contains("clock of the participant's database"));
                }
            }
            // At level 0 the caller commits what the fence left there. It is no reservation.
            assert_ne!(shop.state(1).await.as_deref(), Some("tried"), "{level:?}");
            done(&shop.deliver(level, &branch(1, Phase::Cancel), &[]).await);

            let in_time = expiring(branch(2, Phase::Try), now() + 60_000);
            let reply = shop.deliver(level, &in_time, &payload(2)).await;
            done(&reply);
            let repeat = expiring(branch(2, Phase::Try), now() - 1);
            assert_eq!(shop.deliver(level, &repeat, &payload(2)).await, reply);
            assert_eq!(shop.runs(), 1, "{level:?}");
        }
    }
}

#[tokio::test]
async fn a_confirm_that_finds_nothing_is_refused_until_its_row_may_have_been_cleaned_up() {
    for place in places().await {
        for level in LEVELS {
            let shop = place.open(8).await;
            let horizon = millis(EXPIRY_MARGIN) + millis(RETENTION);
            let recent = expiring(branch(1, Phase::Confirm), now() - horizon + 60_000);
            let answer = shop.deliver(level, &recent, &[]).await;
            assert_eq!(word(&answer), reason::NEVER_TRIED);
            assert_eq!(shop.fence.forgotten_confirms(), 0);

            let long_ago = expiring(branch(1, Phase::Confirm), now() - horizon);
            done(&shop.deliver(level, &long_ago, &[]).await);
            assert_eq!(shop.fence.forgotten_confirms(), 1, "{level:?}");
            assert_eq!((shop.runs(), shop.state(1).await), (0, None));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------ at once

/// Delivers two calls at once, from two processes, many times.
async fn race(
    place: &Place,
    level: Level,
    first: Phase,
    second: Phase,
) -> Vec<(Answer, Answer, Shop)> {
    let mut rounds = Vec::new();
    for n in 0..12 {
        let shop = place.open(8).await;
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
    for place in places().await {
        for level in LEVELS {
            for (a, b, shop) in race(&place, level, Phase::Try, Phase::Try).await {
                assert_eq!((done(&a), done(&b)), (&b"\"8 left\""[..], &b"\"8 left\""[..]));
                assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0), "{level:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_confirms_at_once_one_has_the_effect() {
    for place in places().await {
        for level in LEVELS {
            for (a, b, shop) in race(&place, level, Phase::Confirm, Phase::Confirm).await {
                assert_eq!((done(&a), done(&b)), (&b""[..], &b""[..]));
                assert_eq!(shop.shelf().await, (STOCK - 2, 0, 2), "{level:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_a_try_and_its_cancel_at_once_nothing_is_left() {
    for place in places().await {
        for level in LEVELS {
            for (tried, cancelled, shop) in race(&place, level, Phase::Try, Phase::Cancel).await {
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

// ------------------------------------------------------------------------------------------------------------- several together

/// A shop in which these transactions have come so far, one piece each.
async fn shop_after(place: &Place, before: &[(u64, &[Phase])]) -> Shop {
    let shop = place.open(8).await;
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
    for place in places().await {
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
            let shop = shop_after(&place, before).await;
            let first = shop.runs();
            // Twice: a repeat has the same answers and no further effect.
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
    for place in places().await {
        for (how, answer) in
            [("fail", "Retry"), ("attention", reason::NEEDS_ATTENTION), ("end", "Retry")]
        {
            for (phase, shelf, state) in [
                (Phase::Confirm, (STOCK - 5, 1, 4), "confirmed"),
                (Phase::Cancel, (STOCK - 1, 1, 0), "cancelled"),
            ] {
                let before: Vec<_> = (1..=5).map(|n| (n, &[Phase::Try][..])).collect();
                let shop = shop_after(&place, &before).await;
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
    for place in places().await {
        let shop = shop_after(&place, &[(1, &[Phase::Try]), (2, &[Phase::Try])]).await;
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
    for place in places().await {
        for size in [2, 4, 5, 16, 17, 64] {
            let shop = place.open(8).await;
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

/// While somebody else has all connections, calls come and wait, in this order. Then they can go on.
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
        // The test has one thread, so the call comes as far as it can.
        tokio::task::yield_now().await;
    }
    tasks
}

#[tokio::test]
async fn who_waits_with_others_is_served_whatever_becomes_of_them() {
    for place in places().await {
        let turns = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        let before: Vec<_> = (1..=turns + 5).map(|n| (n, &[Phase::Try][..])).collect();
        let shop = shop_after(&place, &before).await;
        let participant = shop.participant_in_batches();

        // The first ones go at once. Of those who wait for them, one goes away and all others go together.
        let calls_of = |of| calls(of, Phase::Confirm);
        let mut tasks = queue_up(&shop, &participant, calls_of(1..=turns + 3)).await;
        let gone = tasks.remove(tasks.len() - 2);
        gone.abort();
        drop(gone.await);
        for task in tasks {
            assert_eq!(word(&task.await.unwrap()), "Done");
        }
        assert_eq!(shop.batches(), 1);
        assert_eq!(shop.state(turns + 2).await.as_deref(), Some("tried"));

        // One whose code panics ends its own call, and no other.
        shop.change_payload(turns + 4, payload_that(1, "panic")).await;
        let mut calls = calls_of(1..=turns);
        calls.extend(calls_of(turns + 4..=turns + 5));
        let mut tasks = queue_up(&shop, &participant, calls).await;
        assert_eq!(word(&tasks.pop().unwrap().await.unwrap()), "Done");
        assert!(tasks.pop().unwrap().await.unwrap_err().is_panic());
        assert_eq!(shop.batches(), 2);
        assert_eq!(shop.state(turns + 4).await.as_deref(), Some("tried"));

        // And whoever comes then finds nobody at work.
        let late = participant.handle(&branch(turns + 2, Phase::Confirm), &[]).await;
        assert_eq!((word(&late), shop.batches()), ("Done", 2));
    }
}

#[tokio::test]
async fn who_has_come_often_goes_alone() {
    for place in places().await {
        let turns = u64::try_from(Db::BATCHES_AT_A_TIME).unwrap();
        let before: Vec<_> = (1..=turns + 2).map(|n| (n, &[Phase::Try][..])).collect();
        let shop = shop_after(&place, &before).await;
        let mut calls = calls(1..=turns + 2, Phase::Confirm);
        for call in &mut calls {
            call.attempt = 4;
        }
        for task in queue_up(&shop, &shop.participant_in_batches(), calls).await {
            assert_eq!(word(&task.await.unwrap()), "Done");
        }
        assert_eq!(shop.batches(), 0);
    }
}

// ------------------------------------------------------------------------------------------------------- given up half-way

/// Polls the future until it has been pending so many times, and drops it, at once or after the database has had time to do what
/// it was asked.
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

/// Whether shelf and row agree, read in one statement.
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
    for place in places().await {
        let mut points = 0;
        for (level, in_memory) in GIVEN_UP {
            for phase in [Phase::Try, Phase::Confirm, Phase::Cancel] {
                for pause in [Duration::ZERO, Duration::from_millis(2)] {
                    let mut pendings = 0;
                    while give_up_and_repeat(&place, level, in_memory, phase, pendings, pause).await
                    {
                        pendings += 1;
                        points += 1;
                    }
                }
            }
        }
        // How many there are depends on whether an answer is there before it is waited for.
        assert!(points >= 12 * GIVEN_UP.len(), "only {points} points");
    }
}

/// False: the call was over before.
async fn give_up_and_repeat(
    place: &Place,
    level: Level,
    in_memory: bool,
    phase: Phase,
    pendings: usize,
    pause: Duration,
) -> bool {
    let shop = if in_memory { place.alone().await } else { place.open(1).await };
    if phase != Phase::Try {
        done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
    }
    let (branch, payload) = (branch(1, phase), payload(2));
    let call = shop.deliver(level, &branch, &payload);
    let given_up = give_up_after(pendings, pause, call).await.is_none();

    // Whoever wants the only connection has it soon, and it works as ever: also for a transaction of theirs that is dropped.
    let next = tokio::time::timeout(Duration::from_secs(5), shop.pool.begin());
    let mut next = next.await.unwrap_or_else(|_| panic!("{level:?} {phase}, given up after {pendings} waits of {pause:?}: the connection is lost")).unwrap();
    sqlx::query("UPDATE shelf SET free = 0").execute(&mut *next).await.unwrap();
    drop(next);
    agree(&shop).await;

    // And the repeat does what was asked, once.
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
    for place in places().await {
        let shop = place.alone().await;
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
    for place in places().await {
        let shop = place.alone().await;
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

// ----------------------------------------------------------------------------------------------------- the table, and cleaning

/// Delivers these calls for the `n`th transaction, and makes its row so many milliseconds old and expired.
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
    for place in places().await {
        use Phase::{Cancel, Confirm, Try};
        let shop = place.open(8).await;
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

#[tokio::test]
async fn clean_up_takes_many_rows_in_several_batches() {
    for place in places().await {
        let shop = place.open(8).await;
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
    for place in places().await {
        let shop = place.open(8).await;
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
    for place in places().await {
        let shop = place.open(8).await;
        sqlx::raw_sql("DROP VIEW handfast_fence_readable; DROP TABLE handfast_fence")
            .execute(&shop.pool)
            .await
            .unwrap();
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let fence = shop.fence.clone();
                tokio::spawn(async move { fence.create_table_if_missing().await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------- logs

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
    for place in places().await {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .finish();
        // With one subscriber alone, tracing would forget those lines whose first use is in a test without one.
        let _second = tracing::Dispatch::new(tracing_subscriber::registry());
        let _guard = tracing::subscriber::set_default(subscriber);

        let shop = place.alone().await;
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
            shop.deliver(Level::Action, &branch(n, phase), payload).await;
        }

        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(!text.contains("hunter2"));
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
