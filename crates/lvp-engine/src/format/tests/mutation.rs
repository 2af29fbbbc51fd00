//! Images with bytes changed at random, from a fixed seed: each is refused, or read without a panic, a hang or a read
//! outside the file; and what is read is what `qemu-img` reads.

use std::{
    env, fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use e2e::images::{self, Qcow2Options};
use lvp_api::{ErrorCode, ImageFormat};

use super::{Memory, OLD, OPTIONS, memory, populate, room, used_file};
use crate::{
    error::Result,
    format::{Content, Decoder, Image},
    host::block::BlockTarget,
    progress::Progress,
};

const SIZE: u64 = 4 << 20;
/// How many changed images of each kind are held against qemu-img, where it is not the usual number.
const ROUNDS: &str = "LVP_MUTATIONS";
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

/// An image with everything in it that lvp passes over, too: a snapshot, and a bitmap where there can be one.
fn original(directory: &Path, options: &Qcow2Options) -> Vec<u8> {
    let (raw, image) = (directory.join("source.raw"), directory.join("image.qcow2"));
    images::raw_with_data(&raw, SIZE, 50, 21).unwrap();
    images::qcow2_from(&raw, &image, options).unwrap();
    let path = image.to_str().unwrap();
    images::run("qemu-img", &["snapshot", "-c", "before", path]).unwrap();
    if options.version != Some(2) {
        images::run("qemu-img", &["bitmap", "--add", path, "changed"]).unwrap();
    }
    images::qemu_io(&image, &["write -P 7 1M 3k", "write -z 2M 300k"]).unwrap();
    fs::read(image).unwrap()
}

/// Ranges of the file that hold the header and tables: what hostility would change first.
fn metadata(bytes: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let cluster = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    let l1 = number(40) as usize;
    let snapshots = number(64) as usize;
    let mut ranges =
        vec![(0, 120), (0, 120), (104, 408), (l1, entries * 8), (number(48) as usize, 64), (snapshots, 72)];
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

/// What came of the changed images of one kind.
#[derive(Debug, Default)]
struct Outcome {
    refused: usize,
    same: usize,
    /// Of these, how many `qemu-img` read only without what lvp passes over.
    passed_over: usize,
}

/// Changes tables, and holds what is accepted against qemu-img.
fn against_qemu(options: &Qcow2Options, rounds: usize, seed: u64) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let original = original(directory.path(), options);
    let mut ranges = metadata(&original);
    ranges.push((0, original.len()));
    let mut random = fastrand::Rng::with_seed(seed);
    let (path, target) = (directory.path().join("mutant.qcow2"), directory.path().join("target.raw"));
    let mut outcome = Outcome::default();
    for round in 0..rounds {
        let mut mutant = original.clone();
        mutate(&mut mutant, &ranges, &mut random);
        fs::write(&path, &mutant).unwrap();
        used_file(&target, SIZE);
        let begun = Instant::now();
        let copied = copy(&path, &target);
        assert!(begun.elapsed() < LIMIT, "round {round} took {:?}", begun.elapsed());
        let Ok(virtual_size) = copied else {
            outcome.refused += 1;
            continue;
        };
        let raw = directory.path().join("expected.raw");
        if let Err(error) = images::raw_from(&path, "qcow2", &raw) {
            assert!(PASSED_OVER.iter().any(|words| error.to_string().contains(words)), "round {round}: {error}");
            outcome.passed_over += 1;
            pass_over(&mut mutant, &original);
            fs::write(&path, &mutant).unwrap();
            images::raw_from(&path, "qcow2", &raw).unwrap();
        }
        let expected = fs::read(&raw).unwrap();
        let ours = fs::read(&target).unwrap();
        // Qemu cuts a disk down to whole sectors.
        assert_eq!(expected.len() as u64, virtual_size / 512 * 512, "round {round} of {options:?}");
        assert!(ours[..expected.len()] == expected, "round {round} of {options:?} differs from qemu-img");
        assert!(ours[virtual_size as usize..].iter().all(|byte| *byte == 0), "round {round}: old data in the tail");
        outcome.same += 1;
    }
    outcome
}

/// `qemu-img` refuses an image for damage in these too, of which the disk has no byte, and which lvp does not read.
const PASSED_OVER: [&str; 3] = ["snapshot table", "bitmaps_ext", "Bitmap"];

/// Leaves the snapshots out of a changed image, and gives it the bitmaps of the original.
fn pass_over(mutant: &mut [u8], original: &[u8]) {
    mutant[60..72].fill(0);
    if mutant[7] == 3 {
        mutant[104..512].copy_from_slice(&original[104..512]);
        mutant[88..96].fill(0);
    }
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
    let rounds = env::var(ROUNDS).map_or(80, |rounds| rounds.parse().unwrap());
    let (mut refused, mut same) = (0, 0);
    for (seed, options) in kinds().iter().enumerate() {
        // More rounds are not the same ones first, but others.
        let outcome = against_qemu(options, rounds, (seed + 10 * rounds) as u64);
        println!("{outcome:?} of {rounds}: {options:?}");
        refused += outcome.refused;
        same += outcome.same;
    }
    // Both happen, or the changes are not where they matter.
    assert!(refused > 50 && same > 50, "refused {refused}, same {same}");
}

/// Many more changes, anywhere in the file, read in memory: a read outside of it would panic. In a process of its own,
/// whose memory is measured.
#[test]
fn mutated_images_never_panic_and_take_no_more_memory() {
    let name = "format::tests::mutation::mutated_images_never_panic_and_take_no_more_memory";
    let (directory, _) = room("unused");
    let Some(directory) = memory::in_a_process_of_its_own(name, directory.path(), "mutated images") else { return };
    for (seed, options) in kinds().iter().enumerate() {
        let original = original(&directory, options);
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
    memory::say_peak();
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
