//! Idempotency keys: the same key gives the same transaction. A key of a transaction in memory is known; for any other one the
//! store is asked, for all that wait in one look, and for each key once at a time. Whoever comes with the same key meanwhile
//! waits for that look, so two Begins with one key never make two transactions.

use std::collections::BTreeMap;

use handfast_proto::Xid;

use super::{Answer, Ask, Error, Partition, ReadResult, Reply, Until, What};
use crate::{
    store,
    transaction::{GlobalTransaction, Key, NewTransaction},
};

/// Keys of one look.
const KEYS_MAX: usize = 256;

/// See the module's comment.
#[derive(Debug, Default)]
pub(super) struct Keys {
    /// Of the transactions in memory.
    known: BTreeMap<[u8; 32], Xid>,
    /// Those that the store is, or will be, asked for, and who waits.
    wanted: BTreeMap<[u8; 32], Vec<KeyAsk>>,
    /// Those of `wanted` that it has not been asked for yet.
    queue: Vec<[u8; 32]>,
    look_under_way: bool,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly all of them are the large one")]
enum KeyAsk {
    Begin { key: Key, new: NewTransaction, until: Until, reply: Reply },
    Find { reply: Reply },
}

impl KeyAsk {
    fn into_reply(self) -> Reply {
        match self {
            Self::Begin { reply, .. } | Self::Find { reply } => reply,
        }
    }
}

impl Keys {
    /// A transaction has entered memory.
    pub(super) fn known(&mut self, global: &GlobalTransaction) {
        if let Some(key) = global.key {
            // An old one, whose key has been forgotten and used again, may have been read just before.
            self.known.entry(key.hash).or_insert(global.xid);
        }
    }

    /// A transaction has left memory.
    pub(super) fn left(&mut self, global: &GlobalTransaction) {
        if let Some(key) = global.key
            && self.known.get(&key.hash) == Some(&global.xid)
        {
            self.known.remove(&key.hash);
        }
    }

    pub(super) fn end(&mut self, why: &Error) {
        for ask in std::mem::take(&mut self.wanted).into_values().flatten() {
            Partition::answer_now(ask.into_reply(), Err(why.clone()));
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

    /// Asks the store for the keys that wait, if it is not being asked already.
    pub(super) fn look_up_keys(&mut self) {
        if self.keys.look_under_way || self.keys.queue.is_empty() {
            return;
        }
        self.keys.look_under_way = true;
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
        self.keys.look_under_way = false;
        let found: Vec<Result<Option<Xid>, Error>> = match found {
            Ok(found) => found.into_iter().map(Ok).collect(),
            Err(error) => {
                let failed = self.read_failed(&error);
                hashes.iter().map(|_| Err(failed.clone())).collect()
            }
        };
        for (hash, found) in hashes.into_iter().zip(found) {
            for ask in self.keys.wanted.remove(&hash).unwrap_or_default() {
                // The first Begin of a key that is in no record makes it known to those that come after it.
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
                return; // it has been given up while the store was silent
            }
            (Ok(None), KeyAsk::Begin { new, until, reply, .. }) => {
                return self.begin_new(new, until, reply);
            }
            (Ok(None), find @ KeyAsk::Find { .. }) => (Err(Error::KeyUnknown), find),
            (Err(error), ask) => (Err(error), ask),
        };
        Self::answer_now(ask.into_reply(), found);
    }
}
