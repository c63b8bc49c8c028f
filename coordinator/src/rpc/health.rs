//! Readiness and liveness, as grpc.health.v1 tells them.

use std::{sync::Arc, time::Duration};

use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::info;

use crate::coordinator::Coordinator;

/// The names of readiness: the process, and its services.
const HEALTH_NAMES: [&str; 3] = ["", "handfast.v1.CoordinatorService", "handfast.v1.AdminService"];
/// The name of liveness: who asks gets an answer, also from a coordinator that is starting, is a standby, or has a store that does not
/// answer. A restart would mend none of these.
const LIVENESS: &str = "liveness";
/// How often readiness is looked at.
const READINESS_INTERVAL: Duration = Duration::from_millis(500);

/// Tells for every name whether it is ready. Alive it is in any case.
pub(crate) async fn set_ready(health: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
    health.set_service_status(LIVENESS, ServingStatus::Serving).await;
}

/// Tells for ever whether the coordinator is ready, and logs each change.
pub(crate) async fn tell_readiness(coordinator: Arc<Coordinator>, health: HealthReporter) {
    let mut told = None;
    loop {
        let ready = coordinator.is_ready();
        if told != Some(ready) {
            if told.is_some() {
                info!(ready, "readiness has changed");
            }
            set_ready(&health, ready).await;
            told = Some(ready);
        }
        tokio::time::sleep(READINESS_INTERVAL).await;
    }
}
