//! What happens to every request: it gets an id, is counted and logged, is refused if it is not for this machine, its
//! panic is an answer, its error gets the id.

use std::time::Instant;

use axum::{
    Extension, Router,
    extract::{DefaultBodyLimit, MatchedPath, Request},
    http::{HeaderName, HeaderValue, Method, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use lvp_api::ErrorCode;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;

use crate::{
    body,
    error::{Failure, Pending},
    limits::{Followers, Limits},
    listen, metrics,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A request id from outside that is longer than this, or not visible ASCII, is replaced.
const LONGEST_ID: usize = 128;

/// Puts the layers around the routes.
pub fn apply(router: Router, limits: Limits) -> Router {
    router
        .layer(Extension(limits))
        .layer(Extension(Followers::new(limits.followers)))
        .layer(DefaultBodyLimit::max(body::LARGEST))
        .layer(CatchPanicLayer::custom(|_| {
            Failure::new(ErrorCode::Internal, "the request's handler panicked").into_response()
        }))
        .layer(middleware::map_request(listen::local_host_only))
        .layer(middleware::from_fn(identify))
}

/// A method by its name, if it is one of RFC 9110 or RFC 5789: any other word is one, too, and each would be a series of its own.
fn known(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"];
    KNOWN.into_iter().find(|name| method == name).unwrap_or("other")
}

async fn identify(request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()))
        .map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned);
    let method = known(request.method());
    let endpoint = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", method, endpoint, request_id = id);
    let begun = Instant::now();
    let response = next.run(request).instrument(span.clone()).await;
    let mut response = complete(response, &id);
    let status = response.status().as_u16();
    metrics::request_answered(&endpoint, method, status);
    span.in_scope(|| tracing::info!(status, milliseconds = begun.elapsed().as_millis() as u64, "answered"));
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Writes the body of an error, now that the id is known.
fn complete(mut response: Response, id: &str) -> Response {
    let Some(Pending(mut error)) = response.extensions_mut().remove::<Pending>() else { return response };
    error.correlation_id = Some(id.to_owned());
    let retry_later = error.retryable && (error.code == 429 || error.code == 503);
    let mut answer = (response.status(), axum::Json(error)).into_response();
    if let Some(allow) = response.headers_mut().remove(header::ALLOW) {
        answer.headers_mut().insert(header::ALLOW, allow);
    }
    if retry_later {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
    }
    answer
}
