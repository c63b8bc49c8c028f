//! Chooses which of a store's servers to use. All connections are to the writers' server. When the writers switch, readers reconnect
//! there.
//!
//! Each new connection asks which server it has come to, and whether that may be written. When it may not, the other addresses are
//! tried. Before another address is chosen, all that answer are asked for their partition rows: a server that lacks what another one
//! has is not chosen, and neither is one of two that can both be written and are not one group.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::join_all;
use sqlx::{AssertSqlSafe, ConnectOptions as _};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    Addresses, Connection, InMySql,
    member::{self, Engine, Member, Session},
    server::OpenError,
};
use crate::store::{
    Error, Guard, Seat,
    sql::{CALL_TIMEOUT, Role, write},
};

/// Where a store is. All its connections share it.
#[derive(Debug)]
pub(super) struct Home {
    addresses: Addresses,
    current: Mutex<Current>,
}

/// What is known at this moment of the servers and the batches on them.
#[derive(Debug, Default)]
struct Current {
    /// The address that is tried first.
    address: usize,
    /// The server of the writers. `None`: nothing was written yet.
    server: Option<String>,
    /// The partition rows of the latest server that did not take a writer.
    seats: Vec<Seat>,
    /// The latest batch of each partition that this process knows to be durable.
    recorded: BTreeMap<u16, Batch>,
    /// Since when only servers answer that lack some of these.
    lacking_since: Option<Instant>,
}

/// Names a batch of a partition. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Batch {
    epoch: u32,
    position: u64,
}

impl Batch {
    const fn latest(seat: &Seat) -> Self {
        Self { epoch: seat.epoch, position: seat.position }
    }
}

/// The writers do not move to a server that lacks what this process has recorded, as long as another one may come back. After this
/// time they do: a batch then finds out what is lost.
const LACKING_FOR: Duration = Duration::from_secs(30);

/// A server that has answered, and its partition rows.
struct Found {
    address: usize,
    connection: Connection,
    member: Member,
    seats: Vec<Seat>,
}

impl Home {
    pub(super) fn of(addresses: Addresses) -> Arc<Self> {
        Arc::new(Self { addresses, current: Mutex::default() })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().expect("nothing panics while it is locked")
    }

    /// Whether a connection is at the writers' server.
    pub(super) fn has(&self, session: &Session) -> bool {
        self.current().server.as_ref().is_none_or(|server| *server == session.server)
    }

    /// Whether something was written. Until then the process is a standby.
    pub(super) fn is_settled(&self) -> bool {
        self.current().server.is_some()
    }

    /// These batches of this process are durable.
    pub(super) fn recorded(&self, guards: &[Guard]) {
        if self.addresses.len() > 1 {
            let batch = |it: &Guard| Batch { epoch: it.epoch, position: it.position };
            let latest = guards.iter().map(|it| (it.partition, batch(it)));
            self.current().recorded.extend(latest);
        }
    }

    /// The partitions of these guards that have a later epoch on a server that must not be written. A batch cannot find that out there.
    ///
    /// # Errors
    ///
    /// When that server has lost batches of this owner. Nobody else knows of the loss, so the owner must stay until it can be recorded.
    pub(super) async fn replaced(&self, guards: &[Guard]) -> Result<Vec<u16>, Error> {
        let is_later = |guard: &Guard, seats: &[Seat]| {
            seats.iter().any(|seat| seat.partition == guard.partition && seat.epoch > guard.epoch)
        };
        let remembered = self.current().seats.clone();
        if !guards.iter().any(|guard| is_later(guard, &remembered)) {
            return Ok(Vec::new());
        }
        let (mut replaced, mut lossy) = (BTreeSet::new(), BTreeSet::new());
        for address in 0..self.addresses.len() {
            let ask = async {
                let (mut connection, _) = self.greet(address, Some(Role::Read)).await?;
                let seats = write::seats::<InMySql>(&mut connection).await?;
                for guard in guards.iter().filter(|guard| is_later(guard, &seats)) {
                    match write::lost::<InMySql>(&mut connection, *guard).await? {
                        None => replaced.insert(guard.partition),
                        Some(_) => lossy.insert(guard.partition),
                    };
                }
                Ok::<_, Error>(())
            };
            // An address that does not answer tells nothing.
            drop(tokio::time::timeout(CALL_TIMEOUT / 4, ask).await);
        }
        let replaced: Vec<_> = replaced.difference(&lossy).copied().collect();
        if replaced.is_empty() && !lossy.is_empty() {
            return Err(Error::unavailable(format!(
                "another coordinator has taken over partitions {lossy:?} without the last batches of this one, and no server takes a \
                 record of that"
            )));
        }
        Ok(replaced)
    }

    /// A connection for `role`. Before that, connections in doubt are ended, if they are at the same server.
    pub(super) async fn connect(
        &self,
        role: Role,
        doubtful: &[Session],
    ) -> Result<(Connection, Session), Error> {
        let (mut connection, member) = self.find(Some(role)).await?;
        let session = member.session;
        for id in doubtful.iter().filter_map(|doubtful| doubtful.id_for(&session)) {
            // Ignore errors: most likely the server has closed the connection itself, and the id does not exist any more.
            let kill = AssertSqlSafe(format!("KILL {id}"));
            if sqlx::raw_sql(kill).execute(&mut connection).await.is_ok() {
                info!(connection = id, "killed a connection whose statement may still run");
            }
        }
        if role == Role::Write {
            self.writers_are_at(&session.server);
        } else if !self.has(&session) {
            return Err(Error::Old(format!(
                "the connection reached {}, but writes go to another server",
                session.server
            )));
        }
        Ok((connection, session))
    }

    /// A connection for a check at the start, or for `migrate`. The only address is taken as it is: the check tells what is wrong.
    pub(super) async fn connect_once(&self) -> Result<Connection, OpenError> {
        let connecting = async {
            if self.addresses.len() > 1 {
                return Ok(self.find(None).await?.0);
            }
            Ok(self.greet(0, None).await?.0)
        };
        match tokio::time::timeout(CALL_TIMEOUT, connecting).await? {
            Ok(connection) => Ok(connection),
            Err(Error::Corrupt(what) | Error::Old(what) | Error::Replaced(what)) => {
                Err(OpenError::Connect(what))
            }
            Err(Error::Unavailable(cause)) => Err(OpenError::Connect(cause.to_string())),
        }
    }

    /// Chooses the address for a takeover.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] when a person must look: two servers can be written that are not one group.
    pub(super) async fn choose_for_takeover(&self) -> Result<(), Error> {
        if self.addresses.len() > 1 {
            // A server that stops answering must not hold up the takeover.
            let chosen = tokio::time::timeout(CALL_TIMEOUT, self.choose()).await;
            self.current().address = chosen.map_err(Error::unavailable)??.address;
        }
        Ok(())
    }

    /// Asks again whether the server of a connection may be written.
    pub(super) async fn look(&self, connection: &mut Connection) -> Result<Member, Error> {
        let mut member = member::look(connection).await?;
        self.refuse_replica(connection, &mut member).await;
        Ok(member)
    }

    /// The only address may be a replica: then the start-up check reported it and store_unsafe allowed it.
    async fn refuse_replica(&self, connection: &mut Connection, member: &mut Member) {
        let alone = member.unfit.is_none() && member.engine == Engine::Alone;
        if self.addresses.len() > 1 && alone && member::is_replica(connection).await {
            member.unfit = Some("it is a replica".to_owned());
        }
    }

    fn writers_are_at(&self, server: &str) {
        let mut current = self.current();
        current.seats.clear();
        current.lacking_since = None;
        let before = current.server.replace(server.to_owned());
        let address = self.addresses.name(current.address);
        drop(current);
        if let Some(before) = before.filter(|before| before != server) {
            info!(address, server, before, "the store has moved to another server");
        }
    }

    /// Connects to the present address, or to another one if its server must not be written.
    async fn find(&self, role: Option<Role>) -> Result<(Connection, Member), Error> {
        let address = self.current().address;
        let refused = match self.greet(address, role).await {
            Ok((connection, member)) if member.unfit.is_none() && !member.is_donor => {
                return Ok((connection, member));
            }
            Ok((connection, member)) if self.addresses.len() == 1 => match member.unfit {
                None => return Ok((connection, member)),
                Some(unfit) => {
                    self.remember_seats(connection).await;
                    Error::unavailable(format!("the store's server must not be written: {unfit}"))
                }
            },
            Ok((_, member)) => Error::unavailable(member.unfit.unwrap_or_default()),
            Err(error) => error,
        };
        if self.addresses.len() == 1 {
            return Err(refused);
        }
        let chosen = match self.choose().await {
            // A person must look, but until then the batch is repeated.
            Err(Error::Corrupt(what)) => return Err(Error::unavailable(what)),
            chosen => chosen?,
        };
        let found = self.greet(chosen.address, role).await?;
        self.current().address = chosen.address;
        Ok(found)
    }

    /// If the owner was replaced, its rows tell. (They cannot be asked for by a batch there.)
    async fn remember_seats(&self, mut connection: Connection) {
        if let Ok(seats) = write::seats::<InMySql>(&mut connection).await {
            self.current().seats = seats;
        }
    }

    async fn greet(
        &self,
        address: usize,
        role: Option<Role>,
    ) -> Result<(Connection, Member), Error> {
        let greeting = async {
            let mut connection = self.addresses.options(address).connect().await?;
            let mut member = member::greet(&mut connection, role).await?;
            self.refuse_replica(&mut connection, &mut member).await;
            Ok((connection, member))
        };
        // An address that does not answer must leave time for the others.
        let wait = if self.addresses.len() == 1 { CALL_TIMEOUT } else { CALL_TIMEOUT / 4 };
        tokio::time::timeout(wait, greeting)
            .await
            .unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed)))
    }

    /// Asks all addresses, and chooses one that may be written and lacks nothing.
    async fn choose(&self) -> Result<Found, Error> {
        let ask = async |address| {
            let (mut connection, member) = self.greet(address, Some(Role::Read)).await?;
            let seats = write::seats::<InMySql>(&mut connection).await?;
            Ok::<_, Error>(Found { address, connection, member, seats })
        };
        let asked = join_all((0..self.addresses.len()).map(async |address| {
            let asked = tokio::time::timeout(CALL_TIMEOUT / 4, ask(address)).await;
            (address, asked.unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed))))
        }));
        let (mut found, mut silent) = (Vec::new(), Vec::new());
        for (address, asked) in asked.await {
            match asked {
                Ok(one) => found.push(one),
                Err(error) => silent.push(format!("{}: {error}", self.addresses.name(address))),
            }
        }
        // The rows of those that may be chosen are read last. Otherwise one could seem behind a server that was asked a moment later.
        let fit = found.iter_mut().filter(|one| one.member.unfit.is_none());
        join_all(fit.map(async |one| {
            let reading = write::seats::<InMySql>(&mut one.connection);
            let read = tokio::time::timeout(CALL_TIMEOUT / 4, reading).await;
            match read.unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed))) {
                Ok(seats) => one.seats = seats,
                // What it has recorded counts all the same.
                Err(error) => one.member.unfit = Some(format!("it has stopped answering: {error}")),
            }
        }))
        .await;
        let servers: Vec<_> = found.iter().map(|one| (&one.member, &one.seats[..])).collect();
        let name = |n: usize| self.addresses.name(found[n].address);
        let recorded = self.current().recorded.clone();
        let lacks = |seats: &[Seat]| {
            seats.iter().any(|seat| recorded.get(&seat.partition) > Some(&Batch::latest(seat)))
        };
        let fit = servers.iter().filter(|(member, _)| member.unfit.is_none());
        if fit.clone().count() > 0 && fit.clone().all(|(_, seats)| lacks(seats)) {
            let since = *self.current().lacking_since.get_or_insert_with(Instant::now);
            if since.elapsed() < LACKING_FOR {
                return Err(Error::unavailable(format!(
                    "the writable servers lack committed batches of this coordinator; waiting for another one: {}",
                    silent.join("; ")
                )));
            }
        }
        match choose(&servers, name) {
            Ok(chosen) => {
                if !silent.is_empty() {
                    let chosen = name(chosen);
                    warn!(chosen, ?silent, "some addresses of the store do not answer");
                }
                Ok(found.swap_remove(chosen))
            }
            Err(Refusal::Strangers(what)) => Err(Error::Corrupt(what)),
            Err(Refusal::None(reasons)) => {
                self.current().seats = found.into_iter().flat_map(|one| one.seats).collect();
                silent.extend(reasons);
                Err(Error::unavailable(format!(
                    "no address of the store may be written: {}",
                    silent.join("; ")
                )))
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Two servers can be written and are not one group.
    Strangers(String),
    /// No server may be written. The reason of each.
    None(Vec<String>),
}

/// The server that may be written. It lacks no row that another one has.
fn choose(
    servers: &[(&Member, &[Seat])],
    name: impl Fn(usize) -> String,
) -> Result<usize, Refusal> {
    let mut reasons = Vec::new();
    let mut fit = Vec::new();
    for (n, (member, _)) in servers.iter().enumerate() {
        match &member.unfit {
            None => fit.push(n),
            Some(unfit) => reasons.push(format!("{}: {unfit}", name(n))),
        }
    }
    if let Some((one, other)) = strangers(servers, &fit) {
        return Err(Refusal::Strangers(format!(
            "{} and {} can both be written, and are not one group: what one of them records, the other one lacks. Make all but one \
             of the store's servers read-only, or name only one of them in its URL",
            name(one),
            name(other)
        )));
    }
    fit.sort_by_key(|n| servers[*n].0.is_donor);
    for candidate in fit {
        let seats = servers[candidate].1;
        let ahead = (0..servers.len()).find(|other| is_behind(seats, servers[*other].1));
        match ahead {
            None => return Ok(candidate),
            Some(other) => reasons.push(format!(
                "{}: it can be written, but lacks what {} has recorded; it must catch up first",
                name(candidate),
                name(other)
            )),
        }
    }
    Err(Refusal::None(reasons))
}

/// Two servers that can be written and do not keep the same data.
fn strangers(servers: &[(&Member, &[Seat])], fit: &[usize]) -> Option<(usize, usize)> {
    let related = |one: &Member, other: &Member| {
        one.session.server == other.session.server
            || one.group.is_some() && one.group == other.group
    };
    let first = *fit.first()?;
    let other = fit.iter().find(|n| !related(servers[first].0, servers[**n].0))?;
    Some((first, *other))
}

/// Whether these rows are older than the other ones: a smaller epoch, or in the same epoch an earlier batch.
fn is_behind(seats: &[Seat], others: &[Seat]) -> bool {
    let others: BTreeMap<_, _> = others.iter().map(|seat| (seat.partition, seat)).collect();
    seats.iter().any(|seat| {
        let other = others.get(&seat.partition);
        other.is_some_and(|other| {
            // In another history positions cannot be compared.
            let comparable = other.epoch != seat.epoch || other.nonce == seat.nonce;
            comparable && Batch::latest(other) > Batch::latest(seat)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(server: &str, group: Option<&str>) -> Member {
        let session = Session::of_test(server);
        let group = group.map(str::to_owned);
        Member { session, group, engine: Engine::Alone, unfit: None, is_donor: false }
    }

    fn unfit(server: &str) -> Member {
        Member { unfit: Some("it is read-only".to_owned()), ..member(server, None) }
    }

    fn seats(epoch: u32, nonce: u32, position: u64) -> Vec<Seat> {
        let seat = |partition| Seat { partition, epoch, nonce, position, owner: None };
        (0..4).map(seat).collect()
    }

    fn chosen(servers: &[(Member, Vec<Seat>)]) -> Result<usize, String> {
        let servers: Vec<_> = servers.iter().map(|(member, seats)| (member, &seats[..])).collect();
        choose(&servers, |n| format!("db{n}")).map_err(|refusal| match refusal {
            Refusal::Strangers(what) => what,
            Refusal::None(reasons) => reasons.join("; "),
        })
    }

    #[test]
    fn the_one_that_may_be_written_is_chosen() {
        let servers = [(unfit("a"), seats(7, 1, 90)), (member("b", None), seats(7, 1, 90))];
        assert_eq!(chosen(&servers), Ok(1));
        let error = chosen(&servers[..1]).unwrap_err();
        assert_eq!(error, "db0: it is read-only");
    }

    #[test]
    fn two_that_may_be_written_must_be_one_group() {
        let strangers = [(member("a", None), seats(7, 1, 9)), (member("b", None), seats(7, 1, 9))];
        let error = chosen(&strangers).unwrap_err();
        assert!(
            error.contains("db0 and db1 can both be written, and are not one group"),
            "{error}"
        );
        let one_group =
            ["a", "b", "c"].map(|server| (member(server, Some("cluster")), seats(7, 1, 9)));
        assert_eq!(chosen(&one_group), Ok(0));
        let two_names = ["a", "a"].map(|server| (member(server, None), seats(7, 1, 9)));
        assert_eq!(chosen(&two_names), Ok(0));
        let donor = Member { is_donor: true, ..one_group[0].0.clone() };
        let with_donor = [(donor, seats(7, 1, 9)), one_group[1].clone()];
        assert_eq!(chosen(&with_donor), Ok(1), "a donor only if there is nothing else");
        assert_eq!(chosen(&with_donor[..1]), Ok(0));
    }

    #[test]
    fn one_that_lacks_what_another_one_has_is_not_chosen() {
        // The old primary has come back, and the new one is read-only for a moment.
        for newer in [seats(8, 2, 0), seats(7, 1, 91)] {
            let error = chosen(&[(member("a", None), seats(7, 1, 90)), (unfit("b"), newer)]);
            let error = error.unwrap_err();
            assert!(
                error.contains("db0: it can be written, but lacks what db1 has recorded"),
                "{error}"
            );
        }
        let replica_is_behind =
            [(member("a", None), seats(7, 1, 90)), (unfit("b"), seats(7, 1, 70))];
        assert_eq!(chosen(&replica_is_behind), Ok(0));
        let lags = [
            (member("a", Some("cluster")), seats(7, 1, 90)),
            (member("b", Some("cluster")), seats(7, 1, 91)),
        ];
        assert_eq!(chosen(&lags), Ok(1));
        let other_history = [(member("a", None), seats(7, 1, 90)), (unfit("b"), seats(7, 3, 95))];
        assert_eq!(chosen(&other_history), Ok(0), "positions of two histories tell nothing");
    }
}
