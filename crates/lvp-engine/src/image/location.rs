//! Image URLs: which are served, what they mean, and how they are shown without what is secret in them.
//!
//! ```text
//!  s3://bucket/key                          object of MINIO_ENDPOINT, signed
//!  http(s)://<MINIO_ENDPOINT>/bucket/key    the same (path style), when it has no query
//!  any other http(s)://                     plain; its query is sent, but shown as `?…`
//!  file:///path and /path                   a file of this machine, where the caller allows it
//! ```
//! It leaves out every connection: see `source`.

use std::{fmt, path::PathBuf};

use lvp_api::ErrorCode;
use url::Url;

use super::{
    escape::{percent_decode, percent_encode},
    hasher::sha256_hex,
    settings::SourceSettings,
};
use crate::error::{Error, Result};

/// Longest URL that is taken, in bytes.
const LONGEST: usize = 8192;
/// Query parameters that sign a URL and so differ each time it is made; they say nothing about which object is meant.
const SIGNATURE_PARAMETERS: [&str; 5] = ["signature", "expires", "awsaccesskeyid", "googleaccessid", "sig"];
/// As above, by prefix.
const SIGNATURE_PREFIXES: [&str; 2] = ["x-amz-", "x-goog-"];

/// A checked image URL. `Display` and `Debug` never show a query.
#[derive(Clone, PartialEq, Eq)]
pub struct ImageUrl {
    location: Location,
}

/// What a URL means.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Location {
    /// An object of the configured object store.
    Object {
        /// The store: scheme, host and port.
        endpoint: Url,
        /// The bucket.
        bucket: String,
        /// The key, not encoded.
        key: String,
    },
    /// Any other http(s) URL.
    Web(Url),
    /// A file of this machine, by its absolute path.
    File(PathBuf),
}

impl ImageUrl {
    /// Reads a URL; `allow_files` says whether the caller may name files of this machine.
    ///
    /// # Errors
    /// `invalid_url`, `url_has_credentials`, `unsupported_scheme`, `not_permitted` (a file), or
    /// `invalid_configuration` (an `s3://` URL and no object store).
    pub fn parse(text: &str, settings: &SourceSettings, allow_files: bool) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || text.len() > LONGEST {
            return Err(invalid(&format!("has {} bytes; 1 to {LONGEST} are possible", text.len())));
        }
        let location = if text.starts_with('/') {
            local_file(PathBuf::from(text), allow_files)?
        } else {
            let url = Url::parse(text).map_err(|error| {
                invalid("cannot be read as a URL").hint("write s3://bucket/key or https://host/path").source(error)
            })?;
            location(url, settings, allow_files)?
        };
        Ok(Self { location })
    }

    /// The last part of the path, decoded: `debian.qcow2`.
    pub fn file_name(&self) -> String {
        let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        match &self.location {
            Location::Object { key, .. } => last(key),
            Location::Web(url) => percent_decode(&last(url.path())),
            Location::File(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        }
    }

    pub(super) fn location(&self) -> &Location {
        &self.location
    }

    /// The SHA-256 of what the URL names, in hexadecimal: the same for `s3://` and path style, and for one object
    /// under two signatures; different when any other part of a query differs.
    pub(super) fn identity(&self) -> String {
        let canonical = match &self.location {
            Location::Object { endpoint, bucket, key } => format!("{endpoint}{bucket}/{key}"),
            Location::Web(url) => {
                let mut bare = url.clone();
                let kept: Vec<_> = url.query_pairs().filter(|(name, _)| !signs(name)).collect();
                bare.set_query(None);
                if !kept.is_empty() {
                    bare.query_pairs_mut().extend_pairs(kept);
                }
                bare.to_string()
            }
            Location::File(path) => format!("file://{}", path.display()),
        };
        sha256_hex(canonical.as_bytes())
    }

    /// Where the checksum of this image would be published: the same name with `.sha256` added. None for a URL with a
    /// query: such a URL names (and signs) one object only.
    pub(super) fn checksum_url(&self) -> Option<Self> {
        let location = match &self.location {
            Location::Object { endpoint, bucket, key } => {
                Location::Object { endpoint: endpoint.clone(), bucket: bucket.clone(), key: format!("{key}.sha256") }
            }
            Location::Web(url) if url.query().is_some() => return None,
            Location::Web(url) => {
                let mut beside = url.clone();
                beside.set_path(&format!("{}.sha256", url.path()));
                Location::Web(beside)
            }
            Location::File(path) => {
                let mut beside = path.clone().into_os_string();
                beside.push(".sha256");
                Location::File(beside.into())
            }
        };
        Some(Self { location })
    }
}

impl fmt::Display for ImageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Object { bucket, key, .. } => write!(f, "s3://{bucket}/{}", percent_encode(key, true)),
            Location::Web(url) => {
                let mut bare = url.clone();
                bare.set_query(None);
                write!(f, "{bare}{}", if url.query().is_some() { "?…" } else { "" })
            }
            Location::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for ImageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorCode::InvalidUrl, format!("the image URL {why}"))
}

fn signs(parameter: &str) -> bool {
    let name = parameter.to_ascii_lowercase();
    SIGNATURE_PARAMETERS.contains(&name.as_str()) || SIGNATURE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn location(url: Url, settings: &SourceSettings, allow_files: bool) -> Result<Location> {
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::new(
            ErrorCode::UrlHasCredentials,
            format!(
                "the image URL for host '{}' has a user name or password in it",
                url.host_str().unwrap_or_default()
            ),
        )
        .hint("use MINIO_ACCESS_KEY and MINIO_SECRET_KEY, or a presigned URL"));
    }
    if url.fragment().is_some() {
        return Err(invalid("has a fragment (#…), which is never sent to a server").hint("write # in a name as %23"));
    }
    match url.scheme() {
        "s3" => s3_object(&url, settings),
        "http" | "https" => web_or_object(url, settings),
        "file" => {
            let path = url.to_file_path().map_err(|()| invalid("names a file of another host"))?;
            local_file(path, allow_files)
        }
        scheme => Err(Error::new(
            ErrorCode::UnsupportedScheme,
            format!("image URLs of scheme '{scheme}' are not served; s3, http and https are"),
        )
        .hint("put the image in the object store, or serve it by http(s)")),
    }
}

fn s3_object(url: &Url, settings: &SourceSettings) -> Result<Location> {
    let Some(endpoint) = settings.endpoint.clone() else {
        return Err(Error::new(
            ErrorCode::InvalidConfiguration,
            "an s3:// URL needs an object store, and MINIO_ENDPOINT is not set",
        )
        .hint("set MINIO_ENDPOINT to the object store's address, such as https://minio.example.org:9000"));
    };
    if url.query().is_some() {
        return Err(invalid("is s3:// with a query").hint("write ? in a key as %3F"));
    }
    let bucket = url.host_str().unwrap_or_default().to_owned();
    object(endpoint, bucket, url.path())
}

fn web_or_object(url: Url, settings: &SourceSettings) -> Result<Location> {
    match &settings.endpoint {
        Some(endpoint) if endpoint.origin() == url.origin() && url.query().is_none() => {
            let path = url.path().trim_start_matches('/');
            let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
            object(endpoint.clone(), percent_decode(bucket), key)
        }
        _ if url.path().ends_with('/') => {
            Err(invalid("ends with '/', so it names no file").hint("name the image's file"))
        }
        _ => Ok(Location::Web(url)),
    }
}

fn object(endpoint: Url, bucket: String, path: &str) -> Result<Location> {
    let key = percent_decode(path.strip_prefix('/').unwrap_or(path));
    if bucket.is_empty() || key.is_empty() || key.ends_with('/') {
        return Err(invalid("names no object").hint("write s3://bucket/key"));
    }
    if bucket.contains(['/', '\\']) || key.split('/').any(|part| part == "." || part == "..") {
        return Err(invalid("has '.' or '..' as a part of the bucket or key"));
    }
    if bucket.chars().chain(key.chars()).any(char::is_control) {
        return Err(invalid("has control characters in the bucket or key"));
    }
    Ok(Location::Object { endpoint, bucket, key })
}

fn local_file(path: PathBuf, allow_files: bool) -> Result<Location> {
    if !allow_files {
        return Err(Error::new(
            ErrorCode::NotPermitted,
            "a file of this machine may be named as an image only by its own administrator",
        )
        .hint("use the command line on the machine itself, or put the image in the object store"));
    }
    if path.file_name().is_none() || path.to_string_lossy().ends_with('/') {
        return Err(invalid("names no file"));
    }
    Ok(Location::File(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SourceSettings {
        SourceSettings { endpoint: Some(Url::parse("http://minio.test:9000").unwrap()), ..SourceSettings::default() }
    }

    fn parse(text: &str) -> Result<ImageUrl> {
        ImageUrl::parse(text, &settings(), false)
    }

    fn code(text: &str) -> ErrorCode {
        parse(text).unwrap_err().code()
    }

    #[test]
    fn both_forms_of_an_object_are_the_same() {
        let short = parse("s3://images/debian/12%20x.qcow2").unwrap();
        let long = parse("http://minio.test:9000/images/debian/12 x.qcow2").unwrap();
        assert_eq!(short.identity(), long.identity());
        assert_eq!(long.file_name(), "12 x.qcow2");
        assert_eq!(long.to_string(), "s3://images/debian/12%20x.qcow2");
        assert!(matches!(long.location(), Location::Object { key, .. } if key == "debian/12 x.qcow2"));
    }

    #[test]
    fn another_host_or_a_query_is_plain() {
        for text in
            ["http://minio.test/images/x", "https://minio.test:9000/images/x", "http://minio.test:9000/i/x?sig=1"]
        {
            assert!(matches!(parse(text).unwrap().location(), Location::Web(_)), "{text}");
        }
    }

    #[test]
    fn a_query_is_never_shown() {
        let url = parse("https://host/a.qcow2?X-Amz-Signature=hush").unwrap();
        assert_eq!(format!("{url} {url:?}"), "https://host/a.qcow2?… https://host/a.qcow2?…");
        assert!(url.checksum_url().is_none());
    }

    #[test]
    fn the_identity_ignores_signatures_only() {
        let identity = |query: &str| parse(&format!("https://host/a?{query}")).unwrap().identity();
        assert_eq!(identity("X-Amz-Signature=1&X-Amz-Date=2"), identity("X-Amz-Signature=3&X-Amz-Date=4"));
        assert_ne!(identity("id=1"), identity("id=2"));
    }

    #[test]
    fn each_bad_url_has_its_code() {
        for (text, expected) in [
            ("", ErrorCode::InvalidUrl),
            ("debian.qcow2", ErrorCode::InvalidUrl),
            ("http://", ErrorCode::InvalidUrl),
            ("https://host/dir/", ErrorCode::InvalidUrl),
            ("https://host/a#b", ErrorCode::InvalidUrl),
            ("s3://bucket", ErrorCode::InvalidUrl),
            ("s3://bucket/dir/", ErrorCode::InvalidUrl),
            ("s3:///key", ErrorCode::InvalidUrl),
            ("s3://bucket/a%2F..%2Fb", ErrorCode::InvalidUrl),
            ("s3://bucket/a%0Ab", ErrorCode::InvalidUrl),
            ("http://minio.test:9000/bucket", ErrorCode::InvalidUrl),
            ("https://user:hush@host/a", ErrorCode::UrlHasCredentials),
            ("s3://user:hush@bucket/a", ErrorCode::UrlHasCredentials),
            ("ftp://host/a", ErrorCode::UnsupportedScheme),
            ("javascript:alert(1)", ErrorCode::UnsupportedScheme),
            ("file:///etc/passwd", ErrorCode::NotPermitted),
            ("/etc/passwd", ErrorCode::NotPermitted),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.code(), expected, "{text}: {error:?}");
            assert!(!error.chain().contains("hush"), "{error:?}");
        }
        assert_eq!(code(&format!("https://host/{}", "x".repeat(9000))), ErrorCode::InvalidUrl);
    }

    #[test]
    fn an_s3_url_needs_an_object_store() {
        let error = ImageUrl::parse("s3://b/k", &SourceSettings::default(), false).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidConfiguration);
        assert!(error.chain().contains("MINIO_ENDPOINT"));
    }

    #[test]
    fn files_where_the_caller_allows_them() {
        for text in ["/srv/a.qcow2", "file:///srv/a.qcow2"] {
            let url = ImageUrl::parse(text, &settings(), true).unwrap();
            assert_eq!((url.file_name().as_str(), url.to_string().as_str()), ("a.qcow2", "/srv/a.qcow2"));
        }
    }
}
