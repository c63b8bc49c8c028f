//! Readiness and liveness, for the gRPC health service (grpc.health.v1).

use std::{sync::Arc, time::Duration};

use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::info;

use crate::coordinator::Coordinator;

/// The names for readiness: the process, and its services.
const HEALTH_NAMES: [&str; 3] = ["", "handfast.v1.CoordinatorService", "handfast.v1.AdminService"];
/// The name for liveness. It is always healthy, even if the coordinator is starting, is a standby, or has a store that does not
/// answer. A restart would fix none of these.
const LIVENESS: &str = "liveness";
/// How often readiness is checked.
const READINESS_INTERVAL: Duration = Duration::from_millis(500);

/// Sets the readiness of every name. Liveness is always healthy.
pub(crate) async fn set_ready(health: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
    health.set_service_status(LIVENESS, ServingStatus::Serving).await;
}

/// Keeps the readiness up to date for ever, and logs each change.
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
