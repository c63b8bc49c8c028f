//! How much goes into one batch.

use handfast_proto::limits;

use super::*;
use crate::transaction::{Branch, BranchSpec, Payload};

#[tokio::test]
async fn results_count_for_the_bytes_of_a_batch() {
    let mut rig = Rig::new().await;
    rig.store.hold();
    let blocker = rig.begin(0);
    rig.put(&blocker, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    let data = vec![7; limits::RESULT_BYTES_MAX].into();
    let result = Some(Box::new(Payload { data, content_type: String::new() }));
    let mut last = 0;
    for _ in 0..1000 {
        let global = GlobalTransaction { result: result.clone(), ..rig.begin(1) };
        last = rig.put(&global, Head::Insert, Urgency::Awaited);
    }
    rig.store.release();
    rig.until_durable(1, last).await;
    let writes = rig.store.batches().into_iter().skip(1).map(|batch| batch.writes.len());
    let writes: Vec<_> = writes.filter(|count| *count > 0).collect();
    // 4 MiB, and 4,352 bytes each.
    assert_eq!(writes, [963, 37]);
}

#[tokio::test]
async fn branches_count_for_the_bytes_of_a_batch() {
    let mut rig = Rig::new().await;
    rig.store.hold();
    let blocker = rig.begin(0);
    rig.put(&blocker, Head::Insert, Urgency::Awaited);
    rig.until_batches(1).await;
    let mut last = 0;
    for _ in 0..300 {
        let mut global = rig.begin(1);
        let now = rig.clock.now();
        let branches = (1..=64).map(|n: u8| {
            let spec = BranchSpec {
                branch_id: n.to_string().parse().unwrap(),
                action: "inventory.deduct".to_owned(),
                participant: "inventory".to_owned(),
                target: "x".repeat(256),
                payload: None,
                carry_payload: false,
                try_timeout: None,
                inquires: false,
                damage: None,
            };
            Branch::registered(spec, now)
        });
        global.branches = branches.collect();
        last = rig.put(&global, Head::Insert, Urgency::Awaited);
    }
    rig.store.release();
    rig.until_durable(1, last).await;
    let writes = rig.store.batches().into_iter().skip(1).map(|batch| batch.writes.len());
    let writes: Vec<_> = writes.filter(|count| *count > 0).collect();
    // 4 MiB, and 22,455 bytes each.
    assert_eq!(writes, [186, 114]);
}
