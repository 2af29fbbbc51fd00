//! What the copy engine is held to: the same bytes as `qemu-img convert`, refusal of everything hostile, constant
//! memory, and a stop within a second. This file has what those tests share.

mod cancel;
mod confined;
mod devices;
mod differential;
mod hostile;
mod memory;
mod mutation;
mod stream;
mod stream_hostile;

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use e2e::images;
use lvp_api::{ImageFormat, ZeroPolicy};

pub use stream::packed;

use super::{Bytes, FileBytes, GrowingBytes, Image, PopulateOptions, Populated, inspect, populate::Counts};
use crate::{
    error::Result,
    host::{
        block::{BlockTarget, OpenTarget},
        priority::IoPriority,
    },
    progress::Progress,
    watermark::Watermark,
};

/// What a used volume has in it before.
const OLD: u8 = 0xaa;
const OPTIONS: PopulateOptions =
    PopulateOptions { workers: 2, zero: ZeroPolicy::Full, io_priority: IoPriority::Normal };

/// Opens the target and copies to it.
pub fn populate(
    image: &Image,
    target: &BlockTarget,
    options: &PopulateOptions,
    progress: &Progress,
) -> Result<Populated> {
    super::populate(image, &OpenTarget::open(target)?, options, progress)
}

/// Flushes a target.
pub fn sync(target: &BlockTarget) -> Result<()> {
    OpenTarget::open(target)?.sync()
}

/// An image in memory.
pub struct Memory(pub Vec<u8>);

impl Bytes for Memory {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let start = usize::try_from(offset).unwrap();
        let range: Range<usize> = start..start.checked_add(buffer.len()).unwrap();
        let bytes = self.0.get(range.clone()).unwrap_or_else(|| panic!("a read outside the image: {range:?}"));
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn name(&self) -> String {
        "test.img".to_owned()
    }
}

/// A file of `size` bytes that are all old data.
fn used_file(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    let old = vec![OLD; 1 << 20];
    let mut at = 0;
    while at < size {
        let piece = (size - at).min(old.len() as u64);
        file.write_all_at(&old[..piece as usize], at).unwrap();
        at += piece;
    }
}

fn sparse_file(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// [`accounted`], and checks that just the stored bytes were decoded.
fn filled(image: &Image, path: &Path, reads_zero: bool) -> Counts {
    let done = accounted(image, path, reads_zero);
    assert_eq!(done.bytes_decoded, image.data_bytes());
    done
}

/// Populates and flushes, and checks that what was done accounts for every byte.
fn accounted(image: &Image, path: &Path, reads_zero: bool) -> Counts {
    let size = fs::metadata(path).unwrap().len();
    let target = BlockTarget { path: path.to_owned(), offset: 0, size, reads_zero };
    let progress = Progress::default();
    let done = populate(image, &target, &OPTIONS, &progress).unwrap().counts;
    sync(&target).unwrap();
    assert_eq!(done.bytes_written + done.bytes_zeroed + done.bytes_skipped, size);
    if reads_zero {
        assert_eq!(done.bytes_zeroed, 0);
    } else {
        assert_eq!(done.bytes_skipped, 0);
    }
    let snapshot = progress.snapshot();
    assert_eq!(snapshot.bytes_processed, snapshot.bytes_total);
    done
}

/// Fails unless the file has these bytes and then only zeros; names the first offset that differs.
fn assert_content(path: &Path, expected: &[u8], what: &str) {
    let content = fs::read(path).unwrap();
    assert!(content.len() >= expected.len(), "{what}: {} bytes are too few", content.len());
    let (head, tail) = content.split_at(expected.len());
    if head != expected {
        let at = head.iter().zip(expected).position(|(left, right)| left != right);
        panic!("{what}: differs from qemu-img's output at {at:?}");
    }
    if let Some(at) = tail.iter().position(|byte| *byte != 0) {
        panic!("{what}: old data behind the image at {}", expected.len() + at);
    }
}

/// Populates a new file with an image that comes bit by bit.
fn filled_along(path: &Path, format: ImageFormat, target: &Path) {
    let (mark, progress) = (Arc::<Watermark>::default(), Progress::default());
    let header = inspect(&FileBytes::open(path).unwrap(), format).unwrap();
    let stored = header.stored_size;
    let bytes =
        GrowingBytes::filling(File::open(path).unwrap(), path.to_owned(), stored, mark.clone(), progress.clone());
    let image = Image::unproven(Arc::new(bytes), header, None);
    let comes = std::thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(stored);
        let mut at = 0;
        while at < stored {
            at += random.u64(1..=stored.div_ceil(4).max(2));
            mark.advance(at.min(stored));
            std::thread::yield_now();
        }
    });
    let size = fs::metadata(target).unwrap().len();
    let target = BlockTarget { path: target.to_owned(), offset: 0, size, reads_zero: true };
    populate(&image, &target, &OPTIONS, &progress).unwrap();
    comes.join().unwrap();
}

/// The proof: our output over old data, into a sparse file and while the image still comes, with a tail, equals
/// `qemu-img convert`'s.
fn assert_as_qemu(directory: &Path, path: &Path, format: ImageFormat, what: &str) {
    let raw = directory.join("expected.raw");
    images::raw_from(path, format.name(), &raw).unwrap();
    let expected = fs::read(&raw).unwrap();
    let image = Image::open_file(path, format).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let size = image.least_size().next_multiple_of(512) + 512 * 2053;
    let target = directory.join("target.raw");
    used_file(&target, size);
    filled(&image, &target, false);
    assert_content(&target, &expected, &format!("{what}, over old data"));
    fs::remove_file(&target).unwrap();
    sparse_file(&target, size);
    filled(&image, &target, true);
    assert_content(&target, &expected, &format!("{what}, into zeros"));
    fs::remove_file(&target).unwrap();
    sparse_file(&target, size);
    filled_along(path, format, &target);
    assert_content(&target, &expected, &format!("{what}, while it comes"));
    for file in [&raw, &target] {
        fs::remove_file(file).unwrap();
    }
}

/// A directory that goes away, and a path in it.
pub fn room(name: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    (directory, path)
}
