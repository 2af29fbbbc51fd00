//! Reads request bodies and queries: JSON only, bounded, and each mistake under its own code with the field's name.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request, rejection::BytesRejection},
    http::{header::CONTENT_TYPE, request::Parts},
};
use lvp_api::ErrorCode;
use serde::de::DeserializeOwned;
use tokio::time;

use crate::{error::Failure, limits::Limits};

/// A body larger than this is refused: the largest sensible request has a few kilobytes.
pub const LARGEST: usize = 64 * 1024;

/// A body of JSON.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        // A browser cannot send this type to another site without asking first, so no page can drive a local daemon.
        if !content_type.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
            return Err(Failure::new(
                ErrorCode::UnsupportedMediaType,
                "the body's Content-Type is not application/json",
            ));
        }
        let patience = request.extensions().get::<Limits>().copied().unwrap_or_default().patience;
        let bytes = match time::timeout(patience, Bytes::from_request(request, state)).await {
            Ok(read) => read.map_err(|rejection| unreadable(&rejection))?,
            Err(_) => return Err(too_slow(patience)),
        };
        parse(&bytes).map(Self)
    }
}

/// The query of a URL.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                // Its cause, which names the field, without axum's own words before it.
                let words = std::error::Error::source(&rejection).map_or(rejection.body_text(), ToString::to_string);
                Err(Failure::new(ErrorCode::InvalidField, format!("the query cannot be read: {words}")))
            }
        }
    }
}

fn too_slow(patience: Duration) -> Failure {
    Failure::new(ErrorCode::RequestTimeout, format!("the body did not come within {} s", patience.as_secs_f32()))
}

fn unreadable(rejection: &BytesRejection) -> Failure {
    if rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
        return Failure::new(ErrorCode::BodyTooLarge, format!("the body is larger than {LARGEST} bytes"));
    }
    Failure::new(ErrorCode::MalformedJson, format!("the body could not be read: {}", rejection.body_text()))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        explain(error.inner(), &path)
    })?;
    deserializer.end().map_err(|error| explain(&error, "."))?;
    Ok(value)
}

fn explain(error: &serde_json::Error, path: &str) -> Failure {
    if !error.is_data() {
        return Failure::new(ErrorCode::MalformedJson, format!("the body is not JSON: {error}"));
    }
    let words = error.to_string();
    if words.starts_with("unknown field") {
        return Failure::new(ErrorCode::UnknownField, words);
    }
    if path == "." {
        return Failure::new(ErrorCode::InvalidField, words);
    }
    let is_size = path == "size" || path == "volume_size_gb";
    // A number of the wrong kind (too large, negative, with a fraction) is a size that cannot be.
    let is_number = ["integer", "floating point"].iter().any(|kind| {
        words.strip_prefix("invalid ").is_some_and(|rest| {
            rest.starts_with(&format!("type: {kind}")) || rest.starts_with(&format!("value: {kind}"))
        })
    });
    let code = if is_size && (is_number || words.contains("is not a size") || words.contains("more bytes than")) {
        ErrorCode::InvalidSize
    } else {
        ErrorCode::InvalidField
    };
    let mut failure = Failure::new(code, format!("field {path}: {words}"));
    failure.0.details.insert("field".to_owned(), path.into());
    failure
}

#[cfg(test)]
mod tests {
    use lvp_api::ProvisionRequest;

    use super::*;

    fn refusal(body: &str) -> (ErrorCode, String) {
        let failure = parse::<ProvisionRequest>(body.as_bytes()).expect_err(body);
        (failure.0.error, failure.0.message)
    }

    #[test]
    fn each_mistake_has_its_code_and_names_its_field() {
        let base = r#""image_url": "s3://a/b", "volume_name": "c""#;
        for (body, code, words) in [
            ("", ErrorCode::MalformedJson, "not JSON"),
            ("{", ErrorCode::MalformedJson, "not JSON"),
            ("[]", ErrorCode::InvalidField, "invalid length"),
            (r#"{"volume_name": "c"}"#, ErrorCode::InvalidField, "image_url"),
            (&format!("{{{base}, \"voluem_size\": 1}}"), ErrorCode::UnknownField, "voluem_size"),
            (&format!("{{{base}, \"volume_size_gb\": \"50\"}}"), ErrorCode::InvalidField, "volume_size_gb"),
            (
                &format!("{{{base}, \"volume_size_gb\": 99999999999999999999}}"),
                ErrorCode::InvalidSize,
                "volume_size_gb",
            ),
            (&format!("{{{base}, \"size\": -5}}"), ErrorCode::InvalidSize, "-5"),
            (&format!("{{{base}, \"volume_size_gb\": 1.5}}"), ErrorCode::InvalidSize, "1.5"),
            (&format!("{{{base}, \"size\": \"50X\"}}"), ErrorCode::InvalidSize, "50X"),
            (&format!("{{{base}, \"image_type\": \"vmdk\"}}"), ErrorCode::InvalidField, "image_type"),
            (&format!("{{{base}}} trailing"), ErrorCode::MalformedJson, "trailing"),
        ] {
            let (got, message) = refusal(body);
            assert!(message.contains(words), "{body}: {message}");
            assert_eq!(got, code, "{body}: {message}");
        }
    }
}
