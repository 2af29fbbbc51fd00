//! A target opened for writing: held against others as long as it is open, positioned writes past the page cache where the
//! target takes them, zeroing by the device or file system where it can, and the final flush.
//!
//! ```text
//!  a device  claimed with O_EXCL: no mount, swap, device on top, or other claim    + qemu's locks
//!  a file    flock: no other writer of ours                                        + qemu's locks
//! ```
//! None of that keeps out who asks for no claim and no lock: see [`OpenTarget::users`].
//! It leaves out reading: nothing is ever read back from a target, so two writers need only keep to different blocks.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::atomic::{AtomicU8, Ordering},
    thread,
    time::Duration,
};

use lvp_api::ErrorCode;
use rustix::{
    fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock, ioctl_blksszget, major, minor},
    io::Errno,
};

use super::{BlockTarget, Identity, locks, users_beside, users_of};
use crate::error::{Error, Result, is_full};

/// Writes begin on multiples of this many bytes, and end on one or at the target's end. It is the largest logical
/// block size in use, and the page size of the page cache.
pub const BLOCK: usize = 4096;

/// A device zeroes at most this much in one call, so that a cancel is seen within a second even where it does so by
/// writing.
const DEVICE_PIECE: u64 = 32 << 20;
/// A file system only notes that a range is zero, which is quick.
const FILE_PIECE: u64 = 1 << 30;
/// What is claimed or locked by somebody is asked for so many times more, so far apart.
const CLAIM_ATTEMPTS: u32 = 10;
const BETWEEN_CLAIMS: Duration = Duration::from_millis(50);
/// Zeros are written this much at a time.
const WRITTEN_PIECE: u64 = 1 << 20;

/// Ways to zero a range, best first: the first that the target takes is kept.
///
/// A device: ZERO_RANGE is BLKZEROOUT (the kernel writes zeros where the device has no command for it), PUNCH_HOLE is
/// the same with unmapping, and fails where the device cannot promise zeros (fallocate(2), block/fops.c).
const DEVICE_WAYS: [Way; 3] = [Way::Range, Way::Punch, Way::Write];
/// A file: a hole costs nothing; ZERO_RANGE keeps the blocks.
const FILE_WAYS: [Way; 3] = [Way::Punch, Way::Range, Way::Write];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Range,
    Punch,
    Write,
}

/// A block device or raw file that is being written. Shared by threads that write different blocks.
#[derive(Debug)]
pub struct OpenTarget {
    target: BlockTarget,
    device: bool,
    /// Whether the device has no command for zeros, so that the kernel writes them.
    kernel_writes_zeros: bool,
    /// Past the page cache; none where the target does not take that.
    direct: Option<File>,
    /// Through the page cache: the last partial block, and everything where there is no `direct`.
    plain: File,
    /// How many entries of the ways to zero were found not to work.
    ways_lost: AtomicU8,
}

impl OpenTarget {
    /// Opens what exists and holds it for ourselves until it is dropped. Nothing is created, cut or changed.
    ///
    /// # Errors
    /// `volume_in_use` when it is claimed or locked by someone else, `volume_incompatible` when it has not the size that
    /// `target` says, `input_output` when it is neither a file nor a block device or cannot be opened.
    pub fn open(target: &BlockTarget) -> Result<Self> {
        let path = &target.path;
        let kind = path.metadata().map_err(|error| Error::io("opening", path, error))?.file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            return Err(Error::new(
                ErrorCode::InputOutput,
                format!("{} cannot be written: it is neither a block device nor a file", path.display()),
            ));
        }
        // The first descriptor holds the claim of a device; a second one without O_EXCL is let in beside it.
        let claim = if device { OFlags::EXCL } else { OFlags::empty() };
        let mut plain = claimed(target, claim).map_err(|error| not_opened(target, error))?;
        hold(&plain, device).map_err(|error| not_opened(target, error))?;
        let size = plain.seek(SeekFrom::End(0)).map_err(|error| Error::io("finding the size of", path, error))?;
        let expected = target.offset.saturating_add(target.size);
        if size != expected {
            return Err(Error::new(
                ErrorCode::VolumeIncompatible,
                format!("{} has {size} bytes where {expected} were expected", path.display()),
            ));
        }
        let fits = !device || ioctl_blksszget(&plain).is_ok_and(|block| block as usize <= BLOCK);
        let direct = if fits { open_with(target, OFlags::DIRECT).ok() } else { None };
        Ok(Self {
            target: target.clone(),
            device,
            kernel_writes_zeros: device && !has_zero_command(&plain),
            direct,
            plain,
            ways_lost: AtomicU8::new(0),
        })
    }

    /// What is open.
    pub fn target(&self) -> &BlockTarget {
        &self.target
    }

    /// Who uses it beside us now, as [`users_of`] says it: who was let in without a claim, or came in before.
    ///
    /// # Errors
    /// `input_output` when it is not there any more.
    pub fn users(&self) -> Result<Vec<String>> {
        users_beside(&self.target.path)
    }

    /// What is held, which may not be what is at the path by now.
    ///
    /// # Errors
    /// `input_output` when the system does not say.
    pub fn identity(&self) -> Result<Option<Identity>> {
        Identity::of_open(&self.plain).map_err(|error| Error::io("looking at", &self.target.path, error))
    }

    /// The same file or device once more, to read and write: what is held, not what is at the path by now.
    ///
    /// # Errors
    /// `input_output`.
    pub fn reopened(&self) -> Result<File> {
        // A link of the kernel's own (proc(5)), which leads to what is open, whatever name that has.
        let open = format!("/proc/self/fd/{}", self.plain.as_raw_fd());
        let reopened = OpenOptions::new().read(true).write(true).open(open);
        reopened.map_err(|error| Error::io("opening", &self.target.path, error))
    }

    /// Whether it has a name no more and is gone when it is let go: a file only, since nobody removes a device that is held.
    pub fn is_removed(&self) -> bool {
        !self.device && self.plain.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// The descriptors that it writes by: what a thread that writes it must be left with.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        [Some(&self.plain), self.direct.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect()
    }

    /// Writes `bytes`, which lie in an [`AlignedBuffer`](super::AlignedBuffer) at a multiple of [`BLOCK`], at `offset`,
    /// a multiple of [`BLOCK`]. Their number is a multiple too, but at the target's end.
    ///
    /// # Errors
    /// `input_output`, `insufficient_space`; `internal` for a range that is not aligned or passes the target's end.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.bounds(offset, bytes.len() as u64)?;
        let whole = bytes.len() - bytes.len() % BLOCK;
        let (blocks, rest) = bytes.split_at(whole);
        self.write_blocks(blocks, offset)
            .and_then(|()| self.plain.write_all_at(rest, self.target.offset + offset + whole as u64))
            .map_err(|error| self.failed("writing", error).detail("offset", offset))
    }

    /// Makes `length` bytes from `offset` read as zero, and says how many of them the device or file system did by itself.
    /// Same bounds as [`write_at`](Self::write_at). `may` is asked before every piece, with the bytes that are written
    /// for it, by us or by the kernel; its error ends the work.
    ///
    /// # Errors
    /// What `may` gives; `input_output`, `insufficient_space`; `internal` for a range that is not aligned or passes the target's end.
    pub fn zero(&self, offset: u64, length: u64, may: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.bounds(offset, length)?;
        let end = offset + length;
        let (mut at, mut offloaded) = (offset, 0);
        while at < end {
            let piece = (end - at).min(if self.device { DEVICE_PIECE } else { FILE_PIECE });
            may(self.written_to_zero(piece))?;
            let (done, by_itself) = self.zero_piece(at, piece).map_err(|error| self.failed("zeroing", error))?;
            at += done;
            offloaded += if by_itself { done } else { 0 };
        }
        Ok(offloaded)
    }

    /// How many bytes are written when the next piece is zeroed, as far as can be told before.
    fn written_to_zero(&self, piece: u64) -> u64 {
        let by_writing = usize::from(self.ways_lost.load(Ordering::Relaxed)) >= FILE_WAYS.len() - 1;
        match by_writing {
            true => piece.min(WRITTEN_PIECE),
            false if self.kernel_writes_zeros => piece,
            false => 0,
        }
    }

    /// Flushes to stable storage.
    ///
    /// # Errors
    /// `input_output`, `insufficient_space`: a write that was accepted before may be lost.
    pub fn sync(&self) -> Result<()> {
        self.plain.sync_data().map_err(|error| self.failed("flushing", error))
    }

    /// A device has no file system that could be full: it is a thin volume's pool (dm-thin gives `ENOSPC` where it does not
    /// queue).
    fn failed(&self, doing: &str, error: io::Error) -> Error {
        let is_pool = self.device && is_full(&error);
        let failed = Error::io(doing, &self.target.path, error);
        if is_pool {
            failed.hint("the thin pool is full: remove volumes or bases, or extend it with lvextend")
        } else {
            failed
        }
    }

    /// Zeroes up to `length` bytes in the best way that works; says how many, and whether not by writing zeros.
    fn zero_piece(&self, offset: u64, length: u64) -> io::Result<(u64, bool)> {
        loop {
            let lost = self.ways_lost.load(Ordering::Relaxed);
            let ways = if self.device { DEVICE_WAYS } else { FILE_WAYS };
            let mode = match ways[usize::from(lost).min(ways.len() - 1)] {
                Way::Range => FallocateFlags::ZERO_RANGE,
                Way::Punch => FallocateFlags::PUNCH_HOLE,
                Way::Write => return Ok((self.write_zeros(offset, length.min(WRITTEN_PIECE))?, false)),
            };
            match fallocate(&self.plain, mode | FallocateFlags::KEEP_SIZE, self.target.offset + offset, length) {
                Ok(()) => return Ok((length, true)),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {
                    // Another thread may have found the same: then the next way is already taken.
                    let _ = self.ways_lost.compare_exchange(lost, lost + 1, Ordering::Relaxed, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes whole blocks, past the page cache where that works.
    fn write_blocks(&self, blocks: &[u8], offset: u64) -> io::Result<()> {
        let offset = self.target.offset + offset;
        let Some(direct) = &self.direct else { return self.plain.write_all_at(blocks, offset) };
        match direct.write_all_at(blocks, offset) {
            // A file system may take the flag at open and refuse it here.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                self.plain.write_all_at(blocks, offset)
            }
            other => other,
        }
    }

    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<u64> {
        let zeros = super::AlignedBuffer::new(usize::try_from(length).map_err(io::Error::other)?);
        let (blocks, rest) = zeros.split_at(zeros.len() - zeros.len() % BLOCK);
        self.write_blocks(blocks, offset)?;
        self.plain.write_all_at(rest, self.target.offset + offset + blocks.len() as u64)?;
        Ok(length)
    }

    fn bounds(&self, offset: u64, length: u64) -> Result<()> {
        let block = BLOCK as u64;
        let inside = offset.checked_add(length).is_some_and(|end| {
            end <= self.target.size
                && offset.is_multiple_of(block)
                && (end.is_multiple_of(block) || end == self.target.size)
        });
        if inside {
            return Ok(());
        }
        Err(Error::internal(format!(
            "a write of {length} bytes at {offset} does not fit the {} bytes of {}",
            self.target.size,
            self.target.path.display()
        )))
    }
}

impl Drop for OpenTarget {
    /// A guest may be started in the next moment.
    fn drop(&mut self) {
        if !self.device {
            let _ = flock(&self.plain, FlockOperation::Unlock);
        }
        locks::release(&self.plain);
    }
}

/// Opens and claims. A program that is started in this moment, for another job, holds a copy of our last descriptor until
/// it has begun, and a claim that is held so is none: it is tried again for a while.
fn claimed(target: &BlockTarget, claim: OFlags) -> io::Result<File> {
    for _ in 0..CLAIM_ATTEMPTS {
        match open_with(target, claim) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => thread::sleep(BETWEEN_CLAIMS),
            opened => return opened,
        }
    }
    open_with(target, claim)
}

/// Whether a device zeroes by a command of its own: it says how many bytes at once (Documentation/ABI/stable/sysfs-block).
/// A partition's queue is its disk's.
fn has_zero_command(device: &File) -> bool {
    let Ok(number) = device.metadata().map(|metadata| metadata.rdev()) else { return false };
    let directory = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    let limits = [directory.join("queue"), directory.join("../queue")];
    let said = limits.iter().find_map(|queue| fs::read_to_string(queue.join("write_zeroes_max_bytes")).ok());
    said.is_some_and(|bytes| bytes.trim() != "0")
}

/// Holds the file against other writers of ours, in this process or another, under whatever name, and against qemu; a device,
/// which is claimed, against qemu alone. Somebody who only looks into it is gone soon.
fn hold(file: &File, device: bool) -> io::Result<()> {
    for _ in 0..CLAIM_ATTEMPTS {
        let ours = if device { Ok(()) } else { flock(file, FlockOperation::NonBlockingLockExclusive) };
        match ours.map_err(io::Error::from).and_then(|()| locks::take(file)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(BETWEEN_CLAIMS),
            held => return held,
        }
    }
    Err(Errno::BUSY.into())
}

fn open_with(target: &BlockTarget, flags: OFlags) -> io::Result<File> {
    // The path of a logical volume is a link; that of a raw file must not have become one.
    let is_file = target.path.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    let flags = if is_file { flags | OFlags::NOFOLLOW } else { flags };
    OpenOptions::new().write(true).custom_flags(flags.bits().cast_signed()).open(&target.path)
}

fn not_opened(target: &BlockTarget, error: io::Error) -> Error {
    let path = &target.path;
    if error.raw_os_error() != Some(Errno::BUSY.raw_os_error()) {
        return Error::io("opening", path, error);
    }
    let users = users_of(path).unwrap_or_default();
    let by = if users.is_empty() { String::new() } else { format!(": {}", users.join("; ")) };
    Error::new(ErrorCode::VolumeInUse, format!("{} is in use{by}", path.display()))
        .hint("unmount it, detach it from its domain, or stop the program that uses it, then try again")
        .detail("users", users)
}

#[cfg(test)]
mod tests {
    use e2e::images::LoopDevice;

    use super::*;

    const SIZE: u64 = (4 << 20) + 512;

    /// Zeroes the second half of what is there in the way of this place, the others being lost, and says what is left.
    fn zeroed(path: &std::path::Path, way: u8, direct: bool) -> Vec<u8> {
        let target = BlockTarget { path: path.to_owned(), offset: 0, size: SIZE, reads_zero: false };
        let mut open = OpenTarget::open(&target).unwrap();
        assert!(open.direct.is_some(), "{} takes no direct I/O", path.display());
        if !direct {
            open.direct = None;
        }
        open.ways_lost = AtomicU8::new(way);
        open.zero(2 << 20, SIZE - (2 << 20), &mut |_| Ok(())).unwrap();
        open.sync().unwrap();
        assert_eq!(open.ways_lost.load(Ordering::Relaxed), way, "the way works here");
        drop(open);
        fs::read(path).unwrap()
    }

    #[test]
    fn every_way_to_zero_zeroes_that_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        for way in 0..3 {
            for (device, direct) in [(false, true), (false, false), (true, true), (true, false)] {
                fs::write(&file, vec![0xaa; SIZE as usize]).unwrap();
                let attached = device.then(|| LoopDevice::attach(&file, 512).unwrap());
                let path = attached.as_ref().map_or(&file, |attached| &attached.path);
                let content = zeroed(path, way, direct);
                assert_eq!(content.len() as u64, SIZE);
                assert!(content[..2 << 20].iter().all(|byte| *byte == 0xaa), "way {way}, device {device}");
                assert!(content[2 << 20..].iter().all(|byte| *byte == 0), "way {way}, device {device}");
            }
        }
    }
}
