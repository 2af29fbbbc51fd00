//! What a provision did, byte for byte, and the check of a volume against it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ContentDigest, Digest, JobId, Stage, VolumeName, ZeroPolicy};

/// The receipt of a completed provision.
///
/// Written, zeroed, skipped, left and shared bytes are together the volume's size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// The job that did it.
    pub job_id: JobId,
    /// When it was done.
    #[schema(value_type = String, format = DateTime)]
    pub finished_at: Timestamp,
    /// The digest of the image's file.
    #[schema(value_type = String)]
    pub image_digest: Digest,
    /// The digest of what the volume held then: the same for this image on volumes of any size.
    #[schema(value_type = String)]
    pub content_digest: ContentDigest,
    /// What was zeroed.
    pub zero: ZeroPolicy,
    /// The volume's size.
    pub volume_bytes: u64,
    /// Bytes that came from the source; 0 for an image that was in the cache.
    pub bytes_fetched: u64,
    /// Bytes of the disk that were read from the image and, where compressed, decoded.
    pub bytes_decoded: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes made zero.
    pub bytes_zeroed: u64,
    /// Those of them that the device or file system zeroed by itself, without zeros being sent to it.
    pub bytes_offloaded: u64,
    /// Bytes left alone, because they read as zero before.
    pub bytes_skipped: u64,
    /// Bytes behind the image that were left as they were, because the target zeroes no more than the image.
    pub bytes_left: u64,
    /// Bytes shared with the base volume of this image.
    #[serde(default)]
    pub bytes_shared: u64,
    /// The base that the volume is linked to, and needs; absent where it needs no other file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked_to: Option<String>,
    /// How long each stage was shown; the fetch and the copy of a new volume overlap.
    pub stages: Vec<StageTime>,
}

/// How long a stage took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// How long, in milliseconds.
    pub milliseconds: u64,
}

/// The answer to a verification of a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeVerification {
    /// The volume's name.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// Whether it holds what its receipt says.
    pub intact: bool,
    /// The digest of its content by its receipt.
    #[schema(value_type = String)]
    pub expected: ContentDigest,
    /// The digest of its content now.
    #[schema(value_type = String)]
    pub actual: ContentDigest,
    /// The first byte that differs from the image; absent when none does, or when the image is not in the cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
}
