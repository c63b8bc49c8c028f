//! Idempotency keys: a repeated key finds the same transaction. The keys of transactions in memory are known here. Other keys
//! are looked up in the store. One read takes all keys that wait, and no key is in two reads at a time. Callers with the same
//! key wait for the same read, so two Begins with one key never make two transactions.

use std::collections::BTreeMap;

use handfast_proto::Xid;

use super::{Answer, Ask, Error, Partition, ReadResult, Reply, Until, What, answer_now};
use crate::{
    store,
    transaction::{GlobalTransaction, Key, NewTransaction},
};

/// Keys in one read.
const KEYS_MAX: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Keys {
    /// The keys of transactions in memory.
    known: BTreeMap<[u8; 32], Xid>,
    /// The keys that are being read or wait to be read, with the callers that wait for each.
    wanted: BTreeMap<[u8; 32], Vec<KeyAsk>>,
    /// The keys of `wanted` that are not being read yet.
    queue: Vec<[u8; 32]>,
    read_in_flight: bool,
    /// How many callers wait.
    waiting: usize,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly all of them are the large one")]
enum KeyAsk {
    Begin { key: Key, new: NewTransaction, until: Until, reply: Reply },
    Find { reply: Reply },
}

impl KeyAsk {
    fn is_gone(&self) -> bool {
        match self {
            Self::Begin { reply, .. } | Self::Find { reply } => reply.is_closed(),
        }
    }

    fn into_reply(self) -> Reply {
        match self {
            Self::Begin { reply, .. } | Self::Find { reply } => reply,
        }
    }
}

impl Keys {
    /// Notes the key of a transaction that has entered memory.
    pub(super) fn known(&mut self, global: &GlobalTransaction) {
        if let Some(key) = global.key {
            // Keep an existing entry. This may be an old transaction read from the store whose key has expired and belongs to a
            // newer one.
            self.known.entry(key.hash).or_insert(global.xid);
        }
    }

    /// Forgets the key of a transaction that has left memory.
    pub(super) fn left(&mut self, global: &GlobalTransaction) {
        if let Some(key) = global.key
            && self.known.get(&key.hash) == Some(&global.xid)
        {
            self.known.remove(&key.hash);
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Forgets callers that have given up, and keys without callers. If such a key is being read, the result is ignored.
    pub(super) fn forget_gone(&mut self) {
        self.wanted.retain(|_, asks| {
            let before = asks.len();
            asks.retain(|ask| !ask.is_gone());
            self.waiting -= before - asks.len();
            !asks.is_empty()
        });
        self.queue.retain(|hash| self.wanted.contains_key(hash));
    }

    pub(super) fn end(&mut self, why: &Error) {
        self.waiting = 0;
        for ask in std::mem::take(&mut self.wanted).into_values().flatten() {
            answer_now(ask.into_reply(), Err(why.clone()));
        }
        self.known.clear();
        self.queue.clear();
    }

    fn want(&mut self, hash: [u8; 32], ask: KeyAsk) {
        let asks = self.wanted.entry(hash).or_default();
        if asks.is_empty() {
            self.queue.push(hash);
        }
        asks.push(ask);
        self.waiting += 1;
    }

    /// Removes and returns the callers that waited for this key.
    fn answered(&mut self, hash: &[u8; 32]) -> Vec<KeyAsk> {
        let asks = self.wanted.remove(hash).unwrap_or_default();
        self.waiting -= asks.len();
        asks
    }
}

impl Partition {
    pub(super) fn begin_with_key(
        &mut self,
        key: Key,
        new: NewTransaction,
        until: Until,
        reply: Reply,
    ) {
        match self.keys.known.get(&key.hash) {
            Some(xid) => {
                self.ask(Ask { xid: *xid, what: What::BeginAgain(key.digest), until, reply });
            }
            None => self.keys.want(key.hash, KeyAsk::Begin { key, new, until, reply }),
        }
    }

    pub(super) fn find_key(&mut self, hash: [u8; 32], reply: Reply) {
        match self.keys.known.get(&hash) {
            Some(xid) => self.ask(Ask { xid: *xid, what: What::Get, until: Until::Now, reply }),
            None => self.keys.want(hash, KeyAsk::Find { reply }),
        }
    }

    /// Reads the waiting keys, unless a read is in flight.
    pub(super) fn look_up_keys(&mut self) {
        if self.keys.read_in_flight || self.keys.queue.is_empty() {
            return;
        }
        self.keys.read_in_flight = true;
        let hashes: Vec<_> = self.keys.queue.drain(..self.keys.queue.len().min(KEYS_MAX)).collect();
        let (store, reads) = (self.parts.store.clone(), self.reads.0.clone());
        let known = self.known();
        self.parts.tasks.spawn(async move {
            let found = store.find_keys(&hashes, known).await;
            drop(reads.send(ReadResult::Keys { hashes, found })); // the partition may be gone
        });
    }

    pub(super) fn take_keys(
        &mut self,
        hashes: Vec<[u8; 32]>,
        found: Result<Vec<Option<Xid>>, store::Error>,
    ) {
        self.keys.read_in_flight = false;
        let found: Vec<Result<Option<Xid>, Error>> = match found {
            Ok(found) => found.into_iter().map(Ok).collect(),
            Err(error) => {
                let failed = self.read_failed(&error);
                hashes.iter().map(|_| Err(failed.clone())).collect()
            }
        };
        for (hash, found) in hashes.into_iter().zip(found) {
            for ask in self.keys.answered(&hash) {
                // If the store has no such key, the first Begin adds the key, and the callers after it find that transaction.
                let found = found
                    .clone()
                    .map(|found| found.or_else(|| self.keys.known.get(&hash).copied()));
                self.take_key(ask, found);
            }
        }
    }

    fn take_key(&mut self, ask: KeyAsk, found: Result<Option<Xid>, Error>) {
        let (found, ask): (Result<Answer, Error>, _) = match (found, ask) {
            (Ok(Some(xid)), KeyAsk::Begin { key, until, reply, .. }) => {
                return self.ask(Ask { xid, what: What::BeginAgain(key.digest), until, reply });
            }
            (Ok(Some(xid)), KeyAsk::Find { reply }) => {
                return self.ask(Ask { xid, what: What::Get, until: Until::Now, reply });
            }
            (Ok(None), KeyAsk::Begin { reply, .. }) if reply.is_closed() => {
                return; // the caller gave up while the store was silent
            }
            (Ok(None), KeyAsk::Begin { new, until, reply, .. }) => {
                return self.begin_new(new, until, reply);
            }
            (Ok(None), find @ KeyAsk::Find { .. }) => (Err(Error::KeyUnknown), find),
            (Err(error), ask) => (Err(error), ask),
        };
        answer_now(ask.into_reply(), found);
    }
}
