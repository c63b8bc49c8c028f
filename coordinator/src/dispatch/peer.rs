//! One participant, identified by its addresses: how many calls it gets at a time, and whether it answers at all.
//!
//! Each action has its own [`Lane`], so that an action that hangs delays only itself. All lanes share the slots of the
//! participant. One lane may hold most of the slots, but not all. Each lane also has one slot that no other lane can take.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Hurry, Later,
    breaker::Breaker,
    lane::{Lane, QUEUE_MAX},
    servers::Servers,
};
use crate::transaction::Timestamp;

/// Actions of one participant that have their own lane. Further actions share one.
const LANES_MAX: usize = 32;
/// Calls that may wait for one participant. An action may fill what is left of these places, and always has [`QUEUE_MIN`].
const QUEUES_MAX: usize = 2 * QUEUE_MAX;
/// Places in the queue that every action has.
const QUEUE_MIN: usize = 16;
/// The name of the shared lane. No action has an empty name.
const OTHERS: &str = "";

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) servers: Arc<Servers>,
    /// Slots that all lanes share.
    slots: Arc<Semaphore>,
    calls_max: usize,
    lanes: Mutex<BTreeMap<String, Arc<Lane>>>,
    breaker: Mutex<Breaker>,
    /// Calls that wait or are in flight.
    held: AtomicUsize,
    /// When the latest call was submitted, in milliseconds since 1970.
    used_at: AtomicI64,
}

/// A call's place in the queue. Gives it back when dropped.
#[derive(Debug)]
pub(super) struct QueuePlace {
    peer: Arc<Peer>,
    lane: Arc<Lane>,
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.lane.leave();
        self.peer.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The permit to be in flight. Given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    _of_lane: OwnedSemaphorePermit,
    _slot: OwnedSemaphorePermit,
}

impl QueuePlace {
    /// Waits until the call may be made.
    pub(super) async fn permit(&self) -> Permit {
        let of_lane = self.lane.permit().await;
        let slot = tokio::select! {
            biased;
            own = self.lane.own_slot() => own,
            shared = self.peer.slots.clone().acquire_owned() => shared.expect("never closed"),
        };
        Permit { _of_lane: of_lane, _slot: slot }
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Peer {
    /// `calls_max`: calls in flight, in addition to one for each action.
    pub(super) fn new(servers: Servers, calls_max: usize) -> Self {
        Self {
            servers: Arc::new(servers),
            slots: Arc::new(Semaphore::new(calls_max)),
            calls_max,
            lanes: Mutex::default(),
            breaker: Mutex::default(),
            held: AtomicUsize::new(0),
            used_at: AtomicI64::new(0),
        }
    }

    /// Whether the participant has had no call for `length`.
    pub(super) fn is_idle(&self, now: Timestamp, length: Duration) -> bool {
        let used_at = Timestamp(self.used_at.load(Ordering::Relaxed));
        self.held.load(Ordering::Relaxed) == 0 && now - used_at >= length
    }

    /// Takes a place in the queue of an action. A call that an operator asked for ignores the breaker.
    pub(super) fn enter(
        self: &Arc<Self>,
        action: &str,
        now: Timestamp,
        hurry: Hurry,
    ) -> Result<QueuePlace, Later> {
        let lane = self.lane(action);
        let left = QUEUES_MAX.saturating_sub(self.held.load(Ordering::Relaxed));
        lane.enter(left.clamp(QUEUE_MIN, QUEUE_MAX), || {
            let mut breaker = self.breaker.lock().expect("nothing panics while it is locked");
            match hurry {
                Hurry::Yes => Ok(()),
                Hurry::No => breaker.admit(now),
            }
        })?;
        self.held.fetch_add(1, Ordering::Relaxed);
        self.used_at.fetch_max(now.0, Ordering::Relaxed);
        Ok(QueuePlace { peer: self.clone(), lane })
    }

    fn lane(&self, action: &str) -> Arc<Lane> {
        let mut lanes = self.lanes.lock().expect("nothing panics while it is locked");
        if let Some(lane) = lanes.get(action) {
            return lane.clone();
        }
        if lanes.len() >= LANES_MAX {
            lanes.retain(|_, lane| !lane.is_idle());
        }
        let action = if lanes.len() < LANES_MAX { action } else { OTHERS };
        let new = || Arc::new(Lane::new(self.calls_max));
        lanes.entry(action.to_owned()).or_insert_with(new).clone()
    }

    /// A call was answered, with whatever result.
    pub(super) fn answered(&self) {
        self.breaker.lock().expect("nothing panics while it is locked").answered();
    }

    /// A call found no connection, or its connection broke.
    pub(super) fn not_reached(&self, now: Timestamp) {
        self.breaker.lock().expect("nothing panics while it is locked").not_reached(now);
    }

    /// A call passed its deadline. That shows that the action is slow, but says nothing about the participant.
    pub(super) fn timed_out(&self) {
        self.breaker.lock().expect("nothing panics while it is locked").timed_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{address::Addresses, servers::Tcp};

    fn peer(calls_max: usize) -> Arc<Peer> {
        let addresses: Addresses = "http://127.0.0.1:1".parse().unwrap();
        Arc::new(Peer::new(Servers::new(addresses, Arc::new(Tcp), true), calls_max))
    }

    async fn is_turned_away(place: &QueuePlace) -> bool {
        tokio::time::timeout(Duration::from_millis(10), place.permit()).await.is_err()
    }

    #[tokio::test]
    async fn actions_that_hang_leave_slots_to_the_others() {
        let peer = peer(8);
        let enter = |action: &str| peer.enter(action, Timestamp(0), Hurry::No).unwrap();
        let mut hanging = Vec::new();
        for action in ["a", "b", "c", "d", "e"] {
            let places: Vec<_> = (0..20).map(|_| enter(action)).collect();
            for place in &places {
                match tokio::time::timeout(Duration::from_millis(1), place.permit()).await {
                    Ok(permit) => hanging.push(permit),
                    Err(_) => break,
                }
            }
            // A later call of another action still gets its permit, and so does the next one.
            for _ in 0..3 {
                let place = enter("quick");
                assert!(!is_turned_away(&place).await, "{action} hangs");
            }
            std::mem::forget(places);
        }
        assert!(hanging.len() <= 8 + 5, "{} at a time", hanging.len());
    }

    #[tokio::test]
    async fn one_action_uses_most_of_the_slots_and_no_more() {
        let peer = peer(8);
        let places: Vec<_> =
            (0..20).map(|_| peer.enter("a", Timestamp(0), Hurry::No).unwrap()).collect();
        let mut permits = Vec::new();
        for place in &places[..6] {
            permits.push(place.permit().await);
        }
        assert!(is_turned_away(&places[6]).await, "six of eight");
        permits.pop();
        assert!(!is_turned_away(&places[6]).await);
    }

    #[test]
    fn actions_that_hang_leave_room_in_the_queue_to_the_others() {
        let peer = peer(8);
        let mut places = Vec::new();
        for n in 0..LANES_MAX {
            let before = places.len();
            while let Ok(place) = peer.enter(&n.to_string(), Timestamp(0), Hurry::No) {
                places.push(place);
            }
            assert!(places.len() - before >= QUEUE_MIN, "{n}");
        }
        assert!(places.len() <= QUEUES_MAX + LANES_MAX * (8 + QUEUE_MIN), "{}", places.len());
    }

    #[test]
    fn actions_without_number_share_a_lane() {
        let peer = peer(8);
        let places: Vec<_> = (0..1000)
            .map(|n| peer.enter(&format!("action {n}"), Timestamp(0), Hurry::No).unwrap())
            .collect();
        assert_eq!(peer.lanes.lock().unwrap().len(), LANES_MAX + 1);
        assert!(!peer.is_idle(Timestamp(10_000), Duration::from_secs(1)));
        drop(places);
        assert!(peer.is_idle(Timestamp(10_000), Duration::from_secs(1)));
        assert!(!peer.is_idle(Timestamp(10_000), Duration::from_secs(11)));
        drop(peer.enter("one more", Timestamp(0), Hurry::No).unwrap());
        assert_eq!(peer.lanes.lock().unwrap().len(), 1, "those that nobody uses are gone");
    }
}
