//! Calls a gRPC service within this process. Only the socket is missing: the call starts with encoded frames and ends with a status.

use std::convert::Infallible;

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use tonic::{Code, body::Body};
use tower::Service;

use super::{Round, random::Random};

/// The response to a call.
pub(super) struct Answered {
    pub(super) code: Code,
    pub(super) message: String,
    /// Messages of the response.
    pub(super) frames: Vec<Bytes>,
}

/// Encodes messages as gRPC frames, and sometimes corrupts the frames.
pub(super) fn frames(random: &mut Random, messages: &[Vec<u8>]) -> Bytes {
    let mut body = BytesMut::new();
    for message in messages {
        let mut message = message.clone();
        if random.once_in(6) {
            random.bend(&mut message);
        }
        body.put_u8(if random.once_in(200) { 1 } else { 0 });
        body.put_u32(u32::try_from(message.len()).expect("they are small"));
        body.put_slice(&message);
    }
    if random.once_in(100) {
        let mut raw = body.to_vec();
        random.bend(&mut raw);
        return raw.into();
    }
    body.freeze()
}

/// Metadata, some with our keys and some with unknown keys.
pub(super) fn metadata(random: &mut Random, xids: &[String]) -> Vec<(&'static str, Vec<u8>)> {
    let mut metadata = Vec::new();
    let keys = [
        "handfast-xid",
        "handfast-branch-id",
        "handfast-branches",
        "grpc-timeout",
        "grpc-encoding",
        "x-other",
    ];
    while random.once_in(3) {
        let key = random.of(&keys);
        let value = match random.below(4) {
            0 if !xids.is_empty() => random.of(xids).into_bytes(),
            1 => b"1.2".to_vec(),
            2 => b"5S".to_vec(),
            _ => random.text().into_bytes(),
        };
        metadata.push((key, value));
    }
    metadata
}

pub(super) async fn call<S>(
    service: &mut S,
    path: &str,
    metadata: &[(&'static str, Vec<u8>)],
    body: Bytes,
) -> Answered
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
{
    let mut request = http::Request::post(format!("http://handfast.test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (key, value) in metadata {
        // Skip values that HTTP cannot carry.
        if let Ok(value) = http::HeaderValue::from_bytes(value) {
            request = request.header(*key, value);
        }
    }
    let request = request.body(Body::new(Full::new(body))).expect("its parts are sound");
    let Ok(response) = service.call(request).await;
    let (parts, body) = response.into_parts();
    let collected = body.collect().await;
    let collected = match collected {
        Ok(collected) => collected,
        Err(status) => {
            let (code, message) = (status.code(), status.message().to_owned());
            return Answered { code, message, frames: Vec::new() };
        }
    };
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let status = tonic::Status::from_header_map(&trailers)
        .or_else(|| tonic::Status::from_header_map(&parts.headers));
    let (code, message) = match status {
        Some(status) => (status.code(), status.message().to_owned()),
        None => (Code::Unknown, format!("no gRPC status; HTTP says {}", parts.status)),
    };
    Answered { code, message, frames: messages(collected.to_bytes()) }
}

fn messages(mut body: Bytes) -> Vec<Bytes> {
    let mut messages = Vec::new();
    while body.len() >= 5 {
        let frame = body.split_to(5);
        let len = u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]) as usize;
        messages.push(body.split_to(len.min(body.len())));
    }
    messages
}

/// Bad input must get an error with a message and a code that does not blame us.
/// The exception is bytes that are not a valid message: gRPC itself requires INTERNAL for them.
pub(super) fn judge(round: &mut Round, path: &str, code: Code, message: &str) {
    let of_grpc = [
        "failed to decode Protobuf message",
        "protocol error: received message with",
        "Unexpected EOF decoding stream",
        "Missing request message",
        "Message compressed",
    ];
    let ours = matches!(code, Code::Internal | Code::Unknown | Code::DataLoss)
        && !of_grpc.iter().any(|known| message.contains(known));
    if ours || code != Code::Ok && message.is_empty() {
        round.found(format!("{path} is answered {code:?}: {message:?}"));
    }
}
