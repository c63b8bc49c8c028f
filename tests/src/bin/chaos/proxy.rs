//! A TCP proxy in front of one server that injects faults of the network: it cuts connections, stalls them, or drops their bytes. It
//! recognises one message: a COMMIT that is sent to MySQL.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// What is read at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// COMMIT as sqlx sends it: a packet of 7 bytes, the first of its command, COM_QUERY, and the text. Nothing follows before it is
/// answered, so these are the last bytes of what was read.
const COMMIT: &[u8] = b"\x07\0\0\0\x03COMMIT";

/// What happens to the bytes of all connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    /// They pass.
    Fair,
    /// They wait, in both directions. New connections wait too.
    Stall,
    /// Requests arrive, and responses are dropped.
    LoseReplies,
    /// All bytes are dropped, and the connections stay open.
    BlackHole,
}

/// What happens to the next COMMIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trap {
    /// It is dropped, and its connection is cut.
    LoseCommit,
    /// It arrives; its response is dropped, and the connection is cut.
    LoseOk,
    /// It arrives; its response is held back until the connection is cut.
    HoldOk,
}

/// See the module's comment.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    way: Arc<Way>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Way {
    to: Mutex<SocketAddr>,
    sky: watch::Sender<Sky>,
    trap: Mutex<Option<Trap>>,
    /// How many traps were sprung.
    sprung: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Sky {
    weather: Weather,
    /// How often all connections were cut.
    cuts: u64,
    /// How often about half of the connections were cut.
    partial_cuts: u64,
}

impl Proxy {
    /// A proxy to `to`, on a free port of this machine.
    pub(crate) async fn new(to: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let way = Arc::new(Way {
            to: Mutex::new(to),
            sky: watch::Sender::new(Sky { weather: Weather::Fair, cuts: 0, partial_cuts: 0 }),
            trap: Mutex::default(),
            sprung: AtomicU64::new(0),
        });
        let carried = way.clone();
        let accepting = tokio::spawn(async move {
            // An error is one of the connection that did not come about, or too many open files, which passes.
            loop {
                match listener.accept().await {
                    Ok((near, _)) => drop(tokio::spawn(carry(near, carried.clone()))),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(Self { address, way, accepting })
    }

    /// The address that the proxy listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections go there from now on; those that are open stay.
    pub(crate) fn lead_to(&self, to: SocketAddr) {
        *self.way.to.lock().expect("nothing panics while it is locked") = to;
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        self.way.sky.send_modify(|sky| sky.cuts += 1);
    }

    /// Cuts about half of the connections.
    pub(crate) fn cut_some(&self) {
        self.way.sky.send_modify(|sky| sky.partial_cuts += 1);
    }

    /// Connections whose bytes were dropped are cut when the weather becomes fair.
    pub(crate) fn set(&self, weather: Weather) {
        self.way.sky.send_modify(|sky| sky.weather = weather);
    }

    /// Sets the trap, or removes it.
    pub(crate) fn trap(&self, trap: Option<Trap>) {
        *self.way.trap.lock().expect("nothing panics while it is locked") = trap;
    }

    /// How many traps were sprung so far.
    pub(crate) fn sprung(&self) -> u64 {
        self.way.sprung.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

/// Carries one connection to its end.
async fn carry(near: TcpStream, way: Arc<Way>) {
    let sky = way.sky.subscribe();
    tokio::select! {
        () = cut(sky.clone()) => {}
        () = connect_and_carry(near, &way, sky) => {}
    }
}

/// Waits until one connection is cut.
async fn cut(mut sky: watch::Receiver<Sky>) {
    let mut seen = *sky.borrow_and_update();
    while sky.changed().await.is_ok() {
        let now = *sky.borrow_and_update();
        if now.cuts > seen.cuts || now.partial_cuts > seen.partial_cuts && fastrand::bool() {
            return;
        }
        seen = now;
    }
}

async fn connect_and_carry(near: TcpStream, way: &Way, mut sky: watch::Receiver<Sky>) {
    if sky.wait_for(|sky| sky.weather == Weather::Fair).await.is_err() {
        return;
    }
    let to = *way.to.lock().expect("nothing panics while it is locked");
    let Ok(far) = TcpStream::connect(to).await else { return };
    for stream in [&near, &far] {
        if stream.set_nodelay(true).is_err() {
            return; // it is broken already
        }
    }
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    let sprung = Mutex::new(None);
    tokio::select! {
        () = pump(near_in, far_out, Direction::There, way, &sprung, sky.clone()) => {}
        () = pump(far_in, near_out, Direction::Back, way, &sprung, sky) => {}
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    There,
    Back,
}

/// Carries one direction of a connection. `sprung`: the trap that was sprung by what went there, for what comes back.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    way: &Way,
    sprung: &Mutex<Option<Trap>>,
    mut sky: watch::Receiver<Sky>,
) {
    let mut bytes = vec![0; CHUNK_BYTES];
    let mut lossy = false;
    loop {
        let read = tokio::select! {
            read = from.read(&mut bytes) => read.unwrap_or(0),
            _changed = sky.changed() => {
                if lossy && sky.borrow().weather == Weather::Fair {
                    return;
                }
                continue;
            }
        };
        if read == 0 {
            return;
        }
        let chunk = &bytes[..read];
        let weather = match sky.wait_for(|sky| sky.weather != Weather::Stall).await {
            Ok(sky) => sky.weather,
            Err(_) => return,
        };
        let held = match direction {
            Direction::There => match way.spring(chunk) {
                Some(Trap::LoseCommit) => return,
                Some(trap) => {
                    *sprung.lock().expect("nothing panics while it is locked") = Some(trap);
                    false
                }
                None => false,
            },
            Direction::Back => match *sprung.lock().expect("nothing panics while it is locked") {
                Some(Trap::LoseOk) => return,
                Some(Trap::HoldOk) => true,
                Some(Trap::LoseCommit) | None => false,
            },
        };
        let lost = match weather {
            Weather::BlackHole => true,
            Weather::LoseReplies => direction == Direction::Back,
            Weather::Fair | Weather::Stall => false,
        };
        lossy |= lost;
        if !lost && !held && to.write_all(chunk).await.is_err() {
            return;
        }
    }
}

impl Way {
    /// Takes the trap that is set, if this chunk ends with a COMMIT.
    fn spring(&self, chunk: &[u8]) -> Option<Trap> {
        if !chunk.ends_with(COMMIT) {
            return None;
        }
        let trap = self.trap.lock().expect("nothing panics while it is locked").take()?;
        self.sprung.fetch_add(1, Ordering::Relaxed);
        Some(trap)
    }
}
