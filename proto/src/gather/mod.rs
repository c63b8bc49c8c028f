//! Delays each request message until it has arrived completely, and limits the memory for incomplete messages.
//!
//! tonic allocates the length that a message announces. A thousand calls that announce 2 MiB and send one byte each would cost 2
//! GiB. Here, a message costs only the bytes that have arrived. A call fails if its message takes longer than
//! [`MESSAGE_WITHIN`], or exceeds what its connection or the process may hold ([`Budget`]). A call whose first message has not
//! arrived when the server stops fails then: nothing was done for it.

mod budget;

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::Frame;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

pub use self::budget::{Budget, COMMON_BYTES_MAX, CONNECTION_BYTES_MAX, OWN_BYTES_MAX, Share};
use crate::limits;

/// How long a message may take from its first byte to its last. The first message of a call may take as long from the call's begin.
pub const MESSAGE_WITHIN: Duration = Duration::from_secs(30);
/// The header of a message: a flag and four bytes of length.
const HEADER_BYTES: usize = 5;

/// A service that receives each request message only once it is complete.
#[derive(Debug, Clone)]
pub struct Gather<S> {
    inner: S,
    budget: Budget,
    of_connection: fn(&http::Extensions) -> Option<Share>,
    closing: CancellationToken,
}

impl<S> Gather<S> {
    /// `of_connection` finds the share of a request's connection. For `None`, connections are told apart by the address of the
    /// caller.
    pub fn new(
        inner: S,
        budget: Budget,
        of_connection: fn(&http::Extensions) -> Option<Share>,
    ) -> Self {
        Self { inner, budget, of_connection, closing: CancellationToken::new() }
    }

    /// Sets what is cancelled when the server stops.
    #[must_use]
    pub fn until(self, closing: CancellationToken) -> Self {
        Self { closing, ..self }
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
        let known = (self.of_connection)(request.extensions());
        let share = known.unwrap_or_else(|| self.budget.share_of(request.extensions()));
        let (budget, closing) = (self.budget.clone(), self.closing.clone());
        self.inner.call(request.map(|body| Body::new(Gathered::new(body, budget, share, closing))))
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
    budget: Budget,
    share: Share,
    /// Cancelled when the server stops. `None` once the first message is complete: then something may have been done.
    closing: Option<CancellationToken>,
    /// Ends when a message has been waited for too long.
    waiting: Option<BoxFuture<'static, Status>>,
    /// Complete messages, and the trailers.
    ready: VecDeque<Frame<Bytes>>,
    /// The header is invalid. Bytes are passed on unchanged, so that tonic reports the error.
    is_given_up: bool,
}

impl Gathered {
    fn new(body: Body, budget: Budget, share: Share, closing: CancellationToken) -> Self {
        Self {
            body,
            held: Vec::new(),
            lacks: None,
            budget,
            share,
            closing: Some(closing),
            waiting: None,
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
        self.budget.take(&self.share, part.len())?;
        self.held.extend_from_slice(part);
        Ok(())
    }

    /// Releases the held bytes: the message is complete, or no more bytes will come.
    fn release(&mut self) {
        self.is_given_up |= self.is_bad();
        let held = std::mem::take(&mut self.held);
        self.budget.give_back(&self.share, held.len());
        self.lacks = None;
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

impl http_body::Body for Gathered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                (self.closing, self.waiting) = (None, None);
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
                    if self.closing.is_none() && self.held.is_empty() {
                        return Poll::Pending; // a stream between two messages
                    }
                    let closing = self.closing.clone();
                    let waiting = self.waiting.get_or_insert_with(|| Box::pin(too_late(closing)));
                    return waiting.as_mut().poll(cx).map(|status| Some(Err(status)));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && self.held.is_empty() && self.body.is_end_stream()
    }
}

/// Waits until a message must have arrived.
async fn too_late(closing: Option<CancellationToken>) -> Status {
    let stopped = async {
        match closing {
            Some(closing) => closing.cancelled().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = stopped => Status::unavailable(
            "the server is stopping; the request has not arrived whole, and nothing was done",
        ),
        () = sleep(MESSAGE_WITHIN) => Status::deadline_exceeded(format!(
            "the request has not arrived whole within {} s",
            MESSAGE_WITHIN.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, stream};
    use http_body_util::{BodyExt as _, StreamBody};

    use super::{budget::Bounds, *};

    fn message(length: usize) -> Vec<u8> {
        let header = u32::try_from(length).unwrap().to_be_bytes();
        let content = (0..length).map(|n| u8::try_from(n % 251).unwrap());
        [0].into_iter().chain(header).chain(content).collect()
    }

    /// What the body yields when these chunks arrive. If `ends` is false, the body stays open and nothing more arrives.
    async fn gathered(
        chunks: Vec<Vec<u8>>,
        ends: bool,
        budget: &Budget,
    ) -> Result<Vec<Bytes>, Status> {
        let chunks = stream::iter(chunks).map(|chunk| Ok::<_, Status>(Frame::data(chunk.into())));
        let body = if ends {
            Body::new(StreamBody::new(chunks))
        } else {
            Body::new(StreamBody::new(chunks.chain(stream::pending())))
        };
        let closing = CancellationToken::new();
        let mut gathered = Gathered::new(body, budget.clone(), Share::default(), closing);
        let mut left = Vec::new();
        while let Some(frame) = gathered.frame().await {
            left.push(frame?.into_data().unwrap());
        }
        Ok(left)
    }

    /// A budget without bytes that a connection has for itself.
    fn common(bytes: usize) -> Budget {
        Budget::new(Bounds { own: 0, request: bytes, connection: bytes, common: bytes })
    }

    #[tokio::test]
    async fn messages_leave_whole_however_they_arrive() {
        let budget = common(1024);
        let all: Vec<u8> = [message(0), message(7), message(300), message(1)].concat();
        for size in [1, 2, 3, 5, 6, 11, 100, 1000] {
            let chunks = all.chunks(size).map(<[u8]>::to_vec).collect();
            let left = gathered(chunks, true, &budget).await.unwrap();
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
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn what_tonic_refuses_reaches_it_at_once() {
        let too_long = [&[0][..], &u32::MAX.to_be_bytes(), b"x"].concat();
        let no_message = b"GET / HTTP/1.1\r\n".to_vec();
        let budget = Budget::default();
        for bad in [too_long, no_message] {
            for size in [1, 4, 100] {
                let chunks = bad.chunks(size).map(<[u8]>::to_vec).collect();
                assert_eq!(gathered(chunks, true, &budget).await.unwrap().concat(), bad);
            }
        }
        // Half a message: tonic reports that the end is missing.
        let half = message(10)[..9].to_vec();
        assert_eq!(gathered(vec![half.clone()], true, &budget).await.unwrap().concat(), half);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_never_ends_is_given_up_and_costs_what_has_arrived() {
        let all = common(1024);
        let chunks = vec![message(limits::REQUEST_BYTES_MAX)[..6].to_vec()];
        let waiting = gathered(chunks, false, &all);
        let (ended, ()) = tokio::join!(waiting, async {
            sleep(Duration::from_secs(1)).await;
            assert_eq!(all.held(), 6);
        });
        assert_eq!(ended.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        assert_eq!(all.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_a_message_ends_and_a_stream_between_two_messages_does_not() {
        let budget = common(1024);
        let silent = gathered(Vec::new(), false, &budget).await;
        assert_eq!(silent.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        let between = gathered(vec![message(7)], false, &budget);
        assert!(tokio::time::timeout(MESSAGE_WITHIN * 10, between).await.is_err());
        let second = vec![message(7), message(7)[..6].to_vec()];
        let ended = gathered(second, false, &budget).await;
        assert_eq!(ended.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stops_waits_only_for_calls_whose_first_message_is_there() {
        for (arrived, ends) in
            [(Vec::new(), true), (message(7)[..6].to_vec(), true), (message(0), false)]
        {
            let body = stream::iter([Ok::<_, Status>(Frame::data(arrived.into()))]);
            let body = Body::new(StreamBody::new(body.chain(stream::pending())));
            let closing = CancellationToken::new();
            let budget = common(1024);
            let mut gathered = Gathered::new(body, budget, Share::default(), closing.clone());
            let first = tokio::time::timeout(Duration::from_secs(1), gathered.frame()).await;
            assert_eq!(first.is_err(), ends);
            closing.cancel();
            let next = tokio::time::timeout(Duration::from_secs(1), gathered.frame()).await;
            let code = next.ok().flatten().map(|frame| frame.unwrap_err().code());
            assert_eq!(code, ends.then_some(tonic::Code::Unavailable));
        }
    }

    #[tokio::test]
    async fn a_connection_and_the_process_hold_no_more_than_they_may() {
        let budget = Budget::new(Bounds { own: 10, request: 50, connection: 60, common: 80 });
        let part = |length| vec![message(1000)[..length].to_vec()];
        let too_much = gathered(part(61), true, &budget).await.unwrap_err();
        assert_eq!(too_much.code(), tonic::Code::ResourceExhausted);
        let (one, other) = (Share::default(), Share::default());
        budget.take(&one, 50).unwrap(); // ten of its own
        budget.take(&one, 1).unwrap_err();
        assert_eq!(budget.held(), 40);
        budget.take(&other, 50).unwrap();
        assert_eq!(budget.held(), 80);
        assert!(gathered(part(10), true, &budget).await.is_ok(), "it has them for itself");
        let too_much = gathered(part(11), true, &budget).await.unwrap_err();
        assert_eq!(too_much.code(), tonic::Code::ResourceExhausted);
        budget.give_back(&one, 50);
        budget.give_back(&other, 45);
        assert_eq!((budget.held(), *one.held(), *other.held()), (0, 0, 5));
    }

    /// They take all that they can get, in messages that never end.
    #[tokio::test]
    async fn a_few_hostile_connections_do_not_break_the_messages_of_others() {
        const PART: usize = 16 * 1024;
        let budget = Budget::default();
        let largest = message(limits::REQUEST_BYTES_MAX);
        let arrives = async || {
            let chunks = largest.chunks(PART).map(<[u8]>::to_vec).collect();
            gathered(chunks, true, &budget).await.map(|whole| whole.concat() == largest)
        };
        let take_all = |share: &Share| while budget.take(share, PART).is_ok() {};
        let mut hostile: Vec<_> = (0..64).map(|_| Share::default()).collect();
        hostile.iter().for_each(take_all);
        assert!(arrives().await.unwrap());
        // Many of them leave each other connection what it has for itself.
        hostile.extend((0..1000).map(|_| Share::default()));
        hostile.iter().for_each(take_all);
        assert_eq!(arrives().await.unwrap_err().code(), tonic::Code::ResourceExhausted);
        let small = message(OWN_BYTES_MAX - HEADER_BYTES);
        let chunks = small.chunks(PART).map(<[u8]>::to_vec).collect();
        assert_eq!(gathered(chunks, true, &budget).await.unwrap().concat(), small);
        assert!(budget.held() <= COMMON_BYTES_MAX);
    }
}
