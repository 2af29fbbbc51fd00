//! The two ways in which an image is turned away, said in the same words everywhere.

use lvp_api::ErrorCode;

use super::bytes::Bytes;
use crate::error::Error;

/// The image is damaged: `what` is wrong in it.
pub fn invalid(bytes: &dyn Bytes, what: impl AsRef<str>) -> Error {
    Error::new(ErrorCode::ImageInvalid, format!("{} is damaged: {}", bytes.name(), what.as_ref()))
        .hint("fetch the image again; if it stays so, `qemu-img check` says more")
}

/// The image is in order, but uses what is refused.
pub fn refused(bytes: &dyn Bytes, what: impl AsRef<str>) -> Error {
    Error::new(ErrorCode::ImageRefused, format!("{} is refused: {}", bytes.name(), what.as_ref()))
        .hint("make a standalone image of it with `qemu-img convert -O qcow2`")
}
