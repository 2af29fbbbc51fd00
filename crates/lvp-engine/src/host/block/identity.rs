//! Which file or device a path leads to, so that one that was removed, or put in place of another one, is told from the one
//! that was there before.
//!
//! ```text
//!  a file          its number on its file system, and when it was born
//!  a mapped device device-mapper's identifier: a logical volume has one for its life, under whatever name
//!  another device  its number: nobody else gets that as long as the device is held open
//! ```
//! It leaves out what is at neither: a directory, a pipe, a symbolic link to a file.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::SystemTime,
};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A regular file or a block device, whatever it is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// A regular file.
    File {
        /// Of its file system.
        device: u64,
        /// Its number there.
        inode: u64,
        /// Where the file system notes it: the number of a file that is gone may be given to a new one (statx(2), stx_btime).
        born: Option<SystemTime>,
    },
    /// A device of device-mapper, by its `dm/uuid` (Documentation/ABI/testing/sysfs-block-dm): LVM writes the volume's own
    /// there, and renames it with the volume's name only.
    Mapped(String),
    /// Any other block device, by its number.
    Device(u64),
}

impl Identity {
    /// Of what is at this path. A symbolic link to a device is that device, as LVM's names are; one to a file is none. `None`
    /// also when nothing is there.
    ///
    /// # Errors
    /// `input_output` when it cannot be looked at.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        let failed = |error| Error::io("looking at", path, error);
        let there = |metadata: io::Result<Metadata>| match metadata {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            metadata => metadata.map(Some).map_err(failed),
        };
        let metadata = match there(fs::symlink_metadata(path))? {
            Some(link) if link.is_symlink() => {
                there(path.metadata())?.filter(|metadata| metadata.file_type().is_block_device())
            }
            metadata => metadata,
        };
        Ok(metadata.as_ref().and_then(Self::seen))
    }

    /// Of what is open.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of_open(file: &File) -> io::Result<Option<Self>> {
        Ok(Self::seen(&file.metadata()?))
    }

    /// Whether `later` is certainly another one, where this was noted maybe before the host started: a file system, and a device
    /// that is not mapped, may have another number since.
    pub fn is_not(&self, later: &Self) -> bool {
        match (self, later) {
            (Self::File { inode, born: Some(born), .. }, Self::File { inode: now, born: Some(since), .. }) => {
                (inode, born) != (now, since)
            }
            (Self::File { inode, .. }, Self::File { inode: now, .. }) => inode != now,
            (Self::Mapped(one), Self::Mapped(other)) => one != other,
            (Self::Device(_), Self::Device(_)) => false,
            _ => true,
        }
    }

    fn seen(metadata: &Metadata) -> Option<Self> {
        if metadata.is_file() {
            let born = metadata.created().ok();
            return Some(Self::File { device: metadata.dev(), inode: metadata.ino(), born });
        }
        if !metadata.file_type().is_block_device() {
            return None;
        }
        let number = metadata.rdev();
        let said = fs::read_to_string(format!("/sys/dev/block/{}:{}/dm/uuid", major(number), minor(number)));
        let mapped = said.ok().map(|said| said.trim().to_owned()).filter(|said| !said.is_empty());
        Some(mapped.map_or(Self::Device(number), Self::Mapped))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use e2e::images::LoopDevice;

    use super::*;

    #[test]
    fn a_file_is_itself_under_another_name_and_no_other_one_under_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        assert_eq!(Identity::of(&one).unwrap(), None);
        fs::write(&one, "x").unwrap();
        let first = Identity::of(&one).unwrap();
        assert!(first.is_some());
        let open = File::open(&one).unwrap();
        fs::rename(&one, &two).unwrap();
        assert_eq!(Identity::of(&two).unwrap(), first);
        assert_eq!(Identity::of_open(&open).unwrap(), first);
        // As it is read again after the host started.
        let noted = serde_json::to_string(&first).unwrap();
        assert_eq!(serde_json::from_str::<Option<Identity>>(&noted).unwrap(), first);
        let Some(Identity::File { inode, born, .. }) = first.clone() else { panic!("{first:?}") };
        assert!(!first.as_ref().unwrap().is_not(&Identity::File { device: 7, inode, born }));
        assert!(first.as_ref().unwrap().is_not(&Identity::Mapped("LVM-1".to_owned())));
        drop(open);
        // A new file gets the number of one that is gone, as on ext4.
        fs::remove_file(&two).unwrap();
        fs::write(&one, "x").unwrap();
        let second = Identity::of(&one).unwrap();
        assert_ne!(second, first);
        assert!(first.unwrap().is_not(second.as_ref().unwrap()));
        symlink(&one, &two).unwrap();
        assert_eq!(Identity::of(&two).unwrap(), None);
        assert_eq!(Identity::of(directory.path()).unwrap(), None);
    }

    #[test]
    fn a_device_is_itself_under_another_name_and_no_other_one_under_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let devices = ["one", "two"].map(|name| {
            let file = directory.path().join(name);
            fs::write(&file, vec![0; 1 << 20]).unwrap();
            LoopDevice::attach(&file, 512).unwrap()
        });
        let name = directory.path().join("web");
        symlink(&devices[0].path, &name).unwrap();
        let first = Identity::of(&name).unwrap();
        assert!(first.is_some());
        assert_eq!(Identity::of(&devices[0].path).unwrap(), first);
        assert_eq!(Identity::of_open(&File::open(&name).unwrap()).unwrap(), first);
        fs::remove_file(&name).unwrap();
        symlink(&devices[1].path, &name).unwrap();
        assert_ne!(Identity::of(&name).unwrap(), first);
        fs::remove_file(&name).unwrap();
        symlink("/nowhere", &name).unwrap();
        assert_eq!(Identity::of(&name).unwrap(), None);
    }
}
