//! Errors as answers: the engine's error, or the server's own, as the documented body. It leaves out the request id,
//! which `layers` adds to every answer.

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use lvp_api::{ErrorBody, ErrorCode};
use lvp_engine::Error;

/// What handlers return.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// An error that becomes an answer.
#[derive(Debug)]
pub struct Failure(pub ErrorBody);

impl Failure {
    /// A failure of this code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Error::new(code, message).to_body())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error.to_body())
    }
}

impl IntoResponse for Failure {
    /// Status and body; the body travels as an extension until `layers` knows the request id.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Pending(self.0));
        response
    }
}

/// An error body that waits for its correlation id.
#[derive(Clone)]
pub struct Pending(pub ErrorBody);
