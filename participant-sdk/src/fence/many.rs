//! Several Confirms, or several Cancels, in one local transaction.
//!
//! Here only what is common is done: a branch whose row is there and free, and whose work must run or was done before. All else (a row that
//! is not there, that somebody else holds, or that says no) is left to [`Fence::run`], which has an answer for everything. So is every
//! branch whose local transaction failed: it is rolled back whole, and who is to blame is found one by one. The table of verdicts is the
//! same, and so is the rule that what is answered done is durable.

use std::{sync::atomic::Ordering, time::Instant};

use bytes::Bytes;
use handfast_proto::crash_point;
use tracing::Instrument as _;

use super::{
    Fence,
    db::{FenceDb, Key, Settle},
    log, look,
    look::Look,
    tx::Tx,
    verdict::Verdict,
};
use crate::{
    answer::Answer,
    async_func::AsyncFunc,
    branch::{Branch, Phase},
    error::{Failed, chain},
};

/// Where in the batch a branch is whose work must run, and what its Try got.
pub(crate) type ToRun = Vec<(usize, Bytes)>;

impl<DB: FenceDb> Fence<DB> {
    /// As [`Fence::run`] for each of these calls: all of this phase, which is not Try, and each for another branch. `work` is for those
    /// together that must run. `None` in place of an answer: nothing was done for this call, and it must be run by itself.
    ///
    /// # Cancel safety
    ///
    /// As [`Fence::run`], for all of them at once.
    pub(crate) async fn run_many<F>(
        &self,
        phase: Phase,
        branches: &[Branch],
        work: F,
    ) -> Vec<Option<Answer>>
    where
        F: for<'t> AsyncFunc<(&'t mut Tx<DB>, ToRun), Result<(), Failed>, Future: Send>,
    {
        let began = Instant::now();
        let span = tracing::info_span!("branches", phase = %phase, count = branches.len());
        let done = self.attempt_many(phase, branches, work).instrument(span).await;
        for (branch, done) in branches.iter().zip(&done) {
            if let Some((verdict, answer)) = done {
                log::log(branch, *verdict, answer, began.elapsed());
            }
        }
        done.into_iter().map(|done| done.map(|(_, answer)| answer)).collect()
    }

    /// One local transaction, from BEGIN to COMMIT or ROLLBACK.
    async fn attempt_many<F>(
        &self,
        phase: Phase,
        branches: &[Branch],
        work: F,
    ) -> Vec<Option<(Option<Verdict>, Answer)>>
    where
        F: for<'t> AsyncFunc<(&'t mut Tx<DB>, ToRun), Result<(), Failed>>,
    {
        let mut tx = match Tx::begin(&self.pool).await {
            Ok(tx) => tx,
            Err(error) => {
                // By themselves they would have to wait as long again.
                let answer = Answer::failed(phase, chain(&error));
                return branches.iter().map(|_| Some((None, answer.clone()))).collect();
            }
        };
        let verdicts = match self.within_many(&mut tx, phase, branches, work).await {
            Ok(verdicts) => verdicts,
            Err(failed) => {
                tx.rollback().await;
                self.failed_batches.fetch_add(1, Ordering::Relaxed);
                // Whoever is to blame says so again when it is alone. But two batches that disturbed each other are seen only here.
                let (branches, error) = (
                    branches.len(),
                    match failed {
                        Failed::Retry(error) => chain(&*error),
                        // Its text may name a customer.
                        Failed::NeedsAttention(_) => "one needs attention".to_owned(),
                    },
                );
                tracing::warn!(%phase, branches, error, "a batch failed; its branches go one by one");
                return vec![None; branches];
            }
        };
        crash_point!("fence.before_commit");
        let answer = match tx.commit().await {
            Ok(()) => Answer::Done(Bytes::new()),
            Err(error) => Answer::failed(phase, chain(&error)),
        };
        crash_point!("fence.after_commit");
        let answered = |verdict: Verdict| (Some(verdict), answer.clone());
        verdicts.into_iter().map(|verdict| verdict.map(answered)).collect()
    }

    /// The three steps inside the local transaction. `None` instead of a verdict: this one must go by itself.
    async fn within_many<F>(
        &self,
        tx: &mut Tx<DB>,
        phase: Phase,
        branches: &[Branch],
        work: F,
    ) -> Result<Vec<Option<Verdict>>, Failed>
    where
        F: for<'t> AsyncFunc<(&'t mut Tx<DB>, ToRun), Result<(), Failed>>,
    {
        let keys: Vec<_> = branches.iter().map(Key::of).collect();
        let records = DB::find_many(tx, &keys).await?;
        let mut looks: Vec<_> = (branches.iter().zip(records))
            .map(|(branch, record)| Some(Look::of_phase_two(branch, record?, self.retention)))
            // Of the others the row says now that one more call came, and soon will say so of the same call again. No matter.
            .map(|look| look.filter(|look| matches!(look.verdict, Verdict::Run | Verdict::Repeat)))
            .collect();
        let to_run: ToRun = (looks.iter_mut().enumerate())
            .filter_map(|(n, look)| Some((n, look.as_mut().filter(|look| look.runs())?)))
            .map(|(n, look)| (n, look.take_payload(phase, &[])))
            .collect();
        if !to_run.is_empty() {
            crash_point!("fence.entered");
            work((tx, to_run)).await?;
            let settles: Vec<Settle<'_>> = (looks.iter().flatten())
                .filter(|look| look.runs())
                .map(|look| look.settled(phase, &[]))
                .collect();
            look::write_many::<DB>(tx, &settles).await?;
        }
        Ok(looks.into_iter().map(|look| Some(look?.verdict)).collect())
    }
}

impl Look {
    fn runs(&self) -> bool {
        self.verdict == Verdict::Run
    }
}
