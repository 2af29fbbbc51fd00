//! A file of this machine as a source. Its ETag is made of inode, size and time of change, so that a replaced or
//! rewritten file is told from the one before. It leaves out who may name files: see `location`.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use lvp_api::ErrorCode;

use super::source::SourceInfo;
use crate::error::{Error, Result};

/// Looks at the file. Blocks.
pub(super) fn look(path: &Path) -> Result<SourceInfo> {
    // Before opening: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(|error| failed(path, error))?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorCode::SourceFailed, format!("{} is not a regular file", path.display()))
            .retry(false)
            .hint("name an image file"));
    }
    Ok(describe(&metadata))
}

/// Opens the file that `info` describes. Blocks.
pub(super) fn open(path: &Path, info: &SourceInfo) -> Result<File> {
    look(path)?;
    let file = File::open(path).map_err(|error| failed(path, error))?;
    let now = file.metadata().map_err(|error| failed(path, error))?;
    check_unchanged(path, &now, info.etag.as_deref())?;
    Ok(file)
}

/// That the opened file is as it was when its ETag was made, before the first and after the last byte is read. A file that
/// another one was renamed over meanwhile is: all of it was read.
///
/// # Errors
/// `source_changed`.
pub(super) fn check_unchanged(path: &Path, now: &Metadata, etag: Option<&str>) -> Result<()> {
    if etag.is_none() || describe(now).etag.as_deref() == etag {
        return Ok(());
    }
    Err(Error::new(ErrorCode::SourceChanged, format!("{} changed while it was read", path.display()))
        .hint("try again once the file is complete"))
}

fn describe(metadata: &Metadata) -> SourceInfo {
    let (inode, size) = (metadata.ino(), metadata.size());
    let etag = format!("\"{inode:x}-{size:x}-{:x}-{:x}\"", metadata.mtime(), metadata.mtime_nsec());
    SourceInfo { size: Some(size), etag: Some(etag), last_modified: None, accepts_ranges: true }
}

/// The error for a file that cannot be read.
pub(super) fn failed(path: &Path, error: io::Error) -> Error {
    let (code, what) = match error.kind() {
        io::ErrorKind::NotFound => (ErrorCode::SourceNotFound, "is not there"),
        io::ErrorKind::PermissionDenied => (ErrorCode::SourceDenied, "may not be read by lvp"),
        _ => (ErrorCode::SourceFailed, "cannot be read"),
    };
    Error::new(code, format!("{} {what}", path.display())).retry(false).source(error)
}
