//! The fence on a real database; the same tests for each database. Calls arrive in any order, twice, concurrently, or are
//! dropped half-way. At the end, the shelf is as if each call had arrived once and in order.

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

use super::{
    ANALYZE, DROP_INDEX, Db, GIVEN_UP, NUMBERED, READ_ONLY, Server, TOO_MUCH, plan, servers,
    shop::Shop, sql,
};
use crate::{
    Answer, Branch, Participant, Phase, TryError, Tx,
    fence::{
        EXPIRY_MARGIN, Entered, RETENTION,
        db::{OverdueKey, Statements as _},
        fixture::{CELLS, LEVELS, Level, STOCK, UNTOUCHED, branch, payload, payload_that, word},
        millis,
    },
};

mod batches;
mod cells;
mod concurrent;
mod undone;
mod upkeep;

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

/// Waits until the condition holds, for at most ten seconds.
async fn until<F: Future<Output = bool>>(condition: impl Fn() -> F) {
    for _ in 0..1000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came true");
}
