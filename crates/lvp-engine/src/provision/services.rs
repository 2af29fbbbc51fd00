//! What the steps of every job work with.

use super::sharing::BaseLocks;
use crate::{
    host::{libvirt::Libvirt, priority::IoPriority},
    image::{Images, SourceSettings},
    limit::Limits,
    volume::Targets,
};

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
}
