//! Several Confirms, or several Cancels, in one local transaction.
//!
//! A batch handles only the common case: the branch's row exists and is not locked, and its work must run or was done before.
//! All other branches go to [`Fence::run`]: those without a row, with a locked row, or with a verdict that refuses. If the local
//! transaction of a batch fails, it is rolled back, and each of its branches runs alone. Batches use the same table of verdicts.
//! A branch is answered "done" only once that is durable.

use std::{sync::atomic::Ordering, time::Instant};

use bytes::Bytes;
use handfast_proto::crash_point;
use tracing::Instrument as _;

use super::{
    Fence,
    db::{FenceDb, Key, Settle},
    log,
    look::Look,
    tx::{self, Tx},
    verdict::Verdict,
};
use crate::{
    answer::Answer,
    async_func::AsyncFunc,
    branch::{Branch, Phase},
    error::{Failed, chain},
};

/// The branches whose work must run: the position in the batch, and the payload of the branch's Try.
pub(crate) type ToRun = Vec<(usize, Bytes)>;

impl<DB: FenceDb> Fence<DB> {
    /// As [`Fence::run`] for each of these calls. They are all Confirm or all Cancel, each for a different branch. `work` gets
    /// all branches that must run. An answer of `None` means that nothing was done for this call; it must run alone.
    ///
    /// # Cancel safety
    ///
    /// As [`Fence::run`], for the whole batch.
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
                log::log(branch, *verdict, answer, began.elapsed(), &self.log_labels);
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
                // Run alone, each call would wait just as long again. So all of them fail now.
                let answer = Answer::failed(phase, chain(&error));
                return branches.iter().map(|_| Some((None, answer.clone()))).collect();
            }
        };
        let verdicts = match self.within_many(&mut tx, phase, branches, work).await {
            Ok(verdicts) => verdicts,
            Err(failed) => {
                if let Failed::Retry(error) = &failed
                    && let Some(error) = error.downcast_ref()
                {
                    tx.rollback_after(error).await;
                } else {
                    // Each branch runs alone, and finds out whether something was committed.
                    drop(tx.rollback().await);
                }
                self.failed_batches.fetch_add(1, Ordering::Relaxed);
                // A failing branch logs its error again when it runs alone. Batches that block each other are visible only here.
                let (branches, error) = (
                    branches.len(),
                    match failed {
                        Failed::Retry(error) => chain(&*error),
                        // The error's text may contain a customer's name.
                        Failed::NeedsAttention(_) => "one needs attention".to_owned(),
                    },
                );
                tracing::warn!(%phase, branches, error, "batch failed; its branches are run alone");
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

    /// The three steps inside the local transaction. A verdict of `None` means that this branch must run alone.
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
            // The other branches' rows have counted this call, and count it again when it runs alone. That is harmless.
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
            tx::write_many::<DB>(tx, &settles).await?;
        }
        Ok(looks.into_iter().map(|look| Some(look?.verdict)).collect())
    }
}

impl Look {
    fn runs(&self) -> bool {
        self.verdict == Verdict::Run
    }
}
