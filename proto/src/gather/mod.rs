//! Delays each request message until it has arrived completely, and limits the memory for incomplete messages.
//!
//! tonic allocates the length that a message announces. A thousand calls that announce 2 MiB and send one byte each would cost 2
//! GiB. Here, a message costs only the bytes that have arrived. A call fails if its message takes longer than
//! [`MESSAGE_WITHIN`], or exceeds the budget of its connection or of the process.

use std::{
    collections::VecDeque,
    future::Future as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

use crate::limits;

/// How long a message may take from its first byte to its last.
pub const MESSAGE_WITHIN: Duration = Duration::from_secs(30);
/// Bytes of incomplete messages per connection: sixteen of the largest requests.
pub const CONNECTION_BYTES_MAX: usize = 16 * limits::REQUEST_BYTES_MAX;
/// Bytes of incomplete messages over all connections.
pub const ALL_BYTES_MAX: usize = 8 * CONNECTION_BYTES_MAX;
/// The header of a message: a flag and four bytes of length.
const HEADER_BYTES: usize = 5;

/// A memory budget for incomplete messages. Clones share it.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    held: AtomicUsize,
    max: usize,
}

impl Budget {
    /// A budget of `max` bytes.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self(Arc::new(Shared { held: AtomicUsize::new(0), max }))
    }

    fn take(&self, bytes: usize) -> bool {
        let held = self.0.held.fetch_add(bytes, Ordering::Relaxed);
        let fits = held + bytes <= self.0.max;
        if !fits {
            self.give_back(bytes);
        }
        fits
    }

    fn give_back(&self, bytes: usize) {
        self.0.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A service that receives each request message only once it is complete.
#[derive(Debug, Clone)]
pub struct Gather<S> {
    inner: S,
    all: Budget,
    of_connection: fn(&http::Extensions) -> Option<Budget>,
}

impl<S> Gather<S> {
    /// `all` is the budget of all connections together. `of_connection` finds the budget of a request's connection.
    pub fn new(
        inner: S,
        all: Budget,
        of_connection: fn(&http::Extensions) -> Option<Budget>,
    ) -> Self {
        Self { inner, all, of_connection }
    }
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for Gather<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        let of_connection = (self.of_connection)(request.extensions());
        let budgets = [Some(self.all.clone()), of_connection];
        self.inner.call(request.map(|body| Body::new(Gathered::new(body, budgets))))
    }
}

impl<S: NamedService> NamedService for Gather<S> {
    const NAME: &'static str = S::NAME;
}

/// A request body that yields only complete messages.
struct Gathered {
    body: Body,
    /// The bytes of an incomplete message.
    held: Vec<u8>,
    /// How many bytes are missing from this message. `None` until its header has arrived.
    lacks: Option<usize>,
    budgets: [Option<Budget>; 2],
    deadline: Option<Pin<Box<Sleep>>>,
    /// Complete messages, and the trailers.
    ready: VecDeque<Frame<Bytes>>,
    /// The header is invalid. Bytes are passed on unchanged, so that tonic reports the error.
    is_given_up: bool,
}

impl Gathered {
    fn new(body: Body, budgets: [Option<Budget>; 2]) -> Self {
        Self {
            body,
            held: Vec::new(),
            lacks: None,
            budgets,
            deadline: None,
            ready: VecDeque::new(),
            is_given_up: false,
        }
    }

    fn take(&mut self, mut data: Bytes) -> Result<(), Status> {
        // First complete the message that is held.
        while !self.held.is_empty() && !data.is_empty() && !self.is_given_up {
            let wanted = self.lacks.unwrap_or_else(|| HEADER_BYTES - self.held.len());
            let part = data.split_to(wanted.min(data.len()));
            self.hold(&part)?;
            match &mut self.lacks {
                Some(lacks) => *lacks -= part.len(),
                None if self.held.len() == HEADER_BYTES => self.lacks = self.read(&self.held),
                None => {}
            }
            if self.lacks == Some(0) || self.is_bad() {
                self.release();
            }
        }
        // Then pass on complete messages without copying.
        let mut whole = 0;
        while !self.is_given_up && data.len() - whole >= HEADER_BYTES {
            match self.read(&data[whole..]) {
                Some(length) if length <= data.len() - whole - HEADER_BYTES => {
                    whole += HEADER_BYTES + length;
                }
                Some(_) => break,
                None => self.is_given_up = true,
            }
        }
        if self.is_given_up {
            whole = data.len();
        }
        let rest = data.split_off(whole);
        if !data.is_empty() {
            self.ready.push_back(Frame::data(data));
        }
        if !rest.is_empty() {
            self.lacks = None;
            if rest.len() >= HEADER_BYTES {
                self.lacks = self.read(&rest).map(|length| length - (rest.len() - HEADER_BYTES));
            }
            self.hold(&rest)?;
        }
        Ok(())
    }

    /// The length that a header announces. `None` if the header is invalid or the length is above the limit.
    fn read(&self, header: &[u8]) -> Option<usize> {
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        (header[0] <= 1 && length <= limits::REQUEST_BYTES_MAX).then_some(length)
    }

    fn is_bad(&self) -> bool {
        self.held.len() == HEADER_BYTES && self.lacks.is_none()
    }

    fn hold(&mut self, part: &[u8]) -> Result<(), Status> {
        let [all, of_connection] = &self.budgets;
        let fits =
            |budget: &Option<Budget>| budget.as_ref().is_none_or(|budget| budget.take(part.len()));
        if !fits(all) {
            return Err(too_much("this process"));
        }
        if !fits(of_connection) {
            if let Some(all) = all {
                all.give_back(part.len());
            }
            return Err(too_much("this connection"));
        }
        self.held.extend_from_slice(part);
        if self.deadline.is_none() {
            self.deadline = Some(Box::pin(sleep(MESSAGE_WITHIN)));
        }
        Ok(())
    }

    /// Releases the held bytes: the message is complete, or no more bytes will come.
    fn release(&mut self) {
        self.is_given_up |= self.is_bad();
        let held = std::mem::take(&mut self.held);
        for budget in self.budgets.iter().flatten() {
            budget.give_back(held.len());
        }
        (self.lacks, self.deadline) = (None, None);
        if !held.is_empty() {
            self.ready.push_back(Frame::data(held.into()));
        }
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        self.release();
    }
}

fn too_much(whose: &str) -> Status {
    Status::resource_exhausted(format!(
        "too many bytes of requests that have not arrived whole are held for {whose}; ask again"
    ))
}

impl http_body::Body for Gathered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(frame)));
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        if let Err(status) = self.take(data) {
                            return Poll::Ready(Some(Err(status)));
                        }
                    }
                    Err(trailers) => {
                        self.release();
                        self.ready.push_back(trailers);
                    }
                },
                Poll::Ready(None) => {
                    self.release();
                    if self.ready.is_empty() {
                        return Poll::Ready(None);
                    }
                }
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Some(Err(status))),
                Poll::Pending => {
                    let Some(deadline) = &mut self.deadline else { return Poll::Pending };
                    return deadline.as_mut().poll(cx).map(|()| {
                        let seconds = MESSAGE_WITHIN.as_secs();
                        Some(Err(Status::deadline_exceeded(format!(
                            "the request has not arrived whole within {seconds} s"
                        ))))
                    });
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.held.is_empty() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, stream};
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let header = u32::try_from(length).unwrap().to_be_bytes();
        let content = (0..length).map(|n| u8::try_from(n % 251).unwrap());
        [0].into_iter().chain(header).chain(content).collect()
    }

    /// What the body yields when these chunks arrive. If `ends` is false, the body stays open and nothing more arrives.
    async fn gathered(
        chunks: Vec<Vec<u8>>,
        ends: bool,
        budgets: [Option<Budget>; 2],
    ) -> Result<Vec<Bytes>, Status> {
        let chunks = stream::iter(chunks).map(|chunk| Ok::<_, Status>(Frame::data(chunk.into())));
        let body = if ends {
            Body::new(StreamBody::new(chunks))
        } else {
            Body::new(StreamBody::new(chunks.chain(stream::pending())))
        };
        let mut gathered = Gathered::new(body, budgets);
        let mut left = Vec::new();
        while let Some(frame) = gathered.frame().await {
            left.push(frame?.into_data().unwrap());
        }
        Ok(left)
    }

    #[tokio::test]
    async fn messages_leave_whole_however_they_arrive() {
        let budget = Budget::new(1024);
        let all: Vec<u8> = [message(0), message(7), message(300), message(1)].concat();
        for size in [1, 2, 3, 5, 6, 11, 100, 1000] {
            let chunks = all.chunks(size).map(<[u8]>::to_vec).collect();
            let left = gathered(chunks, true, [Some(budget.clone()), None]).await.unwrap();
            assert_eq!(left.concat(), all, "chunks of {size}");
            for frame in &left {
                let mut rest = &frame[..];
                while let Some((header, content)) = rest.split_first_chunk::<HEADER_BYTES>() {
                    let length = u32::from_be_bytes(*header.last_chunk().unwrap()) as usize;
                    rest = &content[length..];
                }
                assert!(rest.is_empty(), "chunks of {size}: a message left in parts");
            }
        }
        assert_eq!(budget.0.held.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_tonic_refuses_reaches_it_at_once() {
        let too_long = [&[0][..], &u32::MAX.to_be_bytes(), b"x"].concat();
        let no_message = b"GET / HTTP/1.1\r\n".to_vec();
        for bad in [too_long, no_message] {
            for size in [1, 4, 100] {
                let chunks = bad.chunks(size).map(<[u8]>::to_vec).collect();
                assert_eq!(gathered(chunks, true, [None, None]).await.unwrap().concat(), bad);
            }
        }
        // Half a message: tonic reports that the end is missing.
        let half = message(10)[..9].to_vec();
        assert_eq!(gathered(vec![half.clone()], true, [None, None]).await.unwrap().concat(), half);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_never_ends_is_given_up_and_costs_what_has_arrived() {
        let all = Budget::new(1024);
        let chunks = vec![message(limits::REQUEST_BYTES_MAX)[..6].to_vec()];
        let waiting = gathered(chunks, false, [Some(all.clone()), None]);
        let (ended, ()) = tokio::join!(waiting, async {
            sleep(Duration::from_secs(1)).await;
            assert_eq!(all.0.held.load(Ordering::Relaxed), 6);
        });
        assert_eq!(ended.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(all.0.held.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_connection_and_the_process_hold_no_more_than_they_may() {
        let (all, of_one) = (Budget::new(100), Budget::new(60));
        let part = |length| vec![message(1000)[..length].to_vec()];
        let too_much = gathered(part(61), true, [Some(all.clone()), Some(of_one.clone())]).await;
        assert_eq!(too_much.unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert!(of_one.take(60) && all.take(60));
        let too_much = gathered(part(41), true, [Some(all.clone()), None]).await;
        assert_eq!(too_much.unwrap_err().code(), tonic::Code::ResourceExhausted);
        assert!(gathered(part(40), true, [Some(all.clone()), None]).await.is_ok());
        of_one.give_back(60);
        all.give_back(60);
        assert_eq!([&all, &of_one].map(|budget| budget.0.held.load(Ordering::Relaxed)), [0, 0]);
    }
}
