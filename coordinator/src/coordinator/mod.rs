//! The coordinator as a whole. Callers ask here; the question goes to the partition that has the answer. `running` takes partitions
//! over and hands them back at the end, `purge` deletes old transactions, `report` logs how things are.

mod doors;
mod purge;
mod report;
mod running;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use handfast_proto::{BranchId, Xid};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

pub use self::running::{End, Running};
use self::{
    doors::{Door, Doors},
    running::Journals,
};
use crate::{
    clock::Clock,
    dispatch::Dispatch,
    partition::{Answer, Ask, Command, Error, Settings, Until, What},
    store::{self, ALL_PARTITIONS, ListFilter, Listed, PARTITIONS, Show, Store},
    transaction::{BranchState, Decision, GlobalTransaction, NewTransaction, State, StuckAfter},
};

/// How long to wait for an answer that needs nothing but a batch or a read. It is shorter than what callers wait (the SDK: 5 s), so that they get
/// UNAVAILABLE and not their own timeout.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Shortest retention with which transactions may be recorded with their decision. Participants ask within seconds; one that was away
/// for longer is told "forgotten" and not "never recorded".
const RETENTION_AT_DECISION_MIN: Duration = Duration::from_secs(24 * 3600);
/// How many transactions without a key begin in one partition before the next partition is used. Those that begin together are
/// recorded and decided together: a few partitions with much to do cost less than all of them with a little.
const IN_A_ROW: usize = 128;

/// What may become of a reservation that its participant asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// There is no answer now.
    Unknown,
    /// There is no decision yet. This carries no promise.
    Undecided,
    /// It is confirmed, or will be.
    Confirmed,
    /// It was not confirmed, and never will be.
    Cancel,
    /// Its transaction may have been deleted after its retention.
    Forgotten,
    /// Records of its time are lost.
    Lost,
    /// An operator has done the work of this decision by hand.
    Resolved(Decision),
}

impl Fate {
    fn of(global: &GlobalTransaction, branch_id: &BranchId) -> Self {
        let branch = global.branch(branch_id).map(|(_, branch)| &branch.state);
        match (global.state.decision(), branch) {
            (None, _) => Self::Undecided,
            (Some(decision), Some(BranchState::Resolved(_))) => Self::Resolved(decision),
            (Some(Decision::Cancel), _) => Self::Cancel,
            // Branches are fixed with the decision, so this one will never be confirmed.
            (Some(Decision::Confirm), None) => Self::Cancel,
            (Some(Decision::Confirm), Some(_)) => Self::Confirmed,
        }
    }
}

/// Answers for the partitions that this process owns.
#[derive(Debug)]
pub struct Coordinator {
    doors: Arc<Doors>,
    journals: Arc<Journals>,
    /// Counts transactions that began without a key.
    keyless_begun: AtomicUsize,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    stuck_after: StuckAfter,
    retention: Duration,
    /// Cancelled when callers shall no longer wait for transactions to be completed.
    waits_end: CancellationToken,
}

impl Coordinator {
    /// Takes over all partitions of the store, and starts. It serves new work at once, and carries on what is open.
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
        let running = Running::new(store, dispatch, clock, settings);
        running.take_over(&ALL_PARTITIONS).await?;
        let coordinator = Self::of(&running, retention);
        let (purging, reporting) = (coordinator.clone(), coordinator.clone());
        running.in_background(async move { purging.purge(retention).await });
        running.in_background(async move { reporting.report().await });
        Ok((coordinator, running))
    }

    /// Answers for the partitions that `running` has, now and later.
    fn of(running: &Running, retention: Duration) -> Arc<Self> {
        Arc::new(Self {
            doors: running.doors.clone(),
            journals: running.journals.clone(),
            keyless_begun: AtomicUsize::new(0),
            store: running.store.clone(),
            clock: running.clock.clone(),
            stuck_after: running.settings.stuck_after,
            retention,
            waits_end: CancellationToken::new(),
        })
    }

    /// Begins a transaction, or finds the one that its key gave before. Waits for the decision if `until` says so, for as long
    /// as phase one may take.
    ///
    /// # Errors
    ///
    /// See [`Error`]. After [`Error::StoreSilent`], [`Error::Fenced`] and [`Error::Stopping`] nobody knows whether it was begun;
    /// after the others it was not.
    pub async fn begin(&self, new: NewTransaction, until: Until) -> Result<Answer, Error> {
        if new.at_decision && self.retention < RETENTION_AT_DECISION_MIN {
            return Err(Error::NotAtDecision(format!(
                "its `retention` is {:?}, and must be a day or more. Participants that were away would come too late to ask",
                self.retention
            )));
        }
        let door = match &new.key {
            Some(key) => self.door_of_key(&key.hash)?,
            None => {
                let round = self.keyless_begun.fetch_add(1, Ordering::Relaxed) / IN_A_ROW;
                self.doors.in_rotation(round).ok_or(Error::NotHere(None))?
            }
        };
        let patience = match until {
            Until::Now => ANSWER_TIMEOUT,
            Until::Decided | Until::Completed => new.timeout + ANSWER_TIMEOUT,
        };
        let answer = door.offer(|reply| Command::Begin { new, until, reply })?;
        Self::answered(answer, patience).await
    }

    /// Asks something about a transaction, and waits up to `patience` for it to come as far as `until`; then tells how far it
    /// has come.
    ///
    /// # Errors
    ///
    /// See [`Error`]; after [`Error::StoreSilent`], [`Error::Fenced`] and [`Error::Stopping`] nobody knows whether what was asked
    /// takes effect.
    pub async fn ask(
        &self,
        xid: Xid,
        what: What,
        until: Until,
        patience: Duration,
    ) -> Result<Answer, Error> {
        let door = self.doors.of(xid.partition).ok_or(Error::NotHere(Some(xid)))?;
        let may_be_refused = matches!(what, What::Register(_));
        // First learn whether it was rejected, then wait: a rejection that comes late must not be lost.
        let command = |reply| Command::Ask(Ask { xid, what, until: Until::Now, reply });
        let answer = if may_be_refused { door.offer(command)? } else { door.send(command).await? };
        let answer = Self::answered(answer, ANSWER_TIMEOUT).await?;
        if until.is_reached(&answer.global) || patience.is_zero() {
            return Ok(answer);
        }
        let command = |reply| Command::Ask(Ask { xid, what: What::Get, until, reply });
        let waited = door.send(command).await?;
        let waited = tokio::time::timeout(patience, waited);
        let told = match self.waits_end.run_until_cancelled(waited).await {
            Some(Ok(waited)) => waited.unwrap_or(Err(Error::Stopping)),
            Some(Err(_)) | None => {
                let command =
                    |reply| Command::Ask(Ask { xid, what: What::Get, until: Until::Now, reply });
                Self::answered(door.send(command).await?, ANSWER_TIMEOUT).await
            }
        };
        match told {
            // Only the wait was refused for load. What was asked for stands.
            Err(Error::TooManyCalls) => Ok(answer),
            told => told,
        }
    }

    /// What the participant of this branch may do with a reservation that it still has.
    pub async fn inquire(&self, xid: Xid, branch_id: BranchId) -> Fate {
        let what = What::Inquire(branch_id.clone());
        match self.ask(xid, what, Until::Now, Duration::ZERO).await {
            Ok(answer) => Fate::of(&answer.global, &branch_id),
            Err(Error::NeverRecorded(_)) => Fate::Cancel,
            Err(Error::Forgotten(_)) => Fate::Forgotten,
            Err(Error::ForgottenAfterResolving(_, decision)) => Fate::Resolved(decision),
            Err(Error::Lost(_)) => Fate::Lost,
            Err(_) => Fate::Unknown,
        }
    }

    /// From now on [`Coordinator::ask`] does not wait for a transaction to come further, and tells how far it is. The next owner
    /// carries it on.
    pub fn end_waits(&self) {
        self.waits_end.cancel();
    }

    /// Finds the transaction of a key, by its SHA-256.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn find_key(&self, hash: [u8; 32]) -> Result<Answer, Error> {
        let answer =
            self.door_of_key(&hash)?.send(|reply| Command::FindKey { hash, reply }).await?;
        Self::answered(answer, ANSWER_TIMEOUT).await
    }

    /// For operators: the newest transactions that fit, newest first, and where the next page starts if there is one.
    ///
    /// # Errors
    ///
    /// When the store does not answer.
    pub async fn list(
        &self,
        filter: &ListFilter,
        limit: usize,
    ) -> Result<(Vec<Arc<GlobalTransaction>>, Option<Listed>), Error> {
        let listing = self.store.list(filter, limit + 1).await;
        let listing = listing.map_err(|error| Error::from(&error))?;
        let mut recorded = listing.transactions;
        let more = recorded.len() > limit;
        recorded.truncate(limit);
        let last = recorded.last().filter(|_| more).map(Listed::of);
        let next = last.or(listing.looked_to);
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
            let fits = match filter.show {
                Show::All => true,
                Show::Open => !now.state.is_final(),
                Show::Stuck(at, after) => now.is_stuck(at, after),
                Show::Lost => now.state == State::Trying, // it may have been decided meanwhile
            };
            if fits {
                found.push(now);
            }
        }
        Ok((found, next))
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
        !self.journals.is_store_silent()
    }

    /// The door of the partition that a key belongs to.
    fn door_of_key(&self, hash: &[u8; 32]) -> Result<Door, Error> {
        let partition = u16::from_be_bytes([hash[0], hash[1]]) % PARTITIONS;
        self.doors.of(partition).ok_or(Error::NotHere(None))
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
}
