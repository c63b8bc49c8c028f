//! Many calls on one stream. A unary call costs both ends about 60 µs of CPU time; a message on an open stream costs about 1 µs.
//!
//! A [`Line`] is the caller's end. It opens a stream on first use, and a new one when the old one has ended. If the peer does
//! not support streams (a participant in another language, a proxy in between), the line makes unary calls and tries a stream
//! again later. [`serve`] is the server's end. Guarantees, idempotency and status codes are the same for both kinds of call.
//!
//! When a stream breaks, its calls have no answer, as with a broken connection. They fail with UNAVAILABLE and a source. The
//! status of a stream is never taken for the answer to a call.
//!
//! A stream has at most [`CALLS_MAX`] unanswered calls, including those whose caller has given up. The line delays further calls
//! until there is room, and [`serve`] refuses them. The limit keeps the connection alive: HTTP/2 servers close a connection when
//! small frames pile up unread. Rust's h2 allows unread frames below 256 bytes to waste half of the connection's window (512 KiB
//! by default). About 2,500 of our smallest calls exceed that, and h2 closes the connection with `too_many_data_frames`.
//!
//! A stream takes calls only for [`AGE`], and idle streams are closed. A server that shuts down gracefully waits until its
//! streams have ended. The next stream then reaches a running server.

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt,
    future::{Future, ready},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, future::Either, stream::poll_fn};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{connection, limits, v1::Failure};

/// Unanswered calls per stream. See the module's comment.
pub const CALLS_MAX: usize = 1024;
/// How long a stream takes calls. After that, a new stream is opened.
pub const AGE: Duration = Duration::from_secs(5);
/// Bytes that a stream adds to a call: its number and its timeout.
const NUMBER_BYTES_MAX: usize = 64;
/// How long the peer may take to accept a stream, if it has answered on an earlier one.
const OPEN_WITHIN: Duration = Duration::from_secs(2);
/// Before that: this part of the call's time. Where a proxy blocks streams, the rest is for the call by itself.
const FIRST_OPEN_PART: u32 = 4;
/// How long calls are unary after the peer has said that it does not support streams.
const UNARY_FOR: Duration = Duration::from_secs(60);
/// How long calls are unary after opening a stream got no answer. A proxy in between may block streams.
const UNARY_AFTER_SILENCE: Duration = Duration::from_secs(10);
/// How often an old stream is checked for callers that still wait.
const OLD_STREAM_CHECK: Duration = Duration::from_secs(1);

/// A service whose calls can share a stream.
pub trait Streamed: Send + Sync + 'static {
    /// A request, without its number.
    type Call: Clone + Send + 'static;
    /// A response, without its number.
    type Answer: Send + 'static;
    /// A call with its number.
    type Request: Send + 'static;
    /// An answer with its number.
    type Response: Send + 'static;

    /// The encoded size of a call, in bytes.
    fn bytes(call: &Self::Call) -> usize;

    /// Opens a stream.
    fn open(
        channel: Channel,
        requests: impl Stream<Item = Self::Request> + Send + 'static,
    ) -> impl Future<Output = Result<Streaming<Self::Response>, Status>> + Send;

    /// Makes a unary call. The peer is told to give up after `timeout`.
    fn unary(
        channel: Channel,
        call: Self::Call,
        timeout: Duration,
    ) -> impl Future<Output = Result<Self::Answer, Status>> + Send;

    /// Wraps a call for a stream.
    fn request(number: u64, timeout_millis: u32, call: Self::Call) -> Self::Request;

    /// Unwraps an answer from a stream.
    fn answer(response: Self::Response) -> (u64, Result<Self::Answer, Status>);
}

/// The caller's end of a channel. Cheap to clone.
pub struct Line<S: Streamed> {
    channel: Channel,
    slot: Arc<Mutex<Slot<S>>>,
    /// Each unanswered call on a stream holds a permit. Old streams count too, because they share the connection.
    unanswered: Arc<Semaphore>,
    streams_work: Arc<AtomicBool>, // the peer has answered on a stream
}

/// How the next call is made.
enum Slot<S: Streamed> {
    /// Open a new stream.
    Closed,
    Open(Arc<Open<S>>),
    /// Make unary calls until this time.
    Unary(Instant),
    /// Always make unary calls.
    AlwaysUnary,
}

struct Open<S: Streamed> {
    requests: mpsc::Sender<S::Request>,
    pending: Arc<Mutex<Pending<S>>>,
    next: AtomicU64,
    /// Whether the peer has accepted the stream.
    accepted: Arc<AtomicBool>,
}

/// The callers that wait for an answer, by call number.
struct Pending<S: Streamed> {
    callers: BTreeMap<u64, Caller<S>>,
    /// Why no further answer will come, once the stream has ended.
    ended: Option<NoAnswer>,
}

/// An unanswered call. The entry stays when the caller gives up, because the peer is still working on the call.
struct Caller<S: Streamed> {
    end: oneshot::Sender<CallEnd<S>>,
    _unanswered: OwnedSemaphorePermit,
}

/// How a call on a stream ended.
enum CallEnd<S: Streamed> {
    /// The peer has answered. Its answer may be a status.
    Answered(Result<S::Answer, Status>),
    /// No answer came.
    Unanswered(NoAnswer),
}

/// Why a stream gives no further answers.
#[derive(Debug, Clone)]
enum NoAnswer {
    /// The peer does not support streams, or has not accepted this one: make the call unary.
    MakeUnary {
        /// The peer may have taken the call from the stream all the same.
        may_have_arrived: bool,
    },
    Broken(Status),
}

impl<S: Streamed> Line<S> {
    /// Makes calls over `channel`. Create and use the line within a tokio runtime.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self::over(channel, Slot::Closed)
    }

    /// As `new`, but every call is unary.
    #[must_use]
    pub fn without_streams(channel: Channel) -> Self {
        Self::over(channel, Slot::AlwaysUnary)
    }

    fn over(channel: Channel, slot: Slot<S>) -> Self {
        let (slot, unanswered) = (Arc::new(Mutex::new(slot)), Arc::new(Semaphore::new(CALLS_MAX)));
        Self { channel, slot, unanswered, streams_work: Arc::default() }
    }

    /// A line with the same settings over another channel.
    #[must_use]
    pub fn with_channel(&self, channel: Channel) -> Self {
        match &*lock(&self.slot) {
            Slot::AlwaysUnary => Self::without_streams(channel),
            Slot::Closed | Slot::Open(_) | Slot::Unary(_) => Self::new(channel),
        }
    }

    /// A line over the same channel whose calls are all unary.
    #[must_use]
    pub fn to_unary(&self) -> Self {
        Self::without_streams(self.channel.clone())
    }

    /// The channel that the line uses.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Makes a call. The peer is told to give up after `timeout`. The caller must enforce its own deadline.
    ///
    /// # Errors
    ///
    /// The peer's status. A status with a source was made on this side: there is no answer.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the call may or may not be executed.
    pub async fn call(&self, call: S::Call, timeout: Duration) -> Result<S::Answer, Status> {
        // An oversized call would break the stream for all other calls.
        let fits = S::bytes(&call) <= limits::REQUEST_BYTES_MAX - NUMBER_BYTES_MAX;
        let unanswered = self.unanswered.clone().acquire_owned().await.expect("never closed");
        let Some(open) = fits.then(|| self.open(timeout)).flatten() else {
            drop(unanswered);
            return self.unary(call, timeout).await;
        };
        // Until the peer accepts the stream, this call may have to be retried as a unary call.
        let spare = (!open.accepted.load(Ordering::Relaxed)).then(|| call.clone());
        match (open.call(call, timeout, unanswered).await, spare) {
            (CallEnd::Answered(answer), _) => answer,
            (CallEnd::Unanswered(NoAnswer::MakeUnary { may_have_arrived }), Some(call)) => {
                let answer = self.unary(call, timeout).await;
                answer.map_err(|status| {
                    let says_that_nothing_is_done = status.code() == Code::ResourceExhausted
                        || connection::is_not_connected(&status);
                    // The first attempt may be carried out, whatever the second one met.
                    let is_open = may_have_arrived && says_that_nothing_is_done;
                    if is_open { broken(status.message()) } else { status }
                })
            }
            (CallEnd::Unanswered(NoAnswer::MakeUnary { .. }), None) => {
                Err(broken("a stream that was accepted was not"))
            }
            (CallEnd::Unanswered(NoAnswer::Broken(status)), _) => Err(status),
        }
    }

    async fn unary(&self, call: S::Call, timeout: Duration) -> Result<S::Answer, Status> {
        let answer = S::unary(self.channel.clone(), call, timeout).await;
        answer.map_err(|status| match status.source() {
            None => status,
            Some(why) => {
                // tonic's own text is only "transport error".
                let mut worded = Status::new(status.code(), connection::in_words(why));
                worded.set_source(Arc::new(status));
                worded
            }
        })
    }

    /// The stream for a call with this timeout. `None` if the call must be unary.
    fn open(&self, timeout: Duration) -> Option<Arc<Open<S>>> {
        let mut slot = lock(&self.slot);
        match &*slot {
            Slot::Open(open) if !open.requests.is_closed() => return Some(open.clone()),
            Slot::Unary(until) if Instant::now() < *until => return None,
            Slot::AlwaysUnary => return None,
            Slot::Open(_) | Slot::Unary(_) | Slot::Closed => {}
        }
        let (requests, receiver) = mpsc::channel(CALLS_MAX);
        let pending = Arc::new(Mutex::new(Pending { callers: BTreeMap::new(), ended: None }));
        let accepted = Arc::new(AtomicBool::new(false));
        let streams_work = self.streams_work.load(Ordering::Relaxed);
        let first = OPEN_WITHIN.min(timeout / FIRST_OPEN_PART);
        let driver = Driver {
            open_within: if streams_work { OPEN_WITHIN } else { first },
            slot: self.slot.clone(),
            pending: pending.clone(),
            accepted: accepted.clone(),
            streams_work: self.streams_work.clone(),
        };
        tokio::spawn(driver.run(self.channel.clone(), receiver));
        let open = Arc::new(Open { requests, pending, next: AtomicU64::new(0), accepted });
        *slot = Slot::Open(open.clone());
        Some(open)
    }
}

impl<S: Streamed> Open<S> {
    async fn call(
        &self,
        call: S::Call,
        timeout: Duration,
        unanswered: OwnedSemaphorePermit,
    ) -> CallEnd<S> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (end, ended) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if let Some(why) = &pending.ended {
                return CallEnd::Unanswered(why.clone());
            }
            pending.callers.insert(number, Caller { end, _unanswered: unanswered });
        }
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        // The channel has room for all unanswered calls. If the stream has ended, the driver tells every waiting caller why.
        drop(self.requests.try_send(S::request(number, millis, call)));
        ended.await.unwrap_or_else(|_| {
            CallEnd::Unanswered(NoAnswer::Broken(broken("the program is stopping")))
        })
    }
}

/// Opens one stream, and passes its answers to the waiting callers until the stream ends.
struct Driver<S: Streamed> {
    open_within: Duration,
    slot: Arc<Mutex<Slot<S>>>,
    pending: Arc<Mutex<Pending<S>>>,
    accepted: Arc<AtomicBool>,
    streams_work: Arc<AtomicBool>,
}

impl<S: Streamed> Driver<S> {
    async fn run(self, channel: Channel, mut requests: mpsc::Receiver<S::Request>) {
        let opening = S::open(channel, poll_fn(move |cx| requests.poll_recv(cx)));
        let why = match tokio::time::timeout(self.open_within, opening).await {
            Ok(Ok(responses)) => {
                self.accepted.store(true, Ordering::Relaxed);
                let (answers, why) = self.take_answers(responses).await;
                if answers == 0 {
                    self.set_slot(Slot::Unary(Instant::now() + UNARY_AFTER_SILENCE));
                }
                NoAnswer::Broken(why)
            }
            // The status came from the peer. If the peer cannot answer at the moment (a standby, a proxy in front
            // of a server that is starting), that says nothing about streams: the next call opens one.
            Ok(Err(status)) if !connection::is_ours(&status) => {
                let is_for_now = matches!(
                    status.code(),
                    Code::Unavailable
                        | Code::ResourceExhausted
                        | Code::Aborted
                        | Code::Cancelled
                        | Code::DeadlineExceeded
                );
                let unary = Slot::Unary(Instant::now() + UNARY_FOR);
                self.set_slot(if is_for_now { Slot::Closed } else { unary });
                // A proxy that makes such a status may have sent the stream on.
                NoAnswer::MakeUnary { may_have_arrived: is_for_now }
            }
            Ok(Err(status)) => NoAnswer::Broken(broken(status)),
            Err(_) => {
                self.set_slot(Slot::Unary(Instant::now() + UNARY_AFTER_SILENCE));
                NoAnswer::MakeUnary { may_have_arrived: true }
            }
        };
        let mut pending = lock(&self.pending);
        pending.ended = Some(why.clone());
        for (_, caller) in std::mem::take(&mut pending.callers) {
            drop(caller.end.send(CallEnd::Unanswered(why.clone()))); // the caller may have been dropped
        }
    }

    /// Returns how many answers arrived, and why no further one will.
    async fn take_answers(&self, mut responses: Streaming<S::Response>) -> (u64, Status) {
        let mut answers = 0;
        let old_at = tokio::time::sleep(AGE);
        tokio::pin!(old_at);
        let mut old = false;
        loop {
            tokio::select! {
                biased; // so that a simulated run can be repeated
                () = &mut old_at => {
                    // The stream takes no further calls. The peer sees that our side is closed, and ends the stream after its
                    // last answer.
                    self.set_slot(Slot::Closed);
                    if old && lock(&self.pending).callers.values().all(|it| it.end.is_closed()) {
                        return (answers, broken("the stream was closed"));
                    }
                    old = true;
                    old_at.as_mut().reset(Instant::now() + OLD_STREAM_CHECK);
                }
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        answers += 1;
                        self.streams_work.store(true, Ordering::Relaxed);
                        let (number, answer) = S::answer(response);
                        let caller = lock(&self.pending).callers.remove(&number);
                        if let Some(caller) = caller {
                            drop(caller.end.send(CallEnd::Answered(answer))); // the caller may have been dropped
                        }
                    }
                    Ok(None) => return (answers, broken("the stream has ended")),
                    Err(status) => return (answers, broken(status)),
                },
            }
        }
    }

    /// Sets how the next call is made, unless another stream has replaced this one.
    fn set_slot(&self, next: Slot<S>) {
        let mut slot = lock(&self.slot);
        if let Slot::Open(open) = &*slot
            && Arc::ptr_eq(&open.pending, &self.pending)
        {
            *slot = next;
        }
    }
}

/// Answers up to [`CALLS_MAX`] calls of a stream concurrently, each as soon as its answer is ready. Further calls are answered
/// by `refuse`, with the status [`too_many_calls`]. When the caller closes its side, or `closing` completes, the stream ends
/// after the last answer.
pub fn serve<Q, R, F>(
    requests: Streaming<Q>,
    closing: impl Future<Output = ()> + Send + 'static,
    mut answer: impl FnMut(Q) -> F + Send + 'static,
    refuse: impl Fn(Q) -> R + Send + 'static,
) -> Answers<R>
where
    Q: Send + 'static,
    R: Send + 'static,
    F: Future<Output = R> + Send + 'static,
{
    // When the connection breaks, its calls are cancelled, as unary calls would be.
    let requests = requests
        .take_until(Box::pin(closing))
        .take_while(|request| ready(request.is_ok()))
        .filter_map(|request| ready(request.ok()));
    let permits = Arc::new(Semaphore::new(CALLS_MAX));
    let answers = requests.map(move |request| match permits.clone().try_acquire_owned() {
        Ok(permit) => {
            let answer = answer(request);
            Either::Left(async move {
                let _permit = permit;
                answer.await
            })
        }
        Err(_) => Either::Right(ready(refuse(request))),
    });
    // Refusals need not wait for the calls that are being served.
    Box::pin(answers.buffer_unordered(2 * CALLS_MAX).map(Ok))
}

/// The status for a call that arrives while [`CALLS_MAX`] other calls of its stream are unanswered.
#[must_use]
pub fn too_many_calls() -> Status {
    Status::resource_exhausted(format!(
        "{CALLS_MAX} calls of this stream have no answer yet, which is as many as may be"
    ))
}

/// The response stream of [`serve`].
pub type Answers<R> = Pin<Box<dyn Stream<Item = Result<R, Status>> + Send>>;

/// Limits a call on a stream to its caller's timeout. 0 means no limit.
pub async fn within<T>(
    timeout_millis: u32,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    if timeout_millis == 0 {
        return answer.await;
    }
    let timeout = Duration::from_millis(timeout_millis.into());
    let answered = tokio::time::timeout(timeout, answer).await;
    answered
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("the time given with the call is over")))
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self {
            code: status.code().into(),
            message: status.message().to_owned(),
            details: status.details().to_vec(),
        }
    }
}

impl From<Failure> for Status {
    fn from(Failure { code, message, details }: Failure) -> Self {
        // A failure with the code OK is invalid, so the code becomes UNKNOWN.
        let code = if code == Code::Ok as i32 { Code::Unknown } else { Code::from_i32(code) };
        Self::with_details(code, message, details.into())
    }
}

/// The status of a call that got no answer.
fn broken(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Status {
    let why: Arc<dyn std::error::Error + Send + Sync> = why.into().into();
    let mut status = Status::unavailable(connection::in_words(&*why));
    status.set_source(why);
    status
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}

impl<S: Streamed> Clone for Line<S> {
    fn clone(&self) -> Self {
        Self {
            channel: self.channel.clone(),
            slot: self.slot.clone(),
            unanswered: self.unanswered.clone(),
            streams_work: self.streams_work.clone(),
        }
    }
}

impl<S: Streamed> fmt::Debug for Line<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &*lock(&self.slot) {
            Slot::Closed => "Line(closed)",
            Slot::Open(_) => "Line(a stream)",
            Slot::Unary(_) | Slot::AlwaysUnary => "Line(unary)",
        })
    }
}
