//! The variants: limits for the clean ones, and the broken property for each missing guard.

use super::{Several, guard::Guard};
use crate::variant::{Size, Variant};

const MODEL: &str = "several partitions";

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
