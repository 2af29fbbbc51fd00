//! Images with bytes changed at random, from a fixed seed: each is refused, or read without a panic, a hang or a read
//! outside the file; and where `qemu-img` reads it too, the bytes are the same.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use e2e::images::{self, Qcow2Options};
use lvp_api::{ErrorCode, ImageFormat};

use super::{Memory, OLD, OPTIONS, room, used_file};
use crate::{
    error::Result,
    format::{Content, Decoder, Image, populate},
    host::block::BlockTarget,
    progress::Progress,
};

const SIZE: u64 = 4 << 20;
/// For one image: opening it, and copying 4 MiB.
const LIMIT: Duration = Duration::from_secs(4);

fn kinds() -> [Qcow2Options; 5] {
    let base = Qcow2Options::default();
    [
        Qcow2Options { version: Some(2), cluster_size: Some(4096), compression: Some("zlib"), ..base.clone() },
        Qcow2Options { compression: Some("zstd"), ..base.clone() },
        Qcow2Options { extended_l2: true, ..base.clone() },
        Qcow2Options { cluster_size: Some(512), ..base.clone() },
        Qcow2Options { extended_l2: true, compression: Some("zlib"), cluster_size: Some(16 << 10), ..base },
    ]
}

fn original(directory: &Path, options: &Qcow2Options) -> Vec<u8> {
    let (raw, image) = (directory.join("source.raw"), directory.join("image.qcow2"));
    images::raw_with_data(&raw, SIZE, 50, 21).unwrap();
    images::qcow2_from(&raw, &image, options).unwrap();
    images::qemu_io(&image, &["write -P 7 1M 3k", "write -z 2M 300k"]).unwrap();
    fs::read(image).unwrap()
}

/// Ranges of the file that hold the header and tables: what hostility would change first.
fn metadata(bytes: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let cluster = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    let l1 = number(40) as usize;
    let mut ranges = vec![(0, 120), (0, 120), (l1, entries * 8), (number(48) as usize, 64)];
    for index in 0..entries {
        let l2 = (number(l1 + index * 8) & 0x00ff_ffff_ffff_fe00) as usize;
        if l2 != 0 {
            // Only the used part of a table of few entries.
            ranges.push((l2, cluster.min(2048)));
        }
    }
    ranges
}

fn mutate(bytes: &mut [u8], ranges: &[(usize, usize)], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..=3) {
        let (start, length) = ranges[random.usize(0..ranges.len())];
        let at = start + random.usize(0..length);
        let value = match random.u8(0..4) {
            0 => bytes[at] ^ (1 << random.u8(0..8)),
            1 => 0,
            2 => 0xff,
            _ => random.u8(..),
        };
        bytes[at] = value;
    }
}

/// Changes tables, and holds what is accepted against qemu-img.
fn against_qemu(options: &Qcow2Options, rounds: usize, seed: u64) -> (usize, usize, usize) {
    let directory = tempfile::tempdir().unwrap();
    let original = original(directory.path(), options);
    let ranges = metadata(&original);
    let mut random = fastrand::Rng::with_seed(seed);
    let (path, target) = (directory.path().join("mutant.qcow2"), directory.path().join("target.raw"));
    let (mut refused, mut same, mut qemu_refused) = (0, 0, 0);
    for round in 0..rounds {
        let mut mutant = original.clone();
        mutate(&mut mutant, &ranges, &mut random);
        fs::write(&path, &mutant).unwrap();
        used_file(&target, SIZE);
        let begun = Instant::now();
        let copied = copy(&path, &target);
        assert!(begun.elapsed() < LIMIT, "round {round} took {:?}", begun.elapsed());
        let Ok(virtual_size) = copied else {
            refused += 1;
            continue;
        };
        let raw = directory.path().join("expected.raw");
        if images::raw_from(&path, "qcow2", &raw).is_err() {
            qemu_refused += 1;
            continue;
        }
        let expected = fs::read(&raw).unwrap();
        let ours = fs::read(&target).unwrap();
        // Qemu cuts a disk down to whole sectors.
        assert_eq!(expected.len() as u64, virtual_size / 512 * 512, "round {round} of {options:?}");
        assert!(ours[..expected.len()] == expected, "round {round} of {options:?} differs from qemu-img");
        assert!(ours[virtual_size as usize..].iter().all(|byte| *byte == 0), "round {round}: old data in the tail");
        same += 1;
    }
    (refused, same, qemu_refused)
}

fn copy(path: &Path, target: &Path) -> Result<u64> {
    let image = Image::open_file(path, ImageFormat::Qcow2).inspect_err(|error| {
        assert!(
            matches!(error.code(), ErrorCode::ImageInvalid | ErrorCode::ImageRefused | ErrorCode::ImageTypeMismatch),
            "{error:?}"
        );
    })?;
    let target = BlockTarget { path: target.to_owned(), offset: 0, size: SIZE, reads_zero: false };
    populate(&image, &target, &OPTIONS, &Progress::default()).inspect_err(|error| {
        assert!(matches!(error.code(), ErrorCode::ImageInvalid | ErrorCode::ImageTooLarge), "{error:?}");
    })?;
    Ok(image.least_size())
}

#[test]
fn mutated_tables_are_refused_or_read_as_qemu_does() {
    let (mut refused, mut same) = (0, 0);
    for (seed, options) in kinds().iter().enumerate() {
        let outcome = against_qemu(options, 80, seed as u64);
        println!("refused {}, same {}, refused by qemu-img only {}: {options:?}", outcome.0, outcome.1, outcome.2);
        refused += outcome.0;
        same += outcome.1;
    }
    // Both happen, or the changes are not where they matter.
    assert!(refused > 50 && same > 50, "refused {refused}, same {same}");
}

/// Many more changes, anywhere in the file, read in memory: a read outside of it would panic.
#[test]
fn mutated_images_never_panic() {
    for (seed, options) in kinds().iter().enumerate() {
        let (directory, _) = room("unused");
        let original = original(directory.path(), options);
        let mut ranges = metadata(&original);
        ranges.push((0, original.len()));
        ranges.push((0, original.len()));
        let mut random = fastrand::Rng::with_seed(100 + seed as u64);
        for round in 0..250 {
            let mut mutant = original.clone();
            mutate(&mut mutant, &ranges, &mut random);
            if random.u8(0..10) == 0 {
                mutant.truncate(random.usize(0..original.len()));
            }
            let begun = Instant::now();
            read_all(mutant);
            assert!(begun.elapsed() < LIMIT, "round {round} took {:?}", begun.elapsed());
        }
    }
}

/// Reads what the gate lets through; a disk that grew by mutation only at its begin.
fn read_all(bytes: Vec<u8>) {
    let Ok(image) = Image::open(Arc::new(Memory(bytes)), ImageFormat::Qcow2) else { return };
    let mut decoder = Decoder::new().unwrap();
    let mut buffer = vec![OLD; 2 << 20];
    let mut at = 0;
    for extent in image.extents() {
        let Ok(mut extent) = extent else { return };
        assert_eq!(extent.guest, at, "extents have no gaps");
        at += extent.length;
        if !matches!(extent.content, Content::Compressed { .. }) {
            extent.length = extent.length.min(1 << 20);
        }
        if extent.guest < 2 * SIZE && image.read(&extent, &mut decoder, &mut buffer).is_err() {
            return;
        }
    }
    assert_eq!(Some(at), image.virtual_size());
}
