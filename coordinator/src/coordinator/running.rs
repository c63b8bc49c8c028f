//! The tasks behind a coordinator: journals, partitions, and work in the background. Partitions come and go one by one: each is
//! taken over with an ownership of its own (partition, epoch, nonce), and everything that was made with that ends with it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info, warn};

use super::{Door, Doors};
use crate::{
    clock::Clock,
    dispatch::Dispatch,
    journal::{Counts, Durable, Ended, Journal},
    partition::{COMMANDS_MAX, MemoryUse, Partition, Parts, Settings},
    store::{self, Ownership, Store, Written},
};

/// How long the end waits for the store to take the partitions back. Without it the next owner waits a little longer.
const RELEASE_WITHIN: Duration = Duration::from_secs(2);

/// A part that stopped unexpectedly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// This partition is not recorded any more. The other partitions go on.
    Partition(Ownership, Ended),
    /// A task is over that should run until the coordinator stops. It has panicked.
    Task(&'static str),
    /// The store is not where it was, in words. Nothing is recorded any more.
    StoreGone(String),
}

/// See the module's comment.
#[derive(Debug)]
pub struct Running {
    pub(super) store: Arc<dyn Store>,
    dispatch: Arc<dyn Dispatch>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) settings: Settings,
    pub(super) doors: Arc<Doors>,
    pub(super) journals: Arc<Journals>,
    /// What all partitions hold in memory.
    held: Arc<MemoryUse>,
    partition_tasks: Tasks,
    journal_tasks: Tasks,
    /// Work that may be cut off at any moment.
    background: CancellationToken,
    ends_sender: mpsc::UnboundedSender<End>,
    ends: mpsc::UnboundedReceiver<End>,
}

/// Tasks that stop together.
#[derive(Debug, Clone, Default)]
struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    async fn stop(self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl Running {
    /// Starts the journals, with no partition yet.
    pub(super) fn new(
        store: Arc<dyn Store>,
        dispatch: Arc<dyn Dispatch>,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Self {
        let journals = Arc::new(Journals::new(&store, &clock));
        // Bounded by the number of tasks, each of which ends once.
        let (ends_sender, ends) = mpsc::unbounded_channel();
        let running = Self {
            store,
            dispatch,
            clock,
            settings,
            doors: Arc::default(),
            journals: journals.clone(),
            held: Arc::default(),
            partition_tasks: Tasks::default(),
            journal_tasks: Tasks::default(),
            background: CancellationToken::new(),
            ends_sender,
            ends,
        };
        for journal in journals.by_remainder.values() {
            let Tasks { tracker, stop } = running.journal_tasks.clone();
            let task = tracker.spawn(journal.clone().run(stop.clone()));
            let ends = running.ends_sender.clone();
            tracker.spawn(async move {
                if ended_by_itself(task, &stop).await {
                    error!("the journal's task has ended");
                    drop(ends.send(End::Task("journal"))); // the coordinator may be gone
                }
            });
        }
        running
    }

    /// Takes these partitions over and serves them, until each of them ends. A partition that is here already begins anew.
    ///
    /// # Errors
    ///
    /// When the store cannot be taken over. None of the partitions is served then.
    pub(super) async fn take_over(&self, partitions: &[u16]) -> Result<(), store::Error> {
        let now = self.clock.now();
        let owner = format!("process {}, started at {}", std::process::id(), now.0);
        for ownership in self.store.acquire(partitions, &owner, now).await? {
            self.serve(ownership);
        }
        Ok(())
    }

    fn serve(&self, ownership: Ownership) {
        let journal = self.journals.of(ownership.partition);
        let outbox = journal.add(ownership);
        let durable = outbox.durable();
        let Tasks { tracker, stop } = self.partition_tasks.clone();
        let parts = Parts {
            store: self.store.clone(),
            dispatch: self.dispatch.clone(),
            clock: self.clock.clone(),
            health: journal.health().clone(),
            held: self.held.clone(),
            tasks: tracker.clone(),
            settings: self.settings.clone(),
        };
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let partition = Partition::new(ownership, parts, outbox);
        let task = tracker.spawn(partition.run(receiver, stop.clone()));
        self.doors.open(Door { ownership, commands });
        let (doors, ends) = (self.doors.clone(), self.ends_sender.clone());
        tracker.spawn(async move {
            if let Some(end) = end_of(ownership, durable, task, &stop).await {
                doors.close(&ownership);
                drop(ends.send(end)); // the coordinator may be gone
            }
        });
    }

    /// Runs `work` until the coordinator stops.
    pub(super) fn in_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.background.clone().run_until_cancelled_owned(work));
    }

    /// Waits until a partition or a task ends unexpectedly and cannot be taken over again at once. From then on, callers get no
    /// answer that is not durable.
    pub async fn ended(&mut self) -> End {
        loop {
            let end = tokio::select! {
                biased; // so that a simulated run can be repeated
                Some(end) = self.ends.recv() => end, // there always is one: this holds a sender
                what = self.store.gone() => return End::StoreGone(what),
            };
            match end {
                End::Partition(ownership, Ended::Fenced) if self.take_back(ownership).await => {}
                end @ (End::Partition(..) | End::Task(_) | End::StoreGone(_)) => return end,
            }
        }
    }

    /// Takes a partition over again if its ownership was ended without a next owner. The store does that when a loss of batches is
    /// noticed after the takeover. The next ownership knows of the loss.
    async fn take_back(&self, Ownership { partition, epoch, .. }: Ownership) -> bool {
        let seats = match self.store.seats().await {
            Ok(seats) => seats,
            Err(error) => {
                warn!(partition, %error, "cannot read who owns the partition");
                return false;
            }
        };
        let seat = seats.into_iter().find(|seat| seat.partition == partition);
        if seat.is_none_or(|seat| seat.epoch != epoch + 1 || seat.owner.is_some()) {
            return false;
        }
        warn!(partition, "a loss of batches was noticed after the takeover; taking over again");
        match self.take_over(&[partition]).await {
            Ok(()) => true,
            Err(error) => {
                warn!(partition, %error, "cannot take the partition over again");
                false
            }
        }
    }

    /// Stops in order: no further change; changes that waited to be recorded with later ones are recorded; the partitions are
    /// handed back. Does not return while the store is silent, so put a limit on it. A kill at any moment is just as safe, only
    /// slower to recover from.
    pub async fn stop(self) {
        self.background.cancel();
        self.partition_tasks.stop().await;
        self.journal_tasks.stop().await;
        let ownerships = self.doors.ownerships();
        let released = tokio::time::timeout(RELEASE_WITHIN, self.store.release(&ownerships)).await;
        if let Err(error) =
            released.unwrap_or_else(|_| Err(store::Error::unavailable("no answer in time")))
        {
            warn!(%error, "cannot hand the partitions back; the next owner will take them over all the same");
        }
        self.store.close().await;
        let Counts { batches, awaited, transactions } = self.journals.counts();
        let Written { statements, rows } = self.store.written();
        info!(batches, awaited, transactions, statements, rows, "recorded");
    }
}

/// Waits until a partition ends; `None`: it was told to stop.
async fn end_of(
    ownership: Ownership,
    mut durable: watch::Receiver<Durable>,
    task: JoinHandle<()>,
    stop: &CancellationToken,
) -> Option<End> {
    let ended = async {
        match durable.wait_for(|durable| durable.ended.is_some()).await {
            Ok(durable) => durable.ended,
            Err(_) => None, // the journal is gone: the task will tell
        }
    };
    tokio::select! {
        biased; // so that a simulated run can be repeated
        Some(ended) = ended => Some(End::Partition(ownership, ended)),
        by_itself = ended_by_itself(task, stop) => by_itself.then(|| {
            error!(ownership.partition, "the partition's task has ended");
            End::Task("partition")
        }),
    }
}

/// Waits until a task is over, and says whether it had not been told to stop.
pub(super) async fn ended_by_itself(task: JoinHandle<()>, stop: &CancellationToken) -> bool {
    let result = task.await;
    result.is_err() || !stop.is_cancelled()
}

/// The journals of a store: as many as it takes batches at a time.
#[derive(Debug)]
pub(super) struct Journals {
    /// A partition's journal is found by the remainder that its number leaves.
    by_remainder: BTreeMap<u16, Arc<Journal>>,
}

impl Journals {
    fn new(store: &Arc<dyn Store>, clock: &Arc<dyn Clock>) -> Self {
        let journal = |remainder| (remainder, Journal::new(store.clone(), clock.clone()));
        Self { by_remainder: (0..store.batches_at_a_time()).map(journal).collect() }
    }

    fn of(&self, partition: u16) -> &Arc<Journal> {
        let at_a_time = u16::try_from(self.by_remainder.len()).expect("made from such a number");
        &self.by_remainder[&(partition % at_a_time)]
    }

    pub(super) fn is_store_silent(&self) -> bool {
        self.by_remainder.values().any(|journal| journal.health().is_store_silent())
    }

    pub(super) fn counts(&self) -> Counts {
        self.by_remainder.values().map(|journal| journal.health().counts()).sum()
    }
}
