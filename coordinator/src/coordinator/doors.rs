//! Routes commands to partitions. A partition has a door, one channel, while this process owns it.

use std::{
    collections::BTreeMap,
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    partition::{Answer, Command, Error, Reply},
    store::Ownership,
};

/// The doors, by partition.
#[derive(Debug, Default)]
pub(super) struct Doors(RwLock<BTreeMap<u16, Door>>);

/// The way into one partition, for one ownership.
#[derive(Debug, Clone)]
pub(super) struct Door {
    pub(super) ownership: Ownership,
    pub(super) commands: mpsc::Sender<Command>,
}

impl Doors {
    pub(super) fn of(&self, partition: u16) -> Option<Door> {
        self.read().get(&partition).cloned()
    }

    /// The door of number `round`, modulo the number of owned partitions.
    pub(super) fn in_rotation(&self, round: usize) -> Option<Door> {
        let doors = self.read();
        doors.values().nth(round.checked_rem(doors.len())?).cloned()
    }

    pub(super) fn ownerships(&self) -> Vec<Ownership> {
        self.read().values().map(|door| door.ownership).collect()
    }

    /// Opens a door. It replaces that of an earlier ownership of the same partition.
    pub(super) fn open(&self, door: Door) {
        self.write().insert(door.ownership.partition, door);
    }

    /// Closes the door of an ownership that has ended.
    pub(super) fn close(&self, ownership: &Ownership) {
        let mut doors = self.write();
        if doors.get(&ownership.partition).is_some_and(|door| door.ownership == *ownership) {
            doors.remove(&ownership.partition);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<u16, Door>> {
        self.0.read().expect("nothing panics while it is locked")
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<u16, Door>> {
        self.0.write().expect("nothing panics while it is locked")
    }
}

impl Door {
    /// Hands over a command, unless too many wait.
    pub(super) fn offer(
        &self,
        command: impl FnOnce(Reply) -> Command,
    ) -> Result<oneshot::Receiver<Result<Answer, Error>>, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::TooManyCalls,
            mpsc::error::TrySendError::Closed(_) => Error::Stopping,
        })?;
        Ok(answer)
    }

    /// Hands over a command that is never refused for load.
    pub(super) async fn send(
        &self,
        command: impl FnOnce(Reply) -> Command,
    ) -> Result<oneshot::Receiver<Result<Answer, Error>>, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::Stopping)?;
        Ok(answer)
    }
}
