//! The life of a batch: `journal/` of the coordinator, and `store/sql/write.rs`. One UPDATE moves the positions of all its partitions.

use super::{
    Several,
    guard::Guard,
    state::{Batch, Coordinator, Each, PARTITIONS, Part, Progress, State},
    when,
};

impl Several {
    /// Sends a batch of these partitions with all their changes.
    pub(super) fn send(state: &mut State, who: usize, which: Each<bool>) -> Option<()> {
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

    /// The partitions whose row is held by a batch.
    pub(super) fn held(state: &State) -> Each<bool> {
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

    /// One UPDATE for all guards, which counts the rows that it has moved.
    pub(super) fn guarded(&self, state: &State, batch: Batch) -> Option<Progress> {
        when(batch.progress == Progress::Sent)?;
        let held = Self::held(state);
        let mut matched = [false; PARTITIONS];
        let mut wanted = [false; PARTITIONS];
        for partition in 0..PARTITIONS {
            let Some(part) = batch.parts[partition].filter(|part| !part.unguarded) else {
                continue;
            };
            when(!held[partition])?; // the UPDATE waits
            let row = state.store[partition];
            wanted[partition] = true;
            matched[partition] = row.epoch == part.epoch && row.position + 1 == part.position;
        }
        let any = matched.contains(&true) && !self.keeps(Guard::AllGuardsMatch);
        Some(if matched == wanted || any { Progress::Guarded } else { Progress::Missed(matched) })
    }

    /// `judge`: what epochs and positions say about a batch whose guards did not all match.
    pub(super) fn judged(&self, state: &State, batch: Batch) -> Option<Progress> {
        let Progress::Missed(matched) = batch.progress else { return None };
        let (mut landed, mut fenced, mut corrupt) = (false, [false; PARTITIONS], false);
        for partition in 0..PARTITIONS {
            let Some(part) = batch.parts[partition].filter(|part| !part.unguarded) else {
                continue;
            };
            let row = state.store[partition];
            if matched[partition] {
                // The batch itself has moved this row, and is rolled back.
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

    pub(super) fn write(state: &mut State, batch: Batch) {
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

    pub(super) fn hear(&self, state: &mut State, who: usize) -> Option<()> {
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

    pub(super) fn take_durable(&self, process: &mut Coordinator, parts: Each<Option<Part>>) {
        for (seat, part) in process.seats.iter_mut().zip(parts) {
            if let (Some(seat), Some(part)) = (seat, part) {
                // In this model batches write nothing but decisions.
                seat.durable = part.decision.or(seat.durable);
            }
        }
    }

    /// Sends the parts of the partitions that were not fenced.
    pub(super) fn send_rest(&self, process: &mut Coordinator, mut rest: Each<Option<Part>>) {
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

    pub(super) fn leave_to_database(state: &mut State, batch: Batch) -> Option<()> {
        if !matches!(batch.progress, Progress::Sent | Progress::Guarded) {
            return Some(());
        }
        let free = state.abandoned.iter_mut().find(|place| place.is_none())?;
        *free = Some(batch);
        Some(())
    }
}
