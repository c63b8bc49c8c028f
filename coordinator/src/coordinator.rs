//! The coordinator as a whole: its partitions, the journal below them, and what goes on in the background. Whoever has a
//! question finds its partition here.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::Xid;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    clock::Clock,
    dispatch::Dispatch,
    journal::{Counts, Durable, Ended, Journal, JournalHealth},
    partition::{
        Answer, Ask, COMMANDS_MAX, Command, Error, Partition, Parts, Reply, Settings, Until, What,
    },
    store::{
        self, ALL_PARTITIONS, ListFilter, Ownership, PARTITIONS, Show, Store, Summary, Written,
    },
    transaction::{GlobalTransaction, NewTransaction, StuckAfter, Timestamp},
};

/// Longest wait for an answer that only the store can hold up. Shorter than what callers wait (the SDK: 5 s), so that they are told
/// UNAVAILABLE rather than nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Transactions without a key that begin one after the other in the same partition. Those that begin together are recorded and decided
/// together: a few partitions with much to do cost less than all of them with a little.
const IN_A_ROW: usize = 128;
/// Transactions that one step of the purge looks at: few, so that it stalls nobody.
const PURGE_STEP: usize = 256;
/// Pause between steps of the purge, and between rounds.
const PURGE_PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(5)];
/// How often the log says how things are.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Answers for all partitions of a store.
#[derive(Debug)]
pub struct Coordinator {
    partitions: Vec<mpsc::Sender<Command>>,
    ownerships: Vec<Ownership>,
    /// Whose turn it is to begin a transaction without a key.
    next: AtomicUsize,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    /// Of each journal.
    health: Vec<Arc<JournalHealth>>,
    durable: Vec<watch::Receiver<Durable>>,
    stuck_after: StuckAfter,
}

/// What runs behind a [`Coordinator`].
#[derive(Debug)]
pub struct Running {
    store: Arc<dyn Store>,
    health: Vec<Arc<JournalHealth>>,
    ownerships: Vec<Ownership>,
    /// What may end at any moment.
    background: CancellationToken,
    partitions: (TaskTracker, CancellationToken),
    journals: (TaskTracker, CancellationToken),
}

impl Coordinator {
    /// Takes the store over and starts. New work is served at once; what was open is carried on.
    ///
    /// # Errors
    ///
    /// When the store cannot be taken over.
    pub async fn start(
        store: Arc<dyn Store>,
        dispatch: Arc<dyn Dispatch>,
        clock: Arc<dyn Clock>,
        settings: Settings,
        retention: Duration,
    ) -> Result<(Arc<Self>, Running), store::Error> {
        let owner = format!("process {}, started at {}", std::process::id(), clock.now().0);
        let ownerships = store.acquire(&ALL_PARTITIONS, &owner, clock.now()).await?;
        let mut running = Running {
            store: store.clone(),
            health: Vec::new(),
            ownerships: ownerships.clone(),
            background: CancellationToken::new(),
            partitions: Default::default(),
            journals: Default::default(),
        };
        let mut partitions = BTreeMap::new();
        let (open, at_a_time) = (Arc::default(), store.batches_at_a_time());
        for remainder in 0..at_a_time {
            let of_one = |ownership: &&Ownership| ownership.partition % at_a_time == remainder;
            let ownerships: Vec<_> = ownerships.iter().filter(of_one).copied().collect();
            let (journal, outboxes, health) =
                Journal::new(store.clone(), clock.clone(), &ownerships);
            running.journals.0.spawn(journal.run(running.journals.1.clone()));
            running.health.push(health.clone());
            let parts = Parts {
                store: store.clone(),
                dispatch: dispatch.clone(),
                clock: clock.clone(),
                health,
                open: Arc::clone(&open),
                tasks: running.partitions.0.clone(),
                settings,
            };
            for (ownership, outbox) in ownerships.into_iter().zip(outboxes) {
                let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
                let durable = outbox.durable();
                let partition = Partition::new(ownership, parts.clone(), outbox);
                running.partitions.0.spawn(partition.run(receiver, running.partitions.1.clone()));
                partitions.insert(ownership.partition, (commands, durable));
            }
        }
        let (partitions, durable) = partitions.into_values().unzip();
        let coordinator = Arc::new(Self {
            partitions,
            ownerships,
            next: AtomicUsize::new(0),
            store,
            clock,
            health: running.health.clone(),
            durable,
            stuck_after: settings.stuck_after,
        });
        let background = running.background.clone();
        let (purging, reporting) = (coordinator.clone(), coordinator.clone());
        tokio::spawn(
            background
                .clone()
                .run_until_cancelled_owned(async move { purging.purge(retention).await }),
        );
        tokio::spawn(background.run_until_cancelled_owned(async move { reporting.report().await }));
        Ok((coordinator, running))
    }

    /// Begins a transaction, or finds the one that its key gave before. Waits for the decision if `until` says so, for as long
    /// as phase one may take.
    ///
    /// # Errors
    ///
    /// See [`Error`]; nothing was begun, except after [`Error::StoreSilent`], when nobody knows.
    pub async fn begin(&self, new: NewTransaction, until: Until) -> Result<Answer, Error> {
        let partition = match &new.key {
            Some(key) => Self::partition_of_key(&key.hash),
            None => self.next.fetch_add(1, Ordering::Relaxed) / IN_A_ROW % self.partitions.len(),
        };
        let patience = match until {
            Until::Now => ANSWER_TIMEOUT,
            Until::Decided | Until::Completed => new.timeout + ANSWER_TIMEOUT,
        };
        let answer = self.offer(partition, |reply| Command::Begin { new, until, reply })?;
        Self::answered(answer, patience).await
    }

    /// Asks something about a transaction, and waits up to `patience` for it to come as far as `until`; then tells how far it
    /// has come.
    ///
    /// # Errors
    ///
    /// See [`Error`]; after [`Error::StoreSilent`] nobody knows whether what was asked takes effect.
    pub async fn ask(
        &self,
        xid: Xid,
        what: What,
        until: Until,
        patience: Duration,
    ) -> Result<Answer, Error> {
        let partition = usize::from(xid.partition);
        if partition >= self.partitions.len() {
            return Err(Error::NotHere(Some(xid)));
        }
        let may_be_refused = matches!(what, What::Register(_));
        // First what became of it, then how far the transaction comes: a rejection that is late must not be lost.
        let command = |reply| Command::Ask(Ask { xid, what, until: Until::Now, reply });
        let answer = if may_be_refused {
            self.offer(partition, command)?
        } else {
            self.send(partition, command).await?
        };
        let answer = Self::answered(answer, ANSWER_TIMEOUT).await?;
        if until.is_reached(&answer.global) || patience.is_zero() {
            return Ok(answer);
        }
        let command = |reply| Command::Ask(Ask { xid, what: What::Get, until, reply });
        let answer = self.send(partition, command).await?;
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer.unwrap_or(Err(Error::Stopping)),
            Err(_) => {
                let command =
                    |reply| Command::Ask(Ask { xid, what: What::Get, until: Until::Now, reply });
                Self::answered(self.send(partition, command).await?, ANSWER_TIMEOUT).await
            }
        }
    }

    /// Finds the transaction of a key, by its SHA-256.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn find_key(&self, hash: [u8; 32]) -> Result<Answer, Error> {
        let command = |reply| Command::FindKey { hash, reply };
        Self::answered(self.send(Self::partition_of_key(&hash), command).await?, ANSWER_TIMEOUT)
            .await
    }

    /// For operators: the newest transactions that fit, newest first, and whether there are more.
    ///
    /// # Errors
    ///
    /// When the store does not answer.
    pub async fn list(
        &self,
        show: Show,
        name: Option<String>,
        limit: usize,
    ) -> Result<(Vec<Arc<GlobalTransaction>>, bool), Error> {
        let mut recorded = self
            .store
            .list(&ListFilter { show, name }, limit + 1)
            .await
            .map_err(|error| Error::from(&error))?;
        let more = recorded.len() > limit;
        recorded.truncate(limit);
        let mut found = Vec::with_capacity(recorded.len());
        for global in recorded {
            // What is open may have come further in memory than in its record.
            let now = if global.state.is_final() {
                Arc::new(global)
            } else {
                match self.ask(global.xid, What::Get, Until::Now, ANSWER_TIMEOUT).await {
                    Ok(answer) => answer.global,
                    Err(_) => Arc::new(global),
                }
            };
            let fits = match show {
                Show::All => true,
                Show::Open => !now.state.is_final(),
                Show::Stuck(at, after) => now.is_stuck(at, after),
            };
            if fits {
                found.push(now);
            }
        }
        Ok((found, more))
    }

    /// What is stuck at this moment.
    #[must_use]
    pub fn stuck_now(&self) -> Show {
        Show::Stuck(self.clock.now(), self.stuck_after)
    }

    /// Whether a transaction is stuck at this moment.
    #[must_use]
    pub fn is_stuck(&self, global: &GlobalTransaction) -> bool {
        global.is_stuck(self.clock.now(), self.stuck_after)
    }

    /// Whether the store answers.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.health.iter().any(|health| health.is_store_silent())
    }

    /// Completes when a partition is not recorded any more: this process has been replaced, or a person must look. Nothing is
    /// served from then on that was not durable.
    pub async fn ended(&self) -> Ended {
        let ended = self.durable.iter().map(|durable| {
            let mut durable = durable.clone();
            Box::pin(async move {
                match durable.wait_for(|durable| durable.ended.is_some()).await {
                    Ok(durable) => durable.ended.expect("waited for it"),
                    Err(_) => std::future::pending().await, // an orderly end
                }
            })
        });
        futures_util::future::select_all(ended).await.0
    }

    fn partition_of_key(hash: &[u8; 32]) -> usize {
        usize::from(u16::from_be_bytes([hash[0], hash[1]]) % PARTITIONS)
    }

    /// Hands over a command, unless too many wait.
    fn offer(
        &self,
        partition: usize,
        command: impl FnOnce(Reply) -> Command,
    ) -> Result<oneshot::Receiver<Result<Answer, Error>>, Error> {
        let (reply, answer) = oneshot::channel();
        self.partitions[partition].try_send(command(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::TooManyCalls,
            mpsc::error::TrySendError::Closed(_) => Error::Stopping,
        })?;
        Ok(answer)
    }

    /// Hands over a command that is never refused for load.
    async fn send(
        &self,
        partition: usize,
        command: impl FnOnce(Reply) -> Command,
    ) -> Result<oneshot::Receiver<Result<Answer, Error>>, Error> {
        let (reply, answer) = oneshot::channel();
        self.partitions[partition].send(command(reply)).await.map_err(|_| Error::Stopping)?;
        Ok(answer)
    }

    async fn answered(
        answer: oneshot::Receiver<Result<Answer, Error>>,
        patience: Duration,
    ) -> Result<Answer, Error> {
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Error::Stopping),
            Err(_) => Err(Error::StoreSilent),
        }
    }

    /// Deletes what has been finished for longer than `retention`, a little at a time, for ever.
    async fn purge(&self, retention: Duration) {
        loop {
            for ownership in &self.ownerships {
                let mut after = None;
                loop {
                    let before = Timestamp(
                        self.clock.now().0
                            - i64::try_from(retention.as_millis()).unwrap_or(i64::MAX),
                    );
                    match self.store.purge(ownership.partition, before, after, PURGE_STEP).await {
                        Ok((_, None)) => break,
                        Ok((_, next)) => after = next,
                        Err(error) => {
                            warn!(%error, "cannot delete what is old; will try again");
                            break;
                        }
                    }
                    tokio::time::sleep(PURGE_PAUSES[0]).await;
                }
            }
            tokio::time::sleep(PURGE_PAUSES[1]).await;
        }
    }

    /// Says once a minute how things are.
    async fn report(&self) {
        let mut interval = tokio::time::interval(REPORT_INTERVAL);
        interval.tick().await;
        let mut before = (0, 0);
        loop {
            interval.tick().await;
            let now = self.clock.now();
            match self.store.summary(now, self.stuck_after).await {
                Ok(Summary { open, stuck, oldest }) => {
                    let Counts { batches, transactions, .. } = counts(&self.health);
                    let oldest_seconds = oldest.map_or(0, |oldest| (now - oldest).as_secs());
                    let batches_lately = batches - before.0;
                    let per_batch =
                        (transactions - before.1).checked_div(batches_lately).unwrap_or(0);
                    before = (batches, transactions);
                    info!(
                        open,
                        stuck,
                        oldest_seconds,
                        batches = batches_lately,
                        transactions_per_batch = per_batch,
                        "status"
                    );
                }
                Err(error) => warn!(%error, "cannot count what is open"),
            }
        }
    }
}

impl Running {
    /// Ends in order: no further change, what was waiting for company is recorded, the partitions are handed back. Does not
    /// return while the store is silent; put a limit on it. A kill at any moment is just as right, only slower to recover.
    pub async fn stop(self) {
        self.background.cancel();
        let (partitions, stop) = self.partitions;
        stop.cancel();
        partitions.close();
        partitions.wait().await;
        let (journals, stop) = self.journals;
        stop.cancel();
        journals.close();
        journals.wait().await;
        if let Err(error) = self.store.release(&self.ownerships).await {
            warn!(%error, "cannot hand the partitions back; the next owner takes them over all the same");
        }
        let Counts { batches, awaited, transactions } = counts(&self.health);
        let Written { statements, rows } = self.store.written();
        info!(batches, awaited, transactions, statements, rows, "recorded");
    }
}

/// What all journals have appended.
fn counts(health: &[Arc<JournalHealth>]) -> Counts {
    health.iter().map(|health| health.counts()).sum()
}
