//! Many calls on one stream: a call by itself costs both ends about 60 µs of processor, a message on an open stream about 1 µs.
//!
//! A [`Line`] is the caller's end. It opens a stream when it is first used, and again when that one has ended; where the other
//! end has no streams (a participant in another language, a proxy in between) it makes the calls one by one, and looks again
//! later. [`serve`] is the other end. What a call guarantees, what a repeat does, and its codes are the same either way.
//!
//! A stream that breaks leaves its calls without an answer, as a connection that breaks does: UNAVAILABLE, with a source. No
//! status of a stream is ever taken for the answer to a call.
//!
//! Streams are short-lived ([`AGE`]) and idle ones are closed: a server that stops in good order waits for those that are open,
//! and a new one finds its way to wherever connections go by then.

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

use futures_util::{Stream, StreamExt as _, stream::poll_fn};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{limits, v1::Failure};

/// Calls of one stream at a time that are being answered; others wait in the connection.
pub const CALLS_MAX: usize = 1024;
/// A stream takes no further calls after so long, and a new one does.
pub const AGE: Duration = Duration::from_secs(5);
/// Bytes around a call on a stream: its number, its timeout.
const NUMBER_BYTES_MAX: usize = 64;
/// How long the other end may take to accept a stream.
const OPEN_WITHIN: Duration = Duration::from_secs(2);
/// How long calls are made one by one, once the other end has said that it has no streams.
const ONE_BY_ONE_FOR: Duration = Duration::from_secs(60);
/// The same, once it has said nothing: something in between may not let streams pass.
const SILENT_FOR: Duration = Duration::from_secs(10);
/// How often an old stream is looked at, whether anybody still waits for an answer from it.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A service whose calls can share a stream.
pub trait Shared: Send + Sync + 'static {
    /// What is asked.
    type Call: Clone + Send + 'static;
    /// What is answered.
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
    fn one_by_one(
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
pub struct Line<S: Shared> {
    channel: Channel,
    slot: Arc<Mutex<Slot<S>>>,
}

/// What the next call goes over.
enum Slot<S: Shared> {
    /// Nothing yet, or not any more.
    Closed,
    Open(Arc<Open<S>>),
    /// No stream before then.
    OneByOne(Instant),
    /// No stream at all.
    AlwaysOneByOne,
}

struct Open<S: Shared> {
    requests: mpsc::Sender<S::Request>,
    pending: Arc<Mutex<Pending<S>>>,
    next: AtomicU64,
    /// The other end has accepted it.
    accepted: Arc<AtomicBool>,
}

/// Who waits for which answer.
struct Pending<S: Shared> {
    callers: BTreeMap<u64, oneshot::Sender<Told<S>>>,
    /// There will be no further answer.
    ended: Option<NoAnswer>,
}

/// What the other end answered, or that it will not.
type Told<S> = Result<Result<<S as Shared>::Answer, Status>, NoAnswer>;

#[derive(Debug, Clone)]
enum NoAnswer {
    /// The call has to be made by itself.
    OneByOne,
    Broken(Status),
}

impl<S: Shared> Line<S> {
    /// Calls over `channel`. Call it, and make the calls, within a tokio runtime.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self { channel, slot: Arc::new(Mutex::new(Slot::Closed)) }
    }

    /// The same, but every call is made by itself.
    #[must_use]
    pub fn without_streams(channel: Channel) -> Self {
        Self { channel, slot: Arc::new(Mutex::new(Slot::AlwaysOneByOne)) }
    }

    /// What it calls over.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Makes a call. The other end is told to give up after `timeout`; giving up here is the caller's business.
    ///
    /// # Errors
    ///
    /// What the other end answered; or, with a source, that there is no answer.
    ///
    /// # Cancel safety
    ///
    /// A call that is given up may or may not be carried out.
    pub async fn call(&self, call: S::Call, timeout: Duration) -> Result<S::Answer, Status> {
        // Too large is this call, and no other: it must not break the stream.
        let fits = S::bytes(&call) <= limits::REQUEST_BYTES_MAX - NUMBER_BYTES_MAX;
        let Some(open) = fits.then(|| self.open()).flatten() else {
            return S::one_by_one(self.channel.clone(), call, timeout).await;
        };
        // Until it is accepted the call may have to be made again, by itself.
        let spare = (!open.accepted.load(Ordering::Relaxed)).then(|| call.clone());
        match (open.call(call, timeout).await, spare) {
            (Ok(answer), _) => answer,
            (Err(NoAnswer::OneByOne), Some(call)) => {
                S::one_by_one(self.channel.clone(), call, timeout).await
            }
            (Err(NoAnswer::OneByOne), None) => Err(broken("a stream that was accepted was not")),
            (Err(NoAnswer::Broken(status)), _) => Err(status),
        }
    }

    /// The stream for the next call, if there is to be one.
    fn open(&self) -> Option<Arc<Open<S>>> {
        let mut slot = lock(&self.slot);
        match &*slot {
            Slot::Open(open) if !open.requests.is_closed() => return Some(open.clone()),
            Slot::OneByOne(until) if Instant::now() < *until => return None,
            Slot::AlwaysOneByOne => return None,
            Slot::Open(_) | Slot::OneByOne(_) | Slot::Closed => {}
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

impl<S: Shared> Open<S> {
    async fn call(&self, call: S::Call, timeout: Duration) -> Told<S> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (caller, answer) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if let Some(why) = &pending.ended {
                return Err(why.clone());
            }
            pending.callers.insert(number, caller);
        }
        let _forget = Forget { pending: &self.pending, number };
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        // If it cannot be sent, the driver tells everybody who waits why.
        drop(self.requests.send(S::request(number, millis, call)).await);
        answer.await.unwrap_or_else(|_| Err(NoAnswer::Broken(broken("the program is stopping"))))
    }
}

/// Forgets a caller that has its answer, or has given up.
struct Forget<'a, S: Shared> {
    pending: &'a Mutex<Pending<S>>,
    number: u64,
}

impl<S: Shared> Drop for Forget<'_, S> {
    fn drop(&mut self) {
        lock(self.pending).callers.remove(&self.number);
    }
}

/// Opens one stream, and brings its answers to those who wait, until its end.
struct Driver<S: Shared> {
    slot: Arc<Mutex<Slot<S>>>,
    pending: Arc<Mutex<Pending<S>>>,
    accepted: Arc<AtomicBool>,
}

impl<S: Shared> Driver<S> {
    async fn run(self, channel: Channel, mut requests: mpsc::Receiver<S::Request>) {
        let opening = S::open(channel, poll_fn(move |cx| requests.poll_recv(cx)));
        let why = match tokio::time::timeout(OPEN_WITHIN, opening).await {
            Ok(Ok(responses)) => {
                self.accepted.store(true, Ordering::Relaxed);
                let (answers, why) = self.take_answers(responses).await;
                if answers == 0 {
                    self.set_slot(Slot::OneByOne(Instant::now() + SILENT_FOR));
                }
                NoAnswer::Broken(why)
            }
            // A status without a source came from the other end: it has no streams, or does not want any.
            Ok(Err(status)) if status.source().is_none() => {
                self.set_slot(Slot::OneByOne(Instant::now() + ONE_BY_ONE_FOR));
                NoAnswer::OneByOne
            }
            Ok(Err(status)) => NoAnswer::Broken(broken(status)),
            Err(_) => {
                self.set_slot(Slot::OneByOne(Instant::now() + SILENT_FOR));
                NoAnswer::OneByOne
            }
        };
        let mut pending = lock(&self.pending);
        pending.ended = Some(why.clone());
        for (_, caller) in std::mem::take(&mut pending.callers) {
            drop(caller.send(Err(why.clone()))); // or has given up
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
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        answers += 1;
                        let (number, answer) = S::answer(response);
                        let caller = lock(&self.pending).callers.remove(&number);
                        if let Some(caller) = caller {
                            drop(caller.send(Ok(answer))); // or has given up
                        }
                    }
                    Ok(None) => return (answers, broken("the stream has ended")),
                    Err(status) => return (answers, broken(status)),
                },
                () = &mut old_at => {
                    // Nobody sends on it any more, so that the other end sees our side closed, and ends it after its last answer.
                    self.set_slot(Slot::Closed);
                    if old && lock(&self.pending).callers.is_empty() {
                        return (answers, broken("the stream was closed"));
                    }
                    old = true;
                    old_at.as_mut().reset(Instant::now() + LAST_ANSWERS);
                }
            }
        }
    }

    /// Says what the next call goes over, unless another stream has taken the place of this one.
    fn set_slot(&self, next: Slot<S>) {
        let mut slot = lock(&self.slot);
        if let Slot::Open(open) = &*slot
            && Arc::ptr_eq(&open.pending, &self.pending)
        {
            *slot = next;
        }
    }
}

/// Answers what comes on a stream: up to [`CALLS_MAX`] calls at a time, each as soon as it has its answer. Ends after the last
/// answer when the caller closes its side, or once `closing` completes.
pub fn serve<Q, R, F>(
    requests: Streaming<Q>,
    closing: impl Future<Output = ()> + Send + 'static,
    answer: impl FnMut(Q) -> F + Send + 'static,
) -> Answers<R>
where
    Q: Send + 'static,
    R: Send + 'static,
    F: Future<Output = R> + Send + 'static,
{
    // A caller whose connection has broken hears nothing any more: what it asked for is given up, as a call by itself would be.
    let requests = requests
        .take_until(Box::pin(closing))
        .take_while(|request| ready(request.is_ok()))
        .filter_map(|request| ready(request.ok()));
    Box::pin(requests.map(answer).buffer_unordered(CALLS_MAX).map(Ok))
}

/// The answers of [`serve`].
pub type Answers<R> = Pin<Box<dyn Stream<Item = Result<R, Status>> + Send>>;

/// Waits for the answer to one call of a stream, as long as its caller does.
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
        // OK is no failure; whoever says so has not answered.
        let code = if code == Code::Ok as i32 { Code::Unknown } else { Code::from_i32(code) };
        Self::with_details(code, message, details.into())
    }
}

/// There is no answer, and this is why.
fn broken(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Status {
    let why: Arc<dyn std::error::Error + Send + Sync> = why.into().into();
    let mut status = Status::unavailable(format!("no answer: {why}"));
    status.set_source(why);
    status
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it is locked")
}

impl<S: Shared> Clone for Line<S> {
    fn clone(&self) -> Self {
        Self { channel: self.channel.clone(), slot: self.slot.clone() }
    }
}

impl<S: Shared> fmt::Debug for Line<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &*lock(&self.slot) {
            Slot::Closed => "Line(closed)",
            Slot::Open(_) => "Line(a stream)",
            Slot::OneByOne(_) | Slot::AlwaysOneByOne => "Line(one by one)",
        })
    }
}
