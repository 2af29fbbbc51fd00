//! Compressed raw images as `gzip`, `zstd` and `xz` make them: what lands on a target must be what was compressed, byte
//! for byte, and then zeros.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use e2e::images;
use lvp_api::{ErrorCode, ImageFormat};

use super::{Memory, OPTIONS, accounted, assert_content, populate, room, sparse_file, used_file};
use crate::{
    error::Result,
    format::{Bytes, Image, measure},
    host::block::BlockTarget,
    progress::Progress,
};

const MIB: u64 = 1 << 20;

pub const FORMATS: [ImageFormat; 3] = [ImageFormat::RawGz, ImageFormat::RawZst, ImageFormat::RawXz];

/// These bytes, compressed with these options of the format's program.
pub fn packed(content: &[u8], format: ImageFormat, options: &[&str]) -> Vec<u8> {
    let (_directory, file) = room("disk");
    fs::write(&file, content).unwrap();
    let ending = format.name().strip_prefix("raw.").unwrap();
    fs::read(images::compressed(&file, ending, options).unwrap()).unwrap()
}

/// A disk of `size` bytes with `share` percent of data in it.
pub fn disk(size: u64, share: u8) -> Vec<u8> {
    let (_directory, file) = room("disk");
    images::raw_with_data(&file, size, share, size ^ u64::from(share)).unwrap();
    fs::read(&file).unwrap()
}

pub fn opened(stored: Vec<u8>, format: ImageFormat) -> Image {
    Image::open(Arc::new(Memory(stored)), format).unwrap_or_else(|error| panic!("{format}: {error:?}"))
}

/// The proof: into a target of `size` bytes, over old data and into zeros.
fn assert_copied(stored: &[u8], format: ImageFormat, expected: &[u8], size: u64, what: &str) {
    let (_directory, target) = room("target.raw");
    let image = opened(stored.to_vec(), format);
    for reads_zero in [false, true] {
        if reads_zero {
            sparse_file(&target, size);
        } else {
            used_file(&target, size);
        }
        let done = accounted(&image, &target, reads_zero);
        assert_eq!(done.bytes_decoded, expected.len() as u64, "{what}");
        assert_content(&target, expected, what);
    }
    let known = Some(expected.len() as u64).filter(|_| format == ImageFormat::RawXz);
    assert_eq!(image.virtual_size(), known, "{what}");
    assert!(image.least_size() <= expected.len() as u64, "{what}");
    let measured = measure(&image, expected.len() as u64, &Progress::default()).unwrap();
    assert_eq!(measured, expected.len() as u64, "{what}");
}

/// Sizes around a sector, a block and a buffer, full, half full and empty; on targets that they fill, and larger ones.
#[test]
fn disks_of_any_size_and_content() {
    for format in FORMATS {
        for size in [1, 511, 512, 4095, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB, 3 * MIB + 512 * 3, 5 * MIB - 77] {
            for share in [0, 5, 100] {
                let expected = disk(size, share);
                let stored = packed(&expected, format, &["-1"]);
                let what = format!("{format}, {size} bytes, {share} %");
                assert_copied(&stored, format, &expected, size, &what);
                if share == 5 {
                    assert_copied(&stored, format, &expected, size.next_multiple_of(512) + 512 * 2053, &what);
                }
            }
        }
    }
}

#[test]
fn whatever_options_it_was_made_with() {
    let expected = disk(6 * MIB + 512, 50);
    let kinds: [(ImageFormat, &[&[&str]]); 3] = [
        (ImageFormat::RawGz, &[&["-1"], &["-9"], &["--no-name"]]),
        (
            ImageFormat::RawZst,
            &[
                &["-1"],
                &["-19"],
                &["--long=23"],
                &["--no-check"],
                &["-T2", "-B1M"],
                &["--no-content-size"],
                &["--fast"],
            ],
        ),
        (
            ImageFormat::RawXz,
            &[
                &["-0"],
                &["-6", "--check=sha256"],
                &["-0", "--check=crc32"],
                &["-0", "--check=none"],
                &["-0", "-T2", "--block-size=1MiB"],
                &["--x86", "--lzma2=preset=0"],
                &["--delta=dist=4", "--x86", "--lzma2=preset=0"],
                &["--arm64", "--lzma2=preset=0,lc=0,lp=4,pb=0"],
                &["--lzma2=preset=0,dict=16MiB"],
            ],
        ),
    ];
    for (format, lists) in kinds {
        for options in lists {
            let stored = packed(&expected, format, options);
            assert_copied(&stored, format, &expected, 7 * MIB, &format!("{format}, {options:?}"));
        }
    }
}

/// Several members, frames or streams are one disk, with everything that may stand between them.
#[test]
fn what_was_concatenated_is_one_disk() {
    let parts = [disk(2 * MIB + 5, 60), Vec::new(), disk(MIB - 5, 100), disk(3 * MIB, 0), disk(700, 100)];
    let expected = parts.concat();
    let skippable = b"\x5a\x2a\x4d\x18\x07\0\0\0nothing".to_vec();
    let kinds: [(ImageFormat, &[Vec<u8>]); 5] = [
        (ImageFormat::RawGz, &[Vec::new()]),
        (ImageFormat::RawZst, &[Vec::new()]),
        (ImageFormat::RawZst, &[skippable.clone(), [skippable, b"\x50\x2a\x4d\x18\0\0\0\0".to_vec()].concat()]),
        (ImageFormat::RawXz, &[Vec::new()]),
        (ImageFormat::RawXz, &[vec![0; 4], Vec::new(), vec![0; 512], vec![0; 8200]]),
    ];
    for (format, between) in kinds {
        let mut stored = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            // Padding begins no xz file; a skippable frame may begin a zstd file.
            if format == ImageFormat::RawZst || index > 0 {
                stored.extend(&between[index % between.len()]);
            }
            stored.extend(packed(part, format, &["-1"]));
        }
        stored.extend(&between[0]);
        assert_copied(&stored, format, &expected, 8 * MIB, &format!("{format} with {} between", between[0].len()));
    }
    let (_directory, file) = room("disk");
    fs::write(&file, &expected).unwrap();
    images::run("pzstd", &["--quiet", "-1", file.to_str().unwrap()]).unwrap();
    let stored = fs::read(file.with_extension("zst")).unwrap();
    assert_copied(&stored, ImageFormat::RawZst, &expected, 8 * MIB, "pzstd");
}

/// Zstd says what its first frame has, so that what cannot fit is known to not fit before it is fetched.
#[test]
fn the_first_frame_says_what_the_disk_has_at_least() {
    let (first, second) = (disk(2 * MIB, 50), disk(MIB, 50));
    let stored = [packed(&first, ImageFormat::RawZst, &[]), packed(&second, ImageFormat::RawZst, &[])].concat();
    let image = opened(stored, ImageFormat::RawZst);
    assert_eq!((image.virtual_size(), image.least_size()), (None, 2 * MIB));
    let image = opened(packed(&first, ImageFormat::RawZst, &["--no-content-size"]), ImageFormat::RawZst);
    assert_eq!((image.virtual_size(), image.least_size()), (None, 0));
}

/// An index that would take long to look through is not: the size is then not known.
#[test]
fn a_great_many_streams_are_read_without_their_indexes() {
    let part = disk(512, 100);
    let count = 1000;
    let stored = packed(&part, ImageFormat::RawXz, &["-0"]).repeat(count);
    let image = opened(stored, ImageFormat::RawXz);
    assert_eq!(image.virtual_size(), None);
    let (_directory, target) = room("target.raw");
    used_file(&target, MIB);
    accounted(&image, &target, false);
    assert_content(&target, &part.repeat(count), "a thousand streams");
}

#[test]
fn zeros_in_a_stream_cost_nothing_where_the_target_reads_zero() {
    let mut expected = vec![0; 300 << 20];
    expected[(280 << 20) + 70] = 1;
    let stored = packed(&expected, ImageFormat::RawZst, &["-1"]);
    let (_directory, target) = room("target.raw");
    sparse_file(&target, 400 << 20);
    let done = accounted(&opened(stored, ImageFormat::RawZst), &target, true);
    assert_eq!((done.bytes_decoded, done.bytes_written), (300 << 20, 4096));
    assert_content(&target, &expected, "one byte");
}

/// Where the size was told, nothing is written; where it was not, no more than the target has.
#[test]
fn a_disk_larger_than_the_target_is_refused() {
    for format in FORMATS {
        for beyond in [1, 512, 3 * MIB] {
            let image = opened(packed(&disk(2 * MIB + beyond, 100), format, &["-1"]), format);
            let (_directory, path) = room("target.raw");
            sparse_file(&path, 2 * MIB);
            let target = BlockTarget { path: path.clone(), offset: 0, size: 2 * MIB, reads_zero: true };
            let error = populate(&image, &target, &OPTIONS, &Progress::default()).unwrap_err();
            assert_eq!(error.code(), ErrorCode::ImageTooLarge, "{format}: {error:?}");
            assert!(error.to_string().contains("2097152") && error.to_body().hint.is_some(), "{error:?}");
            assert_eq!(fs::metadata(&path).unwrap().len(), 2 * MIB);
            let is_told = format != ImageFormat::RawGz;
            assert_eq!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0), is_told, "{format}");
            if image.virtual_size().is_none() {
                let error = measure(&image, 2 * MIB, &Progress::default()).unwrap_err();
                assert_eq!(error.code(), ErrorCode::ImageTooLarge, "{format}: {error:?}");
            }
        }
    }
}

/// Image bytes that note how they are read.
struct Noted(Memory, Mutex<Vec<(u64, usize)>>);

impl Bytes for Noted {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.1.lock().unwrap().push((offset, buffer.len()));
        self.0.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        self.0.name()
    }
}

/// Opens an image and gives the reads that a copy of it makes, one after the other without a gap.
pub fn reads_of_a_copy(stored: Vec<u8>, format: ImageFormat, target: &Path) -> (Result<()>, u64) {
    let noted = Arc::new(Noted(Memory(stored), Mutex::default()));
    let image = Image::open(noted.clone(), format).unwrap();
    noted.1.lock().unwrap().clear();
    let size = fs::metadata(target).unwrap().len();
    let target = BlockTarget { path: target.to_owned(), offset: 0, size, reads_zero: true };
    let copied = populate(&image, &target, &OPTIONS, &Progress::default()).map(drop);
    let mut end = 0;
    for (offset, length) in &*noted.1.lock().unwrap() {
        assert_eq!(*offset, end, "{format}");
        assert!(*length <= 256 << 10, "{format}: {length} bytes at once");
        end += *length as u64;
    }
    (copied, end)
}

/// So a copy can follow a download.
#[test]
fn a_copy_reads_from_begin_to_end_and_not_ahead() {
    let expected = disk(6 * MIB, 90);
    for format in FORMATS {
        let stored = packed(&expected, format, &["-1"]);
        let length = stored.len() as u64;
        assert!(length > MIB);
        let (_directory, target) = room("target.raw");
        sparse_file(&target, 8 * MIB);
        let (copied, end) = reads_of_a_copy(stored, format, &target);
        copied.unwrap();
        assert_eq!(end, length);
        assert_content(&target, &expected, format.name());
    }
}
