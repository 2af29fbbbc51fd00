//! Published checksums: the file `<url>.sha256`, in the forms that tools write.
//!
//! ```text
//!  <64 hex>                       bare, one line
//!  <64 hex>  name  /  *name       GNU coreutils; a leading `\` says that the name is escaped
//!  SHA256 (name) = <64 hex>       BSD, and coreutils with --tag
//! ```
//! Blank lines and lines that begin with `#` are passed over; CRLF is taken. One entry: it is the image's, whatever name
//! it has (images are renamed when they are published). More: the one whose base name is the image's. Anything else in
//! the file makes the whole file unreadable, since a page of HTML is a misconfigured server and not an image without a
//! checksum. It leaves out digests in requests, which outrank this file.

use lvp_api::{Digest, DigestAlgorithm, ErrorCode};

use super::{
    location::ImageUrl,
    source::{Small, Sources},
};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// The largest checksum file that is read, in bytes.
const LARGEST: usize = 64 << 10;

/// One line of a checksum file.
struct Line {
    digest: Digest,
    name: Option<String>,
}

/// Looks for the published checksum of an image. `None` when it is definitely not there, or when the URL has a query.
///
/// # Errors
/// `checksum_unreadable`, or why the file could not be read: dropping the check silently is how images get swapped.
pub(super) async fn published(sources: &Sources, image: &ImageUrl, progress: &Progress) -> Result<Option<Digest>> {
    let Some(url) = image.checksum_url() else {
        return Ok(None);
    };
    match sources.source(&url).read_small(LARGEST, progress).await {
        Ok(None) => Ok(None),
        Ok(Some(Small::Whole(bytes))) => {
            parse(&bytes, &image.file_name()).map(Some).map_err(|why| unreadable(&url, &why))
        }
        Ok(Some(Small::TooLarge)) => Err(unreadable(&url, &format!("it is larger than {LARGEST} bytes"))),
        Err(error) if error.code() == ErrorCode::SourceDenied && may_be_missing(&error) => Err(error.hint(
            "S3 also refuses so when the file is not there and the keys may not list the bucket: publish the checksum \
             file, allow listing, or give the digest in the field `checksum`",
        )),
        Err(error) => Err(error),
    }
}

/// The error for an image that came while its published checksum changed.
pub(super) fn changed(image: &ImageUrl) -> Error {
    Error::new(
        ErrorCode::SourceChanged,
        format!("the published checksum of {image} changed while the image was fetched"),
    )
    .hint("try again once the upload of the image and its checksum is complete")
}

/// Whether a refusal may mean that the file is not there. Without keys, and with any code of the source but this one, it
/// is about keys or clock, and says so already.
fn may_be_missing(denied: &Error) -> bool {
    let details = denied.to_body().details;
    let is_signed = details.get("signed").is_none_or(|signed| signed != false);
    is_signed && details.get("source_code").is_none_or(|code| code == "AccessDenied")
}

fn unreadable(url: &ImageUrl, why: &str) -> Error {
    Error::new(ErrorCode::ChecksumUnreadable, format!("the checksum file {url} cannot be read as one: {why}"))
        .hint("publish it as `sha256sum` writes it, or give the digest in the field `checksum`")
}

/// The digest of the image `name` in a checksum file; or why there is none.
pub(super) fn parse(bytes: &[u8], name: &str) -> Result<Digest, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
    let mut lines = Vec::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            lines.push(parse_line(line).ok_or_else(|| format!("line {} is not a checksum", number + 1))?);
        }
    }
    if let [only] = lines.as_slice() {
        return Ok(only.digest.clone());
    }
    let mut matching = lines.iter().filter(|line| line.name.as_deref() == Some(name)).map(|line| &line.digest);
    match matching.next() {
        None if lines.is_empty() => Err("it is empty".to_owned()),
        None => Err(format!("none of its {} lines is for '{}'", lines.len(), name.escape_debug())),
        Some(first) if matching.all(|other| other == first) => Ok(first.clone()),
        Some(_) => Err(format!("it has different checksums for '{}'", name.escape_debug())),
    }
}

fn parse_line(line: &str) -> Option<Line> {
    let (escaped, line) = match line.strip_prefix('\\') {
        Some(rest) => (true, rest),
        None => (false, line),
    };
    let base = |name: &str| {
        let name = if escaped { unescape(name) } else { name.to_owned() };
        name.rsplit('/').next().unwrap_or_default().to_owned()
    };
    let sha256 = |hex: &str| Digest::new(DigestAlgorithm::Sha256, hex).ok();
    if let Some(tagged) = line.strip_prefix("SHA256 (") {
        let (name, hex) = tagged.rsplit_once(") = ")?;
        return Some(Line { digest: sha256(hex.trim())?, name: Some(base(name)) });
    }
    match line.split_once([' ', '\t']) {
        None => Some(Line { digest: sha256(line)?, name: None }),
        Some((hex, name)) => {
            let name = name.trim_start();
            Some(Line { digest: sha256(hex)?, name: Some(base(name.strip_prefix('*').unwrap_or(name))) })
        }
    }
}

/// Undoes the escapes of coreutils: `\\`, `\n`, `\r`.
fn unescape(name: &str) -> String {
    name.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r").replace('\0', "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn hex(text: &str) -> String {
        parse(text.as_bytes(), "x.qcow2").unwrap_or_else(|why| panic!("{text:?}: {why}")).hex().to_owned()
    }

    #[test]
    fn reads_every_form_that_tools_write() {
        for text in [
            A.to_owned(),
            format!("{}\r\n", A.to_uppercase()),
            format!("\u{feff}{A}\n"),
            format!("{A}  x.qcow2\n"),
            format!("{A} *x.qcow2\r\n"),
            format!("{A}\tx.qcow2"),
            format!("{A}  another-name.qcow2\n"),
            format!("SHA256 (x.qcow2) = {A}\n"),
            format!("SHA256 (dir (1)/x.qcow2) = {A}\n"),
            format!("# comment\n\n{B}  y.qcow2\n{A}  ./x.qcow2\n"),
            format!("SHA256 (y) = {B}\nSHA256 (x.qcow2) = {A}\n"),
            format!("{A}  x.qcow2\n{A}  sub/x.qcow2\n"),
        ] {
            assert_eq!(hex(&text), A, "{text:?}");
        }
    }

    #[test]
    fn reads_escaped_names() {
        let text = format!("{B}  y\n\\{A}  a\\\\b\\nc\n");
        assert_eq!(parse(text.as_bytes(), "a\\b\nc").unwrap().hex(), A);
    }

    #[test]
    fn refuses_what_is_no_checksum_of_this_image() {
        for (text, why) in [
            (String::new(), "empty"),
            ("# nothing\n".to_owned(), "empty"),
            ("<!DOCTYPE html><html><body>Not found</body></html>".to_owned(), "line 1"),
            (format!("{A}\n<html>"), "line 2"),
            (A[..63].to_owned(), "line 1"),
            (format!("{A}{A}"), "line 1"),
            (format!("SHA512 (x.qcow2) = {A}{A}"), "line 1"),
            (format!("{A}  y\n{B}  z\n"), "none of its 2 lines"),
            (format!("{A}\n{B}\n"), "none of its 2 lines"),
            (format!("{A}  x.qcow2\n{B}  x.qcow2\n"), "different checksums"),
        ] {
            let refused = parse(text.as_bytes(), "x.qcow2").unwrap_err();
            assert!(refused.contains(why), "{text:?}: {refused}");
        }
        assert!(parse(&[0xff, 0xfe], "x").is_err());
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes, "x");
        }
    }
}
