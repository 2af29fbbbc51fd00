//! Who uses a file of the image cache: what the kernel shows, and the disks of all of libvirt's domains with what is below.
//!
//! Other than for volumes (`in_use`), a domain that is shut off counts: what stands below its disk is half of that disk. Its
//! XML names no backing chain, so the headers of its files are read; they are compared with and never followed to a decision
//! to remove something. It leaves out domains of which libvirt does not know, as long as they do not run.

use std::path::{Path, PathBuf};

use super::in_use::{files_below, is_same_file};
use crate::{
    error::Result,
    host::{block, libvirt::Libvirt},
    image::Users,
};

/// A file that a domain needs.
struct Needed {
    path: PathBuf,
    domain: String,
}

/// Whom the cache asks: the kernel, and libvirt where there is one.
pub fn file_users(libvirt: Option<Libvirt>) -> Users {
    Users::new(move || {
        let needed = libvirt.as_ref().map_or(Ok(Vec::new()), needed)?;
        Ok(Box::new(move |path| users(path, &needed)))
    })
}

/// All that the disks of all domains stand on.
fn needed(libvirt: &Libvirt) -> Result<Vec<Needed>> {
    let mut found = Vec::new();
    for disk in libvirt.all_disks()? {
        let below = if disk.is_qcow2 { files_below(&disk.path) } else { Vec::new() };
        let paths = below.into_iter().chain([disk.path]);
        found.extend(paths.map(|path| Needed { path, domain: disk.domain.clone() }));
    }
    Ok(found)
}

fn users(path: &Path, needed: &[Needed]) -> Result<Vec<String>> {
    // Nobody can open a file that is gone, but a domain may name it still.
    let mut users = if path.exists() { block::users_of(path)? } else { Vec::new() };
    let domains = needed.iter().filter(|needed| is_same_file(&needed.path, path));
    users.extend(domains.map(|needed| format!("the domain {} has it as a disk, or below one", needed.domain)));
    users.dedup();
    Ok(users)
}

#[cfg(test)]
mod tests;
