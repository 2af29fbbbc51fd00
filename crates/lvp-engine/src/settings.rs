//! What the engine is told at its start. It leaves out where the values come from (flags, environment, a file): the
//! front ends merge those.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

pub use crate::{
    courtesy::CourtesySettings,
    host::priority::IoPriority,
    image::{Credentials, Secret, SourceSettings, parse_endpoint},
    job::Recovery,
    volume::{LockRetry, TargetSettings},
};

use crate::limit::RateLimit;

/// The lowest limit of a rate, in bytes a second.
pub const LEAST_RATE: u64 = RateLimit::LEAST;
/// libvirt's pool that holds the cache, as the seed named it.
pub const POOL: &str = "images";
/// libvirt, where nobody says another one.
pub const LIBVIRT_URI: &str = "qemu:///system";

/// Who asks. It decides whether a request may name files and places of this machine freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// The owner of the process or of its Unix socket.
    Administrator,
    /// Anybody who reaches the API.
    Anybody,
}

/// Whether and where to find libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LibvirtSetting {
    /// `qemu:///system`, where its socket is there or a target needs it.
    Automatic,
    /// Here, and it must answer for the daemon to be ready.
    Uri(String),
    /// Not at all.
    Off,
}

/// All of the engine's settings.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Database, lock and socket.
    pub state_directory: PathBuf,
    /// The database, where it is not in the state directory.
    pub database: Option<PathBuf>,
    /// The image cache; `None`: the directory of libvirt's `images` pool, or below the state directory.
    pub cache_directory: Option<PathBuf>,
    /// The cache's largest size in bytes; `None`: what the file system has.
    pub cache_max_bytes: Option<u64>,
    /// How sources are reached.
    pub sources: SourceSettings,
    /// The targets, by name; the one called `default` is meant when none is named.
    pub targets: BTreeMap<String, TargetSettings>,
    /// How LVM's commands are tried again.
    pub lock_retry: LockRetry,
    /// libvirt.
    pub libvirt: LibvirtSetting,
    /// Jobs that run at once.
    pub max_concurrent_jobs: usize,
    /// Jobs that wait for their turn at most.
    pub max_queued_jobs: u32,
    /// Threads that decode and write, for one job.
    pub workers: usize,
    /// Bytes a second that all jobs together may fetch over the network, at least [`LEAST_RATE`]; `None`: no limit.
    pub download_limit: Option<u64>,
    /// Bytes a second that all jobs together may write to volumes, likewise.
    pub write_limit: Option<u64>,
    /// From which pressure on jobs go slower; `None`: they never do.
    pub courtesy: Option<CourtesySettings>,
    /// How urgent the copying of volumes is to the I/O scheduler.
    pub io_priority: IoPriority,
    /// Ended jobs that are remembered.
    pub job_history: u32,
    /// How long what an unknown job left is kept; `None`: for ever.
    pub leftover_grace: Option<Duration>,
    /// How long running jobs may go on when the daemon is to stop.
    pub stop_grace: Duration,
    /// What is kept free of a thin pool's data, in percent, at most 100.
    pub thin_floor: u8,
    /// What to do with jobs that an earlier process left.
    pub recovery: Recovery,
}

impl EngineSettings {
    /// The database's file.
    pub fn database(&self) -> PathBuf {
        self.database.clone().unwrap_or_else(|| self.state_directory.join("jobs.db"))
    }
}
