//! What a repeat gets back: the value of the run that has confirmed the transaction. The coordinator keeps it with the decision.
//!
//! What must hold: a value that cannot be kept is noticed before the decision is asked for. A kept value that cannot be read never
//! makes a confirmed transaction look like one that is not.

use handfast_proto::{limits, v1 as pb};
use serde::{Serialize, de::DeserializeOwned};

use super::outcome::{Confirmation, Confirmed};

const CONTENT_TYPE: &str = "application/json";

/// How values of one type are kept.
pub(super) struct Memory<T> {
    /// The error says in words why the value cannot be kept.
    pub(super) write: fn(&T) -> Result<pb::Payload, String>,
    read: fn(&pb::Payload) -> Result<T, String>,
}

impl<T: Serialize + DeserializeOwned> Memory<T> {
    pub(super) const JSON: Self = Self { write, read };
}

fn write<T: Serialize + DeserializeOwned>(value: &T) -> Result<pb::Payload, String> {
    let data = serde_json::to_vec(value)
        .map_err(|error| format!("its value cannot be kept, because it is no JSON: {error}"))?;
    let max = limits::RESULT_BYTES_MAX;
    if data.len() > max {
        let bytes = data.len();
        return Err(format!(
            "its value cannot be kept: it has {bytes} bytes as JSON, and may have {max}"
        ));
    }
    let kept = pb::Payload { data: data.into(), content_type: CONTENT_TYPE.to_owned() };
    // Some values become JSON that their own type does not take, such as a float that is no number.
    read::<T>(&kept).map_err(|error| format!("its value cannot be kept: {error}"))?;
    Ok(kept)
}

fn read<T: DeserializeOwned>(kept: &pb::Payload) -> Result<T, String> {
    if kept.content_type != CONTENT_TYPE {
        return Err(format!("a value of type {:?} instead of {CONTENT_TYPE}", kept.content_type));
    }
    serde_json::from_slice(&kept.data).map_err(|error| format!("it cannot be read back: {error}"))
}

impl Confirmation {
    /// What the caller gets. `value` is what this run's closure has returned; it counts only if this run has confirmed. A value that
    /// is kept counts more, so that every run returns the same.
    pub(super) fn with_value<T>(
        self,
        memory: Option<&Memory<T>>,
        value: Option<T>,
    ) -> Confirmed<T> {
        let Self { xid, completed, by_this_run, result } = self;
        let own = value.filter(|_| by_this_run);
        let (value, unreadable) = match (memory, result) {
            (Some(memory), Some(kept)) => match (memory.read)(&kept) {
                Ok(value) => (Some(value), None),
                Err(error) => (None, Some(error)),
            },
            (None, _) | (_, None) => (own, None),
        };
        Confirmed { xid, value, completed, unreadable }
    }
}
