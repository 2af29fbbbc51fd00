//! The locks by which qemu keeps two programs from using one image (`block/file-posix.c` of qemu, `raw_apply_lock_bytes`).
//!
//! A program of qemu's holds a shared lock (fcntl(2), of an open file description) on a byte of the file for each way in
//! which it uses the image, from 100 on, and on another for each way in which it lets nobody else use it, from 200 on. It does
//! not begin where somebody holds what it would need. We hold all of these bytes for ourselves: then none of them begins.
//! It leaves out programs that are told not to lock (`-U`, `locking=off`), and domains that see a device through a file of their
//! own in a private `/dev`: the locks are the file's.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use rustix::fs::OFlags;

/// `RAW_LOCK_PERM_BASE`.
const FIRST: libc::off_t = 100;
/// Up to and with the hundred bytes from `RAW_LOCK_SHARED_BASE`, which is 200: qemu has less than ten of each.
const BYTES: libc::off_t = 200;

/// Takes all of qemu's locks until the file, which is open for writing, is closed. A file system that has no locks has
/// nobody who holds them.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when somebody holds one.
pub fn take(file: &File) -> io::Result<()> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&every_byte())) {
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(Errno::EINVAL | Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(()),
        taken => taken.map(drop).map_err(io::Error::from),
    }
}

/// Gives them back at once: a program that is started in this moment may hold a copy of the descriptor for a while.
pub fn release(file: &File) {
    let unlock = libc::flock { l_type: libc::F_UNLCK as libc::c_short, ..every_byte() };
    if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&unlock)) {
        tracing::debug!(%error, "locks are left to the end of the descriptor");
    }
}

/// Whether somebody, maybe of this process, holds one of the locks. Takes none.
pub fn is_locked(path: &Path) -> bool {
    let open = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path);
    open.is_ok_and(|file| {
        let mut found = every_byte();
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found)).is_ok() && libc::c_int::from(found.l_type) != libc::F_UNLCK
    })
}

/// A lock that nobody else's shared lock agrees with.
fn every_byte() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: FIRST,
        l_len: BYTES,
        l_pid: 0,
    }
}
