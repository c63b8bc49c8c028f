//! The global transaction that a call belongs to, as the call's metadata names it.
//!
//! [`ContextLayer`] around a server reads it as a [`Context`]. With [`Handfast::join`](crate::Handfast::join) the callee registers
//! branches of its own below the branch id in it, and the ones that it tried with success travel back in the response's
//! metadata. Confirm has to name exactly the registered branches, so a branch that is lost on the way back is cancelled and never
//! confirmed by mistake.

use std::{
    fmt,
    sync::{Arc, Mutex},
    task,
};

use futures_util::future::BoxFuture;
use handfast_proto::{BranchId, Xid, metadata};
use http::{HeaderMap, HeaderValue, Request, Response};
use tonic::metadata::MetadataMap;
use tower_layer::Layer;
use tower_service::Service;
use tracing::warn;

tokio::task_local! {
    /// The context of the call that this task is serving.
    static CONTEXT: Context;
}

/// Serves a Try within the transaction that its metadata names. A [`ContextLayer`] around the server has done that already, except
/// for a Try that came on a stream: that one passes no layer.
pub(crate) async fn within_call<Q, R>(
    request: tonic::Request<Q>,
    serve: impl AsyncFnOnce(Q) -> Result<R, tonic::Status>,
) -> Result<tonic::Response<R>, tonic::Status> {
    let (metadata, _, message) = request.into_parts();
    let context = match Context::current() {
        Some(_) => None,
        None => Context::read(metadata.as_ref()),
    };
    let Some(context) = context else { return serve(message).await.map(tonic::Response::new) };
    let response = CONTEXT.scope(context.clone(), serve(message)).await?;
    let mut headers = HeaderMap::new();
    context.report(&mut headers);
    let metadata = MetadataMap::from_headers(headers);
    Ok(tonic::Response::from_parts(metadata, response, tonic::Extensions::new()))
}

/// The global transaction that a call belongs to.
#[derive(Clone)]
pub struct Context {
    xid: Xid,
    branch_id: BranchId,
    /// The transaction is recorded with its decision, as far as the caller knows.
    at_decision: bool,
    /// Branches that were tried below it with success, to be reported with the response.
    tried: Arc<Mutex<Vec<BranchId>>>,
}

impl Context {
    /// The context of `request`, if its server has a [`ContextLayer`] and its caller was in a transaction.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get::<Self>().cloned()
    }

    /// The context of the call that this task is serving. A convenience: a task that you spawn has none.
    #[must_use]
    pub fn current() -> Option<Self> {
        CONTEXT.try_with(Clone::clone).ok()
    }

    /// The global transaction.
    #[must_use]
    pub fn xid(&self) -> Xid {
        self.xid
    }

    /// The branch id that the caller set aside for this call; branches that are registered here are named below it.
    #[must_use]
    pub fn branch_id(&self) -> &BranchId {
        &self.branch_id
    }

    pub(crate) fn at_decision(&self) -> bool {
        self.at_decision
    }

    pub(crate) fn tried(&self, branch_id: BranchId) {
        self.tried.lock().expect("nothing panics while it is locked").push(branch_id);
    }

    fn read(headers: &HeaderMap) -> Option<Self> {
        let text = |key| headers.get(key).map(|value| value.to_str().unwrap_or("?"));
        let (xid, branch_id) = (text(metadata::XID)?, text(metadata::BRANCH_ID)?);
        match (xid.parse(), branch_id.parse()) {
            (Ok(xid), Ok(branch_id)) => {
                let at_decision = headers.contains_key(metadata::AT_DECISION);
                Some(Self { xid, branch_id, at_decision, tried: Arc::default() })
            }
            (Err(error), _) => unreadable(&error),
            (_, Err(error)) => unreadable(&error),
        }
    }

    fn report(&self, headers: &mut HeaderMap) {
        let tried =
            std::mem::take(&mut *self.tried.lock().expect("nothing panics while it is locked"));
        // With an error nothing counts as tried.
        if tried.is_empty() || grpc_error(headers).is_some() {
            return;
        }
        let ids = tried.iter().map(BranchId::as_str).collect::<Vec<_>>().join(",");
        headers.append(
            metadata::BRANCHES,
            HeaderValue::from_str(&ids).expect("branch ids are plain ASCII"),
        );
    }
}

fn unreadable<T>(error: &dyn std::error::Error) -> Option<T> {
    warn!(%error, "a call's metadata names a transaction that is not valid; the call is served outside of any transaction");
    None
}

/// The error, if the response's headers end the call with one.
pub(crate) fn grpc_error(headers: &HeaderMap) -> Option<String> {
    let status = headers.get("grpc-status").filter(|status| *status != "0")?;
    let message =
        headers.get("grpc-message").and_then(|message| message.to_str().ok()).unwrap_or_default();
    Some(format!("status {} {message}", status.to_str().unwrap_or("?")))
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({}, {})", self.xid, self.branch_id)
    }
}

/// For servers: reads the transaction that a call belongs to, and puts it as a [`Context`] into the request's extensions and into
/// the task that serves the call. Reports the branches that were tried with the response.
#[derive(Debug, Clone, Copy, Default)]
pub struct ContextLayer;

impl<S> Layer<S> for ContextLayer {
    type Service = ContextService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ContextService { inner }
    }
}

/// See [`ContextLayer`].
#[derive(Debug, Clone)]
pub struct ContextService<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for ContextService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<R>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> task::Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(context) = Context::read(request.headers()) else {
            return Box::pin(self.inner.call(request));
        };
        request.extensions_mut().insert(context.clone());
        let served = CONTEXT.sync_scope(context.clone(), || self.inner.call(request));
        Box::pin(async move {
            let mut response = CONTEXT.scope(context.clone(), served).await?;
            context.report(response.headers_mut());
            Ok(response)
        })
    }
}
