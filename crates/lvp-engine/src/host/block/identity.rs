//! Which file a path leads to, so that a file that was removed, or put in place of another one, is told from the one that
//! was there before.
//!
//! It leaves out devices: what holds one open keeps it from being removed.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, time::SystemTime};

use crate::error::{Error, Result};

/// A regular file, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// Where the file system notes it: the number of a file that is gone may be given to a new one (statx(2), stx_btime).
    born: Option<SystemTime>,
}

impl FileIdentity {
    /// Of what is at this path, if it is a regular file; a symbolic link is none. `None` also when nothing is there.
    ///
    /// # Errors
    /// `input_output` when it cannot be looked at.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_file() => {
                let born = metadata.created().ok();
                Ok(Some(Self { device: metadata.dev(), inode: metadata.ino(), born }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("looking at", path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_itself_under_another_name_and_no_other_one_under_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        assert_eq!(FileIdentity::of(&one).unwrap(), None);
        fs::write(&one, "x").unwrap();
        let first = FileIdentity::of(&one).unwrap();
        assert!(first.is_some());
        fs::rename(&one, &two).unwrap();
        assert_eq!(FileIdentity::of(&two).unwrap(), first);
        // A new file gets the number of one that is gone, as on ext4.
        fs::remove_file(&two).unwrap();
        fs::write(&one, "x").unwrap();
        assert_ne!(FileIdentity::of(&one).unwrap(), first);
        std::os::unix::fs::symlink(&one, &two).unwrap();
        assert_eq!(FileIdentity::of(&two).unwrap(), None);
    }
}
