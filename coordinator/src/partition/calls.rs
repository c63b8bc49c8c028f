//! Calls to participants: how a due call is made, and how its outcome is applied.

use std::{sync::Arc, time::Duration};

use handfast_proto::Xid;

use super::{Hurry, Partition, Settings};
use crate::{
    dispatch::{CallRequest, Later, Returned},
    transaction::{BranchSet, Change, DueCall, Event, Phase, Timestamp, Weight, retry},
};

impl Partition {
    /// Hands a due call to dispatch. If dispatch has no room, notes when it will.
    pub(super) fn make_call(&mut self, xid: Xid, due: DueCall, now: Timestamp, hurry: Hurry) {
        let DueCall { branch, phase } = due;
        let entry = self.entries.get_mut(&xid).expect("looked up by the caller");
        let global = Arc::make_mut(&mut entry.global);
        let known = &global.branches[branch];
        let Settings { call_timeout, call_timeout_max, .. } = self.parts.settings;
        let mut deadline = retry::call_deadline(call_timeout, known.timeouts, call_timeout_max);
        if phase == Phase::Try {
            if let Some(first) = known.spec.try_timeout {
                deadline = retry::call_deadline(first, known.timeouts, call_timeout_max);
            }
            deadline = deadline.min((global.expires_at - now).max(Duration::from_millis(1)));
        }
        let call = CallRequest {
            xid,
            branch,
            spec: known.spec.clone(),
            phase,
            attempt: known.attempts + 1,
            expires_at: global.expires_at,
            labels: global.labels.clone(),
            deadline,
            hurry,
        };
        let (event, postponed) = match self.parts.dispatch.submit(call, &self.returned_sender) {
            Ok(()) => (Event::CallStarted { branch, phase }, None),
            Err(Later(wait)) => {
                let until = now + wait;
                (Event::CallPostponed { branch, until }, Some(until))
            }
        };
        if let Err(rejection) = global.apply(event, now) {
            debug_assert!(false, "only commands are rejected: {rejection}");
        }
        let was_due = entry.was_due;
        let parks = postponed.is_some_and(|until| until > now + self.park_after(was_due));
        if parks && phase != Phase::Try {
            // Save when this branch is due. Without it the transaction could not leave memory, or would be found due at once.
            let branches = BranchSet::only(branch);
            self.record(xid, Change { weight: Weight::Lazy, head: true, branches });
        }
    }

    /// Applies the outcome of a call to its transaction.
    pub(super) fn take_returned(&mut self, returned: Returned) {
        let Returned { xid, branch, phase, outcome } = returned;
        let Some(entry) = self.entries.get(&xid) else {
            return; // the partition has ended, or an operator resolved the branch and the transaction has left memory
        };
        let attempts = entry.global.branches[branch].attempts;
        let retry_in = self.parts.settings.retry.delay(attempts, fastrand::u32(..));
        self.log_failure(entry, branch, phase, &outcome);
        self.apply_fitting(xid, Event::CallReturned { branch, phase, outcome, retry_in });
    }
}
