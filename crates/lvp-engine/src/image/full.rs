//! How it is told that the file system of the cache is full, by whichever write that comes out.

use std::{io, path::Path};

use lvp_api::ErrorCode;

use crate::error::{Error, is_full};

/// An error while `doing` something to a file of the cache that may need space.
pub(super) fn could_not(doing: &str, path: &Path, error: io::Error) -> Error {
    if !is_full(&error) {
        return Error::io(doing, path, error);
    }
    let message = format!("the file system of the image cache is full: {doing} {} failed", path.display());
    Error::new(ErrorCode::CacheFull, message)
        .hint("free space on it, or set LVP_CACHE_MAX_BYTES so that other data has room")
        .source(error)
}
