//! What applies to every call of every service. A message is passed on only when it has fully arrived. A call counts as in
//! flight until its last byte is sent. A stream that only its caller would end is ended when the server stops.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use handfast_proto::gather::{Budget, Gather};
use http::HeaderMap;
use http_body::Frame;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Status, body::Body};
use tower_layer::Layer;
use tower_service::Service;

use super::connection::Allowance;

/// The path of gRPC's own services. Their streams (a health watch, a reflection) never end by themselves.
const OF_GRPC: &str = "/grpc.";

/// Wraps all services.
#[derive(Debug, Clone)]
pub struct EachCall {
    under_way: TaskTracker,
    closing: CancellationToken,
    budget: Budget,
}

impl EachCall {
    /// `under_way` holds a token for each call in flight. Once `closing` is cancelled, streams of gRPC's own services end,
    /// and calls whose request has not arrived.
    pub(crate) fn new(under_way: TaskTracker, closing: CancellationToken) -> Self {
        Self { under_way, closing, budget: Budget::default() }
    }
}

impl<S> Layer<S> for EachCall {
    type Service = Gather<Counted<S>>;

    fn layer(&self, inner: S) -> Gather<Counted<S>> {
        let Self { under_way, closing, budget } = self.clone();
        let of_connection = |extensions: &http::Extensions| {
            extensions.get::<Allowance>().map(Allowance::unfinished)
        };
        let counted = Counted { inner, under_way, closing: closing.clone() };
        Gather::new(counted, budget, of_connection).until(closing)
    }
}

/// Counts calls in flight, and ends streams of gRPC's own services.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
    under_way: TaskTracker,
    closing: CancellationToken,
}

impl<S> Service<http::Request<Body>> for Counted<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let under_way = self.under_way.token();
        let ends = request
            .uri()
            .path()
            .starts_with(OF_GRPC)
            .then(|| Box::pin(self.closing.clone().cancelled_owned()));
        let answering = self.inner.call(request);
        Box::pin(async move {
            let response = answering.await?;
            Ok(response.map(|body| Body::new(Answer { body, ends, _under_way: under_way })))
        })
    }
}

/// The body of an answer. The call is in flight until this is dropped.
struct Answer {
    body: Body,
    /// Once this completes, the stream ends as soon as it has nothing to send.
    ends: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    _under_way: TaskTrackerToken,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            return polled;
        }
        let Some(ends) = &mut self.ends else { return Poll::Pending };
        ready!(ends.as_mut().poll(cx));
        (self.ends, self.body) = (None, Body::empty());
        let mut trailers = HeaderMap::new();
        let stopping = Status::unavailable("the coordinator is stopping");
        Poll::Ready(Some(stopping.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
