//! Reading a volume again: the digest of what it holds, and where it first differs from an image.
//!
//! What is read is dropped from the page cache before and after, so that the device is asked, and the host's memory is
//! left to others. It leaves out which digest and which image it should be.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use lvp_api::ContentDigest;

use super::{
    Bytes, Content, Decoder, Extent, Header, Image, Layout,
    content::{ContentHasher, leaves},
    populate::{CHUNK, Piece, Plan},
};
use crate::{
    error::{Error, Result},
    host::confine::confine_decoder,
    progress::Progress,
};

/// The digest of the bytes of a volume's disk. Holes are not read.
///
/// # Errors
/// What reading gives, the stop of the job.
pub fn content_digest(disk: &Arc<dyn Bytes>, workers: usize, progress: &Progress) -> Result<ContentDigest> {
    let end = disk.len();
    let image = Image::unproven(disk.clone(), raw_header(end), None);
    let reading = Reading {
        bytes: &**disk,
        image: &image,
        plan: Mutex::new(Plan::new(image.extents(), end, CHUNK)),
        content: ContentHasher::default(),
        progress,
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(|| reading.work())).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(Error::internal("a thread that read the volume panicked")))
        })
    })?;
    Ok(reading.content.finish())
}

/// The first byte of a volume's disk that is neither the image's nor zero behind it.
///
/// # Errors
/// What reading gives, `image_invalid`, the stop of the job.
pub fn first_difference(image: &Image, disk: &dyn Bytes, progress: &Progress) -> Result<Option<u64>> {
    // The device is asked, whoever read it before.
    disk.forget(0, disk.len());
    // A thread of its own, because it is confined for good.
    thread::scope(|scope| {
        let comparison = scope.spawn(|| {
            confine_decoder(&[]);
            compare(image, disk, progress)
        });
        comparison.join().unwrap_or_else(|_| Err(Error::internal("the thread that compared the volume panicked")))
    })
}

fn compare(image: &Image, bytes: &dyn Bytes, progress: &Progress) -> Result<Option<u64>> {
    let end = bytes.len();
    let chunk = CHUNK.max(image.cluster_size());
    let mut plan = Plan::new(image.extents(), end, chunk);
    let (mut decoder, mut wanted, mut found) = (Decoder::new()?, vec![0; chunk as usize], vec![0; chunk as usize]);
    while let Some(piece) = plan.next()? {
        let (range, extents) = match piece {
            Piece::Zero(range) => (range, Vec::new()),
            Piece::Data(_, range, extents) => (range, extents),
        };
        let mut at = range.start;
        while at < range.end {
            progress.check()?;
            let length = (range.end - at).min(chunk) as usize;
            assemble(image, &mut decoder, &extents, at, &mut wanted)?;
            bytes.read_exact_at(&mut found[..length], at)?;
            if let Some(first) = (0..length).find(|index| wanted[*index] != found[*index]) {
                return Ok(Some(at + first as u64));
            }
            bytes.forget(at, length as u64);
            at += length as u64;
        }
    }
    Ok(None)
}

/// What the image has in the chunk that begins at `start`.
fn assemble(image: &Image, decoder: &mut Decoder, extents: &[Extent], start: u64, into: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    for extent in extents.iter().filter(|extent| extent.content != Content::Zero) {
        let from = (extent.guest - start) as usize;
        into[filled..from].fill(0);
        image.read(extent, decoder, &mut into[from..])?;
        filled = from + extent.length as usize;
    }
    into[filled..].fill(0);
    Ok(())
}

/// A volume, read as the raw disk that it is.
fn raw_header(end: u64) -> Header {
    Header { virtual_size: Some(end), least_size: end, stored_size: end, layout: Layout::Raw }
}

/// What the threads of one reading share.
struct Reading<'a> {
    bytes: &'a dyn Bytes,
    image: &'a Image,
    plan: Mutex<Plan<'a>>,
    content: ContentHasher,
    progress: &'a Progress,
}

impl Reading<'_> {
    fn work(&self) -> Result<()> {
        let (mut decoder, mut buffer) = (Decoder::new()?, vec![0; CHUNK as usize]);
        loop {
            self.progress.check()?;
            let piece = self.plan.lock().unwrap_or_else(PoisonError::into_inner).next()?;
            match piece {
                None => return Ok(()),
                Some(Piece::Zero(range)) => self.progress.advance(range.end - range.start),
                Some(Piece::Data(turn, range, extents)) => {
                    let length = (range.end - range.start) as usize;
                    assemble(self.image, &mut decoder, &extents, range.start, &mut buffer[..length])?;
                    self.content.put(turn, leaves(&buffer[..length], range.start));
                    self.bytes.forget(range.start, length as u64);
                    self.progress.advance(length as u64);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt};

    use e2e::images::{self, Qcow2Options};
    use lvp_api::{ImageFormat, ZeroPolicy};

    use super::*;
    use crate::{
        format::{FileBytes, PopulateOptions, populate},
        host::block::{BlockTarget, OpenTarget},
    };

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_volume_is_read_as_it_was_written_and_a_changed_byte_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let (raw, path) = (directory.path().join("raw"), directory.path().join("image.qcow2"));
        images::raw_with_data(&raw, 9 * MIB + 512 * 7, 40, 5).unwrap();
        for options in [
            Qcow2Options { compression: Some("zlib"), ..Qcow2Options::default() },
            Qcow2Options { cluster_size: Some(2 * MIB), ..Qcow2Options::default() },
        ] {
            images::qcow2_from(&raw, &path, &options).unwrap();
            let image = Image::open_file(&path, ImageFormat::Qcow2).unwrap();
            let mut digests = Vec::new();
            for (size, reads_zero, zero) in [
                (9 * MIB + 512 * 8, true, ZeroPolicy::Full),
                (13 * MIB + 512, false, ZeroPolicy::Full),
                (13 * MIB + 512, true, ZeroPolicy::Image),
            ] {
                let volume = directory.path().join("volume.raw");
                fs::File::create(&volume).unwrap().set_len(size).unwrap();
                let target = BlockTarget { path: volume.clone(), offset: 0, size, reads_zero };
                let done = populate(
                    &image,
                    &OpenTarget::open(&target).unwrap(),
                    &PopulateOptions { workers: 2, zero, ..PopulateOptions::default() },
                    &Progress::default(),
                );
                let done = done.unwrap();
                let end = size - done.counts.bytes_left;
                let disk: Arc<dyn Bytes> = Arc::new(FileBytes::of_volume(&volume, 0, end).unwrap());
                let (digest, difference) = (
                    || content_digest(&disk, 2, &Progress::default()).unwrap(),
                    || first_difference(&image, &*disk, &Progress::default()).unwrap(),
                );
                assert_eq!((digest(), difference()), (done.content.clone(), None));
                digests.push(done.content.clone());
                for at in [0, 5 * MIB + 77, end - 1] {
                    let file = fs::OpenOptions::new().read(true).write(true).open(&volume).unwrap();
                    let mut byte = [0];
                    file.read_exact_at(&mut byte, at).unwrap();
                    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
                    assert_ne!(digest(), done.content);
                    assert_eq!(difference(), Some(at));
                    file.write_all_at(&byte, at).unwrap();
                }
                fs::remove_file(volume).unwrap();
            }
            digests.dedup();
            assert_eq!(digests.len(), 1, "one image, one digest: {digests:?}");
        }
    }
}
