//! Runs single transactions, either with the SDK or as a DTM client would.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use handfast::{Global, Handfast, Json, Remote, WorkError};
use tokio::sync::{Semaphore, oneshot};

use super::{
    dtm::DtmInitiator,
    latency::Decided,
    ledger::Ledger,
    options::{Drive, Record},
    participants::{Work, name_of},
};

/// Phase-one timeout of transactions that are held open.
const HELD_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs transactions. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) enum Initiator {
    Sdk(SdkInitiator),
    Dtm(Arc<DtmInitiator>),
}

/// Runs transactions with the SDK.
#[derive(Debug, Clone)]
pub(crate) struct SdkInitiator {
    pub(crate) handfast: Handfast,
    /// The participants. Each transaction has one branch at each of them.
    pub(crate) remotes: Arc<[Remote]>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) drive: Drive,
    pub(crate) record: Record,
    /// Transactions begun so far. Each one orders the next kind of goods.
    pub(crate) orders: Arc<AtomicU32>,
}

/// Keeps transactions open between their Trys and their decision.
#[derive(Debug)]
pub(crate) struct Hold {
    /// Transactions that have reached the hold. Never decreases.
    pub(crate) held: AtomicU64,
    /// One permit for each transaction that may be decided.
    pub(crate) let_go: Semaphore,
}

impl Initiator {
    /// Runs a transaction up to its decision. `meant` is when it was scheduled to begin.
    pub(crate) async fn decide(
        &self,
        meant: Instant,
        hold: Option<&Hold>,
    ) -> anyhow::Result<Decided> {
        match self {
            Self::Sdk(initiator) if initiator.drive == Drive::Initiator => {
                initiator.drive_it(meant, hold).await
            }
            Self::Sdk(initiator) => initiator.execute(meant).await,
            Self::Dtm(initiator) => initiator.decide(meant).await,
        }
    }
}

impl SdkInitiator {
    async fn drive_it(&self, meant: Instant, hold: Option<&Hold>) -> anyhow::Result<Decided> {
        let (marks, order) = (Mutex::new(None), self.next_order());
        let mut transaction = self.handfast.transaction("bench").until_decided();
        if hold.is_some() {
            transaction = transaction.timeout(HELD_TIMEOUT);
        }
        if self.record == Record::Decision {
            transaction = transaction.record_at_decision();
        }
        let confirmed = transaction.run(async |global| {
            let calls = self.remotes.iter().map(|remote| global.call::<Work>(remote, Json(order)));
            // Begin carries all branches because `begun` is polled together with the calls. It resolves when Begin is answered.
            let (begun, _) = tokio::try_join!(self.begun(global), async {
                Ok::<_, WorkError>(try_join_all(calls).await?)
            })?;
            let tried = Instant::now();
            *marks.lock().expect("nothing panics while it is locked") = Some((begun, tried));
            if let Some(hold) = hold {
                hold.held.fetch_add(1, Ordering::Relaxed);
                hold.let_go.acquire().await?.forget();
            }
            Ok(())
        });
        let confirmed = confirmed.await?;
        let decided = Instant::now();
        let completion = self.expect(confirmed.xid);
        let marks = marks.into_inner().expect("nothing panics while it is locked");
        let (begun, tried) = marks.context("confirmed without having been tried")?;
        Ok(Decided { meant, begun: Some(begun), tried: Some(tried), decided, completion })
    }

    fn next_order(&self) -> u32 {
        self.orders.fetch_add(1, Ordering::Relaxed)
    }

    async fn begun(&self, global: &Global) -> Result<Instant, WorkError> {
        global.xid().await?;
        Ok(Instant::now())
    }

    async fn execute(&self, meant: Instant) -> anyhow::Result<Decided> {
        let transaction = self.handfast.execute("bench").until_decided();
        let order = Json(self.next_order());
        let transaction = (self.remotes.iter())
            .fold(transaction, |transaction, remote| transaction.call::<Work>(remote, &order));
        let executed = transaction.run().await?;
        let decided = Instant::now();
        let completion = self.expect(executed.xid);
        Ok(Decided { meant, begun: None, tried: None, decided, completion })
    }

    fn expect(&self, xid: handfast::Xid) -> oneshot::Receiver<()> {
        let branches = u16::try_from(self.remotes.len()).expect("at most 64");
        self.ledger.expect(name_of(xid), branches)
    }
}
