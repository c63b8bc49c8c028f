//! How connections are set up, and to which server they go.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::*;

/// A user of this database only, whose name begins with `hostile`.
async fn hostile_user(database: &Database) -> String {
    let user = format!("hostile_{:08x}", rand::random::<u32>());
    let name = database.url().rsplit_once('/').unwrap().1.to_owned();
    database.execute(&format!("CREATE USER '{user}'@'%' IDENTIFIED BY 'secret'")).await;
    database.execute(&format!("CREATE USER '{user}'@'localhost' IDENTIFIED BY 'secret'")).await;
    database.execute(&format!("GRANT ALL ON {name}.* TO '{user}'@'%'")).await;
    database.execute(&format!("GRANT ALL ON {name}.* TO '{user}'@'localhost'")).await;
    user
}

/// Defaults that break statements of a store. They reach only users whose names begin with `hostile`.
fn hostile_defaults(is_mariadb: bool) -> String {
    let both = [
        ("sql_safe_updates", "1"),
        ("autocommit", "0"),
        ("completion_type", "'CHAIN'"),
        ("sql_select_limit", "1"),
        ("sql_big_selects", "0"),
        ("max_join_size", "1"),
        ("sql_auto_is_null", "1"),
        ("time_zone", "'+09:00'"),
        ("character_set_client", "'gbk'"),
        ("character_set_connection", "'gbk'"),
        ("character_set_results", "'gbk'"),
        ("wait_timeout", "1"),
        ("lock_wait_timeout", "1"),
    ];
    let mariadb = [
        ("sql_mode", "'ORACLE'"),
        ("max_statement_time", "0.0001"),
        ("tx_isolation", "'SERIALIZABLE'"),
        ("tx_read_only", "1"),
    ];
    let mysql = [
        ("sql_mode", "'ANSI,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH'"),
        ("max_execution_time", "1"),
        ("range_optimizer_max_mem_size", "1"),
        ("transaction_isolation", "'SERIALIZABLE'"),
        ("transaction_read_only", "1"),
    ];
    let own: &[_] = if is_mariadb { &mariadb } else { &mysql };
    let set = both.iter().chain(own).map(|(name, value)| {
        let value = format!("IF(USER() LIKE 'hostile%', {value}, @@SESSION.{name})");
        let is_size = ["limit", "size", "timeout", "execution_time"];
        let is_size = is_size.iter().any(|end| name.ends_with(end));
        // MySQL takes nothing else for a size.
        let value = if is_size { format!("CAST({value} AS UNSIGNED)") } else { value };
        format!("SESSION {name} = {value}")
    });
    format!("SET {}", set.collect::<Vec<_>>().join(", "))
}

/// A store does everything that it does, with text in many alphabets.
async fn everything_works(url: &str) {
    migrate(url).await.unwrap();
    let store = MySqlStore::open(url, true).await.unwrap();
    let mut owner = Owner::of(&store).await;
    let mut globals: Vec<_> = (0..300).map(|_| keyed(&mut owner, 2)).collect();
    for global in &mut globals {
        global.labels.insert("city".to_owned(), "北京 – Łódź \\ ' \"".to_owned());
    }
    owner.append(globals.iter().map(inserted).collect()).await;
    let keys: Vec<_> = globals.iter().map(|global| global.key.unwrap().hash).collect();
    let found = store.find_keys(&keys, owner.known(2)).await.unwrap();
    assert_eq!(found, globals.iter().map(|global| Some(global.xid)).collect::<Vec<_>>());
    for global in &mut globals {
        confirm(global);
        call(global, 0, failed(false));
    }
    let write = |global| updated(global, BranchSet::only(0));
    owner.append(globals.iter().map(write).collect()).await;
    let expected: Vec<_> = globals.iter().map(GlobalTransaction::recorded).collect();
    let due = store.due(NOW + Duration::from_secs(60), None, 1000, owner.known(2)).await.unwrap();
    assert_eq!(due.transactions, expected);
    let stuck = StuckAfter { attempts: 1, time: Duration::from_secs(3600) };
    for show in [Show::All, Show::Open, Show::Stuck(NOW, stuck)] {
        let listed = store.list(&ListFilter::of(show), 1000).await.unwrap();
        assert_eq!(listed.transactions.len(), 300, "{show:?}");
    }
    assert_eq!(store.summary(NOW, stuck).await.unwrap().open, 300);
    assert_eq!(store.seats().await.unwrap().len(), 16);
    let told = store.clock().await.unwrap().expect("it has a clock");
    assert!(told + Duration::from_secs(5) >= SystemClock::default().now(), "{told:?}");
    let old = old(&mut owner, 150);
    owner.append(old.iter().map(inserted).collect()).await;
    let later = NOW + Duration::from_secs(60);
    let purged = store.purge(owner.ownership(2), later, later, None, 1000).await.unwrap();
    assert_eq!(purged.0, 150);
    let mut next = Owner::of(&store).await;
    let global = keyed(&mut next, 4);
    next.insert(&global).await;
    store.release(&next.ownerships).await.unwrap();
    // Nothing of all this waits for a COMMIT.
    let again = MySqlStore::open(url, true).await.unwrap();
    assert!(again.seats().await.unwrap().iter().all(|seat| seat.owner.is_none()));
}

#[tokio::test]
async fn a_connection_does_not_depend_on_the_defaults_of_its_server() {
    for server in servers() {
        let database = Database::empty(&server).await;
        let user = hostile_user(&database).await;
        let version: String = sqlx::query_scalar("SELECT VERSION()")
            .fetch_one(&mut database.connect().await)
            .await
            .unwrap();
        let defaults = hostile_defaults(version.contains("MariaDB"));
        database.execute(&format!("SET GLOBAL init_connect = \"{defaults}\"")).await;
        let (head, tail) = database.url().split_once("root@").map(own_pair).unwrap();
        let url = format!(
            "{head}{user}:secret@{tail}?charset=gbk&collation=gbk_chinese_ci&time-zone=%2B05:00&ssl-mode=REQUIRED"
        );
        let url =
            if version.contains("MariaDB") { url.replace("&ssl-mode=REQUIRED", "") } else { url };
        let worked = tokio::spawn(async move {
            let hostile =
                Connection::connect(&url.replace("charset=gbk&collation=gbk_chinese_ci&", ""))
                    .await;
            let limit: u64 = sqlx::query_scalar("SELECT @@sql_select_limit")
                .fetch_one(&mut hostile.unwrap())
                .await
                .unwrap();
            assert_eq!(limit, 1, "the defaults are not hostile");
            everything_works(&url).await;
        });
        let worked = worked.await;
        database.execute("SET GLOBAL init_connect = ''").await;
        worked.unwrap();
        database.execute(&format!("DROP USER '{user}'@'%', '{user}'@'localhost'")).await;
        database.drop().await;
    }
}

/// MySQL sends a password only encrypted.
#[tokio::test]
async fn a_login_that_needs_tls_is_told_at_once() {
    for server in servers() {
        let database = Database::new(&server).await;
        let user = hostile_user(&database).await;
        let (head, tail) = database.url().split_once("root@").map(own_pair).unwrap();
        let open = async |password: &str, parameters: &str| {
            let url = format!("{head}{user}:{password}@{tail}{parameters}");
            MySqlStore::open(&url, true).await.map_err(|error| error.to_string())
        };
        let error = open("wrong", "").await.unwrap_err();
        assert!(error.contains("refuses the login"), "{error}");
        if let Err(error) = open("secret", "?ssl-mode=DISABLED").await {
            assert!(error.contains("needs TLS: add ?ssl-mode=REQUIRED to its URL"), "{error}");
            open("secret", "?ssl-mode=REQUIRED").await.unwrap();
        }
        let error = open("secret", "?ssl-mod=REQUIRED").await.unwrap_err();
        assert!(error.contains("no parameter `ssl-mod`; did you mean `ssl-mode`?"), "{error}");
        database.execute(&format!("DROP USER '{user}'@'%', '{user}'@'localhost'")).await;
        database.drop().await;
    }
}

fn own_pair((head, tail): (&str, &str)) -> (String, String) {
    (head.to_owned(), tail.to_owned())
}

#[tokio::test]
async fn an_address_that_does_not_answer_is_passed_over() {
    for server in servers() {
        let database = Database::new(&server).await;
        let url = database.url().replace("@", "@127.0.0.1:1,");
        let store = MySqlStore::open(&url, true).await.unwrap();
        let mut owner = Owner::of(&store).await;
        let global = keyed(&mut owner, 2);
        owner.insert(&global).await;
        let found = store.load(global.xid, owner.known(2)).await.unwrap();
        assert_eq!(found, Lookup::Found(Box::new(global.recorded())));
        database.drop().await;
    }
}

/// MariaDB and MySQL, which have nothing in common but a name of a database.
#[tokio::test]
async fn two_servers_that_can_both_be_written_are_refused() {
    let servers = servers();
    let [one, other] = &servers[..] else { return };
    let one = Database::new(one).await;
    let other = one.namesake(other).await;
    let url = one.url().replace("@", &format!("@{},", other.address()));
    let store = MySqlStore::open(&url, true).await.unwrap();
    let error = store.acquire(&[3], "test", NOW).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error:?}");
    assert!(error.to_string().contains("can both be written, and are not one group"), "{error}");
    other.drop().await;
    one.drop().await;
}

/// Leads connections to a server, until it is closed.
struct Gate(tokio::task::JoinHandle<()>);

impl Gate {
    async fn open(port: u16, server: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let server = server.to_owned();
        Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let server = server.clone();
                connections.spawn(async move {
                    let mut upstream = TcpStream::connect(server).await.unwrap();
                    drop(tokio::io::copy_bidirectional(&mut client, &mut upstream).await);
                });
            }
        }))
    }

    async fn close(self) {
        self.0.abort();
        drop(self.0.await); // with its listener and its connections
    }
}

/// The writers' server is away for a moment. The other address leads to a server that can be written, and that lacks everything.
#[tokio::test]
async fn an_owner_does_not_move_to_a_server_that_lacks_its_batches() {
    let servers = servers();
    let [one, other] = &servers[..] else { return };
    let one = Database::new(one).await;
    let other = one.namesake(other).await;
    let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second] = ports.map(|port| port.local_addr().unwrap().port());
    let url = one.url().replace(one.address(), &format!("127.0.0.1:{first},127.0.0.1:{second}"));

    let home = Gate::open(first, one.address()).await;
    let store = MySqlStore::open(&url, true).await.unwrap();
    let mut owner = Owner::of(&store).await;
    let (early, late) = (keyed(&mut owner, 2), keyed(&mut owner, 2));
    owner.insert(&early).await;
    home.close().await;
    let elsewhere = Gate::open(second, other.address()).await;
    let batch = owner.batch(vec![inserted(&late)]);
    let mut told = String::new();
    for _ in 0..3 {
        let Err(Error::Unavailable(cause)) = store.append(&batch).await else {
            panic!("it has moved")
        };
        told = cause.to_string();
    }
    assert!(told.contains("lack committed batches of this coordinator"), "{told}");
    elsewhere.close().await;
    let _home = Gate::open(first, one.address()).await;
    assert_eq!(store.append(&batch).await.unwrap(), Appended::Durable);
    let found = store.load(early.xid, owner.known(2)).await.unwrap();
    assert_eq!(found, Lookup::Found(Box::new(early.recorded())));
    drop(store);
    other.drop().await;
    one.drop().await;
}

/// A proxy for a server that freezes when a connection asks for the partition rows the second time.
async fn freezing(server: String) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let upstream = TcpStream::connect(&server).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = upstream.into_split();
            tokio::spawn(async move {
                drop(tokio::io::copy(&mut from_server, &mut to_client).await);
            });
            tokio::spawn(async move {
                let (mut packet, mut passes) = (vec![0; 64 * 1024], None);
                while let Ok(bytes @ 1..) = from_client.read(&mut packet).await {
                    let asked = b"batches, owner FROM `partition`";
                    if packet[..bytes].windows(asked.len()).any(|text| text == asked) {
                        passes = Some(2); // it is prepared, and executed once
                    }
                    match &mut passes {
                        Some(0) => std::future::pending().await,
                        Some(left) => *left -= 1,
                        None => {}
                    }
                    to_server.write_all(&packet[..bytes]).await.unwrap();
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_server_that_freezes_while_one_is_chosen_does_not_hold_up_the_takeover() {
    for server in servers() {
        let database = Database::new(&server).await;
        let port = freezing(database.address().to_owned()).await;
        let both = format!("127.0.0.1:{port},{}", database.address());
        let store =
            MySqlStore::open(&database.url().replace(database.address(), &both), true).await;
        let store = store.unwrap();
        let taken = store.acquire(&[0], "test", NOW);
        let taken = tokio::time::timeout(Duration::from_secs(30), taken).await;
        assert_eq!(taken.expect("it is held up").unwrap().len(), 1);
        database.drop().await;
    }
}
