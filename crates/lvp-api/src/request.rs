//! The provisioning request: the seed's fields, and the optional ones beyond them.
//!
//! Fields are read as loosely as JSON types allow and checked by the engine, so that each wrong value gets its own
//! stable error code instead of a parser's words.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ByteSize, ImageFormat};

/// Asks for an image on a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvisionRequest {
    /// Where the image is: `s3://bucket/key`, `https://host/bucket/key`, any other http(s) URL.
    pub image_url: String,
    /// The volume's name.
    pub volume_name: String,
    /// The volume's size in GiB; this or `size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub volume_size_gb: Option<i64>,
    /// The volume's size in bytes, or text with a unit such as `50G`; this or `volume_size_gb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub size: Option<ByteSize>,
    /// The image's type; without it, the URL's ending says it (`.qcow2`, `.raw`, `.raw.gz`, `.img.gz`,
    /// and so for `zst` and `xz`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageFormat>,
    /// Returned in the job, and in every line of log about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The image's digest, `sha256:…` or `sha512:…`; it outranks a published `.sha256` file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// The configured target to provision to; without it, the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Bytes a second that the job may fetch at most, and as many that it may write; or text with a unit such as
    /// `100M`. An image that is fetched for several jobs comes at the rate of the one that asked first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub limit_rate: Option<ByteSize>,
    /// Only answer what would be done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}
