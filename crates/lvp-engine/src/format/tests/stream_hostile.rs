//! Compressed raw images that are damaged, lie, or ask for too much; and copies of them that are stopped.

use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use lvp_api::{ErrorCode, ImageFormat};

use super::{
    Memory, OPTIONS, populate, room, sparse_file,
    stream::{FORMATS, disk, opened, packed, reads_of_a_copy},
};
use crate::{
    error::{Error, Result},
    format::{Bytes, Image, measure},
    host::block::BlockTarget,
    progress::{Progress, Stop},
};

const MIB: u64 = 1 << 20;

/// Opens and copies to a target of so many bytes; gives what is on the target then.
fn copied(stored: Vec<u8>, format: ImageFormat, size: u64) -> Result<Vec<u8>> {
    let image = Image::open(Arc::new(Memory(stored)), format)?;
    let (_directory, path) = room("target.raw");
    sparse_file(&path, size);
    let target = BlockTarget { path: path.clone(), offset: 0, size, reads_zero: true };
    populate(&image, &target, &OPTIONS, &Progress::default())?;
    Ok(fs::read(&path).unwrap())
}

#[track_caller]
fn assert_refused(outcome: Result<impl Sized>, code: ErrorCode, words: &str) -> Error {
    let error = outcome.err().expect("refused");
    assert_eq!(error.code(), code, "{error:?}");
    assert!(error.chain().contains(words), "{error:?} does not say '{words}'");
    assert!(error.to_body().hint.is_some() && !error.retryable(), "{error:?}");
    error
}

/// At the gate already, so that nothing is reserved.
#[track_caller]
fn assert_not_opened(stored: Vec<u8>, format: ImageFormat, code: ErrorCode, words: &str) -> Error {
    assert_refused(Image::open(Arc::new(Memory(stored)), format), code, words)
}

#[test]
fn truncated_anywhere() {
    let content = disk(3 * MIB, 60);
    for format in FORMATS {
        let whole = packed(&content, format, &["-1"]);
        let length = whole.len();
        for cut in
            [3, 7, 11, 13, 20, 200, length / 4, length / 2, length - 12, length - 9, length - 5, length - 4, length - 1]
        {
            let error = copied(whole[..cut].to_vec(), format, 4 * MIB).expect_err("cut");
            // Of the first few bytes nobody can say what they are.
            let codes = if cut < 7 {
                &[ErrorCode::ImageInvalid, ErrorCode::ImageTypeMismatch][..]
            } else {
                &[ErrorCode::ImageInvalid]
            };
            assert!(codes.contains(&error.code()), "{format} cut at {cut}: {error:?}");
            if cut >= 7 {
                assert_eq!(error.to_body().details["offset"], cut, "{format}: {error:?}");
            }
        }
    }
}

#[test]
fn trailing_bytes() {
    let content = disk(2 * MIB, 60);
    for format in FORMATS {
        let whole = packed(&content, format, &["-1"]);
        for trailing in [&b"\0"[..], b"x", b"garbage, longer than any header could be", &[0; 7], &whole[..11]] {
            let stored = [&whole[..], trailing].concat();
            let error = assert_refused(copied(stored, format, 4 * MIB), ErrorCode::ImageInvalid, "is damaged");
            let offset = error.to_body().details["offset"].as_u64().unwrap();
            assert!(
                (whole.len() as u64..=(whole.len() + trailing.len()) as u64).contains(&offset),
                "{format}: {error:?}"
            );
        }
    }
}

/// Every changed byte is found by a check, but the few that mean nothing: what gzip says of its file, and bits that fill up.
#[test]
fn flipped_bytes() {
    let content = disk(MIB / 4, 60);
    let mut random = fastrand::Rng::with_seed(5);
    for format in FORMATS {
        let whole = packed(&content, format, &["-1"]);
        let mut refused = 0;
        let edges = (0..40).chain(whole.len() - 40..whole.len());
        let places: Vec<usize> = edges.chain((0..300).map(|_| random.usize(0..whole.len()))).collect();
        for at in &places {
            let mut stored = whole.clone();
            stored[*at] ^= 1 << random.u8(0..8);
            match copied(stored, format, MIB / 2) {
                Ok(target) => assert!(target[..content.len()] == content, "{format}, changed at {at}"),
                Err(error) => {
                    let codes = [
                        ErrorCode::ImageInvalid,
                        ErrorCode::ImageTypeMismatch,
                        ErrorCode::ImageRefused,
                        ErrorCode::ImageTooLarge,
                    ];
                    assert!(codes.contains(&error.code()), "{format}, changed at {at}: {error:?}");
                    refused += 1;
                }
            }
        }
        assert!(places.len() - refused < 40, "{format}: {refused} of {}", places.len());
    }
}

/// Larger changes, anywhere, many of them: no decoder may panic or run on. What comes out is not compared, since xz has
/// no checks here, so that more changes get as far as its decoder.
#[test]
fn mutated_streams_are_refused_or_decoded() {
    let content = disk(MIB / 16, 70);
    let mut random = fastrand::Rng::with_seed(6);
    for format in FORMATS {
        let options: &[&str] = if format == ImageFormat::RawXz { &["-0", "--check=none"] } else { &["-1"] };
        let whole = packed(&content, format, options);
        let mut refused = 0;
        for round in 0..1000 {
            let mut stored = whole.clone();
            for _ in 0..random.usize(1..6) {
                let (at, length) = (random.usize(0..stored.len()), random.usize(1..9));
                let end = stored.len().min(at + length);
                match random.u8(0..4) {
                    0 => random.fill(&mut stored[at..end]),
                    1 => stored[at..end].fill(*random.choice([0, 0xff, 0x80, 1].iter()).unwrap()),
                    2 => drop(stored.drain(at..end)),
                    _ => stored.extend_from_within(at..end),
                }
            }
            let begun = Instant::now();
            let image = Image::open(Arc::new(Memory(stored)), format);
            let measured = image.and_then(|image| stream_size(&image));
            assert!(begun.elapsed() < Duration::from_secs(4), "{format}, round {round}: {:?}", begun.elapsed());
            if let Err(error) = measured {
                assert!(error.code().http_status() == 422, "{format}, round {round}: {error:?}");
                refused += 1;
            }
        }
        assert!(refused > 750, "{format}: {refused}");
    }
}

/// Decodes all, whatever the image says of its size.
fn stream_size(image: &Image) -> Result<u64> {
    let progress = Progress::default();
    let mut disk = image.stream(&progress, false)?.unwrap();
    let (mut piece, mut size) = (vec![0; MIB as usize], 0);
    loop {
        let filled = disk.fill(&mut piece)?;
        size += filled as u64;
        if filled < piece.len() || size > 64 * MIB {
            return Ok(size);
        }
    }
}

#[test]
fn a_disk_without_bytes() {
    for format in FORMATS {
        let nothing = packed(&[], format, &[]);
        assert_not_opened(nothing.repeat(2), format, ErrorCode::ImageInvalid, "has no bytes");
        assert_not_opened(Vec::new(), format, ErrorCode::ImageInvalid, "is empty");
    }
}

#[test]
fn another_format_inside() {
    let known: [(usize, &[u8], &str); 6] = [
        (0, b"QFI\xfb", "the disk in it is a qcow2 image"),
        (64, b"\x7f\x10\xda\xbe", "the disk in it is a VDI image"),
        (0, b"KDMV", "the disk in it is a VMDK image"),
        (0, b"\x1f\x8b\x08", "the disk in it is compressed with gzip"),
        (0, b"<!DOCTYPE html>", "the disk in it is an HTML page"),
        (0, b"conectix", "the disk in it is a VHD image"),
    ];
    for format in FORMATS {
        for (at, magic, words) in known {
            let mut content = disk(2 * MIB, 50);
            content[..at + magic.len()].fill(0);
            content[at..at + magic.len()].copy_from_slice(magic);
            let error =
                assert_not_opened(packed(&content, format, &["-1"]), format, ErrorCode::ImageTypeMismatch, words);
            assert!(error.to_body().hint.unwrap().starts_with("decompress it"), "{error:?}");
        }
        // A fixed VHD says what it is in its last sector only.
        for length in [512, MIB as usize, 2 * MIB as usize - 512] {
            let mut content = disk(length as u64, 100);
            content[length - 512..][..8].copy_from_slice(b"conectix");
            let stored = packed(&content, format, &["-1"]);
            assert_refused(copied(stored, format, 4 * MIB), ErrorCode::ImageTypeMismatch, "is a VHD image");
        }
    }
}

#[test]
fn another_compression_than_was_declared() {
    let content = disk(MIB, 50);
    let declared = [ImageFormat::Raw, ImageFormat::Qcow2, ImageFormat::RawGz, ImageFormat::RawZst, ImageFormat::RawXz];
    for actual in FORMATS {
        let stored = packed(&content, actual, &[]);
        for declared in declared.into_iter().filter(|declared| *declared != actual) {
            let error =
                assert_not_opened(stored.clone(), declared, ErrorCode::ImageTypeMismatch, "it is compressed with");
            let hint = error.to_body().hint.unwrap();
            assert!(hint.contains(&format!("type {actual}")), "{hint}");
        }
    }
    for declared in FORMATS {
        let error =
            assert_not_opened(content.clone(), declared, ErrorCode::ImageTypeMismatch, "its first bytes differ");
        assert!(error.to_body().hint.unwrap().contains("raw"), "{error:?}");
        let qcow2 = [&b"QFI\xfb"[..], &[0; 200]].concat();
        let error = assert_not_opened(qcow2, declared, ErrorCode::ImageTypeMismatch, "it is a qcow2 image");
        assert_eq!(error.to_body().hint.unwrap(), "declare the type qcow2");
    }
}

/// Members that decode to nothing, more of them than the gate looks at: what comes behind is looked at all the same,
/// before anything is written.
#[test]
fn another_format_behind_a_great_deal_of_nothing() {
    let mut content = disk(2 * MIB, 100);
    for format in FORMATS {
        let nothing = packed(&[], format, &[]);
        let nothing = nothing.repeat((3 * MIB as usize / 2) / nothing.len());
        let stored = |content: &[u8]| [&nothing[..], &packed(content, format, &["-1"])].concat();
        content[..4].copy_from_slice(b"disk");
        let target = copied(stored(&content), format, 2 * MIB).unwrap();
        assert!(target == content, "{format}");
        content[..4].copy_from_slice(b"QFI\xfb");
        let image = opened(stored(&content), format);
        let (_directory, path) = room("target.raw");
        sparse_file(&path, 2 * MIB);
        let target = BlockTarget { path: path.clone(), offset: 0, size: 2 * MIB, reads_zero: true };
        let outcome = populate(&image, &target, &OPTIONS, &Progress::default());
        assert_refused(outcome, ErrorCode::ImageTypeMismatch, "the disk in it is a qcow2 image");
        assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0), "{format}");
    }
}

/// 10 GiB of zeros: the copy stops where the target ends, and has read next to nothing of the image.
#[test]
fn a_bomb_is_refused_as_soon_as_the_target_is_full() {
    for format in FORMATS {
        let piece = packed(&vec![0; 64 << 20], format, &["-1"]);
        let stored = piece.repeat(160);
        let length = stored.len() as u64;
        let (_directory, target) = room("target.raw");
        sparse_file(&target, 8 * MIB);
        let image = opened(stored.clone(), format);
        let (copied, read) = reads_of_a_copy(stored, format, &target);
        assert_refused(copied, ErrorCode::ImageTooLarge, "8388608");
        assert!(read <= 256 << 10 && read < length, "{format}: {read} of {length}");
        assert_refused(measure(&image, 8 * MIB, &Progress::default()), ErrorCode::ImageTooLarge, "8388608");
    }
}

#[test]
fn a_window_that_is_too_large() {
    // A descriptor without size and checksum, a window of 2^24 bytes, one last raw block of a byte.
    let frame = b"\x28\xb5\x2f\xfd\x00\x70\x09\x00\x00\x41";
    let error = assert_not_opened(frame.to_vec(), ImageFormat::RawZst, ErrorCode::ImageRefused, "takes 16 MiB");
    let body = error.to_body();
    assert_eq!((&body.details["asked_bytes"], &body.details["allowed_bytes"]), (&(16 << 20).into(), &(8 << 20).into()));
    assert!(body.message.contains("at most 8 MiB") && body.hint.unwrap().contains("zstd -19"), "{error:?}");
    // In a later frame it is seen when it comes.
    let stored = [&packed(&disk(MIB, 50), ImageFormat::RawZst, &[])[..], frame].concat();
    assert_refused(copied(stored, ImageFormat::RawZst, 2 * MIB), ErrorCode::ImageRefused, "takes 16 MiB");
    let dictionary = b"\x28\xb5\x2f\xfd\x01\x00\x07\x09\x00\x00\x41";
    assert_not_opened(dictionary.to_vec(), ImageFormat::RawZst, ErrorCode::ImageRefused, "dictionary");
}

#[test]
fn a_dictionary_that_is_too_large() {
    let content = disk(MIB, 50);
    let large = packed(&content, ImageFormat::RawXz, &["-9"]);
    let error = assert_not_opened(large.clone(), ImageFormat::RawXz, ErrorCode::ImageRefused, "takes 64.04 MiB");
    let body = error.to_body();
    assert!(body.details["asked_bytes"].as_u64().unwrap() >= 64 << 20, "{error:?}");
    assert!(body.message.contains("16 MiB") && body.hint.unwrap().contains("zstd -19"), "{error:?}");
    let stored = [packed(&content, ImageFormat::RawXz, &["-0"]), large].concat();
    assert_refused(copied(stored, ImageFormat::RawXz, 4 * MIB), ErrorCode::ImageRefused, "16 MiB");
}

/// The index of an xz stream with another size of the disk in it, and the right check of the index.
#[test]
fn an_index_that_lies() {
    let content = disk(MIB + 5, 50);
    for (change, words) in
        [(1_i8, "promises a disk of 1048582 bytes, and it has 1048581"), (-1, "has at least 1048581")]
    {
        let mut stored = packed(&content, ImageFormat::RawXz, &["-0"]);
        let footer = stored.len() - 12;
        let backward = u32::from_le_bytes(stored[footer + 4..footer + 8].try_into().unwrap());
        let index = footer - (backward as usize + 1) * 4;
        // The size is the last number before the padding: 0x85, 0x80, 0x40 for 2^20 + 5.
        let at = index + stored[index..footer].windows(3).position(|bytes| bytes == [0x85, 0x80, 0x40]).unwrap();
        stored[at] = stored[at].wrapping_add_signed(change);
        let mut check = flate2::Crc::new();
        check.update(&stored[index..footer - 4]);
        stored[footer - 4..footer].copy_from_slice(&check.sum().to_le_bytes());
        assert_refused(copied(stored, ImageFormat::RawXz, 2 * MIB), ErrorCode::ImageInvalid, words);
    }
}

/// What happens when the image is read at or behind a place.
enum Fault {
    Stops(Progress),
    Fails,
    Panics,
}

struct Faulty(Memory, u64, Fault);

impl Bytes for Faulty {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if offset >= self.1 {
            match &self.2 {
                Fault::Stops(progress) => progress.stop(Stop::Cancel),
                Fault::Fails => return Err(Error::new(ErrorCode::InputOutput, "the disk has a bad sector")),
                Fault::Panics => panic!("as the test wants it"),
            }
        }
        self.0.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        self.0.name()
    }
}

/// Copies an image of 24 MiB that fails in its middle; gives the error, and how many bytes were written.
fn failed_copy(stored: &[u8], format: ImageFormat, fault: Fault, progress: &Progress) -> (Error, u64) {
    // The gate reads the end, and is not to fail.
    let image = opened(stored.to_vec(), format);
    let middle = stored.len() as u64 / 2;
    let image = Image { bytes: Arc::new(Faulty(Memory(stored.to_vec()), middle, fault)), ..image };
    let (_directory, path) = room("target.raw");
    sparse_file(&path, 32 * MIB);
    let target = BlockTarget { path: path.clone(), offset: 0, size: 32 * MIB, reads_zero: true };
    let error = populate(&image, &target, &OPTIONS, progress).unwrap_err();
    (error, fs::read(&path).unwrap().iter().filter(|byte| **byte != 0).count() as u64)
}

#[test]
fn what_happens_in_the_middle_ends_the_copy_there() {
    let content: Vec<u8> = disk(24 * MIB, 100).iter().map(|byte| byte | 1).collect();
    for format in FORMATS {
        let stored = packed(&content, format, &["-1"]);
        let progress = Progress::default();
        let (error, written) = failed_copy(&stored, format, Fault::Stops(progress.clone()), &progress);
        assert_eq!(error.code(), ErrorCode::Cancelled, "{error:?}");
        assert!(written < 16 * MIB, "{format}: {written}");
        let (error, written) = failed_copy(&stored, format, Fault::Fails, &Progress::default());
        assert_eq!((error.code(), error.to_string().as_str()), (ErrorCode::InputOutput, "the disk has a bad sector"));
        assert!(written < 16 * MIB, "{format}: {written}");
        let (error, _) = failed_copy(&stored, format, Fault::Panics, &Progress::default());
        assert_eq!(error.code(), ErrorCode::Internal, "{error:?}");
    }
}

/// A bomb needs no further read, so what is stopped is decoding.
#[test]
fn a_cancel_stops_a_bomb() {
    for format in FORMATS {
        let image = opened(packed(&vec![0; 64 << 20], format, &["-1"]).repeat(160), format);
        let (_directory, path) = room("target.raw");
        sparse_file(&path, 12 << 30);
        let target = BlockTarget { path, offset: 0, size: 12 << 30, reads_zero: false };
        let progress = Progress::default();
        let (error, late) = thread::scope(|scope| {
            let copying = scope.spawn(|| populate(&image, &target, &OPTIONS, &progress).unwrap_err());
            while progress.snapshot().bytes_processed == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            progress.stop(Stop::Cancel);
            let stopped = Instant::now();
            (copying.join().unwrap(), stopped.elapsed())
        });
        assert_eq!(error.code(), ErrorCode::Cancelled, "{format}");
        assert!(late < Duration::from_secs(1), "{format}: {late:?}");
        assert!(progress.snapshot().bytes_processed < 6 << 30, "{format}");
    }
}
