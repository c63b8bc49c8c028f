//! Finds a call's row in the fence, decides what to do, and writes the result to the row.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use handfast_proto::{limits, reason, time::timestamp};
use sha2::{Digest as _, Sha256};
use sqlx::Error;

use super::{
    Fence,
    clean_up::EXPIRY_MARGIN,
    db::{Claim, FenceDb, Key, Record, Settle},
    millis, tx,
    verdict::{State, Verdict, verdict},
};
use crate::{
    answer::Answer,
    branch::{Branch, Phase},
    error::Refusal,
};

/// The row of a call, and the verdict. The row stays locked until the local transaction ends.
pub(crate) struct Look {
    pub(crate) verdict: Verdict,
    key: Key,
    /// The row, including this call in its count. `None`: a Confirm found no row.
    record: Option<Record>,
    /// The time in the database.
    now: i64,
}

impl<DB: FenceDb> Fence<DB> {
    /// Locks the row, and decides on the verdict.
    pub(crate) async fn look(
        &self,
        connection: &mut DB::Connection,
        branch: &Branch,
        payload: &[u8],
    ) -> Result<Look, Error> {
        let key = Key::of(branch);
        let digest = digest(&branch.action, payload);
        let empty_rollback = Claim {
            key: &key,
            state: State::Suspended,
            action: &branch.action,
            payload: None,
            digest: None,
            expires_at: branch.expires_at,
            asks: None,
        };
        let record = match branch.phase {
            Phase::Try => {
                let (payload, digest) = (Some(payload), Some(&digest[..]));
                let asks = branch.at_decision.then_some(1);
                let claim = Claim { state: State::Tried, payload, digest, asks, ..empty_rollback };
                Some(DB::claim(connection, &claim).await?)
            }
            Phase::Confirm => DB::find(connection, &key).await?,
            Phase::Cancel => Some(DB::claim(connection, &empty_rollback).await?),
        };
        let now = match &record {
            Some(record) => record.now,
            None => DB::now(connection).await?,
        };
        let look = Look::new(branch, &digest, record, now, self.retention);
        if look.verdict == Verdict::Forgotten {
            self.forgotten_confirms.fetch_add(1, Ordering::Relaxed);
        }
        Ok(look)
    }
}

impl Look {
    /// Decides on a Confirm or Cancel whose row exists.
    pub(crate) fn of_phase_two(branch: &Branch, record: Record, retention: Duration) -> Self {
        let now = record.now;
        Self::new(branch, &[0; 32], Some(record), now, retention)
    }

    /// Decides. `record` is the row that this call found or inserted. `digest` covers this call's action and payload, if it is a
    /// Try.
    pub(crate) fn new(
        branch: &Branch,
        digest: &[u8; 32],
        record: Option<Record>,
        now: i64,
        retention: Duration,
    ) -> Self {
        // If the count is 1, this call has inserted the row.
        let before = record.as_ref().filter(|record| record.seen > 1);
        let same = before.is_none_or(|record| match branch.phase {
            Phase::Try => record.digest.as_deref() == Some(&digest[..]),
            Phase::Confirm | Phase::Cancel => record.action == branch.action,
        });
        let late = branch.expires_at.is_some_and(|expires_at| match branch.phase {
            Phase::Try => now >= expires_at,
            Phase::Confirm => now >= horizon(expires_at, retention),
            Phase::Cancel => false,
        });
        let verdict = verdict(before.map(|record| record.state), branch.phase, same, late);
        Self { verdict, key: Key::of(branch), record, now }
    }

    /// The answer, if the verdict is not to run the work. `None`: run it.
    pub(crate) fn answer(&self, branch: &Branch) -> Option<Answer> {
        let Branch { xid, branch_id, action, phase, .. } = branch;
        let answer = match self.verdict {
            Verdict::Run => return None,
            Verdict::Repeat => {
                let reply = self.record.as_ref().and_then(|record| record.reply.clone());
                let reply = reply.filter(|_| *phase == Phase::Try);
                Answer::Done(reply.unwrap_or_default().into())
            }
            Verdict::EmptyRollback | Verdict::Forgotten => Answer::Done(Bytes::new()),
            Verdict::CancelledBefore => too_late(
                reason::CANCELLED_BEFORE,
                format!("branch {branch_id} of {xid} was tried and cancelled before"),
            ),
            Verdict::Suspension => too_late(
                reason::CANCELLED_BEFORE,
                format!("branch {branch_id} of {xid} was cancelled before its Try came"),
            ),
            Verdict::Expired => too_late(reason::EXPIRED, self.how_late(branch)),
            Verdict::Differs => {
                let tried = self.record.as_ref().map_or("", |record| record.action.as_str());
                let other = if tried == action { "payload" } else { "action" };
                refused(
                    reason::PAYLOAD_DIFFERS,
                    format!(
                        "branch {branch_id} of {xid} was tried as {tried}, and this {phase} comes with another {other}. A branch \
                         id names one call and its repeats; a new call needs a new one"
                    ),
                )
            }
            Verdict::NeverTried => refused(
                reason::NEVER_TRIED,
                format!(
                    "no Try of branch {branch_id} of {xid} is recorded in this database, so there is nothing to confirm. Did the \
                     Try go to another one?"
                ),
            ),
            Verdict::OppositeDone => {
                let done = if *phase == Phase::Cancel { "confirmed" } else { "cancelled" };
                refused(
                    reason::OPPOSITE_DONE,
                    format!("branch {branch_id} of {xid} was {done} before; {phase} is asked for"),
                )
            }
        };
        Some(answer)
    }

    /// The usual cause is a difference between clocks. So the text says how late the call is, and by which clock.
    fn how_late(&self, branch: &Branch) -> String {
        let expires_at = branch.expires_at.unwrap_or(self.now);
        format!(
            "phase one ended at {}, and by the clock of the participant's database it is {}: this Try came {:?} late. If it came \
             in time, that clock differs from the coordinator's",
            timestamp(expires_at),
            timestamp(self.now),
            Duration::from_millis(self.now.abs_diff(expires_at))
        )
    }

    /// The payload for the work: the payload of the branch's Try.
    pub(crate) fn take_payload(&mut self, phase: Phase, asked: &[u8]) -> Bytes {
        match phase {
            Phase::Try => Bytes::copy_from_slice(asked),
            Phase::Confirm | Phase::Cancel => {
                let kept = self.record.as_mut().and_then(|record| record.payload.take());
                kept.unwrap_or_default().into()
            }
        }
    }

    /// Records that the work of this phase is done. A Try without a reply writes too; see [`write`].
    pub(crate) async fn settle<DB: FenceDb>(
        &self,
        connection: &mut DB::Connection,
        phase: Phase,
        reply: &[u8],
    ) -> Result<(), Error> {
        tx::write::<DB>(connection, &self.settled(phase, reply)).await
    }

    /// The changes to the row once the work of this phase is done.
    pub(crate) fn settled<'a>(&'a self, phase: Phase, reply: &'a [u8]) -> Settle<'a> {
        let (state, reply) = match phase {
            Phase::Try => (State::Tried, Some(reply)),
            Phase::Confirm => (State::Confirmed, None),
            Phase::Cancel => (State::Cancelled, None),
        };
        Settle { key: &self.key, state, reply, seen: self.seen() }
    }

    /// Records that no later Try may take effect.
    pub(crate) async fn suspend<DB: FenceDb>(
        &self,
        connection: &mut DB::Connection,
    ) -> Result<(), Error> {
        let (state, reply) = (State::Suspended, None);
        tx::write::<DB>(connection, &Settle { key: &self.key, state, reply, seen: self.seen() })
            .await
    }

    fn seen(&self) -> i64 {
        self.record.as_ref().map_or(0, |record| record.seen)
    }
}

/// When the row of a branch that expired at `expires_at` may have been cleaned up. Before that time, a missing row means that
/// there was no Try.
fn horizon(expires_at: i64, retention: Duration) -> i64 {
    expires_at.saturating_add(millis(EXPIRY_MARGIN)).saturating_add(millis(retention))
}

fn refused(reason: &str, message: String) -> Answer {
    Answer::Refused(Refusal::of_handfast(reason, message))
}

fn too_late(reason: &str, message: String) -> Answer {
    Answer::TooLate(Refusal::of_handfast(reason, message))
}

/// The error text for a payload or reply that is too long for a row.
pub(crate) fn too_long(bytes: &[u8]) -> Option<String> {
    let max = limits::PAYLOAD_BYTES_MAX;
    (bytes.len() > max).then(|| format!("has {} bytes; at most {max} are kept", bytes.len()))
}

/// SHA-256 of action and payload. The action's length comes first, so that different pairs never have the same input bytes.
pub(crate) fn digest(action: &str, payload: &[u8]) -> [u8; 32] {
    let action_bytes = u64::try_from(action.len()).expect("a length in memory fits 64 bits");
    let digest = Sha256::new().chain_update(action_bytes.to_be_bytes());
    digest.chain_update(action).chain_update(payload).finalize().into()
}
