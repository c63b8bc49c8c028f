//! Databases on a running server. `scripts/test` starts the servers and sets the variable that names them. Creating a database
//! is slow, so a test's later shops reuse the databases that its earlier shops no longer need.

use std::sync::{Arc, Mutex};

use sqlx::{AssertSqlSafe, Connection as _};

use super::{Db, Pool, PoolOptions, SERVERS, drop_database, shop::Shop};

type Connection = <Db as sqlx::Database>::Connection;

/// A server, as used by one test.
pub(crate) struct Server {
    url: String,
    /// All databases that this test has created.
    made: Mutex<Vec<String>>,
    /// Databases that are not in use.
    free: Arc<Mutex<Vec<String>>>,
}

/// A database. Clones share it; when all clones are dropped, it can be reused.
#[derive(Clone)]
pub(crate) struct Home(Arc<Taken>);

struct Taken {
    server: String,
    name: String,
    free: Arc<Mutex<Vec<String>>>,
}

/// All servers.
pub(crate) async fn servers() -> Vec<Server> {
    let servers = std::env::var(SERVERS).unwrap_or_default();
    let servers = servers.split(',').map(str::trim).filter(|url| !url.is_empty());
    let server =
        |url: &str| Server { url: url.to_owned(), made: Mutex::default(), free: Arc::default() };
    servers.map(server).collect()
}

impl Server {
    /// A shop whose pool has this many connections.
    pub(crate) async fn open(&self, connections: u32) -> Shop {
        let home = self.home().await;
        Shop::open(home.connect(connections).await, Some(home)).await
    }

    /// A shop with a single connection.
    pub(crate) async fn alone(&self) -> Shop {
        self.open(1).await
    }

    pub(crate) async fn home(&self) -> Home {
        let free = self.free.lock().unwrap().pop();
        let name = match free {
            Some(name) => name,
            None => {
                let name = format!("handfast_test_{:016x}", rand::random::<u64>());
                on_server(&self.url, &format!("CREATE DATABASE {name}")).await;
                self.made.lock().unwrap().push(name.clone());
                name
            }
        };
        Home(Arc::new(Taken { server: self.url.clone(), name, free: self.free.clone() }))
    }
}

impl Home {
    pub(crate) fn url(&self) -> String {
        format!("{}/{}", self.0.server, self.0.name)
    }

    pub(crate) async fn connect(&self, connections: u32) -> Pool {
        PoolOptions::new().max_connections(connections).connect(&self.url()).await.unwrap()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.free.lock().unwrap().push(std::mem::take(&mut self.name));
    }
}

impl Drop for Server {
    /// Drops the databases on a separate thread, because `drop` cannot await.
    fn drop(&mut self) {
        let (url, made) = (self.url.clone(), std::mem::take(&mut *self.made.lock().unwrap()));
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                for name in made {
                    on_server(&url, &drop_database(&name)).await;
                }
            });
        });
        let dropped = dropping.join();
        if !std::thread::panicking() {
            dropped.unwrap();
        }
    }
}

async fn on_server(server: &str, sql: &str) {
    let mut connection = Connection::connect(server).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
}
