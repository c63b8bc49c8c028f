//! How a global transaction travels along ordinary gRPC calls.
//!
//! [`PropagateLayer`] around a client's channel names the transaction that a call belongs to in its metadata, and takes a branch id
//! for it. The other end is [`ContextLayer`](crate::ContextLayer).

use std::task;

use futures_util::future::BoxFuture;
use handfast_proto::metadata;
use http::{HeaderValue, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::global::Global;
use crate::{context::grpc_error, error::BoxError};

tokio::task_local! {
    /// The transaction that the running code is part of: it began the transaction, or joined it.
    static GLOBAL: Global;
}

/// Runs `work` within a transaction: clients with a [`PropagateLayer`] carry it along.
pub(super) async fn scope<F: Future>(global: Global, work: F) -> F::Output {
    GLOBAL.scope(global, work).await
}

/// For clients: carries along the transaction that the caller is in. That is the one whose closure is running in this task, or
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
        // Taken now: the order of the calls decides, and not which of them is woken first.
        let branch_id = global.next_branch_id();
        // The service that has been polled ready makes the call; its clone has not been polled.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            let branch_id = branch_id.map_err(|error| global.call_not_made(error))?;
            // The call is made only once the coordinator knows the transaction.
            let begun = global.registration().await.map_err(|error| global.call_not_made(error))?;
            let ascii = |text: &str| {
                HeaderValue::from_str(text).expect("xids and branch ids are plain ASCII")
            };
            let headers = request.headers_mut();
            headers.insert(metadata::XID, ascii(&begun.xid.to_string()));
            headers.insert(metadata::BRANCH_ID, ascii(branch_id.as_str()));
            if begun.at_decision {
                headers.insert(metadata::AT_DECISION, HeaderValue::from_static("1"));
            }
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
    /// that is done for you, as long as you spawn no task.
    pub fn attach<T>(&self, mut request: tonic::Request<T>) -> tonic::Request<T> {
        request.extensions_mut().insert(self.clone());
        request
    }

    /// Runs `work` as part of this transaction: clients with a [`PropagateLayer`] carry it along. For services that joined.
    pub async fn scope<F: Future>(&self, work: F) -> F::Output {
        scope(self.clone(), work).await
    }
}
