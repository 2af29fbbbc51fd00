//! Block devices and raw files as targets of a copy: who uses them ([`users_of`]), holding, writing, zeroing and syncing
//! them ([`OpenTarget`]), and whether one is a physical volume of LVM ([`physical_volume`]).
//!
//! It leaves out making and removing them, which is the volume backends' part, and what is written.

mod buffer;
mod identity;
mod label;
mod locks;
mod target;
mod users;

use std::path::PathBuf;

pub use buffer::AlignedBuffer;
pub use identity::Identity;
pub use label::physical_volume;
pub use target::{BLOCK, OpenTarget};
pub use users::{users_beside, users_of};

/// Where a copy goes: what a volume backend hands to `format`, and all that `format` knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockTarget {
    /// The block device or raw file. It exists and has its full size.
    pub path: PathBuf,
    /// Where the volume's bytes begin in it: 0, but in a file that has tables before them. A multiple of 4096.
    pub offset: u64,
    /// The volume's size in bytes: a multiple of 512.
    pub size: u64,
    /// Whether every byte that was never written reads as zero, so that no zero need be written.
    pub reads_zero: bool,
}

#[cfg(test)]
mod tests;
