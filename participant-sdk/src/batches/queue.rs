//! Who waits for whom. Calls of one action and phase that come while others of the same are being worked on wait, and go together when
//! those are done. A call that finds nobody at work goes at once, alone; and whoever is at work for too long is not waited for.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::{Mutex, MutexGuard},
};

use tokio::sync::oneshot;

use crate::{answer::Answer, branch::Branch};

/// Branches of one local transaction. More of them would hold their locks for longer and save little: what is shared is one COMMIT.
pub(super) const BATCH_MAX: usize = 64;
/// Calls that wait. Who comes when there are so many goes alone, as if there were no batches.
const WAITING_MAX: usize = 1024;

pub(super) struct Queue {
    /// How many turns there are.
    turns_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How many turns are taken. While one is free, nobody waits.
    turns: usize,
    waiting: VecDeque<Waiting>,
}

/// A call that waits.
pub(super) struct Waiting {
    pub(super) branch: Branch,
    /// Dropped without an answer: the call goes alone.
    pub(super) answer: oneshot::Sender<Answer>,
}

/// What a call does that has come.
pub(super) enum Arrival {
    /// It goes at once and has a turn, which ends with [`Queue::next`].
    Turn,
    /// It waits for its answer.
    Wait(oneshot::Receiver<Answer>),
    /// It goes at once. Nobody waits for it.
    Alone,
}

impl Queue {
    pub(super) fn new(turns_max: usize) -> Self {
        Self { turns_max, state: Mutex::default() }
    }

    pub(super) fn arrive(&self, branch: &Branch) -> Arrival {
        let mut state = self.locked();
        if state.turns < self.turns_max {
            state.turns += 1;
            return Arrival::Turn;
        }
        if state.waiting.len() >= WAITING_MAX {
            return Arrival::Alone;
        }
        let (answer, receiver) = oneshot::channel();
        state.waiting.push_back(Waiting { branch: branch.clone(), answer });
        Arrival::Wait(receiver)
    }

    /// Ends a turn. If calls wait, it goes on with the first of them.
    pub(super) fn next(&self) -> Option<Vec<Waiting>> {
        let mut state = self.locked();
        // One that was overtaken has its end.
        let batch = if state.turns > self.turns_max { None } else { state.batch() };
        state.turns -= usize::from(batch.is_none());
        batch
    }

    /// Begins one more turn with those who wait, if there are any: those who have one take too long.
    pub(super) fn overtake(&self) -> Option<Vec<Waiting>> {
        let mut state = self.locked();
        let batch = state.batch();
        state.turns += usize::from(batch.is_some());
        batch
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it is locked")
    }
}

impl State {
    /// The first of those who wait, in the order of their names, each branch once. A repeat of a call in the batch stays, for the next one,
    /// where it finds the work done.
    fn batch(&mut self) -> Option<Vec<Waiting>> {
        let (mut batch, mut repeats) = (BTreeMap::new(), VecDeque::new());
        while batch.len() < BATCH_MAX
            && let Some(call) = self.waiting.pop_front()
        {
            if call.answer.is_closed() {
                continue; // its caller has gone away
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
    fn who_finds_nobody_at_work_goes_at_once_and_the_others_go_together() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Turn));
        let _answers = [3, 1, 2].map(|n| wait(&queue, n));
        assert_eq!(next(&queue), Some(vec![1, 2, 3]));
        let _answer = wait(&queue, 4); // while those are worked on
        assert_eq!(next(&queue), Some(vec![4]));
        assert_eq!(next(&queue), None);
        assert!(matches!(queue.arrive(&branch(5)), Arrival::Turn));
    }

    #[test]
    fn who_has_gone_away_is_left_out_and_a_repeat_waits_for_the_next_batch() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Turn));
        let [first, gone, ..] = [1, 2].map(|n| wait(&queue, n));
        let (_repeat, _other) = (wait(&queue, 1), wait(&queue, 3));
        drop(gone);
        assert_eq!(next(&queue), Some(vec![1, 3]));
        assert_eq!(next(&queue), Some(vec![1]));
        assert_eq!(next(&queue), None);
        drop(first);
    }

    #[test]
    fn who_takes_too_long_is_overtaken_and_there_are_no_more_turns_for_it_in_the_end() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(9)), Arrival::Turn));
        assert!(queue.overtake().is_none());
        let _answer = wait(&queue, 1);
        assert_eq!(queue.overtake().map(|batch| batch.len()), Some(1));
        let _answer = wait(&queue, 2);
        assert_eq!(next(&queue), None, "one is at work still");
        assert_eq!(next(&queue), Some(vec![2]));
        assert_eq!(next(&queue), None);
        assert!(matches!(queue.arrive(&branch(3)), Arrival::Turn));
    }

    #[test]
    fn batches_and_the_queue_are_bounded() {
        let queue = Queue::new(1);
        assert!(matches!(queue.arrive(&branch(0)), Arrival::Turn));
        let waiting = u64::try_from(WAITING_MAX).unwrap();
        let _answers: Vec<_> = (1..=waiting).map(|n| wait(&queue, n)).collect();
        assert!(matches!(queue.arrive(&branch(waiting + 1)), Arrival::Alone));
        for _ in 0..WAITING_MAX / BATCH_MAX {
            assert_eq!(next(&queue).map(|batch| batch.len()), Some(BATCH_MAX));
        }
        assert_eq!(next(&queue), None);
    }
}
