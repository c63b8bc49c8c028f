//! Readiness, as grpc.health.v1 tells it: of the process, and of its services.

use std::{sync::Arc, time::Duration};

use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::info;

use crate::coordinator::Coordinator;

/// The names that can be asked for: the process, and its services.
const HEALTH_NAMES: [&str; 3] = ["", "handfast.v1.CoordinatorService", "handfast.v1.AdminService"];
/// How often readiness is looked at.
const READINESS_INTERVAL: Duration = Duration::from_millis(500);

/// Tells for every name whether it is ready.
pub(crate) async fn set_ready(health: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
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
