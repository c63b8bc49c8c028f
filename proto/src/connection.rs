//! How both sides connect: the coordinator to participants, and the SDK to both.

use std::time::Duration;

use tonic::transport::Endpoint;

use crate::address::Address;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection with calls on it may be silent before it is pinged.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the other end may take to answer a ping before the connection is closed.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The deadline that is sent with a call is later than the caller's own by this much, so that the caller's timer always fires
/// first. tonic's timers, on either end, would report CANCELLED instead of DEADLINE_EXCEEDED.
pub const DEADLINE_MARGIN: Duration = Duration::from_secs(1);

/// The server at `address`, with the settings that every connection has, over whatever network. Does not connect yet.
#[must_use]
pub fn endpoint(address: &Address) -> Endpoint {
    Endpoint::from(address.uri().clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
}
