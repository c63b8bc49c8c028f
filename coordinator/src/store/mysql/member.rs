//! Which server a connection has come to, and whether a store may be written there.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, Row as _};

use super::Connection;
use crate::store::sql::Role;

/// What is asked of each new connection. Every user may ask it, on MySQL and on MariaDB. A variable that a server does not have
/// is left out.
const QUESTIONS: &str = "SELECT 'connection_id', CAST(CONNECTION_ID() AS CHAR); \
                         SELECT 'now', CAST(UNIX_TIMESTAMP() AS CHAR); \
                         SHOW GLOBAL VARIABLES WHERE Variable_name IN ('server_uuid', 'server_id', 'hostname', 'port', \
                         'wsrep_node_name', 'wsrep_on', 'read_only', 'super_read_only', 'innodb_read_only', \
                         'offline_mode', 'group_replication_group_name', 'group_replication_single_primary_mode'); \
                         SHOW GLOBAL STATUS WHERE Variable_name IN ('Uptime', 'wsrep_ready', 'wsrep_cluster_status', \
                         'wsrep_local_state_comment', 'wsrep_cluster_state_uuid')";
/// The state of this member in its group, its role, and the numbers of members that are ONLINE and of all.
const GROUP_MEMBER: &str = "SELECT CAST(MAX(IF(member_id = @@server_uuid, member_state, '')) AS CHAR), \
                            CAST(MAX(IF(member_id = @@server_uuid, member_role, '')) AS CHAR), \
                            CAST(SUM(member_state = 'ONLINE') AS SIGNED), CAST(COUNT(*) AS SIGNED) \
                            FROM performance_schema.replication_group_members";
/// The start of a server, as two connections see it, may differ by this: it is computed from rounded seconds.
const START_SECONDS_APART_MAX: i64 = 2;

/// A connection at its server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    /// The server's number of the connection.
    connection: u64,
    /// Which server it is.
    pub(super) server: String,
    /// When that server was started, in its own seconds.
    started_at: i64,
}

impl Session {
    #[cfg(test)]
    pub(super) fn of_test(server: &str) -> Self {
        Self { connection: 1, server: server.to_owned(), started_at: 0 }
    }

    /// The connection's number at the server, if `other` is at the same server, which was not restarted since. Elsewhere the
    /// number would be that of a stranger.
    pub(super) fn id_for(&self, other: &Self) -> Option<u64> {
        let apart = (self.started_at - other.started_at).abs();
        let same = self.server == other.server && apart <= START_SECONDS_APART_MAX;
        same.then_some(self.connection)
    }
}

/// A server, as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) session: Session,
    /// What the members of its group have in common. `None`: it is no member of a group.
    pub(super) group: Option<String>,
    /// How its members keep the same data.
    pub(super) engine: Engine,
    /// Why the store must not be written here. `None`: it may be.
    pub(super) unfit: Option<String>,
    /// It may be written, but another member should be preferred: it is giving its data to a new member.
    pub(super) is_donor: bool,
}

/// How the servers of a group keep the same data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    /// There is one server. It may have replicas.
    Alone,
    Galera,
    GroupReplication,
}

impl Engine {
    /// What a reading connection needs besides [`super::session`]: it waits until its member has everything that was committed.
    fn reads(self) -> Option<&'static str> {
        match self {
            Self::Alone => None,
            Self::Galera => Some("SET SESSION wsrep_sync_wait = 1"),
            Self::GroupReplication => Some("SET SESSION group_replication_consistency = 'BEFORE'"),
        }
    }
}

/// Sets up the connection for this role, and asks which server it has come to.
pub(super) async fn greet(
    connection: &mut Connection,
    role: Option<Role>,
) -> Result<Member, sqlx::Error> {
    let message = format!("{}; {QUESTIONS}", super::session::set_up(role));
    let member = ask(connection, message).await?;
    let reads =
        member.engine.reads().filter(|_| role == Some(Role::Read) && member.unfit.is_none());
    if let Some(reads) = reads {
        sqlx::raw_sql(reads).execute(connection).await?;
    }
    Ok(member)
}

/// Asks again. The connection is set up.
pub(super) async fn look(connection: &mut Connection) -> Result<Member, sqlx::Error> {
    ask(connection, QUESTIONS.to_owned()).await
}

async fn ask(connection: &mut Connection, message: String) -> Result<Member, sqlx::Error> {
    let rows = sqlx::raw_sql(AssertSqlSafe(message)).fetch_all(&mut *connection).await?;
    let mut told = Told::default();
    for row in rows {
        let value: Option<String> = row.try_get(1)?;
        told.0.insert(row.try_get::<String, _>(0)?.to_lowercase(), value.unwrap_or_default());
    }
    let mut member = told.member();
    if member.unfit.is_none() && member.engine == Engine::GroupReplication {
        member.unfit =
            in_group(connection, told.is("group_replication_single_primary_mode", "ON")).await;
    }
    Ok(member)
}

/// Why this member of a group must not be written. A member that has left its group may be writable all the same.
async fn in_group(connection: &mut Connection, single_primary: bool) -> Option<String> {
    let row = sqlx::query(GROUP_MEMBER).persistent(false).fetch_one(connection).await;
    let row = row.and_then(|row| {
        let (state, role): (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
        let (online, all): (Option<i64>, i64) = (row.try_get(2)?, row.try_get(3)?);
        Ok((state.unwrap_or_default(), role.unwrap_or_default(), online.unwrap_or(0), all))
    });
    match row {
        Err(error) => Some(format!(
            "it does not say whether it is part of its group: {error}. The store's user needs SELECT on \
             performance_schema.replication_group_members"
        )),
        Ok((state, ..)) if state != "ONLINE" => Some(format!(
            "it belongs to a group, and is {} there",
            if state.is_empty() { "OFFLINE" } else { &state }
        )),
        Ok((_, _, online, all)) if online * 2 <= all => {
            Some(format!("it sees {online} of {all} members of its group, which is no majority"))
        }
        Ok((_, role, ..)) if single_primary && role != "PRIMARY" => {
            Some("it is a secondary of its group".to_owned())
        }
        Ok(_) => None,
    }
}

/// A user without the privilege gets no answer. Then `read_only` has to tell, since replicas usually set it.
pub(super) async fn is_replica(connection: &mut Connection) -> bool {
    let replicas = sqlx::raw_sql("SHOW REPLICA STATUS").fetch_all(connection).await;
    replicas.is_ok_and(|replicas| !replicas.is_empty())
}

/// Names and values, in lower case and as they came.
#[derive(Debug, Default)]
struct Told(BTreeMap<String, String>);

impl Told {
    fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn is(&self, name: &str, value: &str) -> bool {
        let told = self.get(name);
        told.eq_ignore_ascii_case(value) || value == "ON" && told == "1"
    }

    fn number(&self, name: &str) -> i64 {
        self.get(name).parse().unwrap_or(0)
    }

    fn member(&self) -> Member {
        let named = ["server_id", "hostname", "port", "wsrep_node_name"].map(|name| self.get(name));
        let server = match self.get("server_uuid") {
            "" => named.join("/"), // MariaDB has no such id
            uuid => uuid.to_owned(),
        };
        let session = Session {
            connection: self.get("connection_id").parse().unwrap_or(0),
            server,
            started_at: self.number("now") - self.number("uptime"),
        };
        let group_name = self.get("group_replication_group_name");
        let (engine, group) = if self.is("wsrep_on", "ON") {
            (Engine::Galera, self.get("wsrep_cluster_state_uuid"))
        } else if group_name.is_empty() {
            (Engine::Alone, "")
        } else {
            (Engine::GroupReplication, group_name)
        };
        let group = Some(group.to_owned()).filter(|group| !group.is_empty());
        let is_donor =
            engine == Engine::Galera && self.get("wsrep_local_state_comment").starts_with("Donor");
        Member { session, group, engine, unfit: self.unfit(engine, is_donor), is_donor }
    }

    fn unfit(&self, engine: Engine, is_donor: bool) -> Option<String> {
        if engine == Engine::Galera {
            let [ready, status, state] =
                ["wsrep_ready", "wsrep_cluster_status", "wsrep_local_state_comment"]
                    .map(|name| self.get(name));
            let synced = state == "Synced" || is_donor;
            if !self.is("wsrep_ready", "ON") || status != "Primary" || !synced {
                return Some(format!(
                    "its cluster does not let it work: wsrep_ready is {ready}, wsrep_cluster_status is {status}, \
                     wsrep_local_state_comment is {state}"
                ));
            }
        }
        let read_only = ["read_only", "super_read_only", "innodb_read_only", "offline_mode"];
        // Newer servers have further values than ON.
        let set = |name: &&str| !["", "OFF", "0"].contains(&self.get(name));
        let set = read_only.into_iter().find(set)?;
        Some(format!("it is read-only ({set} = {})", self.get(set)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pairs: &[(&str, &str)]) -> Member {
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Told(pairs.collect()).member()
    }

    #[test]
    fn a_connection_is_ended_only_at_its_own_server() {
        let at = |uuid, id, now, uptime| {
            let pairs =
                [("server_uuid", uuid), ("connection_id", id), ("now", now), ("uptime", uptime)];
            told(&pairs).session
        };
        let doubtful = at("one", "7", "1000", "900");
        assert_eq!(doubtful.id_for(&at("one", "9", "1010", "911")), Some(7));
        assert_eq!(doubtful.id_for(&at("two", "9", "1010", "910")), None, "another server");
        assert_eq!(doubtful.id_for(&at("one", "9", "1010", "5")), None, "it was restarted");
    }

    #[test]
    fn members_that_must_not_be_written_are_known() {
        let galera = |ready, status, state| {
            told(&[
                ("wsrep_on", "ON"),
                ("wsrep_ready", ready),
                ("wsrep_cluster_status", status),
                ("wsrep_local_state_comment", state),
                ("wsrep_cluster_state_uuid", "cluster"),
            ])
        };
        let fit = galera("ON", "Primary", "Synced");
        assert_eq!((fit.unfit, fit.group.as_deref()), (None, Some("cluster")));
        let donor = galera("ON", "Primary", "Donor/Desynced");
        assert_eq!((donor.unfit, donor.is_donor), (None, true));
        for (ready, status, state) in [
            ("OFF", "Primary", "Synced"),
            ("ON", "non-Primary", "Synced"),
            ("ON", "Primary", "Joining"),
        ] {
            let unfit = galera(ready, status, state).unfit.unwrap();
            assert!(unfit.contains("its cluster does not let it work"), "{unfit}");
        }
        assert_eq!(told(&[("read_only", "OFF")]).unfit, None);
        for name in ["read_only", "super_read_only", "innodb_read_only", "offline_mode"] {
            let unfit = told(&[(name, "ON")]).unfit.unwrap();
            assert!(unfit.contains(name), "{unfit}");
        }
    }
}
