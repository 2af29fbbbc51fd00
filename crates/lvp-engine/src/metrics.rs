//! The names of the engine's metrics, as the seed published them, and where they are counted.
//!
//! It leaves out how they are exported: whoever installs a recorder reads them.

use lvp_api::JobStatus;
use metrics::{counter, describe_counter, describe_gauge, gauge};

const JOBS: &str = "libvirt_volume_provisioner_jobs_total";
const ACTIVE_JOBS: &str = "libvirt_volume_provisioner_active_jobs";

/// Registers the descriptions, and the series with zero, so that alerts see them before the first job.
pub fn describe() {
    describe_counter!(JOBS, "Jobs by status: started, completed, failed, cancelled");
    describe_gauge!(ACTIVE_JOBS, "Jobs that run now");
    for status in ["started", "completed", "failed", "cancelled"] {
        counter!(JOBS, "status" => status).increment(0);
    }
    gauge!(ACTIVE_JOBS).increment(0.0);
}

/// Counts a job that begins to run.
pub fn job_started() {
    counter!(JOBS, "status" => "started").increment(1);
    gauge!(ACTIVE_JOBS).increment(1.0);
}

/// Counts a job that ended.
pub fn job_ended(status: JobStatus) {
    counter!(JOBS, "status" => status.name()).increment(1);
}

/// Counts a job that stops running. `None`: it was interrupted and will run again.
pub fn job_stopped(status: Option<JobStatus>) {
    if let Some(status) = status {
        job_ended(status);
    }
    gauge!(ACTIVE_JOBS).decrement(1.0);
}
