//! What must always hold, and what must be possible.

use stateright::Property;

use super::{
    Several,
    state::{Decision, PARTITIONS, Progress, State},
};

impl Several {
    pub(super) fn all_properties(&self) -> Vec<Property<Self>> {
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
            Property::always("I11 what callers were told is recorded", |_, state: &State| {
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

    /// Every owner knows that all its decisions are durable.
    fn is_settled(state: &State) -> bool {
        let seats = state.coordinators.iter().flat_map(|process| process.seats.iter().enumerate());
        let mut owned = seats.filter_map(|(partition, seat)| {
            seat.filter(|seat| seat.epoch == state.store[partition].epoch)
        });
        owned.all(|seat| seat.memory == seat.durable)
    }
}
