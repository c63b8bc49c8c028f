//! How a global transaction travels along ordinary gRPC calls, in their metadata.
//!
//! On the way out, [`PropagateLayer`] around a client's channel names the transaction that the call belongs to and sets a branch
//! id aside for it. On the way in, [`ContextLayer`] around a server finds them, as a [`Context`]; with
//! [`Handfast::join`](crate::Handfast::join) the callee registers branches of its own below that id, and what it tried with
//! success travels back in the response's metadata. Confirm has to name exactly what is registered, so a branch that does not
//! come back this way is never confirmed by mistake: the transaction is cancelled.

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

use crate::{error::BoxError, global::Global};

tokio::task_local! {
    /// The transaction that the running code is in, as its initiator or as one who joined it.
    static GLOBAL: Global;
    /// What the call came with that is being served.
    static CONTEXT: Context;
}

/// Runs `work` within a transaction: clients with a [`PropagateLayer`] carry it along.
pub(crate) async fn scope<F: Future>(global: Global, work: F) -> F::Output {
    GLOBAL.scope(global, work).await
}

/// Serves a Try within the transaction that its metadata names, if no [`ContextLayer`] around the server has seen to that: one
/// that came on a stream passes none.
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

/// The global transaction that a call came with.
#[derive(Clone)]
pub struct Context {
    pub(crate) xid: Xid,
    pub(crate) branch_id: BranchId,
    /// What was tried below it, to be reported with the response.
    tried: Arc<Mutex<Vec<BranchId>>>,
}

impl Context {
    /// What `request` came with, if its server has a [`ContextLayer`] and its caller was in a transaction.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get::<Self>().cloned()
    }

    /// What the call came with that is being served by this task. A convenience: a task that you spawn has none.
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

    pub(crate) fn tried(&self, branch_id: BranchId) {
        self.tried.lock().expect("nothing panics while it is locked").push(branch_id);
    }

    fn read(headers: &HeaderMap) -> Option<Self> {
        let text = |key| headers.get(key).map(|value| value.to_str().unwrap_or("?"));
        let (xid, branch_id) = (text(metadata::XID)?, text(metadata::BRANCH_ID)?);
        match (xid.parse(), branch_id.parse()) {
            (Ok(xid), Ok(branch_id)) => Some(Self { xid, branch_id, tried: Arc::default() }),
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
    warn!(%error, "a call's metadata names a transaction that cannot be; it is served outside of any");
    None
}

/// The status, if a response has nothing but an error in it.
fn grpc_error(headers: &HeaderMap) -> Option<String> {
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

/// For servers: finds the transaction that a call came with, as a [`Context`] in the request's extensions and for the task that
/// serves it, and reports with the response what was tried.
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

/// For clients: carries the transaction along that the caller is in. That is the one whose closure is running in this task, or
/// the one that was put into the request with [`Global::attach`].
#[derive(Debug, Clone, Copy, Default)]
pub struct PropagateLayer;

impl<S> Layer<S> for PropagateLayer {
    type Service = PropagateService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        PropagateService { inner }
    }
}

/// See [`PropagateLayer`].
#[derive(Debug, Clone)]
pub struct PropagateService<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for PropagateService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Send + 'static,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<R>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> task::Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let attached = request.extensions_mut().remove::<Global>();
        let Some(global) = attached.or_else(|| GLOBAL.try_with(Clone::clone).ok()) else {
            let response = self.inner.call(request);
            return Box::pin(async move { response.await.map_err(Into::into) });
        };
        // The one that is ready now makes the call; its clone may not be.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            // Not known to the coordinator, no call.
            let xid = global.xid().await.map_err(|error| global.call_not_made(error))?;
            let branch_id = global.next_branch_id().map_err(|error| global.call_not_made(error))?;
            let ascii = |text: &str| {
                HeaderValue::from_str(text).expect("xids and branch ids are plain ASCII")
            };
            request.headers_mut().insert(metadata::XID, ascii(&xid.to_string()));
            request.headers_mut().insert(metadata::BRANCH_ID, ascii(branch_id.as_str()));
            let response = inner.call(request).await.map_err(Into::into);
            match &response {
                Err(error) => global.ordinary_call_failed(branch_id, error.to_string()),
                Ok(response) => match grpc_error(response.headers()) {
                    Some(error) => global.ordinary_call_failed(branch_id, error),
                    None => {
                        global.nested(
                            response
                                .headers()
                                .get_all(metadata::BRANCHES)
                                .iter()
                                .map(HeaderValue::as_bytes),
                        );
                    }
                },
            }
            response
        })
    }
}

impl Global {
    /// Makes an ordinary gRPC call part of this transaction, if its client has a [`PropagateLayer`]. Within the closure of `run`
    /// that goes without saying, as long as you spawn no task.
    pub fn attach<T>(&self, mut request: tonic::Request<T>) -> tonic::Request<T> {
        request.extensions_mut().insert(self.clone());
        request
    }

    /// Runs `work` as part of this transaction: clients with a [`PropagateLayer`] carry it along. For services that joined.
    pub async fn scope<F: Future>(&self, work: F) -> F::Output {
        scope(self.clone(), work).await
    }
}
