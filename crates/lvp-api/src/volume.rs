//! Volumes as the API shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Digest, JobId, Receipt, VolumeName};

/// A volume of a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name.
    #[schema(value_type = String)]
    pub name: VolumeName,
    /// The target that it lives in.
    pub target: String,
    /// Its device or file.
    pub device_path: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether lvp made it. Only then `delete` removes it.
    pub made_by_lvp: bool,
    /// Whether its job has not come to its end: it holds nothing that was promised. Absent where it has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
    /// The job that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<JobId>,
    /// The digest of the image that it was last provisioned with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub image_digest: Option<Digest>,
    /// The base that it is linked to: the file below it, which it needs. Absent where it needs no other file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked_to: Option<String>,
    /// What its last provision did, as long as nothing is known to have changed it. Only in the answer for a single volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Why it may not be overwritten now; absent when it is free. Only in the answer for a single volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_use: Option<String>,
}
