//! Lock files: one process at a time owns a directory. The kernel releases the lock when the process ends, however it
//! ends; the file's text names the owner for whoever comes second.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    path::Path,
};

use lvp_api::ErrorCode;
use rustix::{fs::FlockOperation, io::Errno};

use crate::error::{Error, Result};

/// A held lock; dropping it releases.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock file at `path`, which protects `what` ("the state directory /var/lib/x").
    ///
    /// # Errors
    /// `state_locked` with the owner's process id.
    pub fn acquire(path: &Path, what: &str) -> Result<Self> {
        let failed = |error| Error::io("locking", path, error);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(held(&mut file, what)),
            Err(error) => return Err(failed(error.into())),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

fn held(file: &mut File, what: &str) -> Error {
    let mut owner = String::new();
    let _ = file.take(32).read_to_string(&mut owner);
    let owner = owner.trim();
    let by = if owner.is_empty() { "another process".to_owned() } else { format!("process {owner}") };
    Error::new(ErrorCode::StateLocked, format!("{what} is in use by {by}"))
        .hint("talk to that process (`lvp` finds the daemon's socket by itself), or wait until it has ended")
        .detail("process", owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_learns_who_is_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = Lock::acquire(&path, "the state directory").unwrap();
        let error = Lock::acquire(&path, "the state directory").unwrap_err();
        assert_eq!(error.code(), ErrorCode::StateLocked);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error:?}");
        drop(lock);
        Lock::acquire(&path, "the state directory").unwrap();
    }
}
