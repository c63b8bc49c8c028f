//! A store on a group of servers, with the addresses of all members in its URL.

use std::time::Duration;

use handfast_coordinator::{
    store::{
        ALL_PARTITIONS, Appended, Batch, Error, Guard, Ownership, Store as _, mysql::MySqlStore,
    },
    transaction::Timestamp,
};
use handfast_tests::{
    database::{Group, Kind, USER, groups},
    process::handfast,
};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

/// How long an owner may take to find another member: it must notice that its own does not write any more, and an election may be
/// under way.
const MOVES_WITHIN: Duration = Duration::from_secs(60);
const NOW: Timestamp = Timestamp(1_700_000_000_000);

/// A group with a store. Gone when it is dropped.
struct Rig {
    group: Group,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// `None`: this machine has no such servers, and there is nothing to see.
    async fn start(kind: Kind) -> Option<Self> {
        if !groups().iter().any(|name| Kind::named(name) == Some(kind)) {
            println!("not tested: TEST_GROUPS does not name {kind:?}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let group = Group::start_in(kind, folder.path().join("servers")).await.unwrap();
        let rig = Self { group, _folder: folder };
        rig.sql(0, "CREATE DATABASE store").await;
        let migrated = handfast(&["migrate", "--store", &rig.url(&[0])]).await;
        assert!(migrated.status.success(), "{migrated:?}");
        Some(rig)
    }

    /// The store's URL with the addresses of these members.
    fn url(&self, members: &[u16]) -> String {
        let addresses: Vec<_> =
            members.iter().map(|member| self.group.address(*member).to_string()).collect();
        format!("mysql://{USER}@{}/store", addresses.join(","))
    }

    async fn store(&self, members: &[u16]) -> MySqlStore {
        MySqlStore::open(&self.url(members), true).await.unwrap()
    }

    /// What the operator does on a member.
    async fn sql(&self, member: u16, sql: &str) {
        let url = format!("mysql://root@{}", self.group.address(member));
        let mut connection = MySqlConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }
}

/// An owner that writes empty batches.
struct Owner {
    ownerships: Vec<Ownership>,
    position: u64,
}

impl Owner {
    async fn of(store: &MySqlStore) -> Result<Self, Error> {
        let ownerships = store.acquire(&ALL_PARTITIONS, "test", NOW).await?;
        Ok(Self { ownerships, position: 0 })
    }

    /// Appends the next batch of every partition of a journal, until the store says what became of it.
    async fn append(&mut self, store: &MySqlStore) -> Appended {
        self.position += 1;
        for remainder in 0..2 {
            let guards = self.ownerships.iter().filter(|it| it.partition % 2 == remainder).map(
                |Ownership { partition, epoch, nonce, .. }| Guard {
                    partition: *partition,
                    epoch: *epoch,
                    nonce: *nonce,
                    position: self.position,
                },
            );
            let batch = Batch { guards: guards.collect(), writes: Vec::new() };
            let answered = tokio::time::timeout(MOVES_WITHIN, async {
                loop {
                    match store.append(&batch).await {
                        Ok(appended) => return appended,
                        Err(Error::Unavailable(cause)) => println!("repeating a batch: {cause}"),
                        Err(error) => panic!("{error}"),
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
            match answered.await.expect("it finds a member that can be written") {
                Appended::Durable => {}
                other @ (Appended::Fenced(_) | Appended::Damaged(_)) => return other,
            }
        }
        Appended::Durable
    }
}

#[tokio::test]
async fn an_owner_follows_a_switch_over_and_an_old_primary_is_not_taken() {
    let Some(rig) = Rig::start(Kind::Replication).await else { return };
    let store = rig.store(&[0, 1]).await;
    let mut owner = Owner::of(&store).await.unwrap();
    assert_eq!(owner.append(&store).await, Appended::Durable);
    rig.group.switch(0, 1).await.unwrap();
    for _ in 0..3 {
        assert_eq!(owner.append(&store).await, Appended::Durable, "nothing was lost");
    }
    // A standby that starts now finds the new primary, although the old one comes first.
    let standby = rig.store(&[0, 1]).await;
    let seats = standby.seats().await.unwrap();
    assert!(seats.iter().all(|seat| seat.position == owner.position), "{seats:?}");

    // The old primary comes back as it was: it can be written, and nobody has told it that there is another one.
    rig.sql(0, "SET GLOBAL read_only = 0").await;
    let refused = standby.acquire(&ALL_PARTITIONS, "standby", NOW).await.unwrap_err();
    assert!(matches!(refused, Error::Corrupt(_)), "{refused:?}");
    assert!(refused.to_string().contains("can both be written"), "{refused}");
    assert_eq!(owner.append(&store).await, Appended::Durable, "the owner goes on");
    // It is behind, and so it is not taken either while the new primary is read-only.
    rig.sql(1, "SET GLOBAL read_only = 1").await;
    let refused = standby.acquire(&ALL_PARTITIONS, "standby", NOW).await.unwrap_err();
    assert!(refused.to_string().contains("lacks what"), "{refused}");
    // As a replica of the new primary it is no obstacle.
    rig.sql(1, "SET GLOBAL read_only = 0").await;
    rig.sql(0, "SET GLOBAL read_only = 1").await;
    let next = Owner::of(&standby).await.unwrap();
    assert_eq!(next.ownerships[0].epoch, owner.ownerships[0].epoch + 1);
    let Appended::Fenced(_) = owner.append(&store).await else { panic!("it was replaced") };
}

/// An owner that has recorded a batch, and does not know yet that another one has taken over.
async fn replaced_owner(rig: &Rig) -> (MySqlStore, Owner) {
    let store = rig.store(&[0]).await;
    let mut owner = Owner::of(&store).await.unwrap();
    assert_eq!(owner.append(&store).await, Appended::Durable);
    let next = rig.store(&[0]).await;
    Owner::of(&next).await.unwrap();
    (store, owner)
}

/// A server that becomes read-only cannot take a batch that would tell the owner that it was replaced.
#[tokio::test]
async fn an_owner_of_a_read_only_server_learns_that_it_was_replaced() {
    let Some(rig) = Rig::start(Kind::Replication).await else { return };
    let (store, mut owner) = replaced_owner(&rig).await;
    rig.sql(0, "SET GLOBAL read_only = 1").await;
    let Appended::Fenced(_) = owner.append(&store).await else { panic!("it was replaced") };
}

/// Nobody else knows of the loss. If the owner ended now, the next one would decide otherwise what was decided.
#[tokio::test]
async fn an_owner_that_knows_of_a_loss_waits_for_a_server_that_records_it() {
    let Some(rig) = Rig::start(Kind::Replication).await else { return };
    let (store, mut owner) = replaced_owner(&rig).await;
    // As if the next owner had taken over on a replica that lacked the batch.
    rig.sql(0, "UPDATE store.epoch SET batches = 0 WHERE ended_at IS NOT NULL").await;
    rig.sql(0, "SET GLOBAL read_only = 1").await;
    let mut appending = std::pin::pin!(owner.append(&store));
    let early = tokio::time::timeout(Duration::from_secs(5), &mut appending).await;
    assert!(early.is_err(), "{early:?}");
    rig.sql(0, "SET GLOBAL read_only = 0").await;
    let Appended::Fenced(fenced) = appending.await else { panic!("it was replaced") };
    let url = format!("mysql://root@{}", rig.group.address(0));
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    let marked = sqlx::query_scalar("SELECT COUNT(*) FROM store.epoch WHERE lost = 1");
    let marked: i64 = marked.fetch_one(&mut connection).await.unwrap();
    assert_eq!(usize::try_from(marked), Ok(fenced.len()));
}

#[tokio::test]
async fn a_primary_of_a_group_is_found_and_followed() {
    let Some(rig) = Rig::start(Kind::GroupReplication).await else { return };
    let store = rig.store(&[1, 2, 0]).await;
    let mut owner = Owner::of(&store).await.unwrap();
    assert_eq!(owner.append(&store).await, Appended::Durable);
    rig.group.switch(0, 2).await.unwrap();
    for _ in 0..3 {
        assert_eq!(owner.append(&store).await, Appended::Durable);
    }
    // A member that has left its group is writable, and is not taken: neither alone nor beside the others.
    rig.sql(1, "STOP GROUP_REPLICATION; SET GLOBAL super_read_only = 0; SET GLOBAL read_only = 0")
        .await;
    let alone = rig.store(&[1]).await;
    let refused = alone.acquire(&ALL_PARTITIONS, "alone", NOW).await.unwrap_err();
    assert!(refused.to_string().contains("it belongs to a group, and is OFFLINE"), "{refused}");
    let next = rig.store(&[1, 2, 0]).await;
    Owner::of(&next).await.unwrap();
    let Appended::Fenced(_) = owner.append(&store).await else { panic!("it was replaced") };
}

/// On Galera one local transaction over all partitions loses against each batch of a busy owner on another member.
#[tokio::test]
async fn a_takeover_from_a_busy_owner_on_galera_succeeds() {
    let Some(rig) = Rig::start(Kind::Galera).await else { return };
    let store = rig.store(&[0, 1, 2]).await;
    let mut owner = Owner::of(&store).await.unwrap();
    assert_eq!(owner.append(&store).await, Appended::Durable);
    let busy = tokio::spawn(async move {
        loop {
            if let Appended::Fenced(fenced) = owner.append(&store).await {
                return fenced;
            }
            // A coordinator works between two batches. Without any pause, a takeover would have to be luckier.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    for _ in 0..2 {
        let other = rig.store(&[1]).await;
        let taken = Owner::of(&other).await.expect("it does not give up");
        assert_eq!(taken.ownerships.len(), ALL_PARTITIONS.len());
    }
    assert!(!busy.await.unwrap().is_empty());
}
