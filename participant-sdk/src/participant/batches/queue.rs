//! The queue of one action and phase. If a worker is free when a call arrives, the call runs at once, alone. Otherwise it waits,
//! and the next free worker takes all waiting calls as one batch. If the workers take too long, one more is started.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::{Mutex, MutexGuard},
};

use tokio::sync::oneshot;

use crate::{answer::Answer, branch::Branch};

/// Branches per batch. A larger batch would hold its locks longer and save little, because it already shares a single COMMIT.
pub(super) const BATCH_MAX: usize = 64;
/// Waiting calls at a time. Above this, a call runs alone, without a batch.
const WAITING_MAX: usize = 1024;

pub(super) struct Queue {
    workers_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Running workers. While there are fewer than `workers_max`, no call waits.
    workers: usize,
    waiting: VecDeque<Waiting>,
}

/// A call that waits.
pub(super) struct Waiting {
    pub(super) branch: Branch,
    /// If this is dropped without an answer, the caller runs the call alone.
    pub(super) answer: oneshot::Sender<Answer>,
}

/// How a call that has arrived is run.
pub(super) enum Arrival {
    /// At once, by its caller. The caller counts as a worker until it calls [`Queue::next`].
    Work,
    /// In a batch. The batch sends the answer.
    Wait(oneshot::Receiver<Answer>),
    /// At once, by its caller, without counting as a worker.
    Alone,
}

impl Queue {
    pub(super) fn new(workers_max: usize) -> Self {
        Self { workers_max, state: Mutex::default() }
    }

    pub(super) fn arrive(&self, branch: &Branch) -> Arrival {
        let mut state = self.locked();
        if state.workers < self.workers_max {
            state.workers += 1;
            return Arrival::Work;
        }
        if state.waiting.len() >= WAITING_MAX {
            return Arrival::Alone;
        }
        let (answer, receiver) = oneshot::channel();
        state.waiting.push_back(Waiting { branch: branch.clone(), answer });
        Arrival::Wait(receiver)
    }

    /// The next batch for a worker that has finished. `None`: no call waits or there are too many workers, and this worker ends.
    pub(super) fn next(&self) -> Option<Vec<Waiting>> {
        let mut state = self.locked();
        // With too many workers, this worker is one that took too long and has been replaced. It ends.
        let batch = if state.workers > self.workers_max { None } else { state.batch() };
        state.workers -= usize::from(batch.is_none());
        batch
    }

    /// A batch for one extra worker, because the others take too long. `None`: no call waits.
    pub(super) fn one_more(&self) -> Option<Vec<Waiting>> {
        let mut state = self.locked();
        let batch = state.batch();
        state.workers += usize::from(batch.is_some());
        batch
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it is locked")
    }
}

impl State {
    /// Takes the first waiting calls, sorted by xid and branch id, each branch once. A repeated call stays in the queue, and the
    /// next batch answers it from the fence.
    fn batch(&mut self) -> Option<Vec<Waiting>> {
        let (mut batch, mut repeats) = (BTreeMap::new(), VecDeque::new());
        while batch.len() < BATCH_MAX
            && let Some(call) = self.waiting.pop_front()
        {
            if call.answer.is_closed() {
                continue; // its caller was dropped
            }
            match batch.entry((call.branch.xid, call.branch.branch_id.clone())) {
                Entry::Vacant(place) => drop(place.insert(call)),
                Entry::Occupied(_) => repeats.push_back(call),
            }
        }
        repeats.append(&mut self.waiting);
        self.waiting = repeats;
        (!batch.is_empty()).then(|| batch.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::branch::Phase;

    fn branch(n: u64) -> Branch {
        let xid = crate::Xid { partition: 0, epoch: 1, sequence: n, nonce: 1 };
        Branch::new(xid, "1".parse().unwrap(), "a", Phase::Confirm)
    }

    fn wait(queue: &Queue, n: u64) -> oneshot::Receiver<Answer> {
        let Arrival::Wait(answer) = queue.arrive(&branch(n)) else { panic!("{n} does not wait") };
        answer
    }

    fn next(queue: &Queue) -> Option<Vec<u64>> {
        let batch = queue.next()?;
        Some(batch.iter().map(|waiting| waiting.branch.xid.sequence).collect())
    }

    #[test]
    fn a_call_that_finds_a_free_worker_runs_at_once_and_the_others_run_as_a_batch() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Work));
        let _answers = [3, 1, 2].map(|n| wait(&queue, n));
        assert_eq!(next(&queue), Some(vec![1, 2, 3]));
        let _answer = wait(&queue, 4); // while the batch is running
        assert_eq!(next(&queue), Some(vec![4]));
        assert_eq!(next(&queue), None);
        assert!(matches!(queue.arrive(&branch(5)), Arrival::Work));
    }

    #[test]
    fn a_call_whose_caller_was_dropped_is_left_out_and_a_repeat_waits_for_the_next_batch() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Work));
        let [first, gone, ..] = [1, 2].map(|n| wait(&queue, n));
        let (_repeat, _other) = (wait(&queue, 1), wait(&queue, 3));
        drop(gone);
        assert_eq!(next(&queue), Some(vec![1, 3]));
        assert_eq!(next(&queue), Some(vec![1]));
        assert_eq!(next(&queue), None);
        drop(first);
    }

    #[test]
    fn a_worker_that_takes_too_long_is_replaced_and_ends_when_it_is_done() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Work));
        assert!(queue.one_more().is_none());
        let _answer = wait(&queue, 1);
        assert_eq!(queue.one_more().map(|batch| batch.len()), Some(1));
        let _answer = wait(&queue, 2);
        assert_eq!(next(&queue), None, "the other worker is still running");
        assert_eq!(next(&queue), Some(vec![2]));
        assert_eq!(next(&queue), None);
        assert!(matches!(queue.arrive(&branch(3)), Arrival::Work));
    }

    #[test]
    fn batches_and_the_queue_are_bounded() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(0)), Arrival::Work));
        let waiting = u64::try_from(WAITING_MAX).unwrap();
        let _answers: Vec<_> = (1..=waiting).map(|n| wait(&queue, n)).collect();
        assert!(matches!(queue.arrive(&branch(waiting + 1)), Arrival::Alone));
        for _ in 0..WAITING_MAX / BATCH_MAX {
            assert_eq!(next(&queue).map(|batch| batch.len()), Some(BATCH_MAX));
        }
        assert_eq!(next(&queue), None);
    }
}
