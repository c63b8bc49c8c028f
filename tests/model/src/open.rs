//! What is open: does a new owner find every transaction that it must carry on, without an index of all that are due?
//!
//! The partition's row says from which xid on a transaction may be open (`open_from`). What stays open for longer has a row in a table
//! of its own, `parked`. A transaction below `open_from` without such a row is over. The owner's task publishes `open_from`, and the
//! journal takes the latest one into each batch. So it may be behind what the batch contains, and must never be ahead.
//!
//! Not here: batches of replaced owners, which change nothing (see `protocol`), and which of several open transactions comes first.

use std::fmt;

use stateright::{Model, Property, Representative};

use crate::variant::{Size, Variant};

const MODEL: &str = "what is open";
/// The name of the property, by its start.
const PROPERTY: &str = "O";
/// Transactions, in order of their xids.
const MADE_MAX: usize = 3;
const CRASHES_MAX: u8 = 2;
/// The rule that all guards belong to.
const RULE: u8 = 26;

/// What can be removed. Each comment says what holds while the guard is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// A transaction that is not recorded yet holds `open_from` back: it may be recorded, decided, by any later batch.
    UnrecordedCounts,
    /// A transaction that has finished holds it back until that is durable.
    FinishIsDurable,
    /// A transaction that is parked holds it back until its row in `parked` is durable.
    ParkedIsDurable,
    /// The row in `parked` stays until the transaction has finished, also while the transaction is in memory again.
    ParkedStays,
    /// A new owner does not move it further than its own look has come.
    LookComesFirst,
}

impl Guard {
    const ALL: [Self; 5] = [
        Self::UnrecordedCounts,
        Self::FinishIsDurable,
        Self::ParkedIsDurable,
        Self::ParkedStays,
        Self::LookComesFirst,
    ];
}

/// A transaction's row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Row {
    #[default]
    Absent,
    /// Decided. Somebody must carry it on.
    Open,
    Over,
}

/// A transaction in the owner's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Entry {
    #[default]
    Absent,
    Undecided,
    /// It is decided. Its calls are made once that is durable.
    Open,
    Over,
}

/// What the next batch writes of a transaction: the latest state of everything that has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Write {
    row: Option<Row>,
    parked: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Batch {
    writes: [Write; MADE_MAX],
    open_from: usize,
    /// The store has carried it out.
    landed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Owner {
    entries: [Entry; MADE_MAX],
    /// What is durable of each transaction, as far as the owner knows.
    rows: [Row; MADE_MAX],
    /// The transactions whose row in `parked` is durable, as far as the owner knows.
    parked: [bool; MADE_MAX],
    /// What waits for the next batch.
    outbox: [Write; MADE_MAX],
    published: usize,
    /// All transactions before this one were looked at.
    looked: usize,
}

/// Everything that the model knows at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    rows: [Row; MADE_MAX],
    parked: [bool; MADE_MAX],
    open_from: usize,
    /// How many transactions have begun.
    made: usize,
    /// `None`: it has crashed.
    owner: Option<Owner>,
    batch: Option<Batch>,
    crashes: u8,
}

impl State {
    /// Whether a transaction is open, and a new owner does not look at it.
    fn is_passed(&self, at: usize) -> bool {
        self.rows[at] == Row::Open && at < self.open_from
    }
}

impl Representative for State {
    fn representative(&self) -> Self {
        self.clone()
    }
}

/// One step. The number is a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "`Display` describes each of them")]
pub enum Action {
    Begin,
    Decide(usize),
    Finish(usize),
    Park(usize),
    Leave(usize),
    Load(usize),
    Publish,
    CollectAll,
    CollectOne(usize),
    Land,
    Tell,
    Crash,
    TakeOver,
    Look,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    removed: Option<Guard>,
}

impl Open {
    fn keeps(&self, guard: Guard) -> bool {
        self.removed != Some(guard)
    }

    fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Land => land(&mut state)?,
            Action::Crash => {
                when(state.owner.is_some() && state.crashes < CRASHES_MAX)?;
                state.crashes += 1;
                state.owner = None;
            }
            Action::TakeOver => {
                when(state.owner.is_none())?;
                state.batch = None; // from now on it changes nothing
                let (published, looked) = (state.open_from, state.open_from);
                state.owner = Some(Owner { published, looked, ..Owner::default() });
            }
            Action::CollectAll => collect(&mut state, std::mem::take)?,
            // A batch that is full leaves the rest to the next one.
            Action::CollectOne(at) => collect(&mut state, |outbox| {
                let mut writes = [Write::default(); MADE_MAX];
                writes[at] = std::mem::take(&mut outbox[at]);
                writes
            })?,
            Action::Tell => {
                let (owner, batch) = (state.owner.as_mut()?, state.batch.take()?);
                when(batch.landed)?;
                for (at, write) in batch.writes.into_iter().enumerate() {
                    owner.rows[at] = write.row.unwrap_or(owner.rows[at]);
                    owner.parked[at] = write.parked.unwrap_or(owner.parked[at]);
                }
            }
            Action::Begin => {
                when(state.made < MADE_MAX)?;
                let owner = state.owner.as_mut()?;
                owner.entries[state.made] = Entry::Undecided;
                state.made += 1;
            }
            Action::Publish => {
                let open_from = self.open_from(&state)?;
                state.owner.as_mut()?.published = open_from;
            }
            Action::Look => {
                let owner = state.owner.as_mut()?;
                let at = owner.looked;
                when(at < state.made)?;
                if state.rows[at] == Row::Open && owner.entries[at] == Entry::Absent {
                    Self::take_in(owner, at, state.parked[at]);
                }
                owner.looked += 1;
            }
            Action::Load(at) => {
                let owner = state.owner.as_mut()?;
                when(state.parked[at] && state.rows[at] == Row::Open)?;
                when(owner.entries[at] == Entry::Absent)?;
                Self::take_in(owner, at, true);
                if !self.keeps(Guard::ParkedStays) {
                    owner.outbox[at].parked = Some(false);
                    owner.parked[at] = false;
                }
            }
            Action::Decide(at) => {
                let owner = state.owner.as_mut()?;
                when(owner.entries[at] == Entry::Undecided)?;
                owner.entries[at] = Entry::Open;
                owner.outbox[at].row = Some(Row::Open);
            }
            Action::Finish(at) => {
                let owner = state.owner.as_mut()?;
                when(owner.entries[at] == Entry::Open && owner.rows[at] == Row::Open)?;
                owner.entries[at] = Entry::Over;
                owner.outbox[at] = Write { row: Some(Row::Over), parked: Some(false) };
            }
            Action::Park(at) => {
                let owner = state.owner.as_mut()?;
                when(owner.entries[at] == Entry::Open && owner.rows[at] == Row::Open)?;
                when(!owner.parked[at])?;
                owner.outbox[at].parked = Some(true);
            }
            Action::Leave(at) => {
                let owner = state.owner.as_mut()?;
                when(owner.outbox[at] == Write::default())?;
                match owner.entries[at] {
                    Entry::Open => when(owner.parked[at])?,
                    Entry::Over => when(owner.rows[at] == Row::Over)?,
                    Entry::Absent | Entry::Undecided => return None,
                }
                owner.entries[at] = Entry::Absent;
            }
        }
        (state != *before).then_some(state)
    }

    fn take_in(owner: &mut Owner, at: usize, is_parked: bool) {
        owner.entries[at] = Entry::Open;
        owner.rows[at] = Row::Open;
        owner.parked[at] = is_parked;
    }

    /// The first transaction that may be open without a row in `parked`.
    fn open_from(&self, state: &State) -> Option<usize> {
        let owner = state.owner.as_ref()?;
        let holds_back = |at: &usize| {
            let leaving = owner.outbox[*at].parked == Some(true);
            let is_parked = owner.parked[*at] || leaving && !self.keeps(Guard::ParkedIsDurable);
            !is_parked
                && match owner.entries[*at] {
                    Entry::Absent => false,
                    Entry::Undecided => self.keeps(Guard::UnrecordedCounts),
                    Entry::Open => true,
                    Entry::Over => {
                        self.keeps(Guard::FinishIsDurable) && owner.rows[*at] != Row::Over
                    }
                }
        };
        let first = (0..state.made).find(holds_back).unwrap_or(state.made);
        let looked = if self.keeps(Guard::LookComesFirst) { owner.looked } else { state.made };
        // What it begins itself is not looked at.
        let looks_on = (owner.looked..state.made).any(|at| owner.entries[at] == Entry::Absent);
        Some(if looks_on { first.min(looked) } else { first })
    }
}

/// The journal makes a batch of what `take` takes from the outbox.
fn collect(
    state: &mut State,
    take: impl FnOnce(&mut [Write; MADE_MAX]) -> [Write; MADE_MAX],
) -> Option<()> {
    when(state.batch.is_none())?;
    let owner = state.owner.as_mut()?;
    let writes = take(&mut owner.outbox);
    when(writes != [Write::default(); MADE_MAX])?;
    state.batch = Some(Batch { writes, open_from: owner.published, landed: false });
    Some(())
}

/// The store carries out the batch, whether its owner lives or not.
fn land(state: &mut State) -> Option<()> {
    let batch = state.batch.as_mut()?;
    when(!batch.landed)?;
    batch.landed = true;
    for (at, write) in batch.writes.into_iter().enumerate() {
        state.rows[at] = write.row.unwrap_or(state.rows[at]);
        state.parked[at] = write.parked.unwrap_or(state.parked[at]);
    }
    state.open_from = batch.open_from;
    Some(())
}

impl Model for Open {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            rows: [Row::Absent; MADE_MAX],
            parked: [false; MADE_MAX],
            open_from: 0,
            made: 0,
            owner: Some(Owner::default()),
            batch: None,
            crashes: 0,
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for at in 0..MADE_MAX {
            actions.extend([
                Action::Decide(at),
                Action::Finish(at),
                Action::Park(at),
                Action::Leave(at),
                Action::Load(at),
                Action::CollectOne(at),
            ]);
        }
        actions.extend([
            Action::Begin,
            Action::Publish,
            Action::CollectAll,
            Action::Land,
            Action::Tell,
            Action::Crash,
            Action::TakeOver,
            Action::Look,
        ]);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("O what is open is found by the next owner", |_, state: &State| {
                (0..MADE_MAX).all(|at| !state.is_passed(at) || state.parked[at])
            }),
            Property::sometimes("a parked transaction is passed", |_, state: &State| {
                (0..MADE_MAX).any(|at| state.is_passed(at))
            }),
            Property::sometimes("a finished transaction is passed", |_, state: &State| {
                state.rows[0] == Row::Over && state.open_from > 0
            }),
            Property::sometimes("a look finds what its owner must carry on", |_, state: &State| {
                let found = |owner: &Owner| {
                    (0..owner.looked)
                        .any(|at| owner.entries[at] == Entry::Open && !owner.parked[at])
                };
                state.crashes > 0 && state.owner.as_ref().is_some_and(found)
            }),
            Property::sometimes("what was parked finishes", |_, state: &State| {
                let parked = |owner: &Owner| {
                    (0..MADE_MAX).any(|at| owner.parked[at] && owner.entries[at] == Entry::Over)
                };
                state.owner.as_ref().is_some_and(parked)
            }),
        ]
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin => f.write_str("a transaction begins"),
            Self::Decide(at) => write!(f, "transaction {at} is decided"),
            Self::Finish(at) => write!(f, "transaction {at} finishes"),
            Self::Park(at) => write!(f, "transaction {at} has been open for long, and is parked"),
            Self::Leave(at) => write!(f, "transaction {at} leaves memory"),
            Self::Load(at) => write!(f, "transaction {at} is read because it is parked and due"),
            Self::Publish => f.write_str("the owner publishes open_from"),
            Self::CollectAll => f.write_str("the journal takes all that waits into a batch"),
            Self::CollectOne(at) => {
                write!(f, "the journal's batch has room for transaction {at} only")
            }
            Self::Land => f.write_str("the batch is carried out"),
            Self::Tell => f.write_str("the owner hears of it"),
            Self::Crash => f.write_str("the owner crashes"),
            Self::TakeOver => f.write_str("another owner takes over"),
            Self::Look => f.write_str("it looks at the next transaction"),
        }
    }
}

/// All variants.
#[must_use]
pub fn variants() -> Vec<Variant> {
    let clean = Open { removed: None };
    let what = "2 crashes, batches that are cut";
    let mut variants = vec![Variant::clean(MODEL, what, Size::Small, clean)];
    variants.extend(Guard::ALL.map(|guard| {
        let model = Open { removed: Some(guard) };
        Variant::broken(MODEL, format!("without {guard:?}"), RULE, PROPERTY, model)
    }));
    variants
}

/// Goes on only if `condition` holds.
fn when(condition: bool) -> Option<()> {
    condition.then_some(())
}
