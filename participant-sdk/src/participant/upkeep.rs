//! What a participant does regularly while it is served: it cleans up its fences, and inquires about overdue
//! reservations.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tracing::warn;

use super::{Participant, asking::Nudges};
use crate::{fence, rpc::Handfast};

/// How often upkeep takes place, unless [`ParticipantBuilder::upkeep_every`](crate::ParticipantBuilder::upkeep_every) sets another
/// interval.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// A shorter interval would keep the database busy all the time.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// The first upkeep takes place within this time, so that a program that restarts often gets to it. It is a random moment, so that
/// programs that are started together do not all do it at once.
const FIRST_WITHIN: Duration = Duration::from_secs(60);

/// The upkeep of a participant. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Upkeep {
    pub(super) handfast: Handfast,
    pub(super) nudges: Nudges,
    /// `None`: the program does it itself.
    interval: Option<Duration>,
    /// `None` until the participant is served.
    task: Option<Arc<Task>>,
}

/// Ends when the last clone of the served participant is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Upkeep {
    pub(crate) fn new(handfast: Handfast, interval: Option<Duration>) -> Self {
        let interval = interval.map(|interval| interval.max(INTERVAL_MIN));
        let nudges = Nudges::default();
        Self { handfast, nudges, interval, task: None }
    }
}

impl Participant {
    /// Starts the upkeep, if the coordinator is known.
    pub(super) fn with_upkeep(mut self) -> Self {
        // The task's own clone does not keep the task alive.
        let participant = Self { upkeep: None, ..self.clone() };
        if let Some(Upkeep { handfast, interval: Some(interval), task, .. }) = &mut self.upkeep {
            let (handfast, interval) = (handfast.clone(), *interval);
            let first = FIRST_WITHIN.min(interval).mul_f64(rand::random());
            *task = Some(Arc::new(Task(tokio::spawn(async move {
                let keeping_up = async {
                    tokio::time::sleep(first).await;
                    loop {
                        participant.keep_up(&handfast).await;
                        tokio::time::sleep(interval).await;
                    }
                };
                tokio::join!(keeping_up, participant.ask_for_ever(&handfast));
            }))));
        }
        self
    }

    async fn keep_up(&self, handfast: &Handfast) {
        let mut cleaned = BTreeSet::new();
        for served in self.actions.values() {
            if cleaned.insert(served.fence_id()) {
                fence::log_clean_up(&served.clean_up().await);
            }
        }
        // Last, because it may wait for the coordinator.
        self.inquire_and_log(handfast).await;
    }

    pub(super) async fn inquire_and_log(&self, handfast: &Handfast) {
        if let Err(error) = self.inquire(handfast).await {
            warn!(%error, "cannot ask about overdue reservations; will retry");
        }
    }
}
