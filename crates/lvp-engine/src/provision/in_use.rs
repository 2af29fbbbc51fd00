//! Who uses a volume now: the kernel's view and libvirt's, as sentences.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    thread,
    time::Duration,
};

use lvp_api::{ErrorCode, VolumeName};

use crate::{
    error::{Error, Result},
    host::{block, libvirt::Libvirt},
    volume::{Volume, VolumeBackend},
};

/// udev looks into a device for a moment whenever somebody closed it after writing. It is waited for so many times, so long.
const SETTLING: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// The volume of this name as it is once nobody has it open for a moment only. Blocks, up to two seconds where somebody
/// keeps it open.
pub fn find_settled(backend: &dyn VolumeBackend, name: &VolumeName) -> Result<Option<Volume>> {
    for _ in 0..SETTLING {
        match backend.find(name)? {
            Some(volume) if volume.open => thread::sleep(BETWEEN_LOOKS),
            settled => return Ok(settled),
        }
    }
    backend.find(name)
}

/// Why the volume must not be overwritten or removed now; empty when nothing uses it. Blocks.
///
/// A volume that is attached to a domain that is shut off is free: reprovisioning it is what the seed is for.
///
/// # Errors
/// `libvirt_unavailable`, because then nobody knows which domains hold it.
pub fn users(volume: &Volume, libvirt: Option<&Libvirt>) -> Result<Vec<String>> {
    // The device of a logical volume that is not active is not there, and nobody uses it.
    let mut users = if volume.path.exists() { block::users_of(&volume.path)? } else { Vec::new() };
    if let Some(libvirt) = libvirt {
        for disk in libvirt.active_disks()? {
            if is_same_file(&disk.path, &volume.path) {
                users.push(format!("attached to the active domain {}", disk.domain));
            }
        }
    }
    if users.is_empty() && volume.open {
        users.push("open, says LVM".to_owned());
    }
    Ok(users)
}

/// Refuses a volume that something uses.
pub fn refuse_in_use(volume: &Volume, libvirt: Option<&Libvirt>) -> Result<()> {
    let users = users(volume, libvirt)?;
    if users.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorCode::VolumeInUse, format!("volume {} is in use: {}", volume.name, users.join("; ")))
        .hint("shut the domain down, unmount the volume or stop the program, then try again")
        .detail("volume", volume.name.as_str())
        .detail("users", users))
}

/// Whether two paths are one file or one device, by whatever name.
fn is_same_file(one: &Path, other: &Path) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) if one.file_type().is_block_device() && other.file_type().is_block_device() => {
            one.rdev() == other.rdev()
        }
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_under_two_names_is_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&file, b"x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(is_same_file(&file, &link));
        assert!(!is_same_file(&file, directory.path()));
        assert!(is_same_file(Path::new("/absent"), Path::new("/absent")));
    }
}
