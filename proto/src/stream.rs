//! Many calls on one stream: a call by itself costs both ends about 60 µs of processor, a message on an open stream about 1 µs.
//!
//! A [`Line`] is the caller's end. It opens a stream when it is first used, and again when that one has ended. If the other end has
//! no streams (a participant in another language, a proxy in between) it makes unary calls, and tries a stream again later.
//! [`serve`] is the other end. What a call guarantees, what a repeat does, and its codes are the same either way.
//!
//! A stream that breaks leaves its calls without an answer, as a connection that breaks does: UNAVAILABLE, with a source. No
//! status of a stream is ever taken for the answer to a call.
//!
//! A stream has at most [`CALLS_MAX`] calls without an answer, counting those whose caller has given up; a further one waits here
//! until there is room, and [`serve`] refuses it. This keeps the connection alive: HTTP/2 servers close one on which small frames
//! pile up unread. Rust's h2 lets unread frames below 256 bytes waste half of the connection's window, 512 KiB by default, which
//! about 2,500 of our smallest calls do, and ends the connection with `too_many_data_frames`.
//!
//! Streams are short-lived ([`AGE`]) and idle ones are closed. A server that stops in good order waits until its streams have ended,
//! and the next stream goes to a server that is running then.

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

/// Calls of one stream that may be without an answer at a time. See the module's comment.
pub const CALLS_MAX: usize = 1024;
/// A stream takes calls for this long; then a new one is opened.
pub const AGE: Duration = Duration::from_secs(5);
/// Bytes around a call on a stream: its number, its timeout.
const NUMBER_BYTES_MAX: usize = 64;
/// How long the other end may take to accept a stream.
const OPEN_WITHIN: Duration = Duration::from_secs(2);
/// How long calls are unary after the other end has said that it has no streams.
const UNARY_FOR: Duration = Duration::from_secs(60);
/// How long calls are unary after a stream had no answer at all: a proxy in between may not let streams pass.
const UNARY_AFTER_SILENCE: Duration = Duration::from_secs(10);
/// How often an old stream is checked for callers that still wait for an answer.
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

    /// Bytes of a call, as it is sent.
    fn bytes(call: &Self::Call) -> usize;

    /// Opens a stream.
    fn open(
        channel: Channel,
        requests: impl Stream<Item = Self::Request> + Send + 'static,
    ) -> impl Future<Output = Result<Streaming<Self::Response>, Status>> + Send;

    /// Makes a call by itself. The other end is told to give up after `timeout`.
    fn unary(
        channel: Channel,
        call: Self::Call,
        timeout: Duration,
    ) -> impl Future<Output = Result<Self::Answer, Status>> + Send;

    /// Puts a call on a stream.
    fn request(number: u64, timeout_millis: u32, call: Self::Call) -> Self::Request;

    /// Takes an answer from a stream.
    fn answer(response: Self::Response) -> (u64, Result<Self::Answer, Status>);
}

/// The caller's end of a channel. Cheap to clone.
pub struct Line<S: Streamed> {
    channel: Channel,
    slot: Arc<Mutex<Slot<S>>>,
    /// A permit for each call on a stream that has no answer. Old streams count too: they share a connection.
    unanswered: Arc<Semaphore>,
}

/// How the next call is made.
enum Slot<S: Streamed> {
    /// On a new stream.
    Closed,
    Open(Arc<Open<S>>),
    /// Unary until then.
    Unary(Instant),
    /// Unary, always.
    AlwaysUnary,
}

struct Open<S: Streamed> {
    requests: mpsc::Sender<S::Request>,
    pending: Arc<Mutex<Pending<S>>>,
    next: AtomicU64,
    /// The other end has accepted it.
    accepted: Arc<AtomicBool>,
}

/// The callers that wait for an answer, by the number of their call.
struct Pending<S: Streamed> {
    callers: BTreeMap<u64, Caller<S>>,
    /// Why there will be no further answer.
    ended: Option<NoAnswer>,
}

/// A call without an answer. It stays when its caller gives up, because the other end is still busy with it.
struct Caller<S: Streamed> {
    told: oneshot::Sender<Told<S>>,
    _unanswered: OwnedSemaphorePermit,
}

/// What the other end answered, or that it will not.
type Told<S> = Result<Result<<S as Streamed>::Answer, Status>, NoAnswer>;

#[derive(Debug, Clone)]
enum NoAnswer {
    /// The other end has no streams: make the call unary.
    MakeUnary,
    Broken(Status),
}

impl<S: Streamed> Line<S> {
    /// Calls over `channel`. Call it, and make the calls, within a tokio runtime.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self::over(channel, Slot::Closed)
    }

    /// The same, but every call is unary.
    #[must_use]
    pub fn without_streams(channel: Channel) -> Self {
        Self::over(channel, Slot::AlwaysUnary)
    }

    fn over(channel: Channel, slot: Slot<S>) -> Self {
        let (slot, unanswered) = (Arc::new(Mutex::new(slot)), Arc::new(Semaphore::new(CALLS_MAX)));
        Self { channel, slot, unanswered }
    }

    /// The same over another channel.
    #[must_use]
    pub fn with_channel(&self, channel: Channel) -> Self {
        match &*lock(&self.slot) {
            Slot::AlwaysUnary => Self::without_streams(channel),
            Slot::Closed | Slot::Open(_) | Slot::Unary(_) => Self::new(channel),
        }
    }

    /// The same over the same channel, but every call is unary.
    #[must_use]
    pub fn to_unary(&self) -> Self {
        Self::without_streams(self.channel.clone())
    }

    /// The channel that it makes calls over.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Makes a call. The other end is told to give up after `timeout`; giving up here is the caller's business.
    ///
    /// # Errors
    ///
    /// The other end's status. A status with a source was made on this side: there is no answer.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the call may or may not be carried out.
    pub async fn call(&self, call: S::Call, timeout: Duration) -> Result<S::Answer, Status> {
        // A call that is too large would break the stream for the others.
        let fits = S::bytes(&call) <= limits::REQUEST_BYTES_MAX - NUMBER_BYTES_MAX;
        let unanswered = self.unanswered.clone().acquire_owned().await.expect("never closed");
        let Some(open) = fits.then(|| self.open()).flatten() else {
            drop(unanswered);
            return self.unary(call, timeout).await;
        };
        // Until the stream is accepted, this call may have to be made again as a unary one.
        let spare = (!open.accepted.load(Ordering::Relaxed)).then(|| call.clone());
        match (open.call(call, timeout, unanswered).await, spare) {
            (Ok(answer), _) => answer,
            (Err(NoAnswer::MakeUnary), Some(call)) => self.unary(call, timeout).await,
            (Err(NoAnswer::MakeUnary), None) => Err(broken("a stream that was accepted was not")),
            (Err(NoAnswer::Broken(status)), _) => Err(status),
        }
    }

    async fn unary(&self, call: S::Call, timeout: Duration) -> Result<S::Answer, Status> {
        let answer = S::unary(self.channel.clone(), call, timeout).await;
        answer.map_err(|status| match status.source() {
            None => status,
            Some(why) => {
                // tonic's own words are "transport error".
                let mut worded = Status::new(status.code(), connection::in_words(why));
                worded.set_source(Arc::new(status));
                worded
            }
        })
    }

    /// The stream for the next call, if there is to be one.
    fn open(&self) -> Option<Arc<Open<S>>> {
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
        let driver = Driver {
            slot: self.slot.clone(),
            pending: pending.clone(),
            accepted: accepted.clone(),
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
    ) -> Told<S> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (told, answer) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if let Some(why) = &pending.ended {
                return Err(why.clone());
            }
            pending.callers.insert(number, Caller { told, _unanswered: unanswered });
        }
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        // There is room for all calls without an answer. If the stream has ended, the driver tells every waiting caller why.
        drop(self.requests.try_send(S::request(number, millis, call)));
        answer.await.unwrap_or_else(|_| Err(NoAnswer::Broken(broken("the program is stopping"))))
    }
}

/// Opens one stream and hands its answers to the waiting callers, until the stream ends.
struct Driver<S: Streamed> {
    slot: Arc<Mutex<Slot<S>>>,
    pending: Arc<Mutex<Pending<S>>>,
    accepted: Arc<AtomicBool>,
}

impl<S: Streamed> Driver<S> {
    async fn run(self, channel: Channel, mut requests: mpsc::Receiver<S::Request>) {
        let opening = S::open(channel, poll_fn(move |cx| requests.poll_recv(cx)));
        let why = match tokio::time::timeout(OPEN_WITHIN, opening).await {
            Ok(Ok(responses)) => {
                self.accepted.store(true, Ordering::Relaxed);
                let (answers, why) = self.take_answers(responses).await;
                if answers == 0 {
                    self.set_slot(Slot::Unary(Instant::now() + UNARY_AFTER_SILENCE));
                }
                NoAnswer::Broken(why)
            }
            // A status without a source came from the other end: it has no streams, or refuses this one.
            Ok(Err(status)) if status.source().is_none() => {
                self.set_slot(Slot::Unary(Instant::now() + UNARY_FOR));
                NoAnswer::MakeUnary
            }
            Ok(Err(status)) => NoAnswer::Broken(broken(status)),
            Err(_) => {
                self.set_slot(Slot::Unary(Instant::now() + UNARY_AFTER_SILENCE));
                NoAnswer::MakeUnary
            }
        };
        let mut pending = lock(&self.pending);
        pending.ended = Some(why.clone());
        for (_, caller) in std::mem::take(&mut pending.callers) {
            drop(caller.told.send(Err(why.clone()))); // the caller may have been dropped
        }
    }

    /// Returns how many answers there were, and why there will be no further one.
    async fn take_answers(&self, mut responses: Streaming<S::Response>) -> (u64, Status) {
        let mut answers = 0;
        let old_at = tokio::time::sleep(AGE);
        tokio::pin!(old_at);
        let mut old = false;
        loop {
            tokio::select! {
                biased; // so that a simulated run can be repeated
                () = &mut old_at => {
                    // No further call is sent on it. The other end sees our side closed, and ends the stream after its last answer.
                    self.set_slot(Slot::Closed);
                    if old && lock(&self.pending).callers.values().all(|it| it.told.is_closed()) {
                        return (answers, broken("the stream was closed"));
                    }
                    old = true;
                    old_at.as_mut().reset(Instant::now() + OLD_STREAM_CHECK);
                }
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        answers += 1;
                        let (number, answer) = S::answer(response);
                        let caller = lock(&self.pending).callers.remove(&number);
                        if let Some(caller) = caller {
                            drop(caller.told.send(Ok(answer))); // the caller may have been dropped
                        }
                    }
                    Ok(None) => return (answers, broken("the stream has ended")),
                    Err(status) => return (answers, broken(status)),
                },
            }
        }
    }

    /// Says how the next call is made, unless another stream has taken the place of this one.
    fn set_slot(&self, next: Slot<S>) {
        let mut slot = lock(&self.slot);
        if let Slot::Open(open) = &*slot
            && Arc::ptr_eq(&open.pending, &self.pending)
        {
            *slot = next;
        }
    }
}

/// Answers the calls of a stream, up to [`CALLS_MAX`] at a time, each as soon as it has its answer. A further one is answered by
/// `refuse`, with the status [`too_many_calls`]. When the caller closes its side, or `closing` completes, the stream ends after the last
/// answer.
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
    // When the connection breaks, the calls on it are given up, as unary calls would be.
    let requests = requests
        .take_until(Box::pin(closing))
        .take_while(|request| ready(request.is_ok()))
        .filter_map(|request| ready(request.ok()));
    let places = Arc::new(Semaphore::new(CALLS_MAX));
    let answers = requests.map(move |request| match places.clone().try_acquire_owned() {
        Ok(place) => {
            let answer = answer(request);
            Either::Left(async move {
                let _place = place;
                answer.await
            })
        }
        Err(_) => Either::Right(ready(refuse(request))),
    });
    // Those that are refused do not wait behind those that are being answered.
    Box::pin(answers.buffer_unordered(2 * CALLS_MAX).map(Ok))
}

/// What a call is answered that comes while [`CALLS_MAX`] others of its stream have no answer.
#[must_use]
pub fn too_many_calls() -> Status {
    Status::resource_exhausted(format!(
        "{CALLS_MAX} calls of this stream have no answer yet, which is as many as may be"
    ))
}

/// The answers of [`serve`].
pub type Answers<R> = Pin<Box<dyn Stream<Item = Result<R, Status>> + Send>>;

/// Waits for the answer to one call of a stream, as long as its caller does. 0: without a limit.
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
        // A failure with code OK makes no sense, so its call has no answer.
        let code = if code == Code::Ok as i32 { Code::Unknown } else { Code::from_i32(code) };
        Self::with_details(code, message, details.into())
    }
}

/// The status of a call without an answer.
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
