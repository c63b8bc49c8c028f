//! Deadlines that callers set with `grpc-timeout`. tonic answers CANCELLED when a call reaches its deadline, which could be
//! mistaken for the outcome of a transaction. So a call is answered a little earlier: with the present state, or with
//! DEADLINE_EXCEEDED.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request, Response};
use tonic::{Status, body::Body, codegen::Service, metadata::MetadataMap, server::NamedService};

const HEADER: &str = "grpc-timeout";
/// A call is answered this long before its deadline, or a tenth of its timeout if that is less.
const MARGIN_MAX: Duration = Duration::from_millis(100);

/// Wraps a service so that its calls are answered before their deadlines.
#[derive(Debug, Clone)]
pub struct InTime<S>(pub(super) S);

impl<S: NamedService> NamedService for InTime<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for InTime<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let timeout = given(request.headers());
        let answer = self.0.call(request);
        Box::pin(async move {
            let Some(timeout) = timeout else { return answer.await };
            match tokio::time::timeout(timeout.saturating_sub(margin(timeout)), answer).await {
                Ok(answer) => answer,
                Err(_) => Ok(Status::deadline_exceeded(
                    "the deadline of the call has come; what was asked for may or may not have happened",
                )
                .into_http()),
            }
        })
    }
}

/// How long a call may wait for a transaction: the requested time, or less if the deadline would leave no time to answer.
pub(super) fn bounded(wait: Duration, metadata: &MetadataMap) -> Duration {
    match given(metadata.as_ref()) {
        Some(timeout) => wait.min(timeout.saturating_sub(margin(timeout) * 2)),
        None => wait,
    }
}

fn margin(timeout: Duration) -> Duration {
    (timeout / 10).min(MARGIN_MAX)
}

/// The timeout that the caller set: digits and a unit.
fn given(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    // gRPC allows at most eight digits.
    let number = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let read = |text: &str| {
            given(&HeaderMap::from_iter([(HEADER.parse().unwrap(), text.parse().unwrap())]))
        };
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(read("250000u"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "2", "2X", "-2S", "999999999S", "2.5S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    /// A service that never answers.
    struct Silent;

    impl Service<Request<Body>> for Silent {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn a_call_that_cannot_be_answered_in_time_is_told_so_before_its_deadline() {
        let request = Request::builder().header(HEADER, "300m").body(Body::empty()).unwrap();
        let answer = InTime(Silent).call(request);
        let answer = tokio::time::timeout(Duration::from_millis(300), answer);
        let answer = answer.await.expect("before the deadline").unwrap();
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    }
}
