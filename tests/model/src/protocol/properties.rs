//! What must always hold, and what must be possible. The invariants have the same numbers in all tests.

use stateright::Property;

use super::{
    Protocol,
    state::{
        BRANCHES, Branches, Coordinator, Decision, Fence, Progress, Read, Record, State, Status,
    },
};

impl Protocol {
    pub(super) fn all_properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("I1 no branch is both confirmed and released", |_, state: &State| {
                !state.participants.iter().any(|it| it.confirmed > 0 && it.released > 0)
            }),
            Property::always(
                "I2 no branch is confirmed while another is cancelled",
                |_, state: &State| {
                    !(state.participants.iter().any(|it| it.confirmed > 0)
                        && state.participants.iter().any(|it| it.is_cancelled()))
                },
            ),
            Property::always("I3 each effect happens at most once", |_, state: &State| {
                let at_most_once = |count: u8| count <= 1;
                state.participants.iter().all(|it| {
                    [it.reserved, it.confirmed, it.released].into_iter().all(at_most_once)
                })
            }),
            Property::always("I4 what callers were told is what happens", |_, state: &State| {
                let told = state.told;
                let cancelled = state.participants.iter().any(|it| it.is_cancelled());
                let confirmed = state.participants.iter().any(|it| it.confirmed > 0);
                !(told.confirm && (told.cancel || cancelled) || told.cancel && confirmed)
            }),
            Property::always(
                "I5 at rest no reservation is left",
                |protocol: &Self, state: &State| {
                    let settled = state
                        .participants
                        .iter()
                        .all(|it| it.reserved == it.confirmed + it.released);
                    settled || state.is_lost() || !protocol.is_at_rest(state)
                },
            ),
            Property::always(
                "I6 at rest the decision is carried out",
                |protocol: &Self, state: &State| {
                    !protocol.is_unfinished(state)
                        || state.is_reported_lost()
                        || !protocol.is_at_rest(state)
                },
            ),
            Property::always("I7 a durable decision never changes", |_, state: &State| {
                !state.history.decision_changed
            }),
            Property::always("J no branch joins after the decision", |_, state: &State| {
                !state.history.joined_late
            }),
            Property::always(
                "I8 no phase two before the decision is durable",
                |_, state: &State| !state.history.phase_two_early,
            ),
            Property::always("I9 a Try after its Cancel has no effect", |_, state: &State| {
                !state.history.late_try_ran
            }),
            Property::always("L no participant is asked the impossible", |_, state: &State| {
                !state.history.refused_loudly
            }),
            Property::always("O no owner ends that was not replaced", |_, state: &State| {
                !state.history.ended_for_nothing
            }),
            Property::always(
                "R a row has every branch that was answered",
                |protocol: &Self, state: &State| {
                    let Record { status, branches } = state.store.record;
                    let mut answered = (0..BRANCHES).filter(|it| state.messages.try_.has(*it));
                    let has_all = answered.all(|branch| branches.has(branch));
                    has_all || status == Status::Absent || protocol.scope.losses
                },
            ),
            Property::always("S nothing is answered from memory in silence", |_, state: &State| {
                !state.history.answered_in_silence
            }),
            Property::sometimes("all confirmed, and at rest", |protocol: &Self, state: &State| {
                state.participants.iter().all(|it| it.confirmed == 1) && protocol.is_at_rest(state)
            }),
            Property::sometimes("all released, and at rest", |protocol: &Self, state: &State| {
                state.participants.iter().all(|it| it.released == 1) && protocol.is_at_rest(state)
            }),
            Property::sometimes("a Try is under way after its Cancel", |_, state: &State| {
                (0..BRANCHES).any(|branch| {
                    state.participants[branch].fence == Fence::Suspended
                        && state.messages.try_.has(branch)
                })
            }),
        ];
        if self.scope.faults > 0 {
            properties.push(Property::sometimes(
                "a repeated batch finds itself",
                |_, state: &State| {
                    state.coordinators.iter().filter_map(|process| process.batch).any(|batch| {
                        batch.repeat
                            && batch.progress == Progress::Missed
                            && batch.record == state.store.record
                    })
                },
            ));
        }
        if self.scope.crashes > 0 && !self.scope.standby {
            properties.push(Property::sometimes(
                "a COMMIT outlives its owner",
                |_, state: &State| {
                    let of_decision = |status: Status| status.decision().is_some();
                    state.coordinators.iter().all(|process| !process.owns())
                        && state.abandoned.iter().flatten().any(|batch| {
                            batch.progress == Progress::Guarded && of_decision(batch.record.status)
                        })
                },
            ));
        }
        if self.scope.takeovers > 0 {
            properties.extend([
                Property::sometimes("a zombie has decided otherwise", |_, state: &State| {
                    let decision = state.store.record.status.decision();
                    zombies(state).any(|zombie| {
                        let other = zombie.memory.status.decision();
                        decision.is_some() && other.is_some() && other != decision
                    })
                }),
                Property::sometimes("a batch is fenced", |_, state: &State| {
                    let mut batches = state.coordinators.iter().filter_map(|it| it.batch);
                    batches.any(|batch| batch.progress == Progress::Fenced)
                }),
                Property::sometimes("a zombie tells the truth", |_, state: &State| {
                    zombies(state).any(|zombie| zombie.durable.status == Status::Confirming)
                        && state.store.record.status == Status::Confirming
                }),
            ]);
        }
        if self.scope.forgets {
            properties.push(Property::sometimes(
                "a row is old when it arrives",
                |_, state: &State| {
                    let stale = |read: Read| read.stale && read.row != state.store.record;
                    state
                        .coordinators
                        .iter()
                        .any(|process| process.reads.into_iter().flatten().any(stale))
                },
            ));
        }
        if self.scope.old_reads {
            properties.push(Property::sometimes("a replica shows the past", |_, state: &State| {
                state.store.record.status == Status::Confirming
                    && state.past.iter().any(|past| past.record.status == Status::Trying)
            }));
        }
        if self.scope.failovers > 0 && self.scope.standby {
            properties.push(Property::sometimes(
                "two owners of two histories have the same epoch number",
                |_, state: &State| {
                    state
                        .coordinators
                        .iter()
                        .all(|process| process.owns() && process.epoch == state.store.epoch)
                        && zombies(state).next().is_some()
                },
            ));
        }
        if self.scope.lost_before {
            properties.push(Property::always(
                "I4 what is recorded is not told as lost",
                |_, state: &State| {
                    let of_present_history =
                        state.store.nonces[usize::from(state.xid_epoch)] == state.xid_nonce;
                    !(state.told.lost && of_present_history)
                },
            ));
        }
        if self.scope.losses {
            properties.push(Property::sometimes(
                "a confirmed transaction is lost, and reported as lost",
                |_, state: &State| {
                    state.told.confirm
                        && state.is_reported_lost()
                        && state.coordinators.iter().any(|process| {
                            state.is_live_owner(process) && process.epoch > state.xid_epoch
                        })
                },
            ));
        }
        let is_lost_whole = self.scope.records_at_decision() && !self.scope.silent_participant;
        if is_lost_whole {
            properties.push(Property::sometimes(
                "the first record of a transaction is its decision",
                |_, state: &State| {
                    let began_now = state.xid_epoch == state.store.epoch;
                    let is_first = began_now && state.store.position == 1;
                    is_first && state.store.record.status == Status::Confirming
                },
            ));
        }
        if is_lost_whole && self.scope.crashes > 0 {
            properties.push(Property::sometimes(
                "a transaction that was never recorded is given back",
                |protocol: &Self, state: &State| {
                    state.participants.iter().all(|it| it.released == 1)
                        && state.history.decided.is_none()
                        && protocol.is_at_rest(state)
                },
            ));
        }
        if self.scope.operators {
            properties.push(Property::sometimes(
                "a participant asks about a resolved branch whose row is deleted",
                |_, state: &State| {
                    state.store.purged
                        && (0..BRANCHES).any(|branch| {
                            state.store.resolved.has(branch)
                                && state.participants[branch].fence == Fence::Tried
                        })
                },
            ));
        }
        if self.scope.cleanup {
            properties.push(Property::sometimes(
                "a Confirm finds no row any more",
                |_, state: &State| {
                    state.participants.iter().any(|it| it.cleaned && it.confirmed == 1)
                        && state.store.record.status == Status::Confirming
                },
            ));
        }
        properties
    }

    /// The transaction is open, or a confirmed branch has no effect yet.
    fn is_unfinished(&self, state: &State) -> bool {
        let promised = state.history.decided == Some(Decision::Confirm) || state.told.confirm;
        let all = if self.scope.nested { state.history.decided_branches } else { Branches::ALL };
        let missing = |branch: usize| all.has(branch) && state.participants[branch].confirmed != 1;
        state.store.record.status.is_open() || promised && (0..BRANCHES).any(missing)
    }
}

fn zombies(state: &State) -> impl Iterator<Item = &Coordinator> {
    state.coordinators.iter().filter(|process| process.owns() && !state.is_live_owner(process))
}
