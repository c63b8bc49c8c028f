//! A fence without a database, for simulations and benchmarks. It has the same verdicts, replies, digests and deadlines, in
//! memory.
//!
//! A synchronous critical section replaces the local transaction. While a call is served, it holds the lock of its row's shard.
//! Of two calls for one branch, the second waits and then sees what the first has done. When a simulated host "crashes", each
//! call has been done completely or not at all. There is no replacement for the rollback of the author's own memory: see
//! [`MemoryAction`].

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use handfast_coordinator::clock::{Clock, SystemClock};
use handfast_proto::{BranchId, Xid, planted::Bug};

use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    contract::{Contract, Payload as _},
    error::{Failed, TryError},
    fence::{
        EXPIRY_MARGIN, ExpiredPage, OverduePage, RETENTION, Verdict,
        db::{Key, OverdueKey, Record},
        log,
        look::{self, Look},
        millis,
        verdict::State,
    },
    participant::{
        ParticipantBuilder,
        action::{ContentTypes, Served, unreadable, unreadable_stored},
    },
};

/// The number of locks: many, so that several cores seldom wait for each other.
const SHARDS: u8 = 64;

/// A participant's code for one action with in-memory data: as [`Action`](crate::Action), without a database.
///
/// Each function runs inside the critical section that replaces the local transaction. It must not block. When it returns an
/// error, it must have changed nothing.
pub trait MemoryAction: Send + Sync + 'static {
    /// The action's name, arguments and reply.
    type Contract: Contract;

    /// Reserves, or refuses.
    ///
    /// # Errors
    ///
    /// A [`Refusal`](crate::Refusal) is a definite no. After any other error the outcome is unknown.
    fn on_try(
        &self,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> Result<<Self::Contract as Contract>::Reply, TryError>;

    /// Uses what was reserved.
    ///
    /// # Errors
    ///
    /// After an error, the call is retried until this returns `Ok`.
    fn on_confirm(
        &self,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> Result<(), Failed>;

    /// Releases what was reserved.
    ///
    /// # Errors
    ///
    /// After an error, the call is retried until this returns `Ok`.
    fn on_cancel(
        &self,
        branch: &Branch,
        args: &<Self::Contract as Contract>::Args,
    ) -> Result<(), Failed>;
}

/// An in-memory fence. Cheap to clone; clones share the same rows. As with a database, the rows survive a restart of the
/// participant.
#[derive(Clone)]
pub struct MemoryFence {
    shards: Arc<[Mutex<BTreeMap<Name, Row>>]>,
    clock: Arc<dyn Clock>,
    retention: Duration,
    forgotten_confirms: Arc<AtomicU64>,
}

/// Xid and branch id in their database encoding.
type Name = ([u8; 16], [u8; 32]);

struct Row {
    state: State,
    action: Box<str>,
    /// Kept only while the row is tried. No other state needs it.
    payload: Bytes,
    reply: Bytes,
    digest: [u8; 32],
    expires_at: Option<i64>,
    changed_at: i64,
    asks: bool,
}

impl Default for MemoryFence {
    fn default() -> Self {
        Self::with_clock(Arc::new(SystemClock::default()))
    }
}

impl MemoryFence {
    /// An empty fence on this clock.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            clock,
            retention: RETENTION,
            forgotten_confirms: Arc::default(),
        }
    }

    /// As [`Fence::retention`](crate::Fence::retention).
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        Self { retention, ..self }
    }

    /// Deletes all rows that are old enough, as [`Fence::clean_up`](crate::Fence::clean_up) does. Returns how many were deleted.
    #[must_use]
    pub fn clean_up(&self) -> u64 {
        let now = self.clock.now().0;
        let changed_by = now.saturating_sub(millis(self.retention));
        let expired_by = now.saturating_sub(millis(EXPIRY_MARGIN));
        let mut deleted = 0;
        for shard in self.shards.iter() {
            let mut rows = locked(shard);
            let before = rows.len();
            rows.retain(|_, row| {
                row.state == State::Tried
                    || row.changed_at > changed_by
                    || row.expires_at.is_some_and(|expires_at| expires_at > expired_by)
            });
            deleted += before - rows.len();
        }
        u64::try_from(deleted).unwrap_or(u64::MAX)
    }

    /// How many Confirms without a row were answered "done", because the row may have been cleaned up long ago.
    #[must_use]
    pub fn forgotten_confirms(&self) -> u64 {
        self.forgotten_confirms.load(Ordering::Relaxed)
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| locked(shard).len()).sum()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The recorded state of a branch, as in the table's readable view: `tried`, `confirmed`, `cancelled`, `suspended`.
    #[must_use]
    pub fn recorded(&self, xid: Xid, branch_id: &BranchId) -> Option<&'static str> {
        let name = (xid.to_bytes(), branch_id.to_fixed());
        locked(self.shard(xid)).get(&name).map(|row| match row.state {
            State::Tried => "tried",
            State::Confirmed => "confirmed",
            State::Cancelled => "cancelled",
            State::Suspended => "suspended",
        })
    }

    /// As [`Fence::run`](super::Fence::run). `work` gets the payload of the Try, and returns the Try's reply.
    fn run(
        &self,
        branch: &Branch,
        payload: &[u8],
        work: impl FnOnce(&[u8]) -> Result<Bytes, Answer>,
    ) -> Answer {
        let began = Instant::now();
        let (verdict, answer) = match (branch.phase, look::too_long(payload)) {
            (Phase::Try, Some(message)) => {
                (None, Answer::Invalid { field: "payload.data", message })
            }
            (Phase::Try | Phase::Confirm | Phase::Cancel, _) => {
                let (verdict, answer) = self.within(branch, payload, work);
                (Some(verdict), answer)
            }
        };
        log::log(branch, verdict, &answer, began.elapsed(), &[]);
        answer
    }

    /// The critical section. It writes nothing until the work is done, so there is nothing to roll back.
    fn within(
        &self,
        branch: &Branch,
        payload: &[u8],
        work: impl FnOnce(&[u8]) -> Result<Bytes, Answer>,
    ) -> (Verdict, Answer) {
        let digest = look::digest(&branch.action, payload);
        let name = (branch.xid.to_bytes(), branch.branch_id.to_fixed());
        let mut rows = locked(self.shard(branch.xid));
        let now = self.clock.now().0;
        let record = rows.get(&name).map(|row| row.record(now));
        let mut look = Look::new(branch, &digest, record, now, self.retention);
        let row = |state, payload, reply| Row {
            state,
            action: branch.action.as_str().into(),
            payload,
            reply,
            digest,
            expires_at: branch.expires_at,
            changed_at: now,
            asks: branch.at_decision,
        };
        if let Some(answer) = look.answer(branch) {
            if look.verdict == Verdict::EmptyRollback && !Bug::DropEmptyRollback.is_planted() {
                rows.insert(name, row(State::Suspended, Bytes::new(), Bytes::new()));
            }
            if look.verdict == Verdict::Forgotten {
                self.forgotten_confirms.fetch_add(1, Ordering::Relaxed);
            }
            return (look.verdict, answer);
        }
        let kept = look.take_payload(branch.phase, payload);
        let reply = match work(&kept) {
            Ok(reply) => reply,
            Err(answer) => return (look.verdict, answer),
        };
        let state = match branch.phase {
            Phase::Try => {
                rows.insert(name, row(State::Tried, kept, reply.clone()));
                return (look.verdict, Answer::Done(reply));
            }
            Phase::Confirm => State::Confirmed,
            Phase::Cancel => State::Cancelled,
        };
        let row = rows.get_mut(&name).expect("only a row that is tried is confirmed or cancelled");
        (row.state, row.payload, row.changed_at) = (state, Bytes::new(), now);
        (look.verdict, Answer::Done(Bytes::new()))
    }

    /// Branches of this action that are still tried although phase one ended [`EXPIRY_MARGIN`] ago.
    fn overdue(&self, action: &str) -> Vec<(Xid, BranchId)> {
        let overdue = self.tried(EXPIRY_MARGIN, |row| *row.action == *action).into_iter();
        overdue.map(|(xid, branch_id, _)| (xid, branch_id)).collect()
    }

    /// Branches that ask and are still tried although phase one has ended.
    fn expired(&self) -> Vec<(Xid, BranchId, String)> {
        self.tried(Duration::ZERO, |row| row.asks)
    }

    /// Such branches that are still tried although phase one ended this long ago, each with its action.
    fn tried(
        &self,
        ended_ago: Duration,
        wanted: impl Fn(&Row) -> bool,
    ) -> Vec<(Xid, BranchId, String)> {
        let expired_by = self.clock.now().0.saturating_sub(millis(ended_ago));
        let mut tried = Vec::new();
        for shard in self.shards.iter() {
            let rows = locked(shard);
            let rows = rows.iter().filter(|(_, row)| {
                row.state == State::Tried
                    && wanted(row)
                    && row.expires_at.is_some_and(|expires_at| expires_at <= expired_by)
            });
            tried.extend(rows.filter_map(|((xid, branch_id), row)| {
                let (xid, branch_id) = Key::read(xid, branch_id)?;
                Some((xid, branch_id, row.action.as_ref().to_owned()))
            }));
        }
        tried
    }

    /// The branches of a transaction that are tried and ask, each with its action.
    fn asking(&self, xid: Xid) -> Vec<(BranchId, String)> {
        let rows = locked(self.shard(xid));
        let of_transaction = rows.iter().filter(|((of, _), _)| *of == xid.to_bytes());
        let asking = of_transaction.filter(|(_, row)| row.state == State::Tried && row.asks);
        let branch = |((xid, branch_id), row): (&Name, &Row)| {
            Some((Key::read(xid, branch_id)?.1, row.action.as_ref().to_owned()))
        };
        asking.filter_map(branch).collect()
    }

    fn shard(&self, xid: Xid) -> &Mutex<BTreeMap<Name, Row>> {
        // Transactions of a partition have consecutive sequence numbers, so they spread evenly over the shards.
        &self.shards[usize::try_from(xid.sequence % u64::from(SHARDS)).expect("below 64")]
    }
}

fn locked(shard: &Mutex<BTreeMap<Name, Row>>) -> MutexGuard<'_, BTreeMap<Name, Row>> {
    shard.lock().expect("an action has panicked, and nobody knows what it has done")
}

impl Row {
    /// The record as a later call reads it.
    fn record(&self, now: i64) -> Record {
        let tried = self.state == State::Tried;
        Record {
            state: self.state,
            action: self.action.as_ref().to_owned(),
            payload: tried.then(|| self.payload.to_vec()),
            reply: Some(self.reply.to_vec()),
            digest: Some(self.digest.to_vec()),
            seen: 2,
            now,
        }
    }
}

impl ParticipantBuilder {
    /// Adds an action whose fence and data are in memory.
    ///
    /// # Panics
    ///
    /// As [`ParticipantBuilder::action`].
    pub fn memory_action<A: MemoryAction>(self, fence: &MemoryFence, action: A) -> Self {
        let served = InMemory { fence: fence.clone(), action };
        self.serve(<A::Contract as Contract>::NAME, Box::new(served))
    }
}

struct InMemory<A> {
    fence: MemoryFence,
    action: A,
}

type Args<A> = <<A as MemoryAction>::Contract as Contract>::Args;
type Reply<A> = <<A as MemoryAction>::Contract as Contract>::Reply;

impl<A: MemoryAction> InMemory<A> {
    fn on_try(&self, branch: &Branch, payload: &[u8]) -> Answer {
        let args = match Args::<A>::decode(payload) {
            Ok(args) => args,
            Err(error) => return unreadable::<Args<A>>(branch, &*error),
        };
        self.fence.run(branch, payload, |_| {
            let reply = self.action.on_try(branch, &args)?;
            let reply = reply.encode().map_err(TryError::Unknown)?;
            match look::too_long(&reply) {
                None => Ok(reply),
                Some(message) => Err(Answer::Unknown(format!("the reply {message}"))),
            }
        })
    }

    fn phase_two(
        &self,
        branch: &Branch,
        work: impl FnOnce(&A, &Branch, &Args<A>) -> Result<(), Failed>,
    ) -> Answer {
        self.fence.run(branch, &[], |kept| {
            let args = Args::<A>::decode(kept)
                .map_err(|_| unreadable_stored::<Args<A>>(&branch.action, kept.len()))?;
            work(&self.action, branch, &args)?;
            Ok(Bytes::new())
        })
    }
}

impl<A: MemoryAction> Served for InMemory<A> {
    fn handle<'a>(&'a self, branch: &'a Branch, payload: &'a [u8]) -> BoxFuture<'a, Answer> {
        Box::pin(async move {
            match branch.phase {
                Phase::Try => self.on_try(branch, payload),
                Phase::Confirm => self.phase_two(branch, A::on_confirm),
                Phase::Cancel => self.phase_two(branch, A::on_cancel),
            }
        })
    }

    fn content_types(&self) -> ContentTypes {
        ContentTypes::of::<Args<A>, Reply<A>>()
    }

    fn overdue<'a>(&'a self, _: &'a OverdueKey) -> BoxFuture<'a, Result<OverduePage, sqlx::Error>> {
        let branches = self.fence.overdue(<A::Contract as Contract>::NAME);
        Box::pin(async { Ok(OverduePage { branches, next: None }) })
    }

    fn expired<'a>(&'a self, _: &'a OverdueKey) -> BoxFuture<'a, Result<ExpiredPage, sqlx::Error>> {
        let branches = self.fence.expired();
        Box::pin(async { Ok(ExpiredPage { branches, next: None }) })
    }

    fn asking(&self, xid: Xid) -> BoxFuture<'_, Result<Vec<(BranchId, String)>, sqlx::Error>> {
        Box::pin(async move { Ok(self.fence.asking(xid)) })
    }

    fn close<'a>(&'a self, branch: &'a Branch) -> BoxFuture<'a, Answer> {
        Box::pin(async { self.fence.run(branch, &[], |_| Ok(Bytes::new())) })
    }

    fn clean_up(&self) -> BoxFuture<'_, Result<u64, sqlx::Error>> {
        Box::pin(async { Ok(self.fence.clean_up()) })
    }

    fn fence_id(&self) -> usize {
        Arc::as_ptr(&self.fence.forgotten_confirms).addr()
    }
}

impl fmt::Debug for MemoryFence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFence({} rows)", self.len())
    }
}
