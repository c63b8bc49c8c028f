//! How much memory incomplete messages may take.
//!
//! A few hostile connections must not keep the messages of others from arriving. So each connection has [`OWN_BYTES_MAX`] that
//! no other can use. The rest is common, and half of that is only for connections that hold no more than one request.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use tonic::{Status, transport::server::TcpConnectInfo};

use super::HEADER_BYTES;
use crate::limits;

/// Bytes of incomplete messages per connection: sixteen of the largest requests.
pub const CONNECTION_BYTES_MAX: usize = 16 * limits::REQUEST_BYTES_MAX;
/// The part of these bytes that each connection has for itself. Most requests fit into it, and ten thousand connections
/// together hold at most 320 MiB of it.
pub const OWN_BYTES_MAX: usize = 32 * 1024;
/// Bytes of incomplete messages that all connections together hold beyond [`OWN_BYTES_MAX`] of each.
pub const COMMON_BYTES_MAX: usize = 8 * CONNECTION_BYTES_MAX;
/// Addresses without a call are forgotten when there are twice as many as the last time, and at least this many.
const ADDRESSES_MIN: usize = 64;
/// The memory for incomplete messages of a process. Clones share it.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Common>);

#[derive(Debug)]
struct Common {
    bounds: Bounds,
    /// What all connections hold beyond their own bytes.
    held: AtomicUsize,
    /// The shares of connections, for servers that do not say which connection a call belongs to.
    by_address: Mutex<ByAddress>,
    /// The share of all calls whose connection is not known.
    unknown: Share,
}

/// How many bytes may be held.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) own: usize,
    /// One request of the largest size.
    pub(super) request: usize,
    pub(super) connection: usize,
    pub(super) common: usize,
}

/// What the calls of one connection hold. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Share(Arc<Mutex<usize>>);

impl Share {
    pub(super) fn held(&self) -> MutexGuard<'_, usize> {
        lock(&self.0)
    }
}

/// The shares of the connections with calls, by the address of the caller.
#[derive(Debug, Default)]
struct ByAddress {
    shares: BTreeMap<SocketAddr, Weak<Mutex<usize>>>,
    forget_at: usize,
}

impl ByAddress {
    fn share(&mut self, address: SocketAddr) -> Share {
        if let Some(share) = self.shares.get(&address).and_then(Weak::upgrade) {
            return Share(share);
        }
        if self.shares.len() >= self.forget_at {
            self.shares.retain(|_, share| share.strong_count() > 0);
            self.forget_at = (2 * self.shares.len()).max(ADDRESSES_MIN);
        }
        let share = Share::default();
        self.shares.insert(address, Arc::downgrade(&share.0));
        share
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(Bounds {
            own: OWN_BYTES_MAX,
            request: limits::REQUEST_BYTES_MAX + HEADER_BYTES,
            connection: CONNECTION_BYTES_MAX,
            common: COMMON_BYTES_MAX,
        })
    }
}

impl Budget {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self(Arc::new(Common {
            bounds,
            held: AtomicUsize::new(0),
            by_address: Mutex::default(),
            unknown: Share::default(),
        }))
    }

    /// The share of the connection that a request came over, as far as its caller's address tells.
    pub(super) fn share_of(&self, request: &http::Extensions) -> Share {
        let address = request.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        match address {
            Some(address) => lock(&self.0.by_address).share(address),
            None => self.0.unknown.clone(),
        }
    }

    pub(super) fn take(&self, share: &Share, bytes: usize) -> Result<(), Status> {
        let Bounds { own, request, connection, common } = self.0.bounds;
        let mut held = share.held();
        let after = *held + bytes;
        if after > connection {
            return Err(too_much("this connection"));
        }
        let from_common = after.saturating_sub(own) - held.saturating_sub(own);
        if from_common > 0 {
            let room = if after <= request { common } else { common / 2 };
            let before = self.0.held.fetch_add(from_common, Ordering::Relaxed);
            if before + from_common > room {
                self.0.held.fetch_sub(from_common, Ordering::Relaxed);
                return Err(too_much("this process"));
            }
        }
        *held = after;
        Ok(())
    }

    pub(super) fn give_back(&self, share: &Share, bytes: usize) {
        let own = self.0.bounds.own;
        let mut held = share.held();
        let after = *held - bytes;
        let to_common = held.saturating_sub(own) - after.saturating_sub(own);
        self.0.held.fetch_sub(to_common, Ordering::Relaxed);
        *held = after;
    }
}

#[cfg(test)]
impl Budget {
    /// What all connections hold beyond their own bytes.
    pub(super) fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}

fn too_much(whose: &str) -> Status {
    Status::resource_exhausted(format!(
        "too many bytes of requests that have not arrived whole are held for {whose}; ask again"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_told_apart_by_the_address_of_the_caller() {
        let mut by_address = ByAddress::default();
        let address = |n: u16| SocketAddr::from(([127, 0, 0, 1], n));
        let (one, other) = (by_address.share(address(1)), by_address.share(address(2)));
        assert!(Arc::ptr_eq(&one.0, &by_address.share(address(1)).0));
        assert!(!Arc::ptr_eq(&one.0, &other.0));
        for n in 100..10_000 {
            drop(by_address.share(address(n)));
            assert!(by_address.shares.len() <= ADDRESSES_MIN, "those without a call are forgotten");
        }
        assert!(Arc::ptr_eq(&one.0, &by_address.share(address(1)).0));
    }
}
