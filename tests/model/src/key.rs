//! Idempotency keys: may Begin and Execute be repeated? There is one business operation with one key. Its request arrives any number
//! of times, at any owner, zombies included. It must reserve under one global transaction only.
//!
//! The owner stands for `partition/keys.rs`. It knows the keys of the transactions in its memory. For any other key it looks into the
//! store, with one look per key at a time; requests that arrive meanwhile wait for that look. The key is written with its
//! transaction, and it decides the partition. (The key is also the primary key of its table. The model does not rely on that.)

use std::fmt;

use stateright::{Model, Property, Representative};

use crate::variant::{Size, Variant};

const MODEL: &str = "idempotency key";
const OWNERS: usize = 2;
/// How many transactions the one request may begin.
const MADE_MAX: usize = 3;
const LOOKS: usize = 2;
const CRASHES_MAX: u8 = 1;
const EPOCH_MAX: u8 = 3;

/// What can be removed. Each comment says what holds while the guard is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// The request has a key, and the record keeps it.
    KeyIsKept,
    /// The owner looks into the store for a key that is not in its memory: the transaction may have finished.
    StoreIsAsked,
    /// There is one look for a key at a time.
    OneLookAtATime,
    /// All requests with one key go to one partition.
    KeyDecidesPartition,
    /// A request is repeated within the retention only. Afterwards its key is gone, and it counts as a new request.
    RepeatWithinRetention,
    /// The purge first updates the partition's row, in the same local transaction, and the row must have the epoch of the process that
    /// purges. A replaced owner may have a shorter retention or a clock that is ahead, and would delete keys early.
    PurgeNamesEpoch,
    /// The row must also have the nonce of the process that purges.
    PurgeNamesNonce,
}

impl Guard {
    const ALL: [Self; 7] = [
        Self::KeyIsKept,
        Self::StoreIsAsked,
        Self::OneLookAtATime,
        Self::KeyDecidesPartition,
        Self::RepeatWithinRetention,
        Self::PurgeNamesEpoch,
        Self::PurgeNamesNonce,
    ];

    /// The number of its rule.
    fn rule(self) -> u8 {
        match self {
            Self::KeyIsKept
            | Self::StoreIsAsked
            | Self::OneLookAtATime
            | Self::KeyDecidesPartition
            | Self::RepeatWithinRetention => 19,
            Self::PurgeNamesEpoch | Self::PurgeNamesNonce => 1,
        }
    }
}

/// A transaction that the request has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Row {
    #[default]
    Absent,
    Open,
    Finished,
    Purged,
}

/// A look into the store for the key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Look {
    #[default]
    None,
    Asked,
    FoundNothing,
    Found(usize),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Owner {
    /// 0: the process does not own the partition, or was fenced.
    epoch: u8,
    /// The nonce of that epoch.
    nonce: u8,
    /// The transaction in memory that has the key.
    known: Option<usize>,
    /// The transaction in its batch.
    batch: Option<usize>,
    looks: [Look; LOOKS],
}

/// Everything that the model knows at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    /// The epoch of each partition. There is one partition, except without `KeyDecidesPartition`.
    epochs: [u8; OWNERS],
    /// The nonce of the epoch of each partition.
    nonces: [u8; OWNERS],
    /// Nothing was recorded since the latest takeover.
    untouched: bool,
    /// A failover has lost the latest takeover.
    failed_over: bool,
    rows: [Row; MADE_MAX],
    made: usize,
    owners: [Owner; OWNERS],
    reserved: [bool; MADE_MAX],
    crashes: u8,
}

impl Representative for State {
    fn representative(&self) -> Self {
        self.clone()
    }
}

/// One step. `who` is an owner, `which` one of its looks, `made` a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "`Display` describes each of them")]
pub enum Action {
    Request(usize),
    ReadKey(usize, usize),
    TakeKey(usize, usize),
    Send(usize),
    Commit(usize),
    Finish(usize),
    TakeOver(usize),
    Restart(usize),
    Try(usize),
    Purge(usize),
    PurgeEarly(usize, usize),
    FailOver,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    removed: Option<Guard>,
}

impl Keys {
    fn keeps(&self, guard: Guard) -> bool {
        self.removed != Some(guard)
    }

    fn partition_of(&self, who: usize) -> usize {
        if self.keeps(Guard::KeyDecidesPartition) { 0 } else { who }
    }

    fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut after = before.clone();
        let state = &mut after;
        match action {
            Action::Request(who) => self.request(state, who)?,
            Action::ReadKey(who, which) => {
                when(state.owners[who].looks[which] == Look::Asked)?;
                let mut kept = (0..MADE_MAX)
                    .filter(|made| matches!(state.rows[*made], Row::Open | Row::Finished));
                state.owners[who].looks[which] =
                    kept.next().map_or(Look::FoundNothing, Look::Found);
            }
            Action::TakeKey(who, which) => {
                match std::mem::take(&mut state.owners[who].looks[which]) {
                    Look::None | Look::Asked => return None,
                    Look::FoundNothing => Self::begin(state, who)?,
                    Look::Found(made) => {
                        let open = state.rows[made] == Row::Open;
                        state.owners[who].known = open.then_some(made);
                    }
                }
            }
            Action::Send(who) => {
                let made = state.owners[who].known?;
                when(state.owners[who].batch.is_none() && state.rows[made] == Row::Absent)?;
                state.owners[who].batch = Some(made);
            }
            Action::Commit(who) => {
                let made = state.owners[who].batch.take()?;
                if self.is_owner(state, who) {
                    state.rows[made] = Row::Open;
                    state.untouched = false;
                } else {
                    state.owners[who] = Owner::default(); // fenced
                }
            }
            Action::Finish(who) => {
                let made = state.owners[who].known?;
                when(self.is_owner(state, who) && state.rows[made] == Row::Open)?;
                state.rows[made] = Row::Finished;
                state.untouched = false;
                state.owners[who].known = None;
            }
            Action::TakeOver(who) => {
                let epoch = state.epochs[self.partition_of(who)];
                when(state.owners[who].epoch == 0 && epoch < EPOCH_MAX)?;
                self.own(state, who);
            }
            Action::Restart(who) => {
                when(state.crashes < CRASHES_MAX && state.owners[who].epoch > 0)?;
                state.crashes += 1;
                self.own(state, who);
            }
            Action::Try(made) => {
                when(state.rows[made] == Row::Open)?;
                state.reserved[made] = true;
            }
            Action::Purge(made) => {
                let late = !self.keeps(Guard::RepeatWithinRetention);
                when(late && state.rows[made] == Row::Finished)?;
                state.rows[made] = Row::Purged;
            }
            Action::PurgeEarly(who, made) => {
                // The present owner deletes nothing before the retention is over.
                let (owner, partition) = (state.owners[who], self.partition_of(who));
                when(owner.epoch > 0 && !self.is_owner(state, who))?;
                let epoch = owner.epoch == state.epochs[partition];
                let nonce = owner.nonce == state.nonces[partition];
                when(epoch || !self.keeps(Guard::PurgeNamesEpoch))?;
                when(nonce || !self.keeps(Guard::PurgeNamesNonce))?;
                when(state.rows[made] == Row::Finished)?;
                state.rows[made] = Row::Purged;
            }
            Action::FailOver => {
                // Nothing is lost but the latest takeover. The next one gives its epoch number again.
                when(self.keeps(Guard::KeyDecidesPartition))?;
                when(!state.failed_over && state.untouched)?;
                let live = |who: usize| self.is_owner(state, who);
                let zombie = |who: usize| state.owners[who].epoch > 0 && !live(who);
                when(!(0..OWNERS).any(zombie))?;
                state.failed_over = true;
                state.epochs[0] -= 1;
            }
        }
        (after != *before).then_some(after)
    }

    fn request(&self, state: &mut State, who: usize) -> Option<()> {
        let owner = state.owners[who];
        when(owner.epoch > 0)?;
        if !self.keeps(Guard::KeyIsKept) {
            return Self::begin(state, who); // it counts as a new request
        }
        when(owner.known.is_none())?; // otherwise the reply names the known transaction
        if !self.keeps(Guard::StoreIsAsked) {
            return Self::begin(state, who);
        }
        let at_once = if self.keeps(Guard::OneLookAtATime) { 1 } else { LOOKS };
        let looks = &mut state.owners[who].looks[..at_once];
        *looks.iter_mut().find(|look| **look == Look::None)? = Look::Asked;
        Some(())
    }

    fn is_owner(&self, state: &State, who: usize) -> bool {
        let (owner, partition) = (state.owners[who], self.partition_of(who));
        owner.epoch == state.epochs[partition] && owner.nonce == state.nonces[partition]
    }

    fn begin(state: &mut State, who: usize) -> Option<()> {
        when(state.made < MADE_MAX)?;
        state.owners[who].known = Some(state.made);
        state.made += 1;
        Some(())
    }

    /// A takeover: a new epoch. The owner finds the open transaction when it looks for due ones.
    fn own(&self, state: &mut State, who: usize) {
        let partition = self.partition_of(who);
        state.epochs[partition] += 1;
        let open = state.rows.iter().position(|row| *row == Row::Open);
        let known = open.filter(|_| self.keeps(Guard::KeyDecidesPartition));
        state.untouched = true;
        state.nonces[partition] = 1 + u8::from(state.failed_over);
        let (epoch, nonce) = (state.epochs[partition], state.nonces[partition]);
        state.owners[who] = Owner { epoch, nonce, known, ..Owner::default() };
    }
}

impl Model for Keys {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let owner = Owner { epoch: 1, nonce: 1, ..Owner::default() };
        let other = if self.keeps(Guard::KeyDecidesPartition) { Owner::default() } else { owner };
        vec![State {
            epochs: [1; OWNERS],
            nonces: [1; OWNERS],
            untouched: false,
            failed_over: false,
            rows: [Row::Absent; MADE_MAX],
            made: 0,
            owners: [owner, other],
            reserved: [false; MADE_MAX],
            crashes: 0,
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for who in 0..OWNERS {
            actions.extend([
                Action::Request(who),
                Action::Send(who),
                Action::Commit(who),
                Action::Finish(who),
                Action::TakeOver(who),
                Action::Restart(who),
            ]);
            actions.extend((0..MADE_MAX).map(|made| Action::PurgeEarly(who, made)));
            for which in 0..LOOKS {
                actions.extend([Action::ReadKey(who, which), Action::TakeKey(who, which)]);
            }
        }
        for made in 0..MADE_MAX {
            actions.extend([Action::Try(made), Action::Purge(made)]);
        }
        actions.push(Action::FailOver);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("K one key reserves under one transaction", |_, state: &State| {
                state.reserved.iter().filter(|reserved| **reserved).count() <= 1
            }),
            Property::sometimes(
                "a repeated request finds a finished transaction",
                |_, state: &State| {
                    let found = |look: &Look| matches!(look, Look::Found(made) if state.rows[*made] == Row::Finished);
                    state.owners.iter().flat_map(|owner| &owner.looks).any(found)
                },
            ),
            Property::sometimes("a zombie's Begin is fenced", |model: &Self, state: &State| {
                state.owners.iter().enumerate().any(|(who, owner)| {
                    owner.batch.is_some() && owner.epoch < state.epochs[model.partition_of(who)]
                })
            }),
            Property::sometimes(
                "two owners of two histories have the same epoch number",
                |model: &Self, state: &State| {
                    let [first, second] = state.owners;
                    !model.keeps(Guard::KeyDecidesPartition)
                        || first.epoch > 1
                            && first.epoch == second.epoch
                            && first.nonce != second.nonce
                },
            ),
        ]
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |who: &usize| ["A", "B"][*who];
        match self {
            Self::Request(who) => write!(f, "the request arrives at {}", name(who)),
            Self::ReadKey(who, which) => {
                write!(f, "{}'s look {which} reads the store", name(who))
            }
            Self::TakeKey(who, which) => write!(f, "{} hears of look {which}", name(who)),
            Self::Send(who) => write!(f, "{} sends a batch with its transaction", name(who)),
            Self::Commit(who) => write!(f, "{}'s batch is carried out", name(who)),
            Self::Finish(who) => write!(f, "{}'s transaction finishes", name(who)),
            Self::TakeOver(who) => write!(f, "{} takes over", name(who)),
            Self::Restart(who) => write!(f, "{} is killed and starts again", name(who)),
            Self::Try(made) => write!(f, "transaction {made} is tried"),
            Self::Purge(made) => write!(f, "transaction {made} is deleted after its retention"),
            Self::PurgeEarly(who, made) => {
                write!(f, "{} was replaced, and deletes transaction {made} early", name(who))
            }
            Self::FailOver => f.write_str("another server takes over, without the last takeover"),
        }
    }
}

/// All variants.
#[must_use]
pub fn variants() -> Vec<Variant> {
    let clean = Keys { removed: None };
    let mut variants = vec![Variant::clean(
        MODEL,
        "1 crash, 2 takeovers, 1 failover, repeats anywhere",
        Size::Small,
        clean,
    )];
    variants.extend(Guard::ALL.map(|guard| {
        let model = Keys { removed: Some(guard) };
        Variant::broken(MODEL, format!("without {guard:?}"), guard.rule(), "K", model)
    }));
    variants
}

/// Goes on only if `condition` holds.
fn when(condition: bool) -> Option<()> {
    condition.then_some(())
}
