//! Work that is refused, that fails, or that cannot be committed leaves no changes behind.

use super::*;

#[tokio::test]
async fn a_refusal_leaves_no_row_and_its_cancel_is_an_empty_rollback() {
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
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
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
            let answer =
                shop.deliver(level, &branch(1, Phase::Try), &payload_that(2, "fail")).await;
            assert!(
                matches!(&answer, Answer::Unknown(text) if text.contains("on fire")),
                "{answer:?}"
            );
            assert_eq!((shop.shelf().await, shop.state(1).await), (UNTOUCHED, None));

            // The stored payload makes Confirm and Cancel fail until somebody repairs it. Meanwhile the row stays as it is.
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
    for server in servers().await {
        for level in [Level::Run, Level::Action, Level::Batch] {
            // The test needs a file, not a database in memory: a connection whose transaction count is wrong must be closed.
            let shop = server.open(1).await;
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
    for server in servers().await {
        /// A handler trait as tonic generates it: its futures must be `Send`.
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

        let shop = server.alone().await;
        let handler = shop.clone();
        let answer = tokio::spawn(async move { handler.deduct("2").await }).await.unwrap();
        assert_eq!(done(&answer), b"inventory.deduct");
        assert_eq!(shop.shelf().await, (STOCK - 2, 2, 0));
    }
}

#[tokio::test]
async fn savepoints_are_the_authors_own() {
    for server in servers().await {
        let shop = server.alone().await;
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
async fn work_that_leaves_a_savepoint_open_and_fails_is_undone() {
    for server in servers().await {
        let shop = server.open(1).await;
        let work = async |tx: &mut Tx<Db>| {
            let take = "UPDATE shelf SET free = free - 1, held = held + 1";
            sqlx::query(take).execute(&mut **tx).await?;
            std::mem::forget(tx.begin().await?);
            Err(TryError::from(crate::Refusal::new("NO")))
        };
        let answer = shop.fence.run(&branch(1, Phase::Try), b"", work).await;
        assert_eq!(word(&answer), "NO");
        // The only connection is not in a local transaction.
        done(&shop.deliver(Level::Action, &branch(2, Phase::Try), &payload(2)).await);
        assert_eq!((shop.shelf().await, shop.state(1).await), ((STOCK - 2, 2, 0), None));
    }
}

#[tokio::test]
async fn an_error_cannot_say_done() {
    for server in servers().await {
        struct AllIsWell;
        impl From<AllIsWell> for Answer {
            fn from(_: AllIsWell) -> Self {
                Self::Done("fine".into())
            }
        }
        let shop = server.alone().await;
        let work = async |_: &mut Tx<Db>| Err(AllIsWell);
        let answer = shop.fence.run(&branch(1, Phase::Try), b"", work).await;
        assert_eq!((word(&answer), shop.state(1).await), ("Unknown", None));
    }
}

#[tokio::test]
async fn what_is_too_long_is_not_kept() {
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
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

/// The local transaction still stands, but it is not the fence's any more.
#[tokio::test]
async fn work_that_deletes_its_row_is_not_committed() {
    for server in servers().await {
        for phase in [Phase::Try, Phase::Confirm, Phase::Cancel] {
            let shop = server.open(1).await;
            if phase != Phase::Try {
                done(&shop.deliver(Level::Run, &branch(1, Phase::Try), &payload(2)).await);
            }
            let (shelf, state) = (shop.shelf().await, shop.state(1).await);
            let work = async |tx: &mut Tx<Db>| {
                let take = "UPDATE shelf SET free = free - 1, held = held + 1";
                sqlx::query(take).execute(&mut **tx).await?;
                sqlx::query("DELETE FROM handfast_fence").execute(&mut **tx).await?;
                Ok::<_, TryError>(())
            };
            let answer = shop.fence.run(&branch(1, phase), &payload(2), work).await;
            let word = if phase == Phase::Try { "Unknown" } else { "Retry" };
            let expected = format!("{word}(the local transaction ended");
            assert!(format!("{answer:?}").starts_with(&expected), "{phase}: {answer:?}");
            assert_eq!((shop.shelf().await, shop.state(1).await), (shelf, state), "{phase}");
            done(&shop.deliver(Level::Run, &branch(1, phase), &payload(2)).await);
        }
    }
}

/// After a failover, the connections of the pool may lead to a server that has become read-only.
#[tokio::test]
async fn a_connection_that_cannot_write_is_not_used_again() {
    let Some(read_only) = READ_ONLY else { return };
    for server in servers().await {
        let shop = server.open(1).await;
        for (phase, payload) in [(Phase::Try, payload(2)), (Phase::Confirm, Vec::new())] {
            sqlx::raw_sql(read_only).execute(&shop.pool).await.unwrap();
            let answer = shop.deliver(Level::Action, &branch(1, phase), &payload).await;
            assert!(matches!(answer, Answer::Retry(_)), "{answer:?}");
            done(&shop.deliver(Level::Action, &branch(1, phase), &payload).await);
        }
        done(&shop.deliver(Level::Action, &branch(2, Phase::Try), &payload(2)).await);
        sqlx::raw_sql(read_only).execute(&shop.pool).await.unwrap();
        done(&shop.deliver(Level::Batch, &branch(2, Phase::Confirm), &[]).await); // alone, after its batch failed
        sqlx::raw_sql(read_only).execute(&shop.pool).await.unwrap();
        shop.fence.clone().retention(Duration::ZERO).clean_up().await.unwrap_err();
        assert_eq!(shop.fence.clone().retention(Duration::ZERO).clean_up().await.unwrap(), 2);
    }
}
