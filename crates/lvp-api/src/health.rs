//! Health as the API shows it: one verdict and the checks behind it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The verdict of a check, or of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthStatus {
    /// Usable.
    Healthy,
    /// Usable, but something deserves attention.
    Degraded,
    /// Not usable.
    Unhealthy,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What: `database`, `libvirt`, `cache`, `target:default`, …
    pub name: String,
    /// The verdict.
    pub status: HealthStatus,
    /// What was seen, in a sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The health of a daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// The worst of the checks.
    pub status: HealthStatus,
    /// The version of lvp.
    pub version: String,
    /// Jobs that run now.
    pub active_jobs: u64,
    /// Jobs that wait.
    pub pending_jobs: u64,
    /// What was looked at.
    pub checks: Vec<Check>,
}
