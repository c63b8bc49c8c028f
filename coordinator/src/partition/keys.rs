//! Idempotency keys: a repeated key finds the same transaction. The keys of transactions in memory are known here. Other keys
//! are looked up in the store. One read takes all keys that wait, and no key is in two reads at a time. Callers with the same
//! key wait for the same read, so two Begins with one key never make two transactions.
//!
//! A transaction may be purged after its key was read. Then its key was purged too, and is read again.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use handfast_proto::Xid;

use super::{Ask, Error, FoundKey, Partition, ReadResult, Reply, Until, What, answer_now};
use crate::{
    store::{self, Known, Store},
    transaction::{GlobalTransaction, Key, NewTransaction},
};

/// Keys in one read.
const KEYS_MAX: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Keys {
    /// The keys of transactions in memory.
    known: BTreeMap<[u8; 32], Xid>,
    /// The keys that are being read or wait to be read, with the callers that wait for each. A key that is being read stays
    /// here even if all its callers have given up.
    wanted: BTreeMap<[u8; 32], Vec<KeyAsk>>,
    /// The keys of `wanted` that are not being read yet.
    queue: Vec<[u8; 32]>,
    /// The keys of `wanted` that are being read.
    in_flight: BTreeSet<[u8; 32]>,
    /// How many callers wait.
    waiting: usize,
}

/// A caller that waits for a key to be read.
#[derive(Debug)]
struct KeyAsk {
    what: KeyWhat,
    reply: Reply,
    /// The key led to this transaction before, and it was purged by then.
    purged: Option<Xid>,
}

#[derive(Debug)]
enum KeyWhat {
    Begin { key: Key, new: Box<NewTransaction>, until: Until },
    Find,
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

    /// The transaction in memory that has this key.
    pub(super) fn leads_to(&self, hash: &[u8; 32]) -> Option<Xid> {
        self.known.get(hash).copied()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Forgets callers that have given up. Also forgets queued keys without a caller.
    pub(super) fn forget_gone(&mut self) {
        self.wanted.retain(|hash, asks| {
            let before = asks.len();
            asks.retain(|ask| !ask.reply.is_closed());
            self.waiting -= before - asks.len();
            !asks.is_empty() || self.in_flight.contains(hash)
        });
        self.queue.retain(|hash| self.wanted.contains_key(hash));
    }

    pub(super) fn end(&mut self, why: &Error) {
        self.waiting = 0;
        for ask in std::mem::take(&mut self.wanted).into_values().flatten() {
            answer_now(ask.reply, Err(why.clone()));
        }
        self.known.clear();
        self.queue.clear();
    }

    fn want(&mut self, hash: [u8; 32], ask: KeyAsk) {
        match self.wanted.entry(hash) {
            btree_map::Entry::Occupied(mut entry) => entry.get_mut().push(ask), // one read for all callers
            btree_map::Entry::Vacant(entry) => {
                entry.insert(vec![ask]);
                self.queue.push(hash);
            }
        }
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
        new: Box<NewTransaction>,
        until: Until,
        reply: Reply,
    ) {
        let what = KeyWhat::Begin { key, new, until };
        self.ask_by_key(key.hash, KeyAsk { what, reply, purged: None });
    }

    pub(super) fn find_key(&mut self, hash: [u8; 32], reply: Reply) {
        self.ask_by_key(hash, KeyAsk { what: KeyWhat::Find, reply, purged: None });
    }

    fn ask_by_key(&mut self, hash: [u8; 32], ask: KeyAsk) {
        match self.keys.leads_to(&hash) {
            Some(xid) => self.take_key(hash, ask, Ok(Some(xid))),
            None => self.keys.want(hash, ask),
        }
    }

    /// Answers that a transaction is missing. If its key led to it, and it was purged since then, the key is read again.
    pub(super) fn answer_missing(&mut self, Ask { xid, what, until, reply }: Ask, missing: Error) {
        let purged = matches!(missing, Error::Forgotten(_)).then_some(xid);
        match what {
            What::GetByKey(hash) if purged.is_some() => {
                self.ask_by_key(hash, KeyAsk { what: KeyWhat::Find, reply, purged });
            }
            What::BeginAgain { key, new } if purged.is_some() => {
                let what = KeyWhat::Begin { key, new, until };
                self.ask_by_key(key.hash, KeyAsk { what, reply, purged });
            }
            What::Get
            | What::GetByKey(_)
            | What::Inquire(_)
            | What::Register(_)
            | What::Decide(_)
            | What::Retry
            | What::Resolve { .. }
            | What::ResolveTransaction { .. }
            | What::BeginAgain { .. } => answer_now(reply, Err(missing)),
        }
    }

    /// Reads the waiting keys, unless a read is in flight.
    pub(super) fn look_up_keys(&mut self) {
        if !self.keys.in_flight.is_empty() || self.keys.queue.is_empty() {
            return;
        }
        let hashes: Vec<_> = self.keys.queue.drain(..self.keys.queue.len().min(KEYS_MAX)).collect();
        self.keys.in_flight.extend(&hashes);
        let (store, reads) = (self.parts.store.clone(), self.reads_sender.clone());
        let known = self.known();
        self.parts.tasks.spawn(async move {
            let found = found_keys(&*store, &hashes, known).await;
            drop(reads.send(ReadResult::Keys { hashes, found })); // the partition may be gone
        });
    }

    pub(super) fn take_keys(
        &mut self,
        hashes: Vec<[u8; 32]>,
        found: Result<Vec<FoundKey>, store::Error>,
    ) {
        self.keys.in_flight.clear();
        let mut all = Vec::with_capacity(hashes.len());
        match found {
            Ok(found) => all.extend(found.into_iter().map(|found| match found {
                FoundKey::Belongs(xid) => Ok(Some(xid)),
                FoundKey::Unknown => Ok(None),
                FoundKey::Unreadable(error) => Err(self.read_failed(&error)),
            })),
            Err(error) => all.resize(hashes.len(), Err(self.read_failed(&error))),
        }
        for (hash, found) in hashes.into_iter().zip(all) {
            for ask in self.keys.answered(&hash) {
                // If the store has no such key, the first Begin adds the key, and the callers after it find that transaction.
                let found = found.clone().map(|found| found.or_else(|| self.keys.leads_to(&hash)));
                self.take_key(hash, ask, found);
            }
        }
    }

    fn take_key(&mut self, hash: [u8; 32], ask: KeyAsk, found: Result<Option<Xid>, Error>) {
        let KeyAsk { what, reply, purged } = ask;
        match (found, what) {
            // The purge deletes a transaction together with its key, so this record is damaged. Do not read it for ever.
            (Ok(Some(xid)), _) if purged == Some(xid) => {
                answer_now(reply, Err(Error::Forgotten(xid)));
            }
            (Ok(Some(xid)), KeyWhat::Begin { key, new, until }) => {
                self.ask(Ask { xid, what: What::BeginAgain { key, new }, until, reply });
            }
            (Ok(Some(xid)), KeyWhat::Find) => {
                self.ask(Ask { xid, what: What::GetByKey(hash), until: Until::Now, reply });
            }
            (Ok(None), KeyWhat::Begin { .. }) if reply.is_closed() => {} // the caller gave up while the store was silent
            (Ok(None), KeyWhat::Begin { new, until, .. }) => self.begin_new(*new, until, reply),
            (Ok(None), KeyWhat::Find) => answer_now(reply, Err(Error::KeyUnknown)),
            (Err(error), _) => answer_now(reply, Err(error)),
        }
    }
}

/// Looks keys up. One with a damaged record does not hurt the others.
async fn found_keys(
    store: &dyn Store,
    hashes: &[[u8; 32]],
    known: Known,
) -> Result<Vec<FoundKey>, store::Error> {
    match store.find_keys(hashes, known).await {
        Ok(found) => Ok(found.into_iter().map(FoundKey::from).collect()),
        Err(store::Error::Corrupt(_)) if hashes.len() > 1 => {
            let mut each = Vec::with_capacity(hashes.len());
            for hash in hashes {
                each.push(match store.find_keys(&[*hash], known).await {
                    Ok(found) => found.into_iter().next().flatten().into(),
                    Err(error) => FoundKey::Unreadable(error),
                });
            }
            Ok(each)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, SqliteConnection};

    use super::*;
    use crate::{
        store::{ALL_PARTITIONS, Appended, Batch, Guard, Head, Write, sqlite::SqliteStore},
        transaction::{BranchSet, Drive, Timestamp},
    };

    fn keyed(xid: Xid, key: u8) -> Write {
        let new = NewTransaction {
            at_decision: false,
            name: "checkout".to_owned(),
            drive: Drive::Initiator,
            timeout: std::time::Duration::from_secs(30),
            labels: BTreeMap::new(),
            key: Some(Key { hash: [key; 32], digest: [key; 32] }),
            branches: Vec::new(),
        };
        Write {
            global: std::sync::Arc::new(GlobalTransaction::begin(xid, new, Timestamp(0))),
            head: Head::Insert,
            before: None,
            new_branches: 0,
            changed_branches: BranchSet::EMPTY,
        }
    }

    #[tokio::test]
    async fn a_key_with_a_damaged_record_does_not_hurt_those_of_the_same_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path).await.unwrap();
        let ownership = store.acquire(&ALL_PARTITIONS, "test", Timestamp(0)).await.unwrap()[3];
        let (partition, epoch, nonce) = (3, ownership.epoch, ownership.nonce);
        let xid = |sequence| Xid { partition, epoch, sequence, nonce };
        let guards = vec![Guard { partition, epoch, nonce, position: 1 }];
        let batch = Batch { guards, writes: vec![keyed(xid(1), 1), keyed(xid(2), 2)] };
        assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
        let mut db = SqliteConnection::connect(&path.display().to_string()).await.unwrap();
        let damage = "UPDATE idempotency SET xid = x'01' WHERE key_hash = (SELECT min(key_hash) FROM idempotency)";
        sqlx::raw_sql(damage).execute(&mut db).await.unwrap();
        let known = Known { ownership, position: 1 };
        let found = found_keys(&store, &[[1; 32], [2; 32], [3; 32]], known).await;
        let [damaged, sound, absent] = &found.unwrap()[..] else { panic!() };
        assert!(matches!(damaged, FoundKey::Unreadable(store::Error::Corrupt(_))), "{damaged:?}");
        assert!(matches!(sound, FoundKey::Belongs(found) if *found == xid(2)), "{sound:?}");
        assert!(matches!(absent, FoundKey::Unknown), "{absent:?}");
    }
}
