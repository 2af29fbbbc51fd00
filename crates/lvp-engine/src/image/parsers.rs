//! The parsers of what comes from outside or from the cache's directory, as functions of bytes: the door for `fuzz/`.
//!
//! It leaves out all meaning, and is not in the product.

use std::io;

use lvp_api::Digest;

pub use super::location::ImageUrl;
use super::{checksum::parse, partial::Origin, sidecar::Sidecar};

/// The digest of the image `name` in a checksum file; or why there is none.
///
/// # Errors
/// The words that a `checksum_unreadable` ends with.
pub fn checksum(bytes: &[u8], name: &str) -> Result<Digest, String> {
    parse(bytes, name)
}

/// Reads a sidecar, and says how it would be written again.
///
/// # Errors
/// Why it cannot be read.
pub fn sidecar(bytes: &[u8]) -> io::Result<Vec<u8>> {
    Sidecar::parse(bytes)?.to_json()
}

/// Reads what is known of a partial download, and says how it would be written again.
///
/// # Errors
/// Why it cannot be read.
pub fn origin(bytes: &[u8]) -> io::Result<Vec<u8>> {
    Origin::parse(bytes)?.to_json()
}

/// The identity of what a URL names, and where its checksum would be published.
pub fn url_names(url: &ImageUrl) -> (String, Option<ImageUrl>) {
    (url.identity(), url.checksum_url())
}
