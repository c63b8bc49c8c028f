//! The servers behind a participant's addresses. A name may resolve to several servers, and the configuration may list several
//! addresses. They are called round-robin. A server that does not answer is skipped while another one does.
//!
//! Names are resolved here. If the connection resolved them, it would always start with the first IP address. The first call
//! that needs a channel builds it in its own task, never while holding a lock.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use handfast_proto::{
    address::{Address, Host},
    calls::ToParticipant,
    connection,
    stream::Line,
    time::Pauses,
};
use tonic::{Status, transport::Channel};

use super::address::Addresses;
use crate::{clock::Clock, transaction::Timestamp};

/// How long the result of a name look-up is used.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(5);
/// Servers of one participant. Further servers are ignored.
const SERVERS_MAX: usize = 64;
/// How long a server that did not answer is skipped.
const SKIP_PAUSES: Pauses =
    Pauses { first: Duration::from_secs(1), longest: Duration::from_secs(30) };

/// One server to connect to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Destination {
    /// The address as it was configured, or registered with a branch.
    pub address: Address,
    /// The IP address that the name resolved to. `None`: the network connects by name.
    pub at: Option<SocketAddr>,
}

/// Makes connections. Tests replace it by a simulated network, or by none.
#[async_trait::async_trait]
pub trait Dialler: fmt::Debug + Send + Sync + 'static {
    /// The servers that listen at an address now. One server with the given name, unless the network can tell several apart.
    async fn destinations(&self, address: &Address) -> io::Result<Vec<Destination>> {
        Ok(vec![Destination { address: address.clone(), at: None }])
    }

    /// A channel that connects on first use, and reconnects when the connection is lost.
    fn channel(&self, destination: &Destination) -> Channel;
}

/// Connects over TCP.
#[derive(Debug, Clone, Copy)]
pub struct Tcp;

#[async_trait::async_trait]
impl Dialler for Tcp {
    async fn destinations(&self, address: &Address) -> io::Result<Vec<Destination>> {
        let at = connection::look_up(address).await?;
        Ok(at
            .into_iter()
            .map(|at| Destination { address: address.clone(), at: Some(at) })
            .collect())
    }

    fn channel(&self, destination: &Destination) -> Channel {
        connection::channel(&destination.address, destination.at)
    }
}

#[derive(Debug)]
pub(super) struct Servers {
    addresses: Addresses,
    dialler: Arc<dyn Dialler>,
    streams: bool,
    list: Mutex<ServerList>,
    /// Held during a look-up, so that only one runs at a time.
    looking_up: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct ServerList {
    servers: Vec<Arc<Server>>,
    /// `None`: names have never been looked up.
    looked_up_at: Option<Timestamp>,
    /// Index of the server that the next call starts with.
    next: usize,
}

/// One of the servers.
#[derive(Debug)]
pub(super) struct Server {
    destination: Destination,
    pub(super) line: Line<ToParticipant>,
    /// Set only while the server does not answer.
    skipped: Mutex<Option<Skipped>>,
}

#[derive(Debug, Clone, Copy)]
struct Skipped {
    /// When the latest failure was noticed.
    since: Timestamp,
    until: Timestamp,
    pause: Duration,
}

impl Servers {
    pub(super) fn new(addresses: Addresses, dialler: Arc<dyn Dialler>, streams: bool) -> Self {
        Self { addresses, dialler, streams, list: Mutex::default(), looking_up: Arc::default() }
    }

    /// The servers to try for one call, in this order. The next server is tried only if the previous one has no connection.
    ///
    /// # Errors
    ///
    /// When there is no server: a name does not exist, or cannot be looked up.
    pub(super) async fn in_order(
        self: &Arc<Self>,
        clock: &dyn Clock,
    ) -> Result<Vec<Arc<Server>>, Status> {
        match self.looked_up_at() {
            None => {
                let _looking_up = self.looking_up.lock().await;
                if self.looked_up_at().is_none() {
                    self.look_up(clock.now()).await?;
                }
            }
            Some(at) if self.changes() && clock.now() - at >= LOOK_UP_AGAIN => {
                // The known servers are used meanwhile.
                if let Ok(looking_up) = self.looking_up.clone().try_lock_owned() {
                    let (servers, now) = (self.clone(), clock.now());
                    tokio::spawn(async move {
                        let _looking_up = looking_up;
                        // If the look-up fails, the known servers stay in use.
                        drop(servers.look_up(now).await);
                    });
                }
            }
            Some(_) => {}
        }
        Ok(lock(&self.list).in_order(clock.now()))
    }

    fn looked_up_at(&self) -> Option<Timestamp> {
        lock(&self.list).looked_up_at
    }

    /// Whether a later look-up may find other servers.
    fn changes(&self) -> bool {
        self.addresses.iter().any(|address| matches!(address.host(), Host::Name(_)))
    }

    async fn look_up(&self, now: Timestamp) -> Result<(), Status> {
        let known = lock(&self.list).servers.clone();
        let (mut found, mut failed) = (Vec::new(), None);
        for address in self.addresses.iter() {
            match self.dialler.destinations(address).await {
                Ok(destinations) => found.extend(destinations),
                Err(error) => {
                    failed = Some(error);
                    let known = known.iter().map(|server| &server.destination);
                    found.extend(known.filter(|it| it.address == *address).cloned());
                }
            }
        }
        found.sort();
        found.dedup();
        found.truncate(SERVERS_MAX);
        if found.is_empty() {
            let error = failed.unwrap_or_else(|| io::Error::other("its name has no address"));
            let mut status = Status::unavailable(error.to_string());
            status.set_source(Arc::new(error));
            return Err(status);
        }
        let servers = found.into_iter().map(|destination| {
            let same = known.iter().find(|server| server.destination == destination);
            same.cloned().unwrap_or_else(|| Arc::new(self.server(destination)))
        });
        let servers = servers.collect();
        let mut list = lock(&self.list);
        let before = std::mem::replace(&mut list.servers, servers);
        list.looked_up_at = Some(now);
        drop(list);
        drop(before); // closes connections
        Ok(())
    }

    fn server(&self, destination: Destination) -> Server {
        let channel = self.dialler.channel(&destination);
        let line = if self.streams { Line::new(channel) } else { Line::without_streams(channel) };
        Server { destination, line, skipped: Mutex::default() }
    }
}

impl ServerList {
    fn in_order(&mut self, now: Timestamp) -> Vec<Arc<Server>> {
        let mut servers = self.servers.clone();
        if servers.len() > 1 {
            self.next = (self.next + 1) % servers.len();
            servers.rotate_left(self.next);
            // If all servers are being skipped, start with the next one.
            let first = servers.iter().position(|server| server.is_welcome(now)).unwrap_or(0);
            servers[..=first].rotate_right(1);
            servers[1..].sort_by_key(|server| server.is_skipped(now));
        }
        servers
    }
}

impl Server {
    fn is_skipped(&self, now: Timestamp) -> bool {
        lock(&self.skipped).is_some_and(|it| now < it.until)
    }

    /// Whether a call may start with this server. After the skip time, one call probes the server. Other calls skip it until
    /// the probe is answered.
    fn is_welcome(&self, now: Timestamp) -> bool {
        match &mut *lock(&self.skipped) {
            None => true,
            Some(it) if now < it.until => false,
            Some(it) => {
                it.until = now + it.pause;
                true
            }
        }
    }

    pub(super) fn answered(&self) {
        *lock(&self.skipped) = None;
    }

    /// A call that began at `begun` failed: there was no connection, the connection broke, or the deadline passed.
    pub(super) fn did_not_answer(&self, begun: Timestamp, now: Timestamp) {
        let mut skipped = lock(&self.skipped);
        let pause = match *skipped {
            None => SKIP_PAUSES.first,
            // The call was already in flight when another call failed, so its failure is no news.
            Some(it) if begun < it.since => return,
            Some(it) => SKIP_PAUSES.after(it.pause),
        };
        *skipped = Some(Skipped { since: now, until: now + pause, pause });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}
