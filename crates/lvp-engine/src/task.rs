//! Blocking work from asynchronous code: on a thread that may block, with a broken-off task as an error.

use crate::error::{Error, Result};

/// Runs `work` on a thread that may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::internal("blocking work broke off").source(error)))
}
