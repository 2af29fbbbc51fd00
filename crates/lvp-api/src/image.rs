//! Cached images as the API shows them, and the requests about them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ByteSize, Digest};

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum ImageFormat {
    /// qemu's copy-on-write format, version 2 or 3.
    #[serde(rename = "qcow2")]
    Qcow2,
    /// The disk's bytes as they are.
    #[serde(rename = "raw")]
    Raw,
    /// The disk's bytes, compressed with gzip.
    #[serde(rename = "raw.gz")]
    RawGz,
    /// The disk's bytes, compressed with zstd.
    #[serde(rename = "raw.zst")]
    RawZst,
    /// The disk's bytes, compressed with xz.
    #[serde(rename = "raw.xz")]
    RawXz,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Qcow2, Self::Raw, Self::RawGz, Self::RawZst, Self::RawXz];

    /// The name on the wire, which is also the file name's ending.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::RawGz => "raw.gz",
            Self::RawZst => "raw.zst",
            Self::RawXz => "raw.xz",
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for ImageFormat {
    type Err = crate::Invalid;

    fn from_str(text: &str) -> Result<Self, crate::Invalid> {
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            crate::Invalid(format!("image type '{}' is not known; there are {names}", text.escape_debug()))
        })
    }
}

/// A verified image in the cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// The file's name in the cache: `<stem>-<first 16 of the SHA-256>.<format>`.
    pub name: String,
    /// The SHA-256 of the file.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// The file.
    pub path: String,
    /// Its format.
    pub format: ImageFormat,
    /// Its length in bytes, as cached (compressed).
    pub size_bytes: u64,
    /// The size of the disk in it, in bytes; absent where only decoding all of it would tell (`raw.gz`, `raw.zst`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size_bytes: Option<u64>,
    /// The URL that it came from last.
    pub source: String,
    /// Whether it was checked against a published or given digest, not only against its own.
    pub verified: bool,
    /// Whether it is kept whatever the cache's size.
    pub pinned: bool,
    /// Whether a job uses it now.
    pub in_use: bool,
    /// When it was fetched.
    #[schema(value_type = String, format = DateTime)]
    pub fetched_at: Timestamp,
    /// When it was last used.
    #[schema(value_type = String, format = DateTime)]
    pub last_used_at: Timestamp,
}

/// The answer to a verification of a cached image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageVerification {
    /// The image's name.
    pub name: String,
    /// Whether the file still has its digest.
    pub intact: bool,
    /// The digest that it should have.
    #[schema(value_type = String)]
    pub expected: Digest,
    /// The digest that it has.
    #[schema(value_type = String)]
    pub actual: Digest,
}

/// A base volume: a decoded image that volumes of one target share their blocks with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BaseVolume {
    /// The target that it lives in.
    pub target: String,
    /// Its name there.
    pub name: String,
    /// The digest of the image's file.
    #[schema(value_type = String)]
    pub image_digest: Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The bytes that it took when it was made, where known. Volumes made of it share them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// How many volumes are linked to it and need it, so that it is not removed; absent where that cannot be told. Volumes
    /// that share its blocks do not need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked_volumes: Option<u64>,
}

/// Asks for an image in the cache, for a later provision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PrefetchRequest {
    /// Where the image is.
    pub image_url: String,
    /// The image's type; without it, the URL's ending says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageFormat>,
    /// The image's digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Returned in the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Bytes a second that the job may fetch at most; or text with a unit such as
    /// `100M`. An image that is fetched for several jobs comes at the rate of the one that asked first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub limit_rate: Option<ByteSize>,
}

/// Pins or unpins an image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// Whether to keep the image whatever the cache's size.
    pub pinned: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_has_one_name_everywhere() {
        for format in ImageFormat::ALL {
            assert_eq!(format.name().parse::<ImageFormat>().unwrap(), format);
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        let error = "raw.bz2".parse::<ImageFormat>().unwrap_err();
        assert!(error.0.contains("'raw.bz2'") && error.0.contains("raw.gz, raw.zst, raw.xz"), "{}", error.0);
    }
}
