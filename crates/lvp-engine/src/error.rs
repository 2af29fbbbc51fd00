//! The engine's one error: a stable code, a sentence, what to do, and the chain of causes.
//!
//! `Display` prints the sentence only; [`Error::chain`] prints it with its causes, once, in one line.
//! It leaves out how an error is shown to a user: the front ends turn it into a body or a line.

use std::fmt;

use lvp_api::{ErrorBody, ErrorCode, Invalid};
use serde_json::{Map, Value};

/// What engine functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error is told in at most this many bytes, whatever a source or a program said: it is logged, and kept with its job.
const LONGEST: usize = 4096;

/// Something that went wrong: what, to what, why, and what to do.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    code: ErrorCode,
    message: String,
    hint: Option<String>,
    retryable: Option<bool>,
    details: Map<String, Value>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this code; the message is one sentence without a full stop: what happened, to what, why.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            inner: Box::new(Inner { code, message, hint: None, retryable: None, details: Map::new(), source: None }),
        }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = Some(hint.into());
        self
    }

    /// Adds a fact for programs.
    #[must_use]
    pub fn detail(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.inner.details.insert(key.to_owned(), value.into());
        self
    }

    /// Says whether trying again can help, where the code alone says otherwise.
    #[must_use]
    pub fn retry(mut self, retryable: bool) -> Self {
        self.inner.retryable = Some(retryable);
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// The stable code.
    pub fn code(&self) -> ErrorCode {
        self.inner.code
    }

    /// Whether trying again can help.
    pub fn retryable(&self) -> bool {
        self.inner.retryable.unwrap_or_else(|| self.inner.code.retryable())
    }

    /// The sentence with its causes, joined by colons; cut where somebody else's words have no end.
    pub fn chain(&self) -> String {
        let mut text = self.inner.message.clone();
        let mut cause: Option<&dyn std::error::Error> = self.inner.source.as_deref().map(|source| source as _);
        while let Some(error) = cause {
            let part = error.to_string();
            // Some crates repeat their source in their own words.
            if !text.ends_with(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            cause = error.source();
        }
        if text.len() > LONGEST {
            text.truncate(text.floor_char_boundary(LONGEST));
            text.push('…');
        }
        text
    }

    /// As the API shows it. The correlation id is the front end's to add.
    pub fn to_body(&self) -> ErrorBody {
        ErrorBody {
            error: self.code(),
            message: self.chain(),
            code: self.code().http_status(),
            retryable: self.retryable(),
            hint: self.inner.hint.clone().or_else(|| self.code().usual_hint().map(str::to_owned)),
            correlation_id: None,
            details: self.inner.details.clone(),
        }
    }

    /// An I/O error on `path` while `doing` ("reading", "creating").
    pub fn io(doing: &str, path: &std::path::Path, source: std::io::Error) -> Self {
        let message = format!("{doing} {} failed", path.display());
        if is_full(&source) {
            return Self::new(ErrorCode::InsufficientSpace, message)
                .source(source)
                .hint("free space on its file system (`df` tells how much it has), or raise the quota of its owner");
        }
        Self::new(ErrorCode::InputOutput, message).source(source)
    }

    /// A defect of lvp itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
            .hint("this is a defect of lvp; please report it with the log of this job")
    }

    /// A value that cannot be, under the code of its field.
    pub fn invalid(code: ErrorCode, invalid: &Invalid) -> Self {
        Self::new(code, invalid.0.clone())
    }
}

/// Whether a file system, or somebody's share of it, has no more space.
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.chain(), self.code())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|source| source as _)
    }
}

/// From a stored body: a job's recorded failure becomes an error again.
impl From<ErrorBody> for Error {
    fn from(body: ErrorBody) -> Self {
        let mut error = Self::new(body.error, body.message).retry(body.retryable);
        error.inner.hint = body.hint;
        error.inner.details = body.details;
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_every_cause_once() {
        let cause = std::io::Error::other("no such device");
        let error = Error::io("opening", std::path::Path::new("/dev/x"), cause);
        assert_eq!(error.chain(), "opening /dev/x failed: no such device");
        assert_eq!(error.to_string(), "opening /dev/x failed");
        let endless = Error::new(ErrorCode::SourceFailed, "it said").source(std::io::Error::other("ä".repeat(1 << 20)));
        let told = endless.to_body().message;
        assert!(told.len() <= LONGEST + 4 && told.ends_with("ä…"), "{} bytes", told.len());
        let outer = Error::new(ErrorCode::Internal, "a: b").source(std::io::Error::other("b"));
        assert_eq!(outer.chain(), "a: b");
    }
}
