//! How often a call waits for its database. Each of these waits is also a wait with a locked row. The author's code runs no
//! statement here, so all of them are the fence's. The connection's statements are prepared already, as after its first calls.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::{
    Db, PoolOptions, ROUND_TRIPS,
    server::{Home, servers},
};
use crate::{
    Fence, Phase, Refusal, TryError, Tx,
    fence::fixture::{branch, payload, word},
};

/// A proxy in front of a database. It counts how often the client sends after the server has answered.
struct Counter {
    url: String,
    turns: Arc<AtomicUsize>,
}

impl Counter {
    async fn before(home: &Home) -> Self {
        let url = home.url();
        let (_, address) = url.split_once('@').unwrap();
        let (address, _) = address.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let counts = listener.local_addr().unwrap().to_string();
        let this = Self { url: url.replace(address, &counts), turns: Arc::default() };
        let (address, turns) = (address.to_owned(), this.turns.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&address).await.unwrap();
                tokio::spawn(forward(client, server, turns.clone()));
            }
        });
        this
    }
}

async fn forward(mut client: TcpStream, mut server: TcpStream, turns: Arc<AtomicUsize>) {
    let (mut asked, mut answered) = ([0; 4096], [0; 4096]);
    let mut client_is_next = true;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(1..) = read else { return };
                if client_is_next {
                    turns.fetch_add(1, Ordering::SeqCst);
                }
                client_is_next = false;
                server.write_all(&asked[..read.unwrap()]).await.unwrap();
            }
            read = server.read(&mut answered) => {
                let Ok(1..) = read else { return };
                client_is_next = true;
                client.write_all(&answered[..read.unwrap()]).await.unwrap();
            }
        }
    }
}

/// What happens to one branch: each call, and the name of the call in [`ROUND_TRIPS`].
const CALLS: [(u64, Phase, &str); 9] = [
    (1, Phase::Try, "Try"),
    (1, Phase::Try, "repeated Try"),
    (1, Phase::Confirm, "Confirm"),
    (1, Phase::Confirm, "repeated Confirm"),
    (2, Phase::Try, "Try with a reply"),
    (2, Phase::Cancel, "Cancel"),
    (3, Phase::Cancel, "empty rollback"),
    (3, Phase::Try, "suspended Try"),
    (4, Phase::Try, "refused Try"),
];

#[tokio::test]
async fn no_call_waits_for_the_database_more_often_than_it_must() {
    for server in servers().await {
        let shop = server.alone().await;
        let counter = Counter::before(shop.home.as_ref().unwrap()).await;
        // The pool's own messages are not counted: one before a call, and those after it.
        let pool = PoolOptions::new().max_connections(1).test_before_acquire(false);
        let pool = pool.connect(&counter.url).await.unwrap();
        let fence = Fence::new(pool.clone());
        for round in 0..2 {
            let mut counted = Vec::new();
            for (n, phase, name) in CALLS {
                while pool.num_idle() == 0 {
                    tokio::task::yield_now().await;
                }
                let before = counter.turns.load(Ordering::SeqCst);
                let work = async |tx: &mut Tx<Db>| {
                    if name == "refused Try" {
                        return Err(TryError::from(Refusal::new("OUT_OF_STOCK")));
                    }
                    if name == "Try with a reply" {
                        tx.reply("eight left");
                    }
                    Ok(())
                };
                let mut branch = branch(10 * round + n, phase);
                branch.expires_at = Some(i64::MAX);
                let answer = fence.run(&branch, &payload(2), work).await;
                counted.push((name, counter.turns.load(Ordering::SeqCst) - before));
                let expected = match name {
                    "refused Try" => "OUT_OF_STOCK",
                    "suspended Try" => "CANCELLED_BEFORE",
                    _ => "Done",
                };
                assert_eq!(word(&answer), expected, "{name}: {answer:?}");
            }
            // In the first round, statements are prepared.
            if round == 1 {
                assert_eq!(counted, ROUND_TRIPS);
            }
        }
    }
}
