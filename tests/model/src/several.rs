//! Batches that carry several partitions: each partition's guard must hold for its own rows.
//!
//! Two partitions, which may be taken over one by one (the coordinator takes all of them at once today; the store does not rest
//! on that), and two coordinators. All that is left of a transaction is its decision: one transaction in each partition, first
//! undecided, then confirmed or cancelled by whoever owns it. Loading is one step here; the other model has it in full.
//!
//! What a coordinator does is `Journal::append`, and what the database does is `store/sql/write.rs`: one UPDATE moves the position
//! of every partition in the batch; if it has moved fewer than there are guards, all is rolled back, and `judge` says what became
//! of it. A partition that is fenced is dropped, and the rest of the batch is sent again under its old numbers.

use std::fmt;

use stateright::{Model, Property, Representative};

use crate::variant::{Size, Variant};

const MODEL: &str = "several partitions";
const PARTITIONS: usize = 2;
const COORDINATORS: usize = 2;
const ABANDONED: usize = 3;

/// One thing for each partition.
type Each<T> = [T; PARTITIONS];

/// What may be taken away. The comment says what holds while it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// A batch is applied only if all of its guards have matched.
    AllGuardsMatch,
    /// What does not match is looked at in every partition; one that has landed says nothing of one that is fenced.
    FencedIsLookedForEverywhere,
    /// When a partition is fenced, its rows are dropped from the batch with its guard.
    FencedRowsDropped,
    /// What is left of the batch is sent again: nothing of it was applied.
    RestIsRepeated,
    /// What is left keeps its numbers.
    RestKeepsItsNumbers,
    /// What is left keeps its content.
    RestKeepsItsContent,
}

impl Guard {
    const ALL: [Self; 6] = [
        Self::AllGuardsMatch,
        Self::FencedIsLookedForEverywhere,
        Self::FencedRowsDropped,
        Self::RestIsRepeated,
        Self::RestKeepsItsNumbers,
        Self::RestKeepsItsContent,
    ];

    /// The rule of which it is a case.
    fn rule(self) -> u8 {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => 1,
            Self::FencedIsLookedForEverywhere
            | Self::RestKeepsItsNumbers
            | Self::RestKeepsItsContent => 2,
            Self::RestIsRepeated => 4,
        }
    }

    /// What must be broken without it.
    fn expects(self) -> &'static str {
        match self {
            Self::AllGuardsMatch | Self::FencedRowsDropped => "G",
            Self::FencedIsLookedForEverywhere | Self::RestIsRepeated => "I11",
            Self::RestKeepsItsNumbers => "O",
            Self::RestKeepsItsContent => "I11",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Decision {
    Confirm,
    Cancel,
}

/// A partition as it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Row {
    epoch: u8,
    position: u8,
    decision: Option<Decision>,
}

/// What a batch is to do in one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Part {
    epoch: u8,
    position: u8,
    /// `None`: only the guard, for a heartbeat or for others.
    decision: Option<Decision>,
    /// Without `FencedRowsDropped` only: the guard is gone, the row is still written.
    unguarded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Progress {
    Sent,
    /// All guards have matched; the rows of all partitions in it are held until COMMIT.
    Guarded,
    /// Not all of them have; those that have are held until it has looked.
    Missed(Each<bool>),
    Landed,
    Fenced(Each<bool>),
    Corrupt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Batch {
    progress: Progress,
    parts: Each<Option<Part>>,
}

/// A coordinator's hold on one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Seat {
    epoch: u8,
    position: u8,
    memory: Option<Decision>,
    durable: Option<Decision>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Coordinator {
    /// `None`: not an owner, or fenced.
    seats: Each<Option<Seat>>,
    batch: Option<Batch>,
}

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    store: Each<Row>,
    coordinators: [Coordinator; COORDINATORS],
    abandoned: [Option<Batch>; ABANDONED],
    /// Told as confirmed, as cancelled.
    told: Each<[bool; 2]>,
    changed: bool,
    written_by_stranger: bool,
    alarmed: bool,
    crashes: u8,
    takeovers: u8,
    faults: u8,
}

impl Representative for State {
    fn representative(&self) -> Self {
        let mut sorted = self.clone();
        sorted.coordinators.sort();
        sorted
    }
}

/// One step of a coordinator, or of an abandoned batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "what each is, its text says below")]
pub enum Action {
    TakeOver(usize, Each<bool>),
    Decide(usize, usize, bool),
    Send(usize, Each<bool>),
    Guard(usize),
    Look(usize),
    Commit(usize),
    Hear(usize),
    LoseConnection(usize),
    Crash(usize),
    GuardAbandoned(usize),
    CommitAbandoned(usize),
    EndAbandoned(usize),
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Several {
    crashes: u8,
    takeovers: u8,
    faults: u8,
    removed: Option<Guard>,
}

const SOME: [Each<bool>; 3] = [[true, true], [true, false], [false, true]];

impl Several {
    fn keeps(&self, guard: Guard) -> bool {
        self.removed != Some(guard)
    }

    fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut after = before.clone();
        let state = &mut after;
        match action {
            Action::TakeOver(who, which) => self.take_over(state, who, which)?,
            Action::Decide(who, partition, confirm) => {
                let seat = state.coordinators[who].seats[partition].as_mut()?;
                when(seat.memory.is_none())?;
                seat.memory = Some(if confirm { Decision::Confirm } else { Decision::Cancel });
            }
            Action::Send(who, which) => Self::send(state, who, which)?,
            Action::Guard(who) => {
                let batch = state.coordinators[who].batch?;
                let progress = self.guarded(state, batch)?;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Look(who) => {
                let batch = state.coordinators[who].batch?;
                let progress = self.judged(state, batch)?;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Commit(who) => {
                let batch = state.coordinators[who].batch?;
                when(batch.progress == Progress::Guarded)?;
                Self::write(state, batch);
                let progress = Progress::Landed;
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Hear(who) => self.hear(state, who)?,
            Action::LoseConnection(who) => {
                let batch = state.coordinators[who].batch?;
                when(state.faults < self.faults)?;
                state.faults += 1;
                Self::leave_to_database(state, batch)?;
                let progress = Progress::Sent; // the same one again
                state.coordinators[who].batch = Some(Batch { progress, ..batch });
            }
            Action::Crash(who) => {
                let process = state.coordinators[who];
                when(process != Coordinator::default() && state.crashes < self.crashes)?;
                state.crashes += 1;
                if let Some(batch) = process.batch {
                    Self::leave_to_database(state, batch)?;
                }
                state.coordinators[who] = Coordinator::default();
            }
            Action::GuardAbandoned(which) => {
                let batch = state.abandoned[which]?;
                let progress = self.guarded(state, batch)?;
                let matched = progress == Progress::Guarded;
                state.abandoned[which] = matched.then_some(Batch { progress, ..batch });
            }
            Action::CommitAbandoned(which) => {
                let batch = state.abandoned[which]?;
                when(batch.progress == Progress::Guarded)?;
                Self::write(state, batch);
                state.abandoned[which] = None;
            }
            Action::EndAbandoned(which) => {
                state.abandoned[which].take()?;
            }
        }
        state.abandoned.sort();
        Self::speak(state);
        (after != *before).then_some(after)
    }

    fn take_over(&self, state: &mut State, who: usize, which: Each<bool>) -> Option<()> {
        let process = state.coordinators[who];
        // A process that has partitions is given no more of them: each start is one takeover.
        when(process == Coordinator::default())?;
        let held = Self::held(state);
        let taken = |partition: &usize| which[*partition];
        when(!(0..PARTITIONS).filter(taken).any(|partition| held[partition]))?;
        if (0..PARTITIONS).filter(taken).any(|partition| Self::has_owner(state, partition)) {
            when(state.takeovers < self.takeovers)?;
            state.takeovers += 1;
        }
        for partition in (0..PARTITIONS).filter(taken) {
            let row = &mut state.store[partition];
            (row.epoch, row.position) = (row.epoch + 1, 0);
            let (memory, durable) = (row.decision, row.decision);
            state.coordinators[who].seats[partition] =
                Some(Seat { epoch: row.epoch, position: 0, memory, durable });
        }
        Some(())
    }

    fn has_owner(state: &State, partition: usize) -> bool {
        state.coordinators.iter().any(|process| {
            process.seats[partition].is_some_and(|seat| seat.epoch == state.store[partition].epoch)
        })
    }

    /// A batch of these partitions, with whatever has changed in them.
    fn send(state: &mut State, who: usize, which: Each<bool>) -> Option<()> {
        let process = &mut state.coordinators[who];
        when(process.batch.is_none())?;
        let mut parts = [None; PARTITIONS];
        let mut changes = false;
        for partition in (0..PARTITIONS).filter(|partition| which[*partition]) {
            let seat = process.seats[partition].as_mut()?;
            let changed = seat.memory != seat.durable;
            changes |= changed;
            seat.position += 1;
            let decision = seat.memory.filter(|_| changed);
            let (epoch, position) = (seat.epoch, seat.position);
            parts[partition] = Some(Part { epoch, position, decision, unguarded: false });
        }
        when(changes)?;
        process.batch = Some(Batch { progress: Progress::Sent, parts });
        Some(())
    }

    /// Which partitions' rows some batch holds.
    fn held(state: &State) -> Each<bool> {
        let mut held = [false; PARTITIONS];
        let of_owners = state.coordinators.iter().filter_map(|process| process.batch);
        for batch in of_owners.chain(state.abandoned.iter().flatten().copied()) {
            for (partition, held) in held.iter_mut().enumerate() {
                *held |= match batch.progress {
                    Progress::Guarded => batch.parts[partition].is_some(),
                    Progress::Missed(matched) => matched[partition],
                    Progress::Sent | Progress::Landed | Progress::Fenced(_) | Progress::Corrupt => {
                        false
                    }
                };
            }
        }
        held
    }

    /// One UPDATE for all guards, and how many rows it has moved.
    fn guarded(&self, state: &State, batch: Batch) -> Option<Progress> {
        when(batch.progress == Progress::Sent)?;
        let held = Self::held(state);
        let mut matched = [false; PARTITIONS];
        let mut wanted = [false; PARTITIONS];
        for partition in 0..PARTITIONS {
            let Some(part) = batch.parts[partition].filter(|part| !part.unguarded) else {
                continue;
            };
            when(!held[partition])?; // it waits
            let row = state.store[partition];
            wanted[partition] = true;
            matched[partition] = row.epoch == part.epoch && row.position + 1 == part.position;
        }
        let any = matched.contains(&true) && !self.keeps(Guard::AllGuardsMatch);
        Some(if matched == wanted || any { Progress::Guarded } else { Progress::Missed(matched) })
    }

    /// `judge`: what epoch and position say about a batch that was not applied.
    fn judged(&self, state: &State, batch: Batch) -> Option<Progress> {
        let Progress::Missed(matched) = batch.progress else { return None };
        let (mut landed, mut fenced, mut corrupt) = (false, [false; PARTITIONS], false);
        for partition in 0..PARTITIONS {
            let Some(part) = batch.parts[partition].filter(|part| !part.unguarded) else {
                continue;
            };
            let row = state.store[partition];
            if matched[partition] {
                // Its own UPDATE has moved it, and is rolled back.
            } else if row.epoch == part.epoch && row.position == part.position {
                landed = true;
            } else if row.epoch > part.epoch {
                fenced[partition] = true;
            } else {
                corrupt = true;
            }
        }
        let landed_first = landed && !self.keeps(Guard::FencedIsLookedForEverywhere);
        let moved = matched.contains(&true) && !self.keeps(Guard::FencedIsLookedForEverywhere);
        Some(if corrupt {
            Progress::Corrupt
        } else if landed_first || moved {
            Progress::Landed
        } else if fenced.contains(&true) {
            Progress::Fenced(fenced)
        } else if landed && !matched.contains(&true) {
            Progress::Landed
        } else {
            Progress::Corrupt
        })
    }

    fn write(state: &mut State, batch: Batch) {
        for partition in 0..PARTITIONS {
            let Some(part) = batch.parts[partition] else { continue };
            let row = &mut state.store[partition];
            state.written_by_stranger |= row.epoch != part.epoch;
            if !part.unguarded {
                row.position = part.position;
            }
            if part.decision.is_some() {
                state.changed |= row.decision.is_some() && row.decision != part.decision;
                row.decision = part.decision;
            }
        }
    }

    fn hear(&self, state: &mut State, who: usize) -> Option<()> {
        let process = &mut state.coordinators[who];
        let batch = process.batch?;
        match batch.progress {
            Progress::Sent | Progress::Guarded | Progress::Missed(_) => return None,
            Progress::Landed => {
                process.batch = None;
                self.take_durable(process, batch.parts);
            }
            Progress::Fenced(fenced) => {
                let mut rest = batch.parts;
                for partition in (0..PARTITIONS).filter(|partition| fenced[*partition]) {
                    process.seats[partition] = None;
                    rest[partition] = None;
                    if !self.keeps(Guard::FencedRowsDropped) {
                        rest[partition] =
                            batch.parts[partition].map(|part| Part { unguarded: true, ..part });
                    }
                }
                self.send_rest(process, rest);
            }
            Progress::Corrupt => {
                state.alarmed = true;
                *process = Coordinator::default();
            }
        }
        Some(())
    }

    fn take_durable(&self, process: &mut Coordinator, parts: Each<Option<Part>>) {
        for (seat, part) in process.seats.iter_mut().zip(parts) {
            if let (Some(seat), Some(part)) = (seat, part) {
                // In this model a decision is all that is ever written.
                seat.durable = part.decision.or(seat.durable);
            }
        }
    }

    /// The partitions that were not fenced.
    fn send_rest(&self, process: &mut Coordinator, mut rest: Each<Option<Part>>) {
        process.batch = None;
        if rest.iter().flatten().all(|part| part.unguarded) {
            return;
        }
        if !self.keeps(Guard::RestIsRepeated) {
            return self.take_durable(process, rest);
        }
        for (part, seat) in rest.iter_mut().zip(&mut process.seats) {
            let (Some(part), Some(seat)) = (part, seat) else { continue };
            if !self.keeps(Guard::RestKeepsItsNumbers) {
                seat.position += 1;
                part.position = seat.position;
            }
            if !self.keeps(Guard::RestKeepsItsContent) {
                part.decision = seat.memory;
            }
        }
        process.batch = Some(Batch { progress: Progress::Sent, parts: rest });
    }

    fn leave_to_database(state: &mut State, batch: Batch) -> Option<()> {
        if !matches!(batch.progress, Progress::Sent | Progress::Guarded) {
            return Some(());
        }
        let free = state.abandoned.iter_mut().find(|place| place.is_none())?;
        *free = Some(batch);
        Some(())
    }

    /// What is known to be durable may be told.
    fn speak(state: &mut State) {
        for seats in state.coordinators.map(|process| process.seats) {
            for (told, seat) in state.told.iter_mut().zip(seats) {
                match seat.and_then(|seat| seat.durable) {
                    Some(Decision::Confirm) => told[0] = true,
                    Some(Decision::Cancel) => told[1] = true,
                    None => {}
                }
            }
        }
    }

    /// Every owner knows all that it has decided to be durable.
    fn is_settled(state: &State) -> bool {
        let seats = state.coordinators.iter().flat_map(|process| process.seats.iter().enumerate());
        let mut owned = seats.filter_map(|(partition, seat)| {
            seat.filter(|seat| seat.epoch == state.store[partition].epoch)
        });
        owned.all(|seat| seat.memory == seat.durable)
    }

    /// Nothing is left that must happen sooner or later.
    fn is_at_rest(&self, state: &State) -> bool {
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        actions.retain(|action| match action {
            Action::Send(..)
            | Action::Guard(..)
            | Action::Look(..)
            | Action::Commit(..)
            | Action::Hear(..)
            | Action::GuardAbandoned(..)
            | Action::CommitAbandoned(..) => true,
            Action::TakeOver(..)
            | Action::Decide(..)
            | Action::LoseConnection(..)
            | Action::Crash(..)
            | Action::EndAbandoned(..) => false,
        });
        !actions.into_iter().any(|action| self.step(state, action).is_some())
    }
}

impl Model for Several {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let seat = Some(Seat { epoch: 1, position: 0, memory: None, durable: None });
        let owner = Coordinator { seats: [seat; PARTITIONS], batch: None };
        vec![State {
            store: [Row { epoch: 1, position: 0, decision: None }; PARTITIONS],
            coordinators: [owner, Coordinator::default()],
            abandoned: [None; ABANDONED],
            told: [[false; 2]; PARTITIONS],
            changed: false,
            written_by_stranger: false,
            alarmed: false,
            crashes: 0,
            takeovers: 0,
            faults: 0,
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for who in 0..COORDINATORS {
            for which in SOME {
                actions.extend([Action::Send(who, which), Action::TakeOver(who, which)]);
            }
            for partition in 0..PARTITIONS {
                actions
                    .extend([true, false].map(|confirm| Action::Decide(who, partition, confirm)));
            }
            actions.extend([
                Action::Guard(who),
                Action::Look(who),
                Action::Commit(who),
                Action::Hear(who),
                Action::LoseConnection(who),
                Action::Crash(who),
            ]);
        }
        for which in 0..ABANDONED {
            actions.extend([
                Action::GuardAbandoned(which),
                Action::CommitAbandoned(which),
                Action::EndAbandoned(which),
            ]);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.step(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "G a row is written only by its partition's owner",
                |_, state: &State| !state.written_by_stranger,
            ),
            Property::always("I4 no two answers contradict", |_, state: &State| {
                !state.told.contains(&[true, true])
            }),
            Property::always("I7 a durable decision never changes", |_, state: &State| {
                !state.changed
            }),
            Property::always("I11 what was told is recorded", |_, state: &State| {
                let told = state.told.iter().zip(&state.store);
                told.into_iter().all(|([confirm, cancel], row)| {
                    (!confirm || row.decision == Some(Decision::Confirm))
                        && (!cancel || row.decision == Some(Decision::Cancel))
                })
            }),
            Property::always("I6 at rest everything decided is durable", |model: &Self, state| {
                Self::is_settled(state) || !model.is_at_rest(state)
            }),
            Property::always("O no owner stops in alarm", |_, state: &State| !state.alarmed),
            Property::sometimes("half of a batch is fenced", |_, state: &State| {
                state.coordinators.iter().filter_map(|process| process.batch).any(|batch| {
                    matches!(batch.progress, Progress::Fenced(fenced) if fenced.contains(&false))
                        && batch.parts.iter().all(Option::is_some)
                })
            }),
            Property::sometimes("the rest of it lands", |_, state: &State| {
                state.coordinators.iter().any(|process| {
                    process.seats.contains(&None)
                        && process.batch.is_some_and(|batch| batch.progress == Progress::Landed)
                })
            }),
            Property::sometimes("two partitions land together", |_, state: &State| {
                state.coordinators.iter().filter_map(|process| process.batch).any(|batch| {
                    batch.progress == Progress::Landed
                        && batch.parts.iter().flatten().filter(|it| it.decision.is_some()).count()
                            == PARTITIONS
                })
            }),
        ]
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |who: &usize| ["A", "B"][*who];
        let of = |which: &Each<bool>| match which {
            [true, true] => "both partitions",
            [true, false] => "partition 0",
            [false, _] => "partition 1",
        };
        match self {
            Self::TakeOver(who, which) => write!(f, "{} takes over {}", name(who), of(which)),
            Self::Decide(who, partition, confirm) => {
                let decision = if *confirm { "Confirm" } else { "Cancel" };
                write!(f, "{} decides {decision} in partition {partition}", name(who))
            }
            Self::Send(who, which) => write!(f, "{} sends a batch of {}", name(who), of(which)),
            Self::Guard(who) => write!(f, "the guards of {}'s batch run", name(who)),
            Self::Look(who) => write!(f, "{}'s batch looks at epochs and positions", name(who)),
            Self::Commit(who) => write!(f, "{}'s batch commits", name(who)),
            Self::Hear(who) => write!(f, "{} hears what became of its batch", name(who)),
            Self::LoseConnection(who) => {
                write!(f, "{}'s batch is left without an answer", name(who))
            }
            Self::Crash(who) => write!(f, "{} is killed", name(who)),
            Self::GuardAbandoned(which) => {
                write!(f, "the guards of abandoned batch {which} run")
            }
            Self::CommitAbandoned(which) => write!(f, "abandoned batch {which} commits"),
            Self::EndAbandoned(which) => write!(f, "abandoned batch {which} is rolled back"),
        }
    }
}

/// All variants.
#[must_use]
pub fn variants() -> Vec<Variant> {
    let clean = Several { crashes: 0, takeovers: 1, faults: 1, removed: None };
    let more = Several { crashes: 1, ..clean };
    let mut variants = vec![
        Variant::clean(MODEL, "a takeover of one or both, 1 fault", Size::Small, clean),
        Variant::clean(MODEL, "the same with 1 crash", Size::Large, more),
    ];
    variants.extend(Guard::ALL.map(|guard| {
        let model = Several { removed: Some(guard), ..clean };
        Variant::broken(MODEL, format!("without {guard:?}"), guard.rule(), guard.expects(), model)
    }));
    variants
}

/// Goes on only if `condition` holds.
fn when(condition: bool) -> Option<()> {
    condition.then_some(())
}
