//! Images, copied to a small target in memory: those that passed the whole gate, and those of which only the header is
//! known, as when they are written while they come. The input's byte says how much larger than the disk the target is.
//!
//! After it every byte is what the extents say one by one, or zero; the target has its size; every byte is accounted for;
//! the same content has the same digest; and an image that cannot be decoded stops the copy.

#![no_main]

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::OnceLock,
};

use libfuzzer_sys::{Corpus, fuzz_target};
use lvp_api::{ContentDigest, ImageFormat, ZeroPolicy};
use lvp_engine::{
    format::{Bytes, Decoder, Extent, Image, PopulateOptions, inspect, populate},
    host::{
        block::{BlockTarget, OpenTarget},
        priority::IoPriority,
    },
    progress::Progress,
};
use lvp_fuzz::{assert_refusal, disk_size, image, opened, walk};
use rustix::fs::{MemfdFlags, memfd_create};

/// The largest disk that is copied, in bytes: more than one chunk, and no more, since every byte of it is looked at.
const LARGEST: u64 = (2 << 20) + (192 << 10);
/// What the target has in it before.
const OLD: u8 = 0xaa;
const OPTIONS: PopulateOptions =
    PopulateOptions { workers: 2, zero: ZeroPolicy::Full, io_priority: IoPriority::Normal };

fn target() -> &'static File {
    static TARGET: OnceLock<File> = OnceLock::new();
    TARGET.get_or_init(|| memfd_create("target", MemfdFlags::CLOEXEC).unwrap().into())
}

/// The disk by its extents, one after the other, on this thread; none when one cannot be decoded.
fn expected(image: &Image, extents: &[Extent]) -> Option<Vec<u8>> {
    let cluster = image.cluster_size() as usize;
    let mut decoder = Decoder::new().unwrap();
    let mut disk = vec![OLD; disk_size(image) as usize + cluster];
    for extent in extents {
        let into = &mut disk[extent.guest as usize..];
        image.read(extent, &mut decoder, into).inspect_err(assert_refusal).ok()?;
    }
    disk.truncate(disk_size(image) as usize);
    Some(disk)
}

/// Copies over old data, or into zeros, and compares; the digest of what was written. None, where it was stopped.
fn copied(image: &Image, expected: Option<&[u8]>, size: u64, reads_zero: bool) -> Option<ContentDigest> {
    let file = target();
    file.set_len(0).unwrap();
    file.set_len(size).unwrap();
    if !reads_zero {
        file.write_all_at(&vec![OLD; size as usize], 0).unwrap();
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    let target = BlockTarget { path, offset: 0, size, reads_zero };
    let open = OpenTarget::open(&target).unwrap();
    let outcome = populate(image, &open, &OPTIONS, &Progress::default());
    assert_eq!(file.metadata().unwrap().len(), size, "a write outside the target");
    let done = match outcome {
        Ok(done) => done,
        Err(error) => {
            assert_refusal(&error);
            assert!(expected.is_none(), "{error:?}");
            return None;
        }
    };
    open.sync().unwrap();
    let (counts, expected) = (done.counts, expected.expect("a copy of what cannot be decoded fails"));
    assert_eq!(counts.bytes_written + counts.bytes_zeroed + counts.bytes_skipped, size);
    assert!(counts.bytes_offloaded <= counts.bytes_zeroed && counts.bytes_left == 0);
    let mut content = vec![1; size as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    let (disk, tail) = content.split_at(expected.len());
    assert!(disk == expected, "the copy differs from the extents");
    assert!(tail.iter().all(|byte| *byte == 0), "old data behind the disk");
    Some(done.content)
}

/// The extents of an image whose tables nobody has checked; none when they end in an error.
fn unproven_extents(image: &Image) -> Option<Vec<Extent>> {
    let mut at = 0;
    let extents = image.extents().map(|extent| {
        let extent = extent.inspect_err(assert_refusal).ok()?;
        assert_eq!(extent.guest, at, "extents have no gaps");
        at += extent.length;
        Some(extent)
    });
    let extents = extents.collect::<Option<Vec<_>>>()?;
    assert_eq!(at, disk_size(image), "extents are the whole disk");
    Some(extents)
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((tail, bytes)) = image(input) else { return Corpus::Reject };
    let Ok(header) = inspect(&*bytes, ImageFormat::Qcow2) else { return Corpus::Keep };
    // The header of a qcow2 says it.
    let virtual_size = header.virtual_size.expect("a qcow2 image has a size");
    if virtual_size > LARGEST {
        return Corpus::Reject;
    }
    let size = virtual_size.next_multiple_of(512) + 512 * u64::from(tail);
    let unproven = Image::unproven(bytes.clone(), header, None);
    let disk = unproven_extents(&unproven).and_then(|extents| expected(&unproven, &extents));
    let along = copied(&unproven, disk.as_deref(), size, true);
    if let Some(proven) = opened(bytes.clone(), ImageFormat::Qcow2) {
        walk(&proven, bytes.len());
        assert_eq!(copied(&proven, disk.as_deref(), size, false), along, "another digest of the same content");
    }
    Corpus::Keep
});
