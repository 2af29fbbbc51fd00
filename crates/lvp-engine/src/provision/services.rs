//! What the steps of every job work with.

use std::path::PathBuf;

use lvp_api::{ByteSize, ErrorCode};
use rustix::fs::statvfs;

use super::sharing::BaseLocks;
use crate::{
    error::{Error, Result},
    host::{libvirt::Libvirt, priority::IoPriority},
    image::{Images, SourceSettings},
    limit::Limits,
    space::Ledger,
    volume::Targets,
};

/// The database and its journal need no more for all jobs that run and wait.
pub const STATE_KEPT: u64 = 16 << 20;

/// What the steps work with; shared by all jobs.
pub struct Services {
    /// The sources and the cache.
    pub images: Images,
    /// How sources are reached.
    pub sources: SourceSettings,
    /// The places for volumes.
    pub targets: Targets,
    /// libvirt, where this host has it.
    pub libvirt: Option<Libvirt>,
    /// Who works on which base.
    pub base_locks: BaseLocks,
    /// Threads that decode and write, for one job.
    pub workers: usize,
    /// How fast all jobs together may fetch and write.
    pub limits: Limits,
    /// How urgent their reads and writes are.
    pub io_priority: IoPriority,
    /// Who counts on which space; the cache counts in it too.
    pub ledger: Ledger,
    /// What is kept free.
    pub keeping: Keeping,
}

/// What is kept free for others.
#[derive(Debug, Clone, Default)]
pub struct Keeping {
    /// Of a thin pool's data, in percent.
    pub thin_floor: u8,
    /// The database's directory, on whose file system [`STATE_KEPT`] is kept free for it.
    pub database: PathBuf,
}

impl Keeping {
    /// Refuses a job that could not be recorded to its end. Blocks.
    ///
    /// # Errors
    /// `insufficient_space`; `input_output`.
    pub fn refuse_unrecordable(&self) -> Result<()> {
        let path = &self.database;
        let facts = statvfs(path).map_err(|error| Error::io("asking for the space of", path, error.into()))?;
        let free = facts.f_bavail.saturating_mul(facts.f_frsize);
        if free >= STATE_KEPT {
            return Ok(());
        }
        let (shown, kept) = (ByteSize(free), ByteSize(STATE_KEPT));
        Err(Error::new(
            ErrorCode::InsufficientSpace,
            format!(
                "the directory of the job database, {}, has {shown} free; jobs are taken from {kept} on, so that they can be recorded",
                path.display()
            ),
        )
        .hint("free space on its file system, or move it with LVP_STATE_DIR or DB_PATH; volumes and running jobs are not affected")
        .detail("free_bytes", free)
        .detail("kept_bytes", STATE_KEPT))
    }
}
