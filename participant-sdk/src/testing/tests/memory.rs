//! The in-memory fence gives the same answers as the fences in databases.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use handfast_coordinator::{clock::ManualClock, transaction::Timestamp};
use handfast_proto::reason;

use super::{
    super::{Coordinator, MemoryAction, MemoryFence, World, laws},
    Deduct, Stock,
};
use crate::{
    Answer, Branch, Failed, Json, Participant, Phase, Refusal, TryError,
    fence::{
        EXPIRY_MARGIN, RETENTION,
        fixture::{CELLS, UNTOUCHED, word},
    },
};

const START: i64 = 1_700_000_000_000;

/// Stock in memory.
#[derive(Clone)]
struct Shelf(Arc<Mutex<Stock>>);

impl Shelf {
    fn stock(&self) -> Stock {
        *self.0.lock().unwrap()
    }
}

impl MemoryAction for Shelf {
    type Contract = Deduct;

    fn on_try(&self, _: &Branch, Json(n): &Json<i64>) -> Result<Json<i64>, TryError> {
        let mut stock = self.0.lock().unwrap();
        if stock.0 < *n {
            return Err(Refusal::new("OUT_OF_STOCK").into());
        }
        (stock.0, stock.1) = (stock.0 - n, stock.1 + n);
        Ok(Json(stock.0))
    }

    fn on_confirm(&self, _: &Branch, Json(n): &Json<i64>) -> Result<(), Failed> {
        let mut stock = self.0.lock().unwrap();
        (stock.1, stock.2) = (stock.1 - n, stock.2 + n);
        Ok(())
    }

    fn on_cancel(&self, _: &Branch, Json(n): &Json<i64>) -> Result<(), Failed> {
        let mut stock = self.0.lock().unwrap();
        (stock.1, stock.0) = (stock.1 - n, stock.0 + n);
        Ok(())
    }
}

struct Shop {
    shelf: Shelf,
    fence: MemoryFence,
    clock: ManualClock,
    participant: Participant,
}

impl Shop {
    fn new() -> Self {
        let (shelf, clock) =
            (Shelf(Arc::new(Mutex::new(UNTOUCHED))), ManualClock::at(Timestamp(START)));
        let fence = MemoryFence::with_clock(Arc::new(clock.clone()));
        let participant =
            Participant::builder("inventory").memory_action(&fence, shelf.clone()).build();
        Self { shelf, fence, clock, participant }
    }

    async fn deliver(&self, branch: &Branch, n: &str) -> Answer {
        self.participant.handle(branch, n.as_bytes()).await
    }

    fn recorded(&self, branch: &Branch) -> Option<&'static str> {
        self.fence.recorded(branch.xid, &branch.branch_id)
    }
}

/// Branch of the `n`th transaction. Phase one ends in a minute.
fn branch(n: u64, phase: Phase) -> Branch {
    let mut branch = crate::fence::fixture::branch(n, phase);
    branch.expires_at = Some(START + 60_000);
    branch
}

#[tokio::test]
async fn every_cell_of_the_table() {
    for (before, asked, answer, shelf, state) in CELLS {
        let shop = Shop::new();
        for phase in before {
            assert_eq!(word(&shop.deliver(&branch(1, *phase), "2").await), "Done");
        }
        for _ in 0..2 {
            let found = shop.deliver(&branch(1, asked), "2").await;
            let cell = format!("{before:?}, then {asked}: {found:?}");
            assert_eq!(word(&found), answer, "{cell}");
            assert_eq!(shop.shelf.stock(), shelf, "{cell}");
            assert_eq!(shop.recorded(&branch(1, asked)), state, "{cell}");
        }
    }
}

#[tokio::test]
async fn the_laws_hold() {
    let new_world = async || {
        let shop = Shop::new();
        World::new(shop.participant, async move || shop.shelf.stock())
    };
    let report = laws::<Deduct, _>(Json(2), new_world, |(free, held, sold)| {
        free + held + sold == 10 && *held >= 0
    });
    assert!(report.await.unwrap().stories > 80);
}

#[tokio::test]
async fn replies_are_kept_and_other_payloads_refused() {
    let shop = Shop::new();
    let first = shop.deliver(&branch(1, Phase::Try), "2").await;
    assert_eq!(first, Answer::Done("8".into()));
    shop.deliver(&branch(2, Phase::Try), "1").await;
    for phase in [Phase::Try, Phase::Confirm, Phase::Try] {
        let answer = shop.deliver(&branch(1, phase), "2").await;
        assert!(phase != Phase::Try || answer == first, "{answer:?}");
        let other = shop.deliver(&branch(1, Phase::Try), "3").await;
        assert_eq!(word(&other), reason::PAYLOAD_DIFFERS);
    }
    assert_eq!(shop.shelf.stock(), (7, 1, 2));
}

#[tokio::test]
async fn a_refusal_and_an_error_leave_no_row() {
    let shop = Shop::new();
    assert_eq!(word(&shop.deliver(&branch(1, Phase::Try), "11").await), "OUT_OF_STOCK");
    assert_eq!(word(&shop.deliver(&branch(1, Phase::Try), "eleven").await), "payload.data");
    assert_eq!((shop.shelf.stock(), shop.fence.len()), (UNTOUCHED, 0));
}

#[tokio::test]
async fn a_try_in_time_counts_and_a_late_one_does_not() {
    let shop = Shop::new();
    shop.clock.advance(Duration::from_millis(59_999));
    assert_eq!(word(&shop.deliver(&branch(1, Phase::Try), "2").await), "Done");
    shop.clock.advance(Duration::from_millis(1));
    assert_eq!(word(&shop.deliver(&branch(2, Phase::Try), "2").await), reason::EXPIRED);
    assert_eq!(word(&shop.deliver(&branch(1, Phase::Try), "2").await), "Done", "it is a repeat");
    assert_eq!((shop.shelf.stock(), shop.fence.len()), ((8, 2, 0), 1));
}

#[tokio::test]
async fn rows_go_after_retention_and_reservations_stay() {
    let shop = Shop::new();
    for n in 1..=3 {
        shop.deliver(&branch(n, Phase::Try), "2").await;
    }
    shop.deliver(&branch(1, Phase::Confirm), "").await;
    shop.deliver(&branch(2, Phase::Cancel), "").await;
    shop.clock.advance(RETENTION - Duration::from_millis(1));
    assert_eq!(shop.fence.clean_up(), 0);
    assert_eq!(
        word(&shop.deliver(&branch(4, Phase::Confirm), "").await),
        reason::NEVER_TRIED,
        "its row could not have gone yet"
    );
    shop.clock.advance(Duration::from_millis(1));
    assert_eq!(shop.fence.clean_up(), 2);
    shop.clock.advance(EXPIRY_MARGIN + Duration::from_secs(60));
    assert_eq!(word(&shop.deliver(&branch(1, Phase::Confirm), "").await), "Done");
    assert_eq!((shop.fence.forgotten_confirms(), shop.shelf.stock()), (1, (6, 2, 2)));
    assert_eq!(shop.recorded(&branch(3, Phase::Try)), Some("tried"));
}

#[tokio::test]
async fn an_inquiry_ends_when_the_coordinator_does_not_respond() {
    let shop = Shop::new();
    let mut coordinator = Coordinator::start([shop.participant.clone()]).await;
    let handfast = coordinator.handfast();
    for n in 1..=20 {
        shop.deliver(&branch(n, Phase::Try), "0").await;
    }
    shop.clock.advance(EXPIRY_MARGIN + Duration::from_secs(60));
    coordinator.kill();
    tokio::time::pause();
    let before = tokio::time::Instant::now();
    shop.participant.inquire(&handfast).await.unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(35), "{:?}", before.elapsed());
}

#[tokio::test]
async fn what_nobody_comes_for_is_asked_about_and_given_back() {
    let shop = Shop::new();
    let coordinator = Coordinator::start([shop.participant.clone()]).await;
    let handfast = coordinator.handfast();
    let open = handfast.transaction("order").begin().await.unwrap();
    let xid = open.xid().await.unwrap();
    open.cancel("no longer wanted").await.unwrap();
    let reservation = Branch { xid, ..branch(1, Phase::Try) };
    shop.deliver(&reservation, "2").await;

    shop.clock.advance(EXPIRY_MARGIN);
    assert_eq!(shop.participant.inquire(&handfast).await.unwrap().cancelled, 0, "too early");
    shop.clock.advance(Duration::from_secs(60));
    assert_eq!(shop.participant.inquire(&handfast).await.unwrap().cancelled, 1);
    assert_eq!(shop.shelf.stock(), UNTOUCHED);
}
