//! The table of verdicts, the answers to repeats, and deadlines.

use super::*;

#[tokio::test]
async fn every_cell_of_the_table_at_every_level() {
    for server in servers().await {
        for level in LEVELS {
            for (before, asked, answer, shelf, state) in CELLS {
                let shop = server.alone().await;
                for phase in before {
                    done(&shop.deliver(level, &branch(1, *phase), &payload(2)).await);
                }
                // Twice: a repeat gets the same answer and has no further effect.
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
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
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
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
            done(&shop.deliver(level, &branch(1, Phase::Try), &payload(2)).await);
            let other = shop.deliver(level, &branch(1, Phase::Try), &payload(3)).await;
            assert_eq!(word(&other), reason::PAYLOAD_DIFFERS, "{level:?}");
            assert_eq!(shop.runs(), 1);
        }
        let shop = server.open(8).await;
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
    for server in servers().await {
        let shop = server.open(8).await;
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

#[tokio::test]
async fn confirm_and_cancel_get_what_try_got() {
    for server in servers().await {
        for level in LEVELS {
            for phase in [Phase::Confirm, Phase::Cancel] {
                for asked in [payload(5), Vec::new(), b"not JSON".to_vec()] {
                    let shop = server.alone().await;
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
    for server in servers().await {
        let shop = server.alone().await;
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

#[tokio::test]
async fn a_new_try_after_its_deadline_is_rejected_and_a_recorded_one_is_answered() {
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
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
            // At level 0, the caller commits the row that the fence has written. That row must not be a reservation.
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
    for server in servers().await {
        for level in LEVELS {
            let shop = server.open(8).await;
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
