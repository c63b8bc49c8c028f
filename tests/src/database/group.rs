//! Several servers that keep the same data, and the switch from one of them to another as an operator would do it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use super::{kill, script};

/// The user that everybody but the operator connects as: one that `read_only` binds.
pub const USER: &str = "handfast";
/// The operator.
const OPERATOR: &str = "root";
/// Members listen on consecutive ports, and among themselves on the ports behind these.
const PORTS: u16 = 12;
/// How long a member may take to catch up with another one, or to become the primary.
const SWITCH_WITHIN_SECONDS: u32 = 30;

/// How the servers of a group keep the same data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MariaDB: a primary, and a replica that follows it asynchronously.
    Replication,
    /// MariaDB with Galera: every member can be written to.
    Galera,
    /// MySQL Group Replication with a single primary.
    GroupReplication,
}

impl Kind {
    /// The kind of this name, as `scripts/database` spells it.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Replication, Self::Galera, Self::GroupReplication]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Replication => "replication",
            Self::Galera => "galera",
            Self::GroupReplication => "group-replication",
        }
    }

    fn members(self) -> u16 {
        match self {
            Self::Replication => 2,
            Self::Galera | Self::GroupReplication => 3,
        }
    }
}

/// See the module's comment. Its members end when it is dropped.
#[derive(Debug)]
pub struct Group {
    kind: Kind,
    folder: PathBuf,
    port: u16,
}

impl Group {
    /// Starts a group with its files in this folder, where they stay. The first member is the primary.
    ///
    /// # Errors
    ///
    /// When this machine does not have these servers.
    pub async fn start_in(kind: Kind, folder: PathBuf) -> anyhow::Result<Self> {
        let group = Self { kind, folder, port: free_ports()? };
        script(&["start", kind.name()], &group.folder, group.port).await?;
        group.create_user().await?;
        Ok(group)
    }

    /// How its servers keep the same data.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How many members it has.
    #[must_use]
    pub fn members(&self) -> u16 {
        self.kind.members()
    }

    /// Where a member listens. Members are counted from 0.
    #[must_use]
    pub fn address(&self, member: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port + member).into()
    }

    /// Makes the member `new` the one to connect to, instead of `old`: the primary, where there is one. Nothing that was committed is
    /// lost. Connections to `old` stay open; they can still read.
    ///
    /// # Errors
    ///
    /// When a member does not answer, or does not catch up in time.
    pub async fn switch(&self, old: u16, new: u16) -> anyhow::Result<()> {
        match self.kind {
            Kind::Galera => Ok(()), // every member can be written to
            Kind::GroupReplication => {
                let mut new = self.connect(new).await?;
                // Transactions that are open at the old primary get 2 s to end.
                let sql = "SELECT CAST(group_replication_set_as_primary(@@server_uuid, 2) AS CHAR)";
                sqlx::raw_sql(sql).execute(&mut new).await?;
                Ok(())
            }
            Kind::Replication => self.promote(old, new).await,
        }
    }

    /// The old primary takes no more writes; the replica catches up, and takes them. The old primary goes on as it is, and falls behind,
    /// until [`Self::follow`].
    async fn promote(&self, old: u16, new: u16) -> anyhow::Result<()> {
        let (mut old, mut new) = (self.connect(old).await?, self.connect(new).await?);
        sqlx::raw_sql("SET GLOBAL read_only = 1").execute(&mut old).await?;
        let written: String =
            sqlx::query_scalar("SELECT @@gtid_binlog_pos").fetch_one(&mut old).await?;
        let caught_up: i64 = sqlx::query_scalar("SELECT CAST(MASTER_GTID_WAIT(?, ?) AS SIGNED)")
            .bind(written)
            .bind(SWITCH_WITHIN_SECONDS)
            .fetch_one(&mut new)
            .await?;
        ensure!(caught_up == 0, "the replica does not catch up within {SWITCH_WITHIN_SECONDS} s");
        let promote = "STOP SLAVE; RESET SLAVE ALL; SET GLOBAL read_only = 0";
        sqlx::raw_sql(promote).execute(&mut new).await?;
        Ok(())
    }

    /// Makes a primary that was replaced the replica of the new one. Elsewhere members follow by themselves.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn follow(&self, replaced: u16, primary: u16) -> anyhow::Result<()> {
        if self.kind != Kind::Replication {
            return Ok(());
        }
        let port = self.port + primary;
        let follow = format!(
            "SET GLOBAL gtid_slave_pos = @@gtid_binlog_pos; \
             CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {port}, MASTER_USER = '{OPERATOR}', \
             MASTER_USE_GTID = slave_pos; START SLAVE"
        );
        let mut replaced = self.connect(replaced).await?;
        sqlx::raw_sql(AssertSqlSafe(follow)).execute(&mut replaced).await?;
        Ok(())
    }

    /// A member applies nothing for this long: it falls behind, and can still be read.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn fall_behind(&self, member: u16, time: Duration) -> anyhow::Result<()> {
        let mut member = self.connect(member).await?;
        sqlx::raw_sql("FLUSH TABLES WITH READ LOCK").execute(&mut member).await?;
        tokio::time::sleep(time).await;
        sqlx::raw_sql("UNLOCK TABLES").execute(&mut member).await?;
        Ok(())
    }

    async fn connect(&self, member: u16) -> anyhow::Result<MySqlConnection> {
        let url = format!("mysql://{OPERATOR}@{}", self.address(member));
        MySqlConnection::connect(&url)
            .await
            .with_context(|| format!("member {member} of the group does not answer"))
    }

    async fn create_user(&self) -> anyhow::Result<()> {
        let mut first = self.connect(0).await?;
        for host in ["localhost", "127.0.0.1"] {
            let user = format!("{USER}@'{host}'");
            let mut sql = format!("CREATE USER IF NOT EXISTS {user}; GRANT ALL ON *.* TO {user};");
            if self.kind == Kind::Replication {
                sql += &format!("REVOKE READ ONLY ADMIN, SUPER ON *.* FROM {user};");
            }
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut first).await?;
        }
        Ok(())
    }

    fn folder(&self, member: u16) -> PathBuf {
        self.folder.join((member + 1).to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for member in 0..self.members() {
            kill(&self.folder(member));
        }
    }
}

/// The first of a row of ports that nobody listens on.
fn free_ports() -> anyhow::Result<u16> {
    let free = |port: u16| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    (0..100)
        .map(|_| rand::random_range(20_000..30_000 - PORTS))
        .find(|first| (*first..first + PORTS).all(free))
        .context("no free ports")
}
